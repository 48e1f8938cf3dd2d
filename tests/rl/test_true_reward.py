"""The truth that benchmarks/learning.py pays, and how it reads its curves."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pytest
import true_reward

from tppo.core.config import RL, Synthetic, Task
from tppo.core.tables import Example
from tppo.core.text import Event
from tppo.generate.engine import Generation, decode_response
from tppo.logs import synthetic
from tppo.rl.reward_function import make_sample
from tppo.rl.rewards import RewardScale
from tppo.rl.stage import QueryReward


@pytest.fixture
def setting():
    """The truth about user 0, an example of theirs, and two of their queries that are not in its history."""
    truth = true_reward.Truth(Synthetic(users=1), seed=0)
    (user_id,) = truth.users
    rows = [row for row in synthetic.user_rows(0, Synthetic(), 0) if row[2] == "search" and len(row) == 4]
    known = [r[3] for r in rows if all(synthetic.relevant_words(r[3].split(), truth.possible(user_id)))]
    old, *new = dict.fromkeys(known)
    example = Example("e", user_id, "train", [Event("search", old)], new[:2], datetime(2026, 1, 5))
    return truth, example, old, new


def test_only_new_queries_of_the_users_interests_are_relevant(setting):
    truth, example, old, (first, second, *_) = setting
    words, marks = truth.words(example, f"{first}\n{second}")
    assert [word.text for word in words] == [*first.split(), *second.split()]
    assert all(marks)
    assert not any(truth.words(example, old)[1])
    repeated = truth.words(example, f"{first}\n{first}")[1]
    assert repeated == [True] * len(first.split()) + [False] * len(first.split())
    assert truth.words(example, f"{first} zzz")[1] == [True] * len(first.split()) + [False]
    shares = truth.mean_shares([example] * 2, [first, f"{first}\n{old}"])
    assert shares["responses_relevant"] == 0.5
    assert shares["relevant_words"] == len(first.split())
    assert not truth.is_relevant([])
    truth.response_share = 0.5
    assert truth.is_relevant([True, False])
    assert not truth.is_relevant([True, False, False])


def test_every_token_of_a_word_is_paid_for_it(setting, tiny_tokenizer):
    truth, example, _, (first, second, *_) = setting
    eos = tiny_tokenizer.eos_token_id
    samples = []
    for text in (f"{first}\n{second}", "zzz"):
        ids = [*tiny_tokenizer(text)["input_ids"], eos]
        samples.append(make_sample(tiny_tokenizer, Generation([5], ids, decode_response(tiny_tokenizer, ids), True), 0))
    scale = RewardScale(suggested_length=100.0, relevant_word_share=0.25, relevant_response_share=0.5)
    scores = {
        algorithm: QueryReward(truth, [example], RL(algorithm=algorithm), Task(num_queries=2), scale)(samples)
        for algorithm in ("tppo", "ppo_sum", "ppo")
    }
    good, bad = scores["tppo"].rewards
    inked = [bool(samples[0].response[start:end].strip()) for start, end in samples[0].spans]
    assert good == pytest.approx([0.75 if ink else 0.0 for ink in inked], abs=1e-4)
    assert sum(bad) == pytest.approx(-0.25 * (len(bad) - 1) - 1.0)  # one query is missing
    assert scores["ppo_sum"].rewards[0] == pytest.approx([0.0] * (len(good) - 1) + [sum(good)], abs=1e-4)
    assert scores["ppo"].rewards[0][-1] == pytest.approx(0.5 * 100, abs=1e-3)
    assert scores["ppo"].rewards[1][-1] == pytest.approx(-0.5 * 100 - 1.0, abs=1e-3)
    assert scores["tppo"].metrics["sentence_reward_mean"] == 0.5


def test_updates_to_reach_a_score_are_counted_from_one_on_means_of_five():
    curve = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1.0])
    assert true_reward.updates_to_reach(curve, 0.2) == 5
    assert true_reward.updates_to_reach(curve, 1.0) == 9
    assert true_reward.updates_to_reach(curve, 1.1) is None
    rows = [[{"x": value} for value in curve], [{"x": value + 1} for value in curve]]
    assert true_reward.final(rows, "x").tolist() == [1.0, 2.0]
    assert true_reward.step_std(rows, "x") == 0.0
    assert true_reward.mean_std(true_reward.final(rows, "x"), percent=True) == "150.0 ± 50.0"
