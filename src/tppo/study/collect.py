"""Everything the finished cells measured, in documented tables: results.parquet, curves.parquet, votes.parquet.

None of them holds text of the log; example and user ids are those of the prepare stage (keyed hashes).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from dataclasses import field as field_of
from pathlib import Path
from typing import Any

import pyarrow as pa

from tppo.errors import UserError
from tppo.evaluate.generations import DISTANCES, RUBRICS, VERDICTS, read_generations
from tppo.evaluate.metrics import KL, PER_RESPONSE
from tppo.evaluate.votes import VOTES
from tppo.judge.record import RELEVANT
from tppo.run import read_jsonl, rl_stage
from tppo.study.plan import SFT, Job, Plan
from tppo.tables import field, read_table, write_table

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
