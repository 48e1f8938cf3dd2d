"""The label stage: every word and every response judged, under both rubrics.

Writes labels.parquet (one row per response and rubric) and judge.json (the calibrated judge, which the
evaluate stage loads again).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tppo.config import Label, Recipe, Rubric
from tppo.errors import UserError
from tppo.judge.embedding import EmbeddingJudge, other_user_items
from tppo.judge.record import JudgeItem, Verdict, verdict_to_row
from tppo.run import RunFolder
from tppo.seeding import rng
from tppo.tables import LABELS, RESPONSES, Example, load_examples, read_table, write_table
from tppo.text import render_response


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Calibrate the judge on training users, then label the responses of the sample stage."""
    settings = recipe.label
    examples = load_examples(run.require("prepare"))
    by_id = {example.example_id: example for example in examples}
    responses = read_table(run.require("sample") / "responses.parquet", RESPONSES).to_pylist()
    unknown = [row["example_id"] for row in responses if row["example_id"] not in by_id]
    if unknown:
        raise UserError(
            f"responses.parquet has {len(unknown)} responses to examples that examples.parquet lacks (first: "
            f"{unknown[0]}): it was sampled from another prepare stage; give `--redo sample`"
        )
    judge = EmbeddingJudge(
        settings.encoder, {}, repeats_irrelevant=settings.repeats_irrelevant, batch_size=settings.batch_size
    )
    calibration = _draw([e for e in examples if e.split == "train"], settings.calibration_examples, recipe.seed)
    thresholds = judge.calibrate(calibration, settings.null_quantile, recipe.seed, "calibrating the judge")
    items = [
        JudgeItem(by_id[row["example_id"]].history, by_id[row["example_id"]].targets, row["response"])
        for row in responses
    ]
    rows = []
    sampled: dict[str, Any] = {}
    for rubric in get_args(Rubric):
        verdicts = judge.judge(items, rubric, f"labelling, rubric {rubric}")
        sampled[rubric] = relevance_shares(verdicts)
        rows += [
            verdict_to_row(by_id[row["example_id"]], row["sample"], rubric, judge.name, row["response"], verdict)
            for row, verdict in zip(responses, verdicts, strict=True)
        ]
    write_table(folder / "labels.parquet", rows, LABELS)
    judge.save(folder)
    return {
        "judge": judge.name,
        "responses": len(responses),
        "labels": len(rows),
        "thresholds": thresholds,
        "relevant_share": {"sft_responses": sampled, **_scale(judge, examples, settings, recipe.seed)},
    }


def relevance_shares(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Share of words and of responses judged relevant (null when there are none), and the counts."""
    judged = [verdict for verdict in verdicts if verdict.words is not None]
    words = [word.relevant for verdict in judged for word in verdict.words or []]
    return {
        "words": float(np.mean(words)) if words else None,
        "responses": float(np.mean([verdict.sentence_relevant for verdict in judged])) if judged else None,
        "word_count": len(words),
        "response_count": len(judged),
        "empty_count": sum(not verdict.words for verdict in judged),
        "abstained_count": len(verdicts) - len(judged),
    }


def _scale(judge: EmbeddingJudge, examples: list[Example], settings: Label, seed: int) -> dict[str, Any]:
    """Shares relevant among the true next queries and among another user's, on users not calibrated with.

    The `targets` rubric on the true targets is left out: a text is always similar to itself.
    """
    held_out = _draw([e for e in examples if e.split == "reward_eval"], settings.calibration_examples, seed)
    if len({example.user_id for example in held_out}) < 2:
        return {"held_out_users": "fewer than two reward_eval users: no scale measured"}
    true = [JudgeItem(e.history, e.targets, render_response(e.targets)) for e in held_out]
    other = other_user_items(held_out, seed)
    return {
        "true_targets": {"history": relevance_shares(judge.judge(true, "history", "true next queries"))},
        "other_users_targets": {
            rubric: relevance_shares(judge.judge(other, rubric, f"another user's queries, rubric {rubric}"))
            for rubric in get_args(Rubric)
        },
    }


def _draw(examples: list[Example], count: int, seed: int) -> list[Example]:
    """`count` examples (all when there are fewer) drawn with the seed."""
    if len(examples) <= count:
        return examples
    chosen = rng(seed, "label").choice(len(examples), size=count, replace=False)
    return [examples[i] for i in chosen]
