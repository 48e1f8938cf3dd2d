"""What `ppo` pays: the rival's score or the token model's mean, by real models on real rollout samples."""

from __future__ import annotations

import numpy as np
import pytest

from tppo.core.config import RL, Task
from tppo.generate.engine import Generation
from tppo.reward.metrics import response_relevance
from tppo.reward.models import SentenceRewardModel, TokenRewardModel
from tppo.rl.reward_function import make_sample
from tppo.rl.rewards import RewardScale
from tppo.rl.stage import QueryReward, score_with_models

TEXTS = ["garden shed\nraised bed\ntomato", "visa\ndrum kit\ncheap flights", "rose\nrose\nrose pruning"]
SCALE = RewardScale(suggested_length=10.0, relevant_word_share=0.3, relevant_response_share=0.2)


@pytest.mark.parametrize("sentence_reward", ["rival", "token_mean"])
def test_ppo_pays_the_chosen_score_at_the_last_token(tiny_encoder, tiny_tokenizer, example_factory, sentence_reward):
    token, rival = TokenRewardModel.start(str(tiny_encoder), 64), SentenceRewardModel.start(str(tiny_encoder), 64)
    examples = example_factory(len(TEXTS))
    samples = []
    for i, text in enumerate(TEXTS):
        ids = [*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id]
        samples.append(make_sample(tiny_tokenizer, Generation([5], ids, text, True), i))
    config = RL(algorithm="ppo", sentence_reward=sentence_reward, length_penalty_alpha=0, returns="as_is")
    scores = QueryReward(score_with_models(token, rival), examples, config, Task(), SCALE)(samples)
    histories = [example.history for example in examples]
    if sentence_reward == "rival":
        expected = np.array(rival.score(histories, TEXTS)) - SCALE.relevant_response_share
    else:
        probs = token.score(histories, TEXTS, [sample.spans for sample in samples])
        expected = np.array([response_relevance(row) for row in probs]) - SCALE.relevant_word_share
    np.testing.assert_allclose([row[-1] for row in scores.rewards], expected, atol=1e-5)
    assert all(value == 0 for row in scores.rewards for value in row[:-1])
    assert scores.metrics["sentence_reward_mean"] == pytest.approx(np.mean(rival.score(histories, TEXTS)), abs=1e-5), (
        "the curves of all algorithms stay on the rival's scale"
    )
