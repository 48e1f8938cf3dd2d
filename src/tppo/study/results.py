"""Everything the finished cells measured, in documented tables: results.parquet, curves.parquet, votes.parquet.

None of them holds text of the log; example and user ids are those of the prepare stage (keyed hashes).

What training curves say when algorithms are compared: at equal KL, and by how soon they get somewhere.

Pure functions on the curve of one training: one number per update, in order (T).

A rollout is a small sample, so curves are smoothed over `WINDOW` updates before anything is read off them. KL need not
rise steadily: "at KL k" means when the smoothed KL reaches k for the first time.

Numbers of the study's report: intervals over seeds and users, corrected p-values, comparisons at equal KL.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as field_of
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tppo.core.common import UserError, stream_seed
from tppo.core.config import Recipe
from tppo.core.files import read_jsonl
from tppo.core.stages import BASELINES, MODEL_ORDER, REFERENCES, rl_stage
from tppo.core.stats import SeedMean, SeedUserBootstrap, UserBootstrap, holm, mean_over_seeds
from tppo.core.tables import field, read_table, write_table
from tppo.evaluate.compare import Metrics, Rows, build_metrics
from tppo.evaluate.metrics import DISTANCES, KL, PER_RESPONSE, RUBRICS, VERDICTS, read_generations
from tppo.evaluate.votes import VOTES
from tppo.judge.verdict import RELEVANT
from tppo.study.grid import SFT, Job, Plan

RESULTS = pa.schema(
    [
        field("setting", pa.string(), "setting of the study; base is the recipe as it stands"),
        field("model", pa.string(), "as in generations.parquet"),
        field("seed", pa.int64(), "seed of the tuning and of the sampling of the answer"),
        field("split", pa.string(), "eval1 or eval2"),
        field("example_id", pa.string(), "example answered; the same examples under every seed and setting"),
        field("user_id", pa.string(), "keyed hash of the user"),
        field("judge", pa.string(), "judge and version"),
        field("second_judge", pa.string(), "judge of the columns second_..., else null", True),
        *[
            field(f"{prefix}status_{r}", pa.string(), f"ok; abstained or not_asked, rubric {r}")
            for prefix in ("", "second_")
            for r in RUBRICS
        ],
        field("word_count", pa.int32(), "words of the answer"),
        *[field(f"relevant_words_{r}", pa.int32(), f"words judged relevant, rubric {r}", True) for r in RUBRICS],
        *[field(metric.name, pa.float64(), metric.doc, True) for metric in PER_RESPONSE],
    ]
)
"""One row for each answer that was judged: a model, setting, seed and example. Both rubrics stand side by side."""
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
STUDY_VOTES = pa.schema(
    [
        field("setting", pa.string(), "setting of the study the vote was made for"),
        field("seed", pa.int64(), "seed of both answers"),
        *VOTES,
    ]
)
"""One row for each pair of answers that was voted on."""
_COUNTERS = ("update", "step")


@dataclass(frozen=True)
class Collected:
    """What the finished cells hold."""

    rows: dict[str, list[dict[str, Any]]]
    """Rows of generations.parquet with `setting`, `seed` and `judge`, by the name of the cell."""
    curves: list[dict[str, Any]]
    """Rows of curves.parquet."""
    judge_labelled_training: dict[str, bool]
    """Whether the cell's judge is the one whose labels trained the reward models, by the name of the cell."""
    missing: list[str]
    """Cells, and jobs that read them, that are not finished."""
    votes: dict[str, list[dict[str, Any]]]
    """Rows of votes.parquet with `setting` and `seed`, by the name of the vote."""
    readings: dict[str, list[dict[str, Any]]] = field_of(default_factory=dict)
    """Rows of verdicts.parquet with `seed`, by the name of the second judge's reading."""
    distances: dict[str, list[dict[str, Any]]] = field_of(default_factory=dict)
    """Rows of distance.parquet with `seed`, by the name of the measurement."""

    def of_setting(self, plan: Plan, setting: str) -> list[dict[str, Any]]:
        """Rows of every cell that stands for this setting, also when it was made for another one, with what the
        setting's second judge said of them and the KL measured at their prompts."""
        names = [job.name for (name, _, _), job in plan.cell_of.items() if name == setting and job.name in self.rows]
        second = _by_answer(self.readings, plan.reading_of, setting)
        distances = _by_answer(self.distances, plan.distance_of, setting)
        judge = next((row["judge"] for row in second.values()), None)
        found = []
        for row in (row for name in names for row in self.rows[name]):
            answer = (row["seed"], row["model"], row["example_id"])
            columns = {name: value for name, value in second.get(answer, {}).items() if name.startswith("second_")}
            kl = distances.get(answer, {}).get(KL.name)
            found.append({**row, "second_judge": judge, **columns, KL.name: kl})
        return found

    def votes_of_setting(self, plan: Plan, setting: str) -> list[dict[str, Any]]:
        """Rows of every vote that stands for this setting."""
        names = [job.name for (name, _), job in plan.vote_of.items() if name == setting and job.name in self.votes]
        return [row for name in names for row in self.votes[name]]


def _by_answer(
    found: Mapping[str, list[dict[str, Any]]], job_of: Mapping[tuple[str, int], Job], setting: str
) -> dict[tuple[int, str, str], dict[str, Any]]:
    """The rows that the jobs of a setting wrote, by seed, model and example."""
    names = [job.name for (name, _), job in job_of.items() if name == setting]
    return {(row["seed"], row["model"], row["example_id"]): row for name in names for row in found.get(name, [])}


def collect(plan: Plan, left_out: Collection[str] = ()) -> Collected:
    """Read the finished cells.

    Args:
        left_out: names of cells not to read: what they hold is not of this study's settings.
    """
    cells, votes, readings, distances = (
        [job for job in jobs if job.name not in left_out and job.finished()]
        for jobs in (plan.cells, plan.votes, plan.readings, plan.distances)
    )
    finished = {job.name for job in (*cells, *votes, *readings, *distances)}
    wanted = (*plan.cells, *plan.readers)
    found = Collected({}, [], {}, [job.name for job in wanted if job.name not in finished], {})
    for job in cells:
        folder = job.run.require("evaluate")
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        own = {"setting": job.setting, "seed": job.seed, "judge": metrics["judge"]}
        found.rows[job.name] = [{**row, **own} for row in read_generations(folder)]
        found.judge_labelled_training[job.name] = metrics["judge_labelled_training"]
        found.curves.extend(curve_rows(job))
    for job in votes:
        own = {"setting": job.setting, "seed": job.seed}
        rows = read_table(job.run.require("vote") / "votes.parquet", VOTES).to_pylist()
        found.votes[job.name] = [{**row, **own} for row in rows]
    for job in readings:
        rows = read_table(job.run.require("rejudge") / "verdicts.parquet", VERDICTS).to_pylist()
        found.readings[job.name] = [{**row, "seed": job.seed} for row in rows]
    for job in distances:
        rows = read_table(job.run.require("distance") / "distance.parquet", DISTANCES).to_pylist()
        found.distances[job.name] = [{**row, "seed": job.seed} for row in rows]
    return found


def curve_rows(job: Job) -> list[dict[str, Any]]:
    """The per-update metrics of a cell's own training; none for SFT and for a training taken from another cell."""
    if job.model == SFT or rl_stage(job.model) not in job.stages:
        return []
    path = job.run.require(rl_stage(job.model)) / "metrics.jsonl"
    rows = []
    for line in read_jsonl(path):
        counter = next((name for name in _COUNTERS if name in line), None)
        if counter is None:
            raise UserError(f"{path}: a row without {' or '.join(_COUNTERS)}")
        own = {"setting": job.setting, "model": job.model, "seed": job.seed, "update": int(line[counter])}
        rows += [
            {**own, "metric": name, "value": float(value)}
            for name, value in line.items()
            if name not in _COUNTERS and isinstance(value, int | float)
        ]
    return rows


def write_tables(plan: Plan, collected: Collected, folder: Path) -> None:
    """Write results.parquet, curves.parquet and, where there are votes, votes.parquet."""
    settings = dict.fromkeys(setting for setting, *_ in plan.cell_of)
    rows = [row for setting in settings for row in collected.of_setting(plan, setting) if row["setting"] == setting]
    results = [result_row(row) for row in rows]
    write_table(folder / "results.parquet", results, RESULTS)
    write_table(folder / "curves.parquet", collected.curves, CURVES)
    if collected.votes:
        votes = [row for rows in collected.votes.values() for row in rows]
        write_table(folder / "votes.parquet", votes, STUDY_VOTES)


def result_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of generations.parquet without its texts."""
    labels = {rubric: row[f"word_labels_{rubric}"] for rubric in RUBRICS}
    counts = {f"relevant_words_{r}": None if found is None else found.count(RELEVANT) for r, found in labels.items()}
    kept = {name: row[name] for name in RESULTS.names if name in row}
    return {**kept, "word_count": len(row["words"]), **counts}


WINDOW = 3


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
    after = int(reached[0])
    if after == 0:
        return float(values_T[0])
    before = after - 1
    part = (level - kl_T[before]) / (kl_T[after] - kl_T[before])
    return float(values_T[before] + part * (values_T[after] - values_T[before]))


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


MEASURES = {
    "token_relevance": "relevance by the token reward model",
    "sentence_reward_mean": "relevance by the sentence reward model",
}
"""Measures of a rollout that are the same for every RL algorithm, unlike the reward it is paid."""


def study_metrics(recipe: Recipe, rows: Rows, judge_labelled_training: bool, votes: Rows | None = None) -> Metrics:
    """metrics.json of all seeds together; differences, and `net` of wins, also hold `p_value` and `p_holm`.

    `p_holm` is corrected for the number of pairs compared in one measure and one scope: pairs of policies, and pairs of
    a policy and a simple baseline, each for itself.

    Args:
        rows: of generations.parquet, with `seed`, `judge` and `second_judge`; the same judges in all.
        votes: of votes.parquet, with `seed`; one judge and one rubric in all.
    """
    judges = {(row["judge"], row["second_judge"]) for row in rows}
    assert len(judges) == 1, f"one table, one judge: {judges}"
    judge, second_judge = next(iter(judges))

    def bootstrap_of(questions: Rows, scope: str) -> UserBootstrap:
        users, seeds = ([row[name] for row in questions] for name in ("user_id", "seed"))
        return SeedUserBootstrap(
            users, seeds, recipe.study.bootstrap_samples, stream_seed(recipe.seed, "study bootstrap", scope)
        )

    data = build_metrics(rows, recipe, votes, bootstrap_of)
    families: dict[tuple[str, str, bool], Rows] = {}
    for row in data["differences"]:
        families.setdefault((row["scope"], row["metric"], row["than"] in BASELINES), []).append(row)
    for row in data["wins"]:
        if row["model"] not in REFERENCES:
            what = f"wins by {row['by']}, {row['rubric']}"
            families.setdefault((row["scope"], what, row["than"] in BASELINES), []).append(row["net"])
    for family in families.values():
        for row, corrected in zip(family, holm([row["p_value"] for row in family]), strict=True):
            row["p_holm"] = corrected
    data |= {
        "seeds": len({row["seed"] for row in rows}),
        "distinct_examples": {
            scope: len({row["example_id"] for row in rows if scope in ("all", row["split"])})
            for scope in data["scopes"]
        },
        "judge": judge,
        "second_judge": second_judge,
        "judge_labelled_training": judge_labelled_training,
    }
    return Metrics(data)


class Curve(NamedTuple):
    """One measure of one algorithm over its training, all seeds."""

    updates: np.ndarray
    """(T)"""
    values: np.ndarray
    """(S, T)"""

    @property
    def mean(self) -> list[float]:
        return [float(value) for value in self.values.mean(axis=0)]

    @property
    def spread(self) -> list[float | None]:
        """Standard deviation between the seeds; None with one seed."""
        if len(self.values) < 2:
            return [None] * len(self.updates)
        return [float(value) for value in self.values.std(axis=0, ddof=1)]


class Curves:
    """Look-ups in the rows of curves.parquet of one setting."""

    def __init__(self, rows: Rows, setting: str) -> None:
        self._found: dict[tuple[str, str], dict[int, dict[int, float]]] = {}
        for row in rows:
            if row["setting"] == setting:
                by_seed = self._found.setdefault((row["model"], row["metric"]), {})
                by_seed.setdefault(row["seed"], {})[row["update"]] = row["value"]

    def models(self, metric: str) -> list[str]:
        """Algorithms that have the measure, in the order of comparison."""
        return [model for model in MODEL_ORDER if (model, metric) in self._found]

    def get(self, model: str, metric: str) -> Curve | None:
        """The updates that all seeds have (a training that `max_kl` halted is shorter than the others)."""
        by_seed = self._found.get((model, metric))
        if not by_seed:
            return None
        updates = sorted(set.intersection(*(set(values) for values in by_seed.values())))
        values = [[by_seed[seed][update] for update in updates] for seed in sorted(by_seed)]
        return Curve(np.array(updates), np.array(values, dtype=float).reshape(len(by_seed), len(updates)))

    def trainings(self, model: str, *metrics: str) -> dict[int, list[np.ndarray]]:
        """Smoothed measures (T) of each training that has all of them, by seed; a value that is none counts as -inf."""
        of = [self._found.get((model, metric), {}) for metric in metrics]
        found = {}
        for seed in sorted(set.intersection(*(set(by_seed) for by_seed in of))):
            updates = sorted(set.intersection(*(set(by_seed[seed]) for by_seed in of)))
            smoothed = [smooth([by_seed[seed][update] for update in updates]) for by_seed in of]
            found[seed] = [np.nan_to_num(values_T, nan=-np.inf) for values_T in smoothed]
        return found


class EqualKL(NamedTuple):
    """Algorithms where their KL is the same."""

    kl: float
    """Nats per response: the largest that every training reaches."""
    values: dict[str, SeedMean]
    """By algorithm."""
    differences: dict[tuple[str, str], SeedMean]
    """First minus second, paired by seed."""


def at_equal_kl(curves: Curves, measure: str) -> EqualKL | None:
    """Compare the algorithms that have a KL and the measure; None when there is no common KL above 0."""
    models = [model for model in curves.models(measure) if model in curves.models("kl")]
    trainings = {model: curves.trainings(model, "kl", measure) for model in models}
    level = common_kl([kl_T for found in trainings.values() for kl_T, _ in found.values()])
    if level is None:
        return None
    values: dict[str, dict[int, float]] = {}
    for model, seeds in trainings.items():
        at_level = {seed: value_at_kl(kl_T, value_T, level) for seed, (kl_T, value_T) in seeds.items()}
        values[model] = {seed: value for seed, value in at_level.items() if value is not None and np.isfinite(value)}
    differences = {
        (a, b): mean
        for number, a in enumerate(models)
        for b in models[number + 1 :]
        if (mean := mean_over_seeds([values[a][seed] - values[b][seed] for seed in values[a] if seed in values[b]]))
    }
    means = {model: mean for model in models if (mean := mean_over_seeds(list(values[model].values())))}
    return EqualKL(level, means, differences)


def reaching(curves: Curves, measure: str, model: str, other: str) -> dict[int, Reached]:
    """When `model` first has the best of `other`, by seed."""
    ours, theirs = curves.trainings(model, measure), curves.trainings(other, measure)
    return {seed: updates_to_reach(ours[seed][0], theirs[seed][0]) for seed in ours if seed in theirs}


def steadiness_of(curves: Curves, measure: str) -> dict[str, Steadiness]:
    """By algorithm, of those with at least one update that all seeds have."""
    found = {model: curves.get(model, measure) for model in curves.models(measure)}
    return {model: steadiness(curve.values) for model, curve in found.items() if curve and len(curve.updates)}
