"""Votes of the LLM judge between the models' answers: votes.parquet.

`evaluate` votes on the models of one run folder (`evaluate.vote`). The stage `vote` does the same between evaluations
of different run folders, such as the cells of a study: it takes each over under the name `evaluate_<model>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from tppo.config import Recipe
from tppo.errors import UserError
from tppo.evaluate.compare import MODEL_ORDER, model_pairs, voted_pairs
from tppo.evaluate.examples import Answered, answered_examples, read_answers
from tppo.judge.llm import LLMJudge
from tppo.judge.vote import Contest, vote
from tppo.run import EVALUATION, RunFolder, taken_models
from tppo.tables import Example, field, write_table

VOTES = pa.schema(
    [
        field("example_id", pa.string(), "example answered"),
        field("split", pa.string(), "eval1 or eval2"),
        field("model", pa.string(), "the model that is a"),
        field("than", pa.string(), "the model that is b"),
        field("judge", pa.string(), "judge and version"),
        field("rubric", pa.string(), "targets or history: what relevance is judged against"),
        field("winner", pa.string(), "a, b or tie; null when the judge abstained", True),
        field("flipped", pa.bool_(), "the two orders disagreed; null when not asked or abstained", True),
        field(
            "preference",
            pa.float64(),
            "probability that a is better, half that of a tie added; null unless judge.score is probability, and when "
            "not asked or abstained",
            True,
        ),
    ]
)


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """The stage `vote`: writes votes.parquet.

    Raises:
        UserError: not two models to compare, an evaluation that is not finished or lacks its model, or evaluations of
            different examples.
    """
    models = taken_models(recipe)
    if not model_pairs(models):
        raise UserError(
            f"vote compares two of {list(MODEL_ORDER)}, but stage_dirs names the evaluations of {models}: give "
            f"`{EVALUATION}<model>: folder` for each, and `prepare`"
        )
    answers = read_answers(run, models)
    examples = answered_examples(recipe, run, answers, recipe.evaluate.vote_examples)
    votes = vote_rows(recipe, examples, answers)
    write_table(folder / "votes.parquet", votes, VOTES)
    return {
        "votes": len(votes),
        "examples": len(examples),
        "abstained": sum(row["winner"] is None for row in votes),
        "flipped": sum(row["flipped"] is True for row in votes),
    }


def vote_rows(recipe: Recipe, examples: Sequence[Example], answers: Answered) -> list[dict[str, Any]]:
    """The LLM judge's votes on these examples, under the headline's rubric: rows of votes.parquet."""
    judge = LLMJudge(recipe.judge)
    rubric = recipe.reward.rubric
    own = {"judge": judge.name, "rubric": rubric}
    asked = [
        (example, a, b)
        for a, b in voted_pairs(answers)
        for example in examples
        if all(example.example_id in answers[model] for model in (a, b))
    ]
    contests = [
        Contest(e.history, e.targets, *(_readable(answers[model][e.example_id]) for model in pair))
        for e, *pair in asked
    ]
    votes = vote(judge, contests, rubric, "votes")
    return [
        {"example_id": e.example_id, "split": e.split, "model": a, "than": b, **own, **asdict(found)}
        for (e, a, b), found in zip(asked, votes, strict=True)
    ]


def _readable(row: Mapping[str, Any]) -> str | None:
    return row["response"] if row["problem"] is None else None
