"""The evaluate stage: every policy answers the same prompts with the same seed; one judge reads all answers.

Simple baselines (`tppo.generate.simple`) answer the same examples and go the same way. Two reference rows show the
scale of the judge: `targets` judges the user's true next queries as if a model had written them, `other_user` judges
those of another user of the same evaluation set. Writes answers.parquet, readings.parquet and metrics.json.

Each (split, model) is written to parts/ as soon as it is read, and a policy's answers as they come
(`tppo.core.resume`); a restarted stage keeps what it finds (the run folder guarantees the same settings and inputs).
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from tppo.core.common import UserError
from tppo.core.config import Recipe
from tppo.core.files import PARTS, write_json
from tppo.core.models import SCRATCH
from tppo.core.parts import train_examples
from tppo.core.run import RunFolder
from tppo.core.stages import evaluated_models, uses_llm_judge
from tppo.core.tables import Example, read_table, write_table
from tppo.evaluate.answers import ANSWERS, Row, answer_rows, choose_examples, make_answerer, readable_encoder
from tppo.evaluate.compare import build_metrics
from tppo.evaluate.readings import READINGS, judge_readings, text_readings, truth_readings
from tppo.judge.embedding import Encoder
from tppo.judge.label import make_judge, saved_judge
from tppo.judge.llm import LLMJudge
from tppo.judge.verdict import Judge
from tppo.logs.truth import known_truth

_DROPPED = ".dropped.json"


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Answer, read, compare.

    Raises:
        UserError: an evaluation set is empty, or a stage to the left is not finished.
    """
    check_settings(recipe)
    judge, truth = choose_judge(recipe, run), known_truth(run)
    prepare, splits = run.require("prepare"), recipe.evaluate.splits
    examples: dict[str, list[Example]]
    examples = {split: choose_examples(recipe.evaluate, prepare, split, recipe.data_seed) for split in splits}
    encoder = readable_encoder(recipe, [example for chosen in examples.values() for example in chosen])
    num_queries = recipe.task.num_queries

    def read(model: str, chosen: list[Example], answers: list[Row]) -> list[Row]:
        known = {example.example_id: example for example in chosen}
        rows = judge_readings(judge, known, answers, f"judging {model}", num_queries)
        rows += text_readings(known, answers, encoder)
        return rows + (truth_readings(truth, known, answers, num_queries) if truth else [])

    parts = folder / PARTS
    parts.mkdir(exist_ok=True)
    facts = _write_parts(recipe, run, examples, encoder, read, parts)
    order = [(split, model) for split in examples for model in evaluated_models(recipe)]
    tables = {}
    for name, schema in (("answers", ANSWERS), ("readings", READINGS)):
        paths = [path for split, model in order if (path := _part(parts, split, model, name)).exists()]
        tables[name] = pa.concat_tables([read_table(path, schema) for path in paths])
        write_table(folder / f"{name}.parquet", tables[name], schema)
    frames = tables["answers"].to_pandas(), tables["readings"].to_pandas()
    metrics = build_metrics(*frames, judge=judge.name, rubric=recipe.reward.rubric)
    metrics["judge_labelled_training"] = judge.name == run.facts("label")["judge"]
    write_json(folder / "metrics.json", metrics)
    return {
        "examples": {split: len(chosen) for split, chosen in examples.items()},
        "users": {split: len({e.user_id for e in chosen}) for split, chosen in examples.items()},
        "judge": judge.name,
        **facts,
        "headline": [row for row in metrics["rows"] if row["metric"] == metrics["headline"]],
    }


def _write_parts(
    recipe: Recipe,
    run: RunFolder,
    examples: dict[str, list[Example]],
    encoder: Encoder | None,
    read: Callable[[str, list[Example], list[Row]], list[Row]],
    parts: Path,
) -> dict[str, Any]:
    """Write every (split, model) part that is missing; returns facts about all.

    Seconds are given for models that were answered and read as a whole in this attempt.
    """
    seconds: dict[str, dict[str, float]] = {"seconds_answering": {}, "seconds_judging": {}}
    for model in evaluated_models(recipe):
        missing = {split: e for split, e in examples.items() if not _part(parts, split, model, "readings").exists()}
        if not missing:
            continue
        took: dict[str, float] = defaultdict(float)
        start = time.monotonic()
        answerer = make_answerer(model, recipe, run, encoder, parts)
        for split, chosen in missing.items():
            answers = answerer(split, chosen)
            answered = time.monotonic()
            took["seconds_answering"] += answered - start
            if answers is not None:
                rows = answer_rows(answers, chosen, model=model, seed=recipe.seed, num_queries=recipe.task.num_queries)
                write_table(_part(parts, split, model, "answers"), rows, ANSWERS)
                if answers.dropped_events is not None:
                    write_json(parts / f"{split}.{model}{_DROPPED}", answers.dropped_events)
                # Last: a part is whole when its readings are there.
                write_table(_part(parts, split, model, "readings"), read(model, chosen, rows), READINGS)
            start = time.monotonic()
            took["seconds_judging"] += start - answered
        if len(missing) == len(examples):
            for name, value in took.items():
                seconds[name][model] = round(value, 1)
    paths = {f"{split}.{model}": parts / f"{split}.{model}{_DROPPED}" for model in evaluated_models(recipe)
             for split in examples}  # fmt: skip
    dropped = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    return {"history_events_dropped_to_fit_the_prompt": dropped, **seconds}


def _part(parts: Path, split: str, model: str, name: str) -> Path:
    return parts / f"{split}.{model}.{name}.parquet"


def check(recipe: Recipe) -> None:
    """Every check of the stage's settings that needs no data."""
    check_settings(recipe)
    if uses_llm_judge("evaluate", recipe):
        LLMJudge(recipe.judge)


def check_settings(recipe: Recipe) -> None:
    """Settings that cannot work.

    Raises:
        UserError: names the setting and what it has to be.
    """
    settings = recipe.evaluate
    everybody = evaluated_models(replace(recipe, evaluate=replace(settings, models=[])))
    wrong = [
        (not settings.splits, "splits is empty: name eval1, eval2 or both"),
        (
            "reward_eval" in settings.splits and len(settings.splits) > 1,
            f"splits={settings.splits}: reward_eval is no evaluation set, so it stands alone",
        ),
        (settings.temperature < 0, f"temperature={settings.temperature}: give 0 (greedy) or more"),
        (
            "best_of_n" in settings.baselines and settings.best_of < 2,
            f"best_of={settings.best_of}: best_of_n chooses among at least 2",
        ),
        (
            "best_of_n" in settings.baselines and settings.temperature == 0,
            "temperature=0 draws one and the same response, so best_of_n has no choice: raise it or take best_of_n out",
        ),
        (
            len(set(settings.baselines)) < len(settings.baselines),
            f"baselines={settings.baselines} names one twice",
        ),
        (
            not set(settings.models) <= set(everybody),
            f"models={settings.models}: this recipe has {everybody}",
        ),
    ]
    for is_wrong, words in wrong:
        if is_wrong:
            raise UserError(f"evaluate.{words}")
    if recipe.sample.batch_size < 1:
        raise UserError(f"sample.batch_size={recipe.sample.batch_size}: give at least 1")
    if settings.untuned and recipe.sft.model == SCRATCH:
        raise UserError(f"evaluate.untuned asks for answers of random weights (sft.model={SCRATCH}): leave it out")


def choose_judge(recipe: Recipe, run: RunFolder) -> Judge:
    """The judge named by `evaluate.judge`.

    Raises:
        UserError: it does not judge what the reward models learnt, the headline of the report.
    """
    kind, redone = recipe.evaluate.judge, run.redone("evaluate")
    if kind == "label":
        judge = saved_judge(run.require("label"), recipe.judge, redone)
    else:
        train = train_examples(run.require("prepare"), "reward", recipe.parts, recipe.data_seed)
        judge, _ = make_judge(kind, recipe.label, recipe.judge, train, recipe.data_seed, redone)
    if recipe.reward.rubric not in judge.rubrics:
        raise UserError(
            f"the reward models learn rubric '{recipe.reward.rubric}', but judge.rubrics={list(judge.rubrics)} leaves "
            "it out: add it, since it is the headline of the report"
        )
    return judge
