"""Votes of the LLM judge between the models' answers: votes.parquet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from tppo.config import Recipe
from tppo.evaluate.compare import DISPLAY, model_pairs
from tppo.judge.llm import LLMJudge
from tppo.judge.vote import Contest, vote
from tppo.tables import Example, field

VOTES = pa.schema(
    [
        field("example_id", pa.string(), "example answered"),
        field("split", pa.string(), "eval1 or eval2"),
        field("model", pa.string(), "the model that is a"),
        field("than", pa.string(), "the model that is b"),
        field("rubric", pa.string(), "targets or history: what relevance is judged against"),
        field("winner", pa.string(), "a, b or tie; null when the judge abstained", True),
        field("flipped", pa.bool_(), "the two orders disagreed; null when not asked or abstained", True),
    ]
)


def vote_rows(
    recipe: Recipe, examples: Mapping[str, list[Example]], generations: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The LLM judge's votes between the models' responses, under the headline's rubric: rows of votes.parquet."""
    judge = LLMJudge(recipe.judge)
    rubric = recipe.reward.rubric
    answers = {(row["model"], row["example_id"]): row for row in generations}
    rows = []
    for a, b in model_pairs({row["model"] for row in generations}):
        for split, chosen in examples.items():
            contests = [
                Contest(e.history, e.targets, *(_readable(answers[model, e.example_id]) for model in (a, b)))
                for e in chosen
            ]
            votes = vote(judge, contests, rubric, f"votes on {split}: {DISPLAY[a]} against {DISPLAY[b]}")
            rows += [
                {"example_id": e.example_id, "split": split, "model": a, "than": b, "rubric": rubric, **asdict(found)}
                for e, found in zip(chosen, votes, strict=True)
            ]
    return rows


def _readable(row: dict[str, Any]) -> str | None:
    return row["response"] if row["problem"] is None else None
