"""Votes across the cells of a study: the stage `read_vote`, and `tppo study` with a judge behind a server."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers import fake_run
from tests.helpers.fault_server import Settings, running
from tests.helpers.rewritten import as_if_written
from tests.study.test_study_report import EXAMPLES, make_study
from tppo.cli import run_one
from tppo.core.common import UserError
from tppo.core.config import Evaluate, JudgeSettings, Reading, Recipe, Setting, Study
from tppo.core.run import RunFolder
from tppo.core.tables import write_table
from tppo.evaluate.answers import ANSWERS
from tppo.study.grid import Plan, make_plan
from tppo.study.run import discard, run_study

KL = Setting("kl", {"rl.kl_coef": 0.05}, ["tppo"])


def make_voted(root: Path, port: int, model: str = "m") -> tuple[Recipe, Plan]:
    """Two algorithms' cells (SFT, TPPO) of two seeds and two settings, finished; only the votes are missing."""
    return make_study(
        root,
        algorithms=["tppo"],
        evaluate=Evaluate(readings=[Reading("vote")]),
        judge=JudgeSettings(f"http://127.0.0.1:{port}/v1", model, ledger=str(root.parent / "judge.sqlite")),
        study=Study(seeds=[0, 1], settings=[KL]),
    )


def test_a_study_votes_once_and_pools_the_seeds(tmp_path: Path):
    with running(Settings()) as server:
        recipe, plan = make_voted(tmp_path / "run", server.port)
        names = [f"vote/{setting}-s{seed}" for seed in (0, 1) for setting in ("base", "kl")]
        assert [job.name for job in plan.readings] == names
        run_study(recipe)
        asked = server.stats()["requests"]
        # Both orders of every pair of answers that differ and can be read; equal pairs are one question.
        assert 0 < asked <= 2 * (len(names) + 1) * len(EXAMPLES)  # the references' contests are the same everywhere
        written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/vote").glob("*/read_vote/*")}
        assert len(written) == 3 * len(names)  # readings.parquet, started.json, manifest.json
        run_study(recipe)
        assert {path: path.stat().st_mtime_ns for path in written} == written, "a finished vote was made again"
        # Deleted votes come back out of the judge's ledger.
        discard(plan, ["read_vote"])
        assert not any(path.exists() for path in written)
        run_study(recipe)
        assert server.stats()["requests"] == asked
    check_report(tmp_path / "run/study")


def votes_of(path: Path) -> list[dict]:
    """Rows of votes with vote, flipped and preference side by side; None where there is no such row."""
    found: dict[tuple, dict] = {}
    for row in pq.read_table(path).to_pylist():
        if row["than"] is not None:
            names = ("setting", "seed", "split", "example_id", "model", "than", "reader")
            key = tuple(row.get(name) for name in names)
            none = dict.fromkeys(("vote", "flipped", "preference"))
            vote = found.setdefault(key, {**dict(zip(names, key, strict=True)), **none})
            vote[row["measure"].removesuffix("_targets")] = row["value"]
    return list(found.values())


def check_report(folder: Path) -> None:
    votes = [row for row in votes_of(folder / "results.parquet") if row["setting"] == "base"]
    # The references are voted on as well: what the votes are worth.
    of_references = [row for row in votes if row["model"] == "targets"]
    assert {row["than"] for row in of_references} == {"other_user"}
    votes = [row for row in votes if row["model"] != "targets"]
    assert len(votes) == len(of_references) == 2 * len(EXAMPLES)
    assert {row["reader"] for row in votes} == {"llm/m/token-v1"}
    wins = [row for row in json.loads((folder / "metrics.json").read_text())["wins"] if row["by"] == "vote"]
    assert [(row["scope"], row["model"], row["than"]) for row in wins] == [
        (scope, *pair) for scope in ("all", "eval1", "eval2") for pair in (("tppo", "sft"), ("targets", "other_user"))
    ]
    won, lost, undecided = (sum(row["vote"] == side for row in votes) for side in (1, -1, 0))
    pooled = wins[0]
    assert min(won, lost, undecided) > 0
    for name, count in (("win", won), ("lose", lost), ("tie", undecided)):
        assert pooled[name] == pytest.approx(count / len(votes))
    assert (pooled["net"]["examples"], pooled["net"]["seeds"]) == (len(votes), 2)
    assert pooled["net"]["low"] < pooled["net"]["value"] < pooled["net"]["high"]
    references = next(row for row in wins if row["model"] == "targets")
    for row in (pooled, references):  # one pair of models; references apart
        assert row["net"]["comparisons"] == 1
        assert row["net"]["p_corrected"] == row["net"]["p_value"] is not None
    by_seed = [[row for row in votes if row["seed"] == seed] for seed in (0, 1)]
    assert [row["vote"] for row in by_seed[0]] != [row["vote"] for row in by_seed[1]]
    page, summary = (folder / "report.html").read_text(), (folder / "summary.md").read_text()
    for text in (page, summary):
        assert "llm/m/token-v1; orders disagree: " in text
    assert (
        page.count("by vote<small>") == 8
    )  # two pairs; three evaluation sets of the recipe itself, one of the setting


def test_votes_follow_answers_made_anew_and_a_judge_is_needed_before_anything_runs(tmp_path: Path):
    recipe, plan = make_voted(tmp_path / "run", port=1, model="")
    with pytest.raises(UserError, match=r"evaluate\.readings: vote asks the LLM judge: judge\.model is empty"):
        run_study(recipe)
    for job in plan.readings:
        with job.run.stage("read_vote"):
            pass
    discard(plan, [])
    assert all(job.finished() for job in plan.readings)
    of_sft = next(job for job in plan.cells if job.name == "cells/base-tppo-s0")
    discard(Plan(cells=[of_sft], reading_of=plan.reading_of), ["evaluate"])
    assert [job.name for job in plan.readings if job.run.manifest("read_vote") is None] == ["vote/base-s0"]


def test_a_vote_that_cannot_be_is_refused(tmp_path: Path):
    recipe, plan = make_voted(tmp_path / "run", port=1)
    vote = plan.readings[0].recipe
    given = vote.evaluate.answers

    def refused(words: str, prepare: str = vote.stage_dirs["prepare"], **answers: str) -> None:
        evaluate = replace(vote.evaluate, answers={**given, **answers})
        other = replace(vote, run_dir=str(tmp_path / "vote"), stage_dirs={"prepare": prepare}, evaluate=evaluate)
        with pytest.raises(UserError, match=words):
            run_one(other, "read_vote")

    refused("no answer of tppo", tppo=given["sft"])
    short = replace(recipe, run_dir=str(tmp_path / "short"), stage_dirs=plan.cells[0].recipe.stage_dirs, algorithms=[])
    with RunFolder(short).stage("evaluate") as (folder, _):
        write_table(folder / "answers.parquet", fake_run.made_up_rows(EXAMPLES[:3], "tppo")[0], ANSWERS)
    refused("other examples", tppo=str(folder))
    with RunFolder(replace(recipe, run_dir=str(tmp_path / "other"), stage_dirs={})).stage("prepare") as (folder, _):
        few = [fake_run.example_row(example) for example in EXAMPLES[3:]]
        write_table(folder / "examples.parquet", few, fake_run.EXAMPLES)
    refused(f"has no example {EXAMPLES[0].example_id}", prepare=str(folder))
    lonely = replace(vote.evaluate, answers={"sft": given["sft"]})
    alone = replace(vote, run_dir=str(tmp_path / "alone"), evaluate=lonely)
    with pytest.raises(UserError, match="vote compares two of"):
        run_one(alone, "read_vote")


def test_votes_on_some_examples_by_probability(tmp_path: Path):
    with running(Settings()) as server:
        recipe, _ = make_voted(tmp_path / "run", server.port)
        judge = replace(recipe.judge, score="probability", template="sentence")
        some = replace(recipe, evaluate=replace(recipe.evaluate, readings=[Reading("vote", 2)]), judge=judge)
        assert all(job.finished() for job in make_plan(some).cells), "votes change no cell"
        run_study(some)
    votes = votes_of(tmp_path / "run/study/results.parquet")
    chosen = {row["example_id"] for row in votes}
    assert len(chosen) == 4, "two of each set, the same for every pair, setting and seed"
    assert len(votes) == 4 * 2 * 2 * 2
    graded = [row for row in votes if row["flipped"] is not None]
    assert graded
    assert {row["vote"]: row["preference"] > 0.5 for row in graded if row["vote"] != 0} == {1: True, -1: False}
    assert {row["preference"] for row in votes if row["flipped"] is None} == {None}
    assert {row["reader"] for row in votes} == {"llm/m/sentence-v1-probability"}


def test_a_reference_that_one_set_lacks_is_not_voted_on_there(tmp_path: Path):
    with running(Settings()) as server:
        _, plan = make_voted(tmp_path / "run", server.port)
        cell = next(job for job in plan.cells if job.name == "cells/base-sft-s0")
        path = cell.run.path("evaluate") / "answers.parquet"
        kept = [r for r in pq.read_table(path).to_pylist() if (r["model"], r["split"]) != ("other_user", "eval2")]
        write_table(path, kept, ANSWERS)
        as_if_written(path.parent)
        run_one(plan.readings[0].recipe, "read_vote")
    votes = votes_of(tmp_path / "run/vote/base-s0/read_vote/readings.parquet")
    splits = {pair: {row["split"] for row in votes if row["model"] == pair} for pair in ("tppo", "targets")}
    assert splits == {"tppo": {"eval1", "eval2"}, "targets": {"eval1"}}
