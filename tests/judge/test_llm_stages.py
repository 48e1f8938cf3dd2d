"""The LLM judge through the CLI: label, what follows from its labels, the ledger, injection probes."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import injection
import pytest

from tests.helpers.fault_server import Settings, running, truth
from tests.helpers.many_items import make_run
from tppo.cli import main
from tppo.core.common import UserError
from tppo.core.config import JudgeSettings
from tppo.core.run import RunFolder
from tppo.core.tables import LABELS, load_examples, read_table
from tppo.judge import llm
from tppo.judge.label import saved_judge
from tppo.judge.prompts import judge_question
from tppo.judge.verdict import JudgeItem
from tppo.reward.data import load_labelled

ITEMS = 30


@pytest.fixture
def run_dir(tmp_path):
    make_run(tmp_path / "run", ITEMS)
    return tmp_path / "run"


def label_arguments(run_dir, server) -> list[str]:
    return [
        *("--config", str(run_dir / "recipe.yaml"), "--label.judge", "llm", "--judge.model", "m"),
        *("--judge.base_url", f"http://127.0.0.1:{server.port}/v1"),
        *("--judge.ledger", str(run_dir.parent / "judge.sqlite")),
    ]


def label(run_dir, server, *arguments: str) -> None:
    main(["label", *label_arguments(run_dir, server), *arguments])


def labels(run_dir) -> list[dict]:
    return read_table(run_dir / "label" / "labels.parquet", LABELS).to_pylist()


def test_labels_are_the_servers_verdicts_and_reach_the_reward_models(run_dir):
    with running(Settings()) as server:
        label(run_dir, server, "--judge.rubrics", "[targets, history]")
        examples = {e.example_id: e for e in load_examples(run_dir / "prepare")}
        rows = labels(run_dir)
        assert len(rows) == 2 * ITEMS
        for row in rows:
            example = examples[row["example_id"]]
            item = JudgeItem(example.history, example.targets, row["response"])
            reply = truth(json.loads(judge_question(item, row["rubric"], "token").user))
            assert [word["label"] - 1 for word in row["words"]] == [word["score"] for word in reply["words"]]
            assert (row["sentence_label"], row["sentence_score"]) == (reply["sentence"], reply["sentence"])
            assert row["judge"] == "llm/m/token-v1"
        # Phase I -> phase II: the reward models read them as they read the offline judge's.
        labelled, abstained = load_labelled(run_dir / "label", run_dir / "prepare", "targets", "train")
        assert (len(labelled), abstained) == (25, 0)
        assert server.stats()["requests"] == 2 * ITEMS
        # Another run over the same texts pays nothing.
        make_run(run_dir.parent / "again", ITEMS)
        label(run_dir.parent / "again", server, "--judge.rubrics", "[targets, history]")
        assert server.stats()["requests"] == 2 * ITEMS
        assert labels(run_dir.parent / "again") == rows


def test_sentence_template_labels_the_response_only(run_dir):
    with running(Settings()) as server:
        label(run_dir, server, "--judge.template", "sentence")
    assert all(row["words"] == [] and row["sentence_label"] in (0, 1) for row in labels(run_dir))
    with pytest.raises(UserError, match="no word labels"):
        load_labelled(run_dir / "label", run_dir / "prepare", "targets", "train")


def test_abstentions_are_labels_of_their_own_kind(run_dir):
    with running(Settings(fault_rate=0.5, faults="truncated", seed=2)) as server:
        label(run_dir, server, "--judge.reply_attempts", "1")
    rows = labels(run_dir)
    abstained = [row for row in rows if row["status"] == "abstained"]
    assert 0 < len(abstained) < ITEMS
    assert all(row["sentence_label"] is None and row["words"] == [] and row["problem"] for row in abstained)
    shares = json.loads((run_dir / "label" / "manifest.json").read_text())["facts"]["relevant_share"]
    assert shares["sft_responses"]["targets"]["abstained_count"] == len(abstained)
    assert shares["sft_responses"]["targets"]["response_count"] == ITEMS - len(abstained)


def test_failed_questions_stop_the_stage_and_are_asked_again(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(llm, "TRANSPORT_ATTEMPTS", 1)
    with running(Settings(fault_rate=1, faults="500", seed=0)) as server, pytest.raises(SystemExit) as exit_:
        label(run_dir, server, "--judge.max_concurrency", "1")
    assert exit_.value.code == 2
    assert "in a row" in capsys.readouterr().err
    assert not (run_dir / "label" / "manifest.json").exists()
    with running(Settings()) as server:
        label(run_dir, server)
        assert server.stats()["requests"] == ITEMS
    assert len(labels(run_dir)) == ITEMS


def test_how_fast_to_ask_is_not_part_of_a_finished_stage_but_what_was_asked_is(run_dir, capsys):
    with running(Settings()) as server:
        label(run_dir, server)
        label(run_dir, server, "--judge.max_concurrency", "3", "--judge.timeout", "9")
        assert "finished already" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            label(run_dir, server, "--judge.temperature", "0.7")
        assert "judge.temperature: 0.0 -> 0.7" in capsys.readouterr().err
        recipe = RunFolder(replace(make_run(run_dir.parent / "x", 2), run_dir=str(run_dir))).recipe
        recipe.judge = JudgeSettings(
            f"http://127.0.0.1:{server.port}/v1", "m", ledger=str(run_dir.parent / "judge.sqlite")
        )
        assert saved_judge(run_dir / "label", recipe.judge).name == "llm/m/token-v1"
        recipe.judge.model = "other"
        with pytest.raises(UserError, match="other settings"):
            saved_judge(run_dir / "label", recipe.judge)


def test_injection_is_measured_against_a_control(run_dir):
    with running(Settings()) as server:
        facts = injection.measure(label_arguments(run_dir, server), probes=40)
    assert facts["probes"] == 40
    for side in ("attack", "control"):
        # This server's verdicts are bits of a hash of all it is shown: any added text flips half of them.
        assert facts[side]["raised_of"] + facts[side]["lowered_of"] == 40
        assert 0.1 < facts[side]["raised"] < 0.9
        assert facts[side]["abstained"] == 0


def test_ledger_command_shows_and_exports(run_dir, tmp_path, capsys):
    with running(Settings(fault_rate=0.3, faults="truncated,500", seed=5)) as server:
        label(run_dir, server)
    ledger = ["--judge.ledger", str(tmp_path / "judge.sqlite")]
    main(["ledger", *ledger])
    shown = capsys.readouterr().err
    assert "token" in shown
    assert "http_500" in shown
    for ending in ("csv", "jsonl", "parquet"):
        main(["ledger", *ledger, "--ledger.export", str(tmp_path / f"attempts.{ending}")])
    with (tmp_path / "attempts.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len((tmp_path / "attempts.jsonl").read_text().splitlines()) > ITEMS
    assert {row["outcome"] for row in rows} == {"ok", "broken", "http_500"}
    for arguments, message in (
        ([*ledger, "--ledger.export", "attempts.xlsx"], "has to end in"),
        (["--judge.ledger", str(tmp_path / "none.sqlite")], "no judge model has been asked"),
    ):
        with pytest.raises(SystemExit):
            main(["ledger", *arguments])
        assert message in capsys.readouterr().err
