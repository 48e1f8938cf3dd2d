"""A second judge reads the answers of finished evaluations: verdicts.parquet.

`evaluate` may have a second judge beside the first (`evaluate.second_judge`). The stage `rejudge` asks it afterwards,
about evaluations of one or several run folders, such as the cells of a study: it takes each over under the name
`evaluate_<model>`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tppo.core.common import UserError
from tppo.core.config import Recipe
from tppo.core.run import RunFolder
from tppo.core.stages import EVALUATION, taken_models
from tppo.core.tables import Example, write_table
from tppo.evaluate.answers import answered_examples, read_answers
from tppo.evaluate.metrics import RUBRICS, VERDICTS, verdict_columns
from tppo.evaluate.readings import choose_second_judge
from tppo.judge.verdict import JudgeItem, Verdict


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """The stage `rejudge`: writes verdicts.parquet.

    Raises:
        UserError: no second judge, or it is the first; an evaluation that is not finished or lacks its model, or
            evaluations of different examples.
    """
    models = taken_models(recipe)
    if recipe.evaluate.second_judge == "none" or not models:
        raise UserError(
            f"rejudge reads evaluations of {models} with evaluate.second_judge={recipe.evaluate.second_judge}: name a "
            f"judge, and in stage_dirs `{EVALUATION}<model>: folder` for each model, and `prepare`"
        )
    answers = read_answers(run, models)
    examples = answered_examples(recipe, run, answers, recipe.evaluate.second_judge_examples)
    judge = choose_second_judge(recipe, run, _first_judges(run, models))
    assert judge is not None, "there is one: it was checked above"
    read = [
        (example, rows[example.example_id])
        for example in examples
        for rows in answers.values()
        if example.example_id in rows
    ]
    items = [JudgeItem(example.history, example.targets, row["response"]) for example, row in read]
    verdicts = {rubric: judge.judge(items, rubric, f"second judge, rubric {rubric}") for rubric in judge.rubrics}
    rows = [
        _row(example, row, judge.name, {rubric: found[number] for rubric, found in verdicts.items()})
        for number, (example, row) in enumerate(read)
    ]
    write_table(folder / "verdicts.parquet", rows, VERDICTS)
    abstained = Counter(rubric for rubric, found in verdicts.items() for verdict in found if verdict.status != "ok")
    return {"judge": judge.name, "answers": len(rows), "examples": len(examples), "abstained": dict(abstained)}


def _first_judges(run: RunFolder, models: list[str]) -> set[str]:
    """The names of the judges of these evaluations."""
    files = {run.require(EVALUATION + model) / "metrics.json" for model in models}
    return {json.loads(path.read_text(encoding="utf-8"))["judge"] for path in files}


def _row(example: Example, row: Mapping[str, Any], judge: str, verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    found = {"example_id": example.example_id, "split": example.split, "model": row["model"], "judge": judge}
    for rubric in RUBRICS:
        found |= verdict_columns(verdicts.get(rubric), rubric, row["problem"] is None, "second_")
    return found
