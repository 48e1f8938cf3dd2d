"""Votes of the LLM judge between the models' answers: votes.parquet.

`evaluate` votes on the models of one run folder (`evaluate.vote`). The stage `vote` does the same between evaluations
of different run folders, such as the cells of a study: it takes each over under the name `evaluate_<model>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from tppo.config import Recipe
from tppo.errors import UserError
from tppo.evaluate.compare import DISPLAY, MODEL_ORDER, model_pairs
from tppo.evaluate.generations import read_generations
from tppo.judge.llm import LLMJudge
from tppo.judge.vote import Contest, vote
from tppo.run import EVALUATION, RunFolder, taken_models
from tppo.tables import Example, field, load_examples, write_table

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
    answers = {model: model_answers(run.require(EVALUATION + model), model) for model in models}
    examples = answered_examples(run, answers)
    votes = vote_rows(recipe, examples, [row for rows in answers.values() for row in rows])
    write_table(folder / "votes.parquet", votes, VOTES)
    return {
        "votes": len(votes),
        "abstained": sum(row["winner"] is None for row in votes),
        "flipped": sum(row["flipped"] is True for row in votes),
    }


def model_answers(folder: Path, model: str) -> list[dict[str, Any]]:
    """The rows of one model in a finished evaluation.

    Raises:
        UserError: there are none.
    """
    rows = [row for row in read_generations(folder) if row["model"] == model]
    if not rows:
        raise UserError(f"{folder} holds no answer of {model}: stage_dirs has to name an evaluation of it")
    return rows


def answered_examples(run: RunFolder, answers: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[Example]]:
    """The examples that every model answered, by split.

    Raises:
        UserError: some model answered others, or the run's prepare stage does not know them.
    """
    ids = [row["example_id"] for row in next(iter(answers.values()))]
    for model, rows in answers.items():
        if {row["example_id"] for row in rows} != set(ids):
            folders = ", ".join(str(run.path(EVALUATION + name)) for name in answers)
            raise UserError(f"{folders}: {model} answered other examples than the first; name equal evaluations")
    known = {example.example_id: example for example in load_examples(run.require("prepare"))}
    if missing := [name for name in ids if name not in known]:
        raise UserError(f"{run.path('prepare')} has no example {missing[0]}, which was answered: name its own prepare")
    by_split: dict[str, list[Example]] = {}
    for name in ids:
        by_split.setdefault(known[name].split, []).append(known[name])
    return by_split


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
            own = {"split": split, "model": a, "than": b, "judge": judge.name, "rubric": rubric}
            rows += [
                {"example_id": e.example_id, **own, **asdict(found)} for e, found in zip(chosen, votes, strict=True)
            ]
    return rows


def _readable(row: dict[str, Any]) -> str | None:
    return row["response"] if row["problem"] is None else None
