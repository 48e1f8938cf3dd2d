"""Everything the finished cells measured: results.parquet and curves.parquet, and the numbers of the study's report.

None of them holds text of the log; example and user ids are those of the prepare stage (keyed hashes).

Training curves are compared by pure functions on the curve of one training: one number per update, in order (T). A
rollout is a small sample, so curves are smoothed over `WINDOW` updates before anything is read off them. KL need not
rise steadily: "at KL k" means when the smoothed KL reaches k for the first time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from tppo.core.config import Rubric
from tppo.core.stages import MODEL_ORDER, rl_stage
from tppo.core.tables import field, read_table, write_table
from tppo.evaluate.answers import ANSWERS
from tppo.evaluate.compare import Metrics, build_metrics
from tppo.evaluate.metrics import NO_JUDGE
from tppo.evaluate.readings import READINGS, with_asked
from tppo.report.charts import training_rows
from tppo.report.page import load_metrics
from tppo.study.grid import Job, Plan

RESULTS = pa.schema(
    [
        field("setting", pa.string(), "setting of the study; base is the recipe as it stands"),
        *(column for column in READINGS if column.name != "labels"),
    ]
)
"""One row for each number that a reader gave an answer (a vote: a pair of answers), under each setting and seed."""
CURVES = pa.schema(
    [
        field("setting", pa.string(), "setting of the study"),
        field("model", pa.string(), "algorithm"),
        field("seed", pa.int64(), "seed of the training"),
        field("update", pa.int64(), "update (DPO: step) the measure belongs to, from 1"),
        field("metric", pa.string(), "column of the stage's metrics.jsonl"),
        field("value", pa.float64(), "its value"),
    ]
)
MEASURES = {
    "token_relevance": "relevance by the token reward model",
    "sentence_reward_mean": "relevance by the sentence reward model",
}
"""Measures of a rollout that are the same for every RL algorithm, unlike the reward it is paid."""
WINDOW = 3


@dataclass(frozen=True)
class Collected:
    """What the finished cells hold, and the jobs that read them."""

    answers: pd.DataFrame
    """Rows of answers.parquet with `setting` and `job`, the name of the cell."""
    readings: pd.DataFrame
    """Rows of readings.parquet with `setting` and `job`."""
    curves: pd.DataFrame
    """Rows of curves.parquet."""
    metrics: dict[str, dict[str, Any]]
    """metrics.json of each cell, by name."""
    missing: list[str]
    """Cells, and jobs that read them, that are not finished."""

    def of_setting(self, plan: Plan, setting: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Answers and readings of every job that stands for this setting, also when it was made for another one."""
        jobs = [job.name for (name, *_), job in [*plan.cell_of.items(), *plan.reading_of.items()] if name == setting]
        return self.answers[self.answers["job"].isin(jobs)], self.readings[self.readings["job"].isin(jobs)]

    def curves_of(self, plan: Plan, setting: str) -> pd.DataFrame:
        """Of the trainings of the cells that stand for this setting."""
        made = {(job.setting, job.model) for (name, *_), job in plan.cell_of.items() if name == setting}
        own = [pair in made for pair in zip(self.curves["setting"], self.curves["model"], strict=True)]
        return self.curves[np.array(own, dtype=bool)]

    def means(self, measures: Sequence[str]) -> pd.DataFrame:
        """Mean over the answers of each measure (columns), by job and model; of the first judge where it is one's."""
        judges = pd.Series({name: found["judge"] for name, found in self.metrics.items()}, dtype=object)
        rows = self.readings[self.readings["measure"].isin(measures)]
        rows = rows[rows["reader"].isin(NO_JUDGE) | (rows["reader"] == rows["job"].map(judges))]
        found = rows.pivot_table(index=["job", "model"], columns="measure", values="value", aggfunc="mean")
        return found.reindex(columns=list(measures))


def collect(plan: Plan, left_out: Collection[str] = ()) -> Collected:
    """Read the finished jobs.

    Args:
        left_out: names of jobs not to read: what they hold is not of this study's settings.
    """
    wanted = [*plan.cells, *plan.readings]
    finished = [job for job in wanted if job.name not in left_out and job.finished()]
    cells = [job for job in finished if job.model]
    curves = [row for job in cells for row in _curve_rows(job)]
    return Collected(
        answers=_rows(cells, "answers", ANSWERS),
        readings=_rows(finished, "readings", READINGS),
        curves=pd.DataFrame(curves, columns=CURVES.names),
        metrics={job.name: load_metrics(_last_folder(job)).data for job in cells},
        missing=[job.name for job in (*wanted, *plan.search_of.values()) if job.name in left_out or not job.finished()],
    )


def _last_folder(job: Job) -> Path:
    return job.run.require(job.stages[-1])


def _rows(jobs: Sequence[Job], name: str, schema: pa.Schema) -> pd.DataFrame:
    """A table that each of the jobs has, with `setting` and `job`."""
    found = []
    for job in jobs:
        rows = read_table(_last_folder(job) / f"{name}.parquet", schema).to_pandas()
        if name == "readings" and job.model:  # a cell's, of its own answers
            answers = read_table(_last_folder(job) / "answers.parquet", ANSWERS).to_pandas()
            rows = with_asked(answers, rows, job.run.require("prepare"), job.recipe.task.num_queries)
        found.append(rows.assign(setting=job.setting, job=job.name))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=[*schema.names, "setting", "job"])


def _curve_rows(job: Job) -> list[dict[str, Any]]:
    """Of a cell's own training; none for SFT and for a training taken from another cell."""
    stage = rl_stage(job.model)
    if stage not in job.stages:
        return []
    own = {"setting": job.setting, "model": job.model, "seed": job.seed}
    return [{**own, **row} for row in training_rows(job.run.require(stage))]


def write_tables(collected: Collected, folder: Path) -> None:
    """Write results.parquet and curves.parquet."""
    results = pa.Table.from_pandas(collected.readings[RESULTS.names], preserve_index=False)
    write_table(folder / "results.parquet", results, RESULTS)
    write_table(folder / "curves.parquet", collected.curves.to_dict("records"), CURVES)


def study_metrics(answers: pd.DataFrame, readings: pd.DataFrame, cell: dict[str, Any], rubric: Rubric) -> Metrics:
    """metrics.json of all seeds together.

    Args:
        answers, readings: of one setting, every seed; one first judge in all.
        cell: metrics.json of one of the cells.
    """
    data = build_metrics(answers, readings, judge=cell["judge"], rubric=rubric)
    split_of = answers.drop_duplicates("example_id")["split"]
    # All evaluation sets together are a scope, and no split.
    distinct = {scope: int((split_of == scope).sum()) or len(split_of) for scope in data["scopes"]}
    return Metrics(
        {
            **data,
            "seeds": int(answers["seed"].nunique()),
            "distinct_examples": distinct,
            "judge_labelled_training": cell["judge_labelled_training"],
        }
    )


def smooth(values_T: Sequence[float], window: int = WINDOW) -> np.ndarray:
    """Centred moving average; at the ends over what there is."""
    values = np.asarray(values_T, dtype=float)
    reach = window // 2
    return np.array([values[max(0, t - reach) : t + reach + 1].mean() for t in range(len(values))])


def value_at_kl(kl_T: np.ndarray, values_T: np.ndarray, level: float) -> float | None:
    """The value when `kl_T` first reaches `level`, linear between the two updates; None when it never does."""
    reached = np.flatnonzero(kl_T >= level)
    if not len(reached):
        return None
    around = slice(max(0, reached[0] - 1), reached[0] + 1)
    return float(np.interp(level, kl_T[around], values_T[around]))


def common_kl(curves: Sequence[np.ndarray]) -> float | None:
    """The largest KL that every curve reaches; None when one of them never leaves 0."""
    level = min((float(kl_T.max()) for kl_T in curves if len(kl_T)), default=0.0)
    return level if level > 0 and all(len(kl_T) for kl_T in curves) else None


class Reached(NamedTuple):
    """How soon one training gets to the best of another."""

    best: float
    """Best smoothed value of the other training."""
    best_update: int
    """Update (from 1) at which the other training has it."""
    update: int | None
    """First update at which this training has at least that much; None: never."""

    @property
    def share(self) -> float | None:
        """`update` / `best_update`."""
        return None if self.update is None else self.update / self.best_update


def updates_to_reach(values_T: np.ndarray, other_T: np.ndarray) -> Reached:
    """When `values_T` first reaches the best of `other_T`."""
    best_at = int(other_T.argmax())
    reached = np.flatnonzero(values_T >= other_T[best_at])
    return Reached(float(other_T[best_at]), best_at + 1, int(reached[0]) + 1 if len(reached) else None)


class Steadiness(NamedTuple):
    """How much a curve differs between seeds and jumps from update to update, in its own unit."""

    over_seeds: float | None
    """Standard deviation between seeds at the same update, mean over the updates; None for one seed."""
    over_steps: float | None
    """Standard deviation around the trend: of the change from one update to the next, divided by the root of 2 (von
    Neumann 1941), mean over the seeds; None for fewer than three updates."""


def steadiness(values_ST: np.ndarray) -> Steadiness:
    """Steadiness of a measure (S seeds, T updates)."""
    seeds, updates = values_ST.shape
    between = float(values_ST.std(axis=0, ddof=1).mean()) if seeds > 1 else None
    if updates < 3:
        return Steadiness(between, None)
    return Steadiness(between, float((np.diff(values_ST, axis=1).std(axis=1, ddof=1) / np.sqrt(2)).mean()))


def models_with(curves: pd.DataFrame, metric: str) -> list[str]:
    """Algorithms that have the measure, in the order of comparison."""
    found = set(curves.loc[curves["metric"] == metric, "model"])
    return [model for model in MODEL_ORDER if model in found]


def trainings(curves: pd.DataFrame, model: str, *metrics: str) -> dict[int, list[np.ndarray]]:
    """Smoothed measures (T) of each training, by seed, at the updates that have all of them; a value that is none
    counts as -inf."""
    found = {}
    for seed, rows in curves[(curves["model"] == model) & curves["metric"].isin(metrics)].groupby("seed"):
        whole = rows.groupby("update")["metric"].transform("size") == len(metrics)
        values = rows[whole].pivot(index="update", columns="metric", values="value")
        if len(values):
            found[int(seed)] = [np.nan_to_num(smooth(values[metric]), nan=-np.inf) for metric in metrics]
    return found


def at_equal_kl(curves: pd.DataFrame, measure: str) -> tuple[float, pd.DataFrame] | None:
    """Compare the algorithms that have a KL and the measure, where their KL is the same.

    Returns:
        The largest KL (nats per response) that every training reaches, and there the measure (seeds, algorithms), NaN
        where a training has no value; None when there is no common KL above 0.
    """
    of = {model: trainings(curves, model, "kl", measure) for model in models_with(curves, measure)}
    of = {model: found for model, found in of.items() if found}
    level = common_kl([kl_T for found in of.values() for kl_T, _ in found.values()])
    if level is None:
        return None
    values = {
        model: {seed: value_at_kl(kl_T, value_T, level) for seed, (kl_T, value_T) in found.items()}
        for model, found in of.items()
    }
    return level, pd.DataFrame(values, dtype=float).replace([np.inf, -np.inf], np.nan)


def reaching(curves: pd.DataFrame, measure: str, model: str, other: str) -> dict[int, Reached]:
    """When `model` first has the best of `other`, by seed."""
    ours, theirs = trainings(curves, model, measure), trainings(curves, other, measure)
    return {seed: updates_to_reach(*ours[seed], *theirs[seed]) for seed in ours if seed in theirs}
