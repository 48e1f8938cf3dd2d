"""The stage `read_llm`: a second judge reads the answers of finished evaluations, history by history."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers.fault_server import Settings, running, truth
from tests.helpers.rewritten import as_if_written
from tests.study.test_study_report import EXAMPLES, make_study, results_of
from tppo.cli import main, run_one
from tppo.core.common import UserError
from tppo.core.config import Evaluate, JudgeSettings, Reading, Study
from tppo.judge.prompts import judge_question
from tppo.judge.verdict import JudgeItem
from tppo.study.grid import make_plan
from tppo.study.run import run_study

JUDGE = "llm/m/sentence-v1-probability"
READ = 4
"""Examples of each evaluation set that the second judge reads."""


def make_read(root: Path, port: int, **settings):
    """SFT and TPPO of two seeds, evaluated; only the second judge's readings are missing."""
    judge = JudgeSettings(
        f"http://127.0.0.1:{port}/v1", "m", ledger=str(root.parent / "judge.sqlite"), template="sentence",
        score="probability", rubrics=["targets"], max_concurrency=1,
    )  # fmt: skip
    return make_study(
        root,
        algorithms=["tppo"],
        evaluate=Evaluate(**{"readings": [Reading("llm", READ)], **settings}),
        judge=judge,
        study=Study(seeds=[0, 1]),
    )


def test_a_study_has_its_answers_read_by_a_second_judge_afterwards(tmp_path: Path):
    bodies = tmp_path / "bodies.jsonl"
    with running(Settings(bodies=str(bodies))) as server:
        recipe, plan = make_read(tmp_path / "run", server.port)
        assert [job.name for job in plan.readings] == ["llm/base-s0", "llm/base-s1"]
        run_study(recipe)
        asked = server.stats()["requests"]
        run_study(recipe)
        assert server.stats()["requests"] == asked
    rows = results_of(tmp_path / "run/study")
    read = [row for row in rows if f"{JUDGE} relevant_targets" in row]
    readers = {row["reader"] for row in pq.read_table(tmp_path / "run/study/results.parquet").to_pylist()}
    assert readers == {"text", "word-overlap-v1", JUDGE}
    assert not any(f"{JUDGE} relevant_history" in row for row in rows), "it was asked about one rubric"
    models = ["sft", "tppo", "targets", "other_user"]
    # The same examples of every model, under every seed.
    chosen = {row["example_id"] for row in read}
    assert len(chosen) == 2 * READ
    assert sorted((row["model"], row["seed"], row["example_id"]) for row in read) == sorted(
        (model, seed, example) for model in models for seed in (0, 1) for example in chosen
    )
    check_verdicts(tmp_path / "run", read)
    # All answers to a history are asked about in a row.
    histories = [json.dumps(json.loads(message(line))["history"]) for line in bodies.read_text().splitlines()]
    runs = [h for number, h in enumerate(histories) if number == 0 or h != histories[number - 1]]
    assert len(runs) == 2 * len(set(histories))  # once for each seed
    metrics = json.loads((tmp_path / "run/study/metrics.json").read_text())
    assert metrics["second_judges"] == [JUDGE]
    cells = {(r["model"], r["metric"]): r for r in metrics["rows"] if (r["scope"], r["reader"]) == ("all", JUDGE)}
    for model in models:
        mine = [row[f"{JUDGE} sentence_score_targets"] for row in read if row["model"] == model]
        cell = cells[model, "sentence_score_targets"]
        assert cell["value"] == pytest.approx(sum(mine) / len(mine))
        assert cell["examples"] == len(mine)
    page = (tmp_path / "run/study/report.html").read_text()
    assert "The same by a second judge, llm/m/sentence-v1-probability" in page
    assert "Second judge, answers relevant to what the user really searched next, times the share of" in page
    summary = (tmp_path / "run/study/summary.md").read_text()
    assert "| Score, against what the user searched next (second judge) | p | corrected p |" in summary


def message(line: str) -> str:
    return json.loads(line)["messages"][-1]["content"]


def check_verdicts(root: Path, read: list[dict]) -> None:
    """Every verdict is the server's on that very answer."""
    examples = {example.example_id: example for example in EXAMPLES}
    for row in read:
        cell = "sft" if row["model"] in ("targets", "other_user") else row["model"]
        folder = root / f"cells/base-{cell}-s{row['seed']}/evaluate/answers.parquet"
        key = (row["model"], row["example_id"])
        (answer,) = (r for r in pq.read_table(folder).to_pylist() if (r["model"], r["example_id"]) == key)
        example = examples[row["example_id"]]
        question = judge_question(
            JudgeItem(example.history, example.targets, answer["response"]), "targets", "sentence"
        )
        right = truth(json.loads(question.user))["sentence"] if answer["words"] else 0
        assert row[f"{JUDGE} relevant_targets"] == (right if answer["problem"] is None else 0)
        assert (row[f"{JUDGE} sentence_score_targets"] > 0.5) == right


def test_the_cells_do_not_depend_on_the_second_judge(tmp_path: Path):
    recipe, plan = make_read(tmp_path / "run", 1)
    without = make_plan(replace(recipe, evaluate=replace(recipe.evaluate, readings=[])))
    assert without.readings == []
    assert all(job.finished() for job in without.cells)
    assert [job.recipe for job in plan.cells] == [job.recipe for job in without.cells]


def test_a_reading_that_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe, plan = make_read(tmp_path / "run", 1)
    with pytest.raises(UserError, match=r"evaluate\.readings: llm asks the LLM judge: judge\.model is empty"):
        run_study(replace(recipe, judge=JudgeSettings()))
    reading = replace(plan.readings[0].recipe, run_dir=str(tmp_path / "second"))
    with pytest.raises(UserError, match=r"evaluate\.readings=\[\] has to name the reader llm once"):
        run_one(replace(reading, evaluate=Evaluate()), "read_llm")
    with pytest.raises(UserError, match=r"stage 'evaluate' is not finished"):
        run_one(replace(reading, evaluate=replace(reading.evaluate, answers={})), "read_llm")
    given = reading.evaluate.answers
    wrong = replace(reading.evaluate, answers={**given, "tppo": given["sft"]})
    with pytest.raises(UserError, match="no answer of tppo"):
        run_one(replace(reading, evaluate=wrong), "read_llm")
    nowhere = replace(reading.evaluate, answers={**given, "tppo": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match=r"evaluate\.answers: .*nowhere holds no finished evaluation"):
        run_one(replace(reading, evaluate=nowhere), "read_llm")
    cells = Path(given["sft"])
    facts = json.loads((cells / "metrics.json").read_text())
    (cells / "metrics.json").write_text(json.dumps({**facts, "judge": JUDGE}))
    as_if_written(cells)
    with pytest.raises(UserError, match="it would only agree with itself"):
        run_one(reading, "read_llm")
    with pytest.raises(SystemExit):
        main(["read", "--help"])
    assert "evaluate.readings" in capsys.readouterr().out
