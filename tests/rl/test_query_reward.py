"""The format part of the query reward, and how reward-model scores are padded."""

import time
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from tppo.core.config import RL, Synthetic, Task
from tppo.core.tables import Example
from tppo.core.text import Event, parse_response, render_history
from tppo.generate.engine import Generation
from tppo.logs.truth import Truth
from tppo.reward.models import SentenceRewardModel, TokenRewardModel
from tppo.rl.reward_function import make_sample
from tppo.rl.rewards import RewardScale
from tppo.rl.stage import QueryReward, Relevance, format_reward, pad_class_probs, score_with_models, without_repeats


@pytest.mark.parametrize(
    ("response", "finished", "weight", "reward"),
    [
        ("a\nb\nc", True, 1, 0),
        ("a\nb", True, 2 / 3, -0.5),
        ("a", True, 1 / 3, -1.0),
        ("", True, 0, -3.5),
        ("a\nb\nc", False, 0, -2.0),
        ("one endless query", False, 0, -3.0),
        ("a\nb\nc\nd", True, 0, -2.0),
    ],
)
def test_format_reward(response, finished, weight, reward):
    config = RL(bad_format_reward=-2.0, missing_query_reward=-0.5)
    result = format_reward([parse_response(response, finished, 3)], config, Task(num_queries=3))
    assert result.weight.tolist() == pytest.approx([weight])
    assert result.reward.tolist() == pytest.approx([reward])
    config.format_weight = False
    assert format_reward([parse_response(response, finished, 3)], config, Task()).weight.tolist() == [1.0]


def test_padding_is_class_0_and_lengths_are_checked():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    probs = [np.array([[0.1, 0.2, 0.7], [0.0, 1.0, 0.0]], dtype=np.float32), np.array([[0.5, 0.5, 0.0]], np.float32)]
    padded = pad_class_probs(probs, mask)
    assert padded.shape == (2, 3, 3)
    assert padded[1, 1].tolist() == [1.0, 0.0, 0.0]
    assert padded[0, 0].tolist() == pytest.approx([0.1, 0.2, 0.7])
    with pytest.raises(AssertionError, match="one class distribution"):
        pad_class_probs([probs[0], probs[0]], mask)


@pytest.fixture
def query_reward(tmp_path, tiny_tokenizer):
    """A function: the reward of tiny random models that read `max_length` tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tiny_tokenizer), **sizes)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)

    def make(max_length, examples):
        models = [cls.start(str(tmp_path), max_length) for cls in (TokenRewardModel, SentenceRewardModel)]
        return QueryReward(score_with_models(*models), examples, RL(), Task(), RewardScale(12.0, 0.5, 0.5))

    return make


def test_truncated_histories_and_the_token_models_time_are_reported(query_reward, tiny_tokenizer, example_factory):
    """Every rollout says how many of its histories the reward model could not read whole: not the sum so far."""
    examples = example_factory(2)
    examples[1].history[:] = examples[1].history * 9
    ids = [*tiny_tokenizer("rome hotels")["input_ids"], tiny_tokenizer.eos_token_id]
    samples = [make_sample(tiny_tokenizer, Generation([1], ids, "rome hotels", True), index) for index in (0, 1, 1, 1)]
    lengths = [len(tiny_tokenizer(render_history(example.history))["input_ids"]) for example in examples]
    assert lengths[0] + len(ids) < 150 < lengths[1]
    reward = query_reward(150, examples)
    for _ in range(2):
        start = time.perf_counter()
        metrics = reward(samples).metrics
        assert metrics["histories_truncated"] == 0.75
        assert 0 < metrics["seconds_token_reward"] < time.perf_counter() - start
    assert query_reward(512, examples)(samples).metrics["histories_truncated"] == 0


def test_what_repeats_is_paid_as_irrelevant_whatever_the_models_say(tiny_tokenizer):
    """The first query is a search of the history, the third repeats the second; a click of the history is no search."""
    history = [Event("search", "rome hotels"), Event("click", "visa")]
    example = Example("e", "u", "train", history, ["visa"], datetime(2020, 1, 1))
    text = "Rome  hotels\nvisa\nvisa"
    ids = [*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id]
    sample = make_sample(tiny_tokenizer, Generation([1], ids, text, True), 0)
    probs_T3 = np.tile(np.array([0.1, 0.0, 0.9], np.float32), (len(ids), 1))
    relevance = Relevance([probs_T3], [0.9])
    config = RL(repeats_irrelevant=True, format_weight=False, length_penalty_alpha=0)
    scale = RewardScale(10.0, 0.5, 0.5)
    rewards = {
        on: QueryReward(
            lambda *_: relevance, [example], replace(config, repeats_irrelevant=on), Task(num_queries=3), scale
        )([sample])
        for on in (True, False)
    }
    for (start, end), paid, before in zip(
        sample.spans, rewards[True].rewards[0], rewards[False].rewards[0], strict=True
    ):
        shown = text[start:end].strip()
        is_new = text.index("\nvisa") < end <= text.rindex("\nvisa")
        assert paid == pytest.approx(0.9 * 0.5 if is_new or not shown else -0.9 * 0.5), shown
        assert before == pytest.approx(0.9 * 0.5)
    changed = without_repeats(relevance, [example], [sample], [parse_response(text, True, 3)])
    assert changed.sentence_scores == [pytest.approx(0.9 / 3)]
    np.testing.assert_allclose(changed.class_probs[0].sum(1), 1, atol=1e-6)
    assert relevance.class_probs[0] is probs_T3
    assert not (probs_T3[:, 1]).any(), "the scorer's own numbers are left alone"


def test_the_true_relevance_of_a_rollout_is_said_and_pays_nothing(tiny_tokenizer):
    truth = Truth(Synthetic(users=1), seed=0)
    (user,) = truth.users
    first, second = (" ".join(words) for words in truth.possible(user)[:2])
    example = Example("e", user, "train", [Event("search", first)], [second], datetime(2026, 1, 1))
    samples = []
    for text, finished in ((second, True), (first, True), (second, False)):
        ids = tiny_tokenizer(text)["input_ids"]
        samples.append(make_sample(tiny_tokenizer, Generation([1], ids, text, finished), 0))

    def scorer(examples, samples):
        return Relevance([np.tile(np.array([0, 1, 0], np.float32), (len(s.spans), 1)) for s in samples], [0.0] * 3)

    rewards = [
        QueryReward(scorer, [example], RL(), Task(num_queries=1), RewardScale(10.0, 0.5, 0.5), known)(samples)
        for known in (truth, None)
    ]
    assert rewards[0].rewards == rewards[1].rewards
    assert rewards[0].metrics["known_queries"] == rewards[0].metrics["known_words"] == pytest.approx(1 / 3)
    assert "known_queries" not in rewards[1].metrics
