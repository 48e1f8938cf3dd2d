"""A run folder whose labels depend on the history: a word is relevant when it is of the history's topic.

Small enough for a tiny encoder to learn in seconds, and unlike a list of good words it cannot be learnt without
reading the history.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from test_reward_train import finish_until_labels

from tppo.config import Recipe
from tppo.judge.record import JudgeItem, Verdict, WordVerdict, split_response, verdict_to_row
from tppo.tables import Example
from tppo.text import Event, render_response

TOPICS = {
    "food": ["pizza", "pasta", "cheese", "oven", "bread", "soup"],
    "cars": ["car", "tyre", "engine", "road", "truck", "brake"],
}


def make_topic_run(root: Path, encoder: Path, rows: int = 320, held_out: int = 60) -> Recipe:
    generator = np.random.default_rng(0)
    examples, labels = [], []
    for i in range(rows + held_out):
        topic = str(generator.choice(list(TOPICS)))
        example = _example(i, "train" if i < rows else "reward_eval", TOPICS[topic], generator)
        share = 0.85 if generator.random() < 0.5 else 0.15
        words = [
            str(generator.choice(TOPICS[topic if generator.random() < share else _other(topic)]))
            for _ in range(generator.integers(4, 8))
        ]
        response = render_response([" ".join(words[:2]), " ".join(words[2:])])
        examples.append(asdict(example))
        for rubric in ("targets", "history"):
            labels.append(verdict_to_row(example, 0, rubric, "rule", response, judge(example, response)))
    recipe = Recipe(run_dir=str(root / "run"))
    recipe.prepare.source = ["log.tsv"]
    recipe.reward.encoder = str(encoder)
    recipe.reward.rubric = "history"
    recipe.reward.max_length = 64
    recipe.reward.learning_rate = 3e-3
    recipe.reward.epochs = 12
    recipe.reward.evals_per_epoch = 1
    recipe.reward.batch_size = 16
    recipe.check_reward.bootstrap_samples = 200
    finish_until_labels(recipe, examples, labels)
    return recipe


def judge(example: Example, response: str) -> Verdict:
    """Words of the topic are relevant; a response is when most of its words are."""
    topic = next(words for words in TOPICS.values() if example.history[0].text.split()[0] in words)
    item = JudgeItem(example.history, example.targets, response)
    words = [WordVerdict(float(w.text in topic), w.text in topic) for w in split_response(item.response).words]
    share = sum(word.relevant for word in words) / len(words)
    return Verdict(words, share, share > 0.5, "ok", None)


def _other(topic: str) -> str:
    return next(name for name in TOPICS if name != topic)


def _example(number: int, split: str, words: list[str], generator: np.random.Generator) -> Example:
    pairs = [" ".join(map(str, generator.choice(words, 2, replace=False))) for _ in range(6)]
    history: list[Any] = [Event("search", pairs[0]), Event("click", pairs[1]), Event("search", pairs[2])]
    return Example(f"e{number}", f"u{number // 2}", split, history, pairs[3:], datetime(2026, 3, 1))
