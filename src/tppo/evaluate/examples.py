"""Which examples are evaluated, which of them the LLM judge is asked about, and who answered them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tppo.config import Recipe
from tppo.errors import UserError
from tppo.evaluate.compare import DISPLAY, REFERENCES
from tppo.evaluate.generations import read_generations
from tppo.progress import console
from tppo.run import EVALUATION, RunFolder
from tppo.seeding import draw
from tppo.tables import Example, load_examples

Answered = dict[str, dict[str, dict[str, Any]]]
"""Rows of generations.parquet by model and example."""


def choose_examples(recipe: Recipe, run: RunFolder, split: str) -> list[Example]:
    """`evaluate.max_examples` examples of a split, drawn with the seed, in file order (0: all)."""
    examples = load_examples(run.require("prepare"), split)
    if not examples:
        raise UserError(
            f"{run.path('prepare')}/examples.parquet has no example of split '{split}': raise "
            f"prepare.{split}_share or take the split out of evaluate.splits"
        )
    return draw(examples, recipe.evaluate.max_examples or None, recipe.data_seed, "evaluate", split)


def asked_about(recipe: Recipe, examples: Mapping[str, Sequence[Example]], limit: int) -> list[Example]:
    """Examples that a second judge or a voter is asked about: `limit` of each split, drawn with the seed; 0 means all.

    Args:
        examples: by split.
        limit: `evaluate.second_judge_examples` or `evaluate.vote_examples`; equal limits draw equal examples.
    """
    return [
        example
        for split, found in examples.items()
        for example in draw(found, limit or None, recipe.data_seed, "second judge", split)
    ]


def by_model(rows: Sequence[dict[str, Any]]) -> Answered:
    """Rows of generations.parquet by model and example."""
    answers: Answered = {}
    for row in rows:
        answers.setdefault(row["model"], {})[row["example_id"]] = row
    return answers


def read_answers(run: RunFolder, models: Sequence[str]) -> Answered:
    """The finished evaluations' rows by model and example. A reference that an evaluation could not have (one user
    only) is left out.

    Raises:
        UserError: an evaluation is not finished or does not hold its model, or two models answered different examples.
    """
    folders = {model: run.require(EVALUATION + model) for model in models}
    read = {folder: by_model(read_generations(folder)) for folder in dict.fromkeys(folders.values())}
    answers = {model: read[folder].get(model, {}) for model, folder in folders.items()}
    for model, folder in folders.items():
        if not answers[model]:
            if model not in REFERENCES:
                raise UserError(f"{folder} holds no answer of {model}: stage_dirs has to name an evaluation of it")
            console.print(f"{folder} has no row '{DISPLAY[model]}'", soft_wrap=True)
    answered = {model: rows.keys() for model, rows in answers.items() if rows and model not in REFERENCES}
    for model, ids in answered.items():
        if ids != next(iter(answered.values())):
            named = ", ".join(str(run.path(EVALUATION + name)) for name in answered)
            raise UserError(f"{named}: {model} answered other examples than the first; name equal evaluations")
    return {model: rows for model, rows in answers.items() if rows}


def answered_examples(recipe: Recipe, run: RunFolder, answers: Answered, limit: int) -> list[Example]:
    """Those of the examples answered that a second judge or a voter is asked about (see `asked_about`), by split.

    Raises:
        UserError: the run's prepare stage does not know them.
    """
    ids = list(dict.fromkeys(name for rows in answers.values() for name in rows))
    known = {example.example_id: example for example in load_examples(run.require("prepare"))}
    if missing := [name for name in ids if name not in known]:
        raise UserError(f"{run.path('prepare')} has no example {missing[0]}, which was answered: name its own prepare")
    by_split: dict[str, list[Example]] = {}
    for name in ids:
        by_split.setdefault(known[name].split, []).append(known[name])
    return asked_about(recipe, by_split, limit)
