"""A run folder with made-up labels that follow a rule, for a tiny encoder to learn in seconds."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import numpy as np

from tppo.core.config import Recipe
from tppo.core.run import RunFolder
from tppo.core.tables import EXAMPLES, LABELS, Example, write_table
from tppo.core.text import Event
from tppo.judge.verdict import Verdict, WordVerdict, split_response, verdict_to_row

GOOD = ["pizza", "pasta", "cheese", "oven"]
BAD = ["car", "tyre", "engine", "road"]


def make_run(root: Path, encoder: Path, rows: int = 160, held_out: int = 40, relevant_share: float = 0.5) -> Recipe:
    """Labels with a rule: food words are relevant; a response is when most of its words are."""
    generator = np.random.default_rng(0)
    examples, labels = [], []
    for i in range(rows + held_out):
        split = "train" if i < rows else "reward_eval"
        good = generator.random() < relevant_share
        chosen = [
            str(generator.choice(GOOD if (generator.random() < 0.85) == good else BAD))
            for _ in range(generator.integers(3, 6))
        ]
        response = " ".join(chosen[:2]) + "\n" + " ".join(chosen[2:])
        words = [WordVerdict(0.0, word.text in GOOD) for word in split_response(response).words]
        relevant = 2 * sum(word.relevant for word in words) > len(words)
        history = [Event("search", f"thing {i}")]
        example = Example(str(i), f"u{i}", split, history, ["a", "b", "c"], datetime(2006, 3, 1))
        examples.append(asdict(example))
        for rubric, label in (("targets", relevant), ("history", not relevant)):
            labels.append(verdict_to_row(example, 0, rubric, "rule", response, Verdict(words, 0.0, label, "ok", None)))
    recipe = Recipe(run_dir=str(root / "run"))
    recipe.reward.encoder = str(encoder)
    recipe.reward.max_length = 64
    recipe.reward.precision = "fp32"
    recipe.reward.learning_rate = 3e-3
    recipe.reward.epochs = 3
    recipe.reward.batch_size = 16
    recipe.prepare.source = ["log.tsv"]
    finish_until_labels(recipe, examples, labels)
    return recipe


def finish_until_labels(recipe: Recipe, examples: list[dict], labels: list[dict]) -> None:
    """The stages that the reward stage builds on, with real manifests."""
    run = RunFolder(recipe)
    with run.stage("prepare") as (folder, _):
        write_table(folder / "examples.parquet", examples, EXAMPLES)
    for name in ("sft", "sample"):
        with run.stage(name):
            pass
    with run.stage("label") as (folder, facts):
        write_table(folder / "labels.parquet", labels, LABELS)
        facts["judge"] = "rule"
