"""The evaluate stage: every policy answers the same prompts with the same seed; one judge reads all answers.

Simple baselines (`tppo.generate.simple`) answer the same examples and go the same way. Two reference rows show
the scale of the judge: `targets` judges the user's true next queries as if a model had written them, `other_user`
judges those of another user of the same evaluation set. A second judge may read the same answers; its verdicts
stand in columns `second_...`.

Each (split, model) part is written to parts/ as soon as it is judged; a restarted stage keeps the parts it
finds (the run folder guarantees the same settings and inputs).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tppo.core.common import UserError
from tppo.core.config import Recipe
from tppo.core.files import write_json
from tppo.core.models import SCRATCH
from tppo.core.run import RunFolder
from tppo.core.stages import REFERENCES, evaluated_baselines
from tppo.core.tables import Example, load_examples, read_table, write_table
from tppo.core.text import parse_response
from tppo.evaluate.answers import Answers, asked_about, by_model, choose_examples, embed_texts, make_answerer
from tppo.evaluate.compare import build_metrics
from tppo.evaluate.metrics import (
    GENERATIONS,
    KNOWN_COLUMNS,
    RUBRICS,
    form_metrics,
    similarity_metrics,
    truth_metrics,
    verdict_columns,
)
from tppo.evaluate.votes import VOTES, vote_rows
from tppo.judge.embedding import Encoder
from tppo.judge.label import make_judge, saved_judge
from tppo.judge.verdict import Judge, JudgeItem, Verdict
from tppo.logs.truth import Truth, known_truth

NOT_MEASURED = {"similarity_written": None, "similarity_true": None}
NOT_KNOWN = dict.fromkeys(KNOWN_COLUMNS)


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Generate, judge, measure; writes generations.parquet and metrics.json.

    Raises:
        UserError: an evaluation set is empty, or a stage to the left is not finished.
    """
    check_settings(recipe)
    judge = choose_judge(recipe, run)
    second = choose_second_judge(recipe, run, {judge.name})
    encoder, truth = Encoder(recipe.evaluate.encoder, setting="evaluate.encoder"), known_truth(run)
    examples: dict[str, list[Example]] = {s: choose_examples(recipe, run, s) for s in recipe.evaluate.splits}
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    asked = {e.example_id for e in asked_about(recipe, examples, recipe.evaluate.second_judge_examples)}
    readers = {
        split: Readers(judge, second, [e.example_id in asked for e in chosen], encoder, truth)
        for split, chosen in examples.items()
    }
    facts = _write_parts(recipe, run, examples, readers, parts)
    models = evaluated_models(recipe)
    order = [(split, model) for split in examples for model in models]
    tables = [read_table(path, GENERATIONS) for s, m in order if (path := _part(parts, s, m)).exists()]
    generations = pa.concat_tables(tables)
    write_table(folder / "generations.parquet", generations, GENERATIONS)
    votes = None
    if recipe.evaluate.vote:
        votes = vote_rows(
            recipe, asked_about(recipe, examples, recipe.evaluate.vote_examples), by_model(generations.to_pylist())
        )
        write_table(folder / "votes.parquet", votes, VOTES)
    metrics = build_metrics(generations.to_pylist(), recipe, votes)
    metrics["judge"] = judge.name
    metrics["judge_labelled_training"] = judge.name == run.facts("label")["judge"]
    metrics["second_judge"] = second.name if second else None
    write_json(folder / "metrics.json", metrics)
    shutil.rmtree(parts)
    return {
        "examples": {split: len(chosen) for split, chosen in examples.items()},
        "users": {split: len({e.user_id for e in chosen}) for split, chosen in examples.items()},
        "judge": judge.name,
        "second_judge": second.name if second else None,
        **facts,
        "headline": [row for row in metrics["rows"] if row["metric"] == metrics["headline"]],
    }


def _write_parts(
    recipe: Recipe, run: RunFolder, examples: dict[str, list[Example]], readers: dict[str, Readers], parts: Path
) -> dict[str, Any]:
    """Write every (split, model) part that is missing; returns facts about that.

    Seconds are given for models that were answered and judged as a whole in this attempt.
    """
    facts: dict[str, dict[str, Any]] = {
        name: {} for name in ("history_events_dropped_to_fit_the_prompt", "seconds_answering", "seconds_judging")
    }
    for model in evaluated_models(recipe):
        missing = {split: part for split, part in examples.items() if not _part(parts, split, model).exists()}
        if not missing:
            continue
        seconds, dropped = _write_model(recipe, run, model, missing, readers, parts)
        facts["history_events_dropped_to_fit_the_prompt"] |= dropped
        if len(missing) == len(examples):
            for name, value in seconds.items():
                facts[name][model] = round(value, 1)
    return facts


def _write_model(
    recipe: Recipe,
    run: RunFolder,
    model: str,
    examples: dict[str, list[Example]],
    readers: dict[str, Readers],
    parts: Path,
) -> tuple[dict[str, float], dict[str, int]]:
    """Answer, judge and measure; returns the seconds of each, and how many history events did not fit, per split."""
    seconds = {"seconds_answering": 0.0, "seconds_judging": 0.0}
    dropped = {}
    start = time.monotonic()
    answerer = make_answerer(model, recipe, run, next(iter(readers.values())).encoder)
    for split, chosen in examples.items():
        answers = answerer(split, chosen)
        answered = time.monotonic()
        seconds["seconds_answering"] += answered - start
        if answers is not None:
            rows = response_rows(readers[split], chosen, answers, model=model, num_queries=recipe.task.num_queries)
            write_table(_part(parts, split, model), rows, GENERATIONS)
            if answers.dropped_events is not None:
                dropped[f"{split}.{model}"] = answers.dropped_events
        start = time.monotonic()
        seconds["seconds_judging"] += start - answered
    return seconds, dropped


def check_settings(recipe: Recipe) -> None:
    """Settings that cannot work.

    Raises:
        UserError: names the setting and what it has to be.
    """
    settings = recipe.evaluate
    wrong = [
        (not settings.splits, "splits is empty: name eval1, eval2 or both"),
        (settings.bootstrap_samples < 100, f"bootstrap_samples={settings.bootstrap_samples}: give at least 100"),
        (settings.batch_size < 1, f"batch_size={settings.batch_size}: give at least 1"),
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
    ]
    for is_wrong, words in wrong:
        if is_wrong:
            raise UserError(f"evaluate.{words}")
    if settings.untuned and recipe.sft.model == SCRATCH:
        raise UserError(f"evaluate.untuned asks for answers of random weights (sft.model={SCRATCH}): leave it out")


def evaluated_models(recipe: Recipe) -> list[str]:
    """Who answers, in the order of the tables: policies, baselines, references; or the tuned policies only.

    Raises:
        UserError: none is left.
    """
    if recipe.evaluate.tuned_only:
        if not recipe.algorithms:
            raise UserError("evaluate.tuned_only leaves nothing to evaluate: `algorithms` is empty")
        return list(recipe.algorithms)
    untuned = ["untuned"] if recipe.evaluate.untuned else []
    return ["sft", *recipe.algorithms, *untuned, *evaluated_baselines(recipe), *REFERENCES]


def choose_judge(recipe: Recipe, run: RunFolder) -> Judge:
    """The judge named by `evaluate.judge`.

    Raises:
        UserError: it does not judge what the reward models learnt, the headline of the report.
    """
    kind = recipe.evaluate.judge
    if kind == "label":
        judge = saved_judge(run.require("label"), recipe.judge)
    else:
        train = load_examples(run.require("prepare"), "train")
        judge, _ = make_judge(kind, recipe.label, recipe.judge, train, recipe.data_seed)
    if recipe.reward.rubric not in judge.rubrics:
        raise UserError(
            f"the reward models learn rubric '{recipe.reward.rubric}', but judge.rubrics={list(judge.rubrics)} leaves "
            "it out: add it, since it is the headline of the report"
        )
    return judge


def choose_second_judge(recipe: Recipe, run: RunFolder, first: Collection[str]) -> Judge | None:
    """The judge named by `evaluate.second_judge`, if any.

    Args:
        first: names of the first judges.

    Raises:
        UserError: it is a first judge again.
    """
    kind = recipe.evaluate.second_judge
    if kind == "none":
        return None
    train = load_examples(run.require("prepare"), "train")
    second, _ = make_judge(kind, recipe.label, recipe.judge, train, recipe.data_seed)
    if second.name in first:
        raise UserError(
            f"evaluate.second_judge={kind} is {second.name}, the first judge: it would only agree with itself; name "
            "another, or none"
        )
    return second


def _part(parts: Path, split: str, model: str) -> Path:
    return parts / f"{split}.{model}.parquet"


@dataclass(frozen=True)
class Readers:
    """What looks at the answers of a split."""

    judge: Judge
    second: Judge | None = None
    second_asked: Sequence[bool] = ()
    """Of each example; read only with a second judge."""
    encoder: Encoder | None = None
    """Of the embedding similarity, which is null without it."""
    truth: Truth | None = None
    """Of a synthetic log; what it says is null without it."""

    def verdicts(self, items: Sequence[JudgeItem], model: str) -> list[dict[str, Verdict]]:
        """Of each item the verdicts by rubric; the second judge's have the prefix `second_`."""
        found: list[dict[str, Verdict]] = [{} for _ in items]
        indices = list(range(len(items)))
        second = [index for index in indices if self.second_asked[index]] if self.second else []
        for judge, prefix, chosen in ((self.judge, "", indices), (self.second, "second_", second)):
            for rubric in judge.rubrics if judge and chosen else ():
                assert judge is not None
                description = f"{prefix.replace('_', ' ')}judging {model}, rubric {rubric}"
                verdicts = judge.judge([items[index] for index in chosen], rubric, description)
                for index, verdict in zip(chosen, verdicts, strict=True):
                    found[index][prefix + rubric] = verdict
        return found


def response_rows(
    readers: Readers, examples: Sequence[Example], answers: Answers, *, model: str, num_queries: int
) -> list[dict[str, Any]]:
    """Judge and measure one response per example: rows of generations.parquet."""
    items = [JudgeItem(e.history, e.targets, r) for e, r in zip(examples, answers.responses, strict=True)]
    verdicts = readers.verdicts(items, model)
    parsed_responses = [
        parse_response(response, finished, num_queries)
        for response, finished in zip(answers.responses, answers.finished, strict=True)
    ]
    vectors: dict[str, Any] = {}
    if readers.encoder:
        texts = {text for parsed in parsed_responses for text in parsed.queries} | {
            t for e in examples for t in e.targets
        }
        distinct = sorted(texts)
        vectors = dict(zip(distinct, embed_texts(readers.encoder, distinct), strict=True))
    rows = []
    for i, (example, parsed) in enumerate(zip(examples, parsed_responses, strict=True)):
        usable = parsed.problem is None
        row: dict[str, Any] = {
            "example_id": example.example_id,
            "user_id": example.user_id,
            "split": example.split,
            "model": model,
            "response": answers.responses[i],
            "queries": parsed.queries,
            "words": [word.text for word in parsed.words],
            "word_query": [word.query for word in parsed.words],
            "finished": answers.finished[i],
            "problem": parsed.problem,
            "unparseable": float(not usable),
            "response_tokens": answers.tokens[i],
        }
        for prefix in ("", "second_"):
            for rubric in RUBRICS:
                row |= verdict_columns(verdicts[i].get(prefix + rubric), rubric, usable, prefix)
        row |= truth_metrics(parsed.queries, example.targets, usable)
        if readers.encoder:
            written, true = (np.array([vectors[text] for text in part]) for part in (parsed.queries, example.targets))
            row |= similarity_metrics(written, true, usable)
        else:
            row |= NOT_MEASURED
        row |= NOT_KNOWN
        if readers.truth:
            known = readers.truth.shares(example, answers.responses[i], num_queries)
            row |= dict(zip(KNOWN_COLUMNS, known if usable else (0.0, 0.0), strict=True))
        row |= form_metrics(parsed.queries, example.history)
        rows.append(row)
    return rows
