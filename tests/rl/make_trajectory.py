"""Writes trajectory.json, the numbers of a few updates that test_trajectory.py compares with: see there.

    python -m tests.rl.make_trajectory

A two-layer model over twenty letters, one seed, float32. A letter's class probabilities are made up from its id, so
that rewards, Eq. 4-5, KL, GAE, both losses and the optimiser all have their share in the numbers.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.letters import PROMPTS, WORDS, letter_tokenizer
from tppo.core.config import RL, Scratch, Task
from tppo.core.tables import Example
from tppo.core.text import Event
from tppo.rl.reward_function import Sample
from tppo.rl.rewards import RewardScale
from tppo.rl.stage import QueryReward, Relevance
from tppo.rl.trainer import TokenPPOTrainer
from tppo.tune.scratch import llama_config, make_policy

FILE = Path(__file__).with_name("trajectory.json")
UPDATES = 3
COLUMNS = ("reward_mean", "kl", "loss", "policy_loss", "value_loss", "grad_norm", "approx_kl", "entropy")
CASES: dict[str, dict[str, Any]] = {
    f"{algorithm}, {tuning}": {"algorithm": algorithm, "tuning": tuning, "value_function": value_function}
    for algorithm in ("tppo", "ppo")
    for tuning, value_function in (("full", "probe"), ("lora", "shared"))
}
SETTINGS: dict[str, Any] = {
    "batch_size": 16,
    "minibatch_size": 8,
    "micro_batch_size": 4,
    "ppo_epochs": 2,
    "learning_rate": 3e-3,
    "value_learning_rate": 1e-2,
    "lora_r": 4,
    "precision": "fp32",
}
TASK = Task(num_queries=1, max_response_tokens=8)


def trajectory(settings: dict[str, Any]) -> list[dict[str, float]]:
    """The columns of every update with these settings, to six decimals."""
    sizes = Scratch(hidden_size=32, intermediate_size=48, layers=2, heads=4)
    lm = make_policy(llama_config(sizes, len(WORDS), positions=16, initializer_range=0.1), seed=0)
    config = RL(**SETTINGS | settings)
    example = Example("e", "u", "train", [Event("search", "a b")], ["c"], datetime(2020, 1, 1))
    reward = QueryReward(made_up_relevance, [example] * len(PROMPTS), config, TASK, RewardScale(2.0, 0.4, 0.3))
    limit = TASK.max_response_tokens
    trainer = TokenPPOTrainer(
        lm, reward, PROMPTS, config, tokenizer=letter_tokenizer(), max_response_tokens=limit, seed=0
    )
    rows = [trainer.step().metrics for _ in range(UPDATES)]
    return [{name: round(row[name], 6) for name in COLUMNS} for row in rows]


def made_up_relevance(examples: list[Example], samples: list[Sample]) -> Relevance:
    """Class probabilities that differ from letter to letter; a response is as relevant as its letters on average."""
    relevant = [np.array([token * 7 % 20 / 20 for token in sample.response_ids], np.float32) for sample in samples]
    inked = [np.array([0.9 if token else 0.0 for token in sample.response_ids], np.float32) for sample in samples]
    class_probs = [
        np.stack([1 - ink_T, ink_T * (1 - good_T), ink_T * good_T], axis=1)
        for good_T, ink_T in zip(relevant, inked, strict=True)
    ]
    return Relevance(class_probs, [float(good_T.mean()) for good_T in relevant])


def main() -> None:
    rows = {name: trajectory(settings) for name, settings in CASES.items()}
    FILE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
