"""What a verdict is known by, when an abstention is tried again, and what becomes of older ledgers."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

import pytest

from tests.helpers.fault_server import Settings, running
from tests.helpers.many_items import make_run
from tests.judge.test_transport import MODEL, items, judge
from tppo.cli import main
from tppo.core.tables import LABELS, read_table
from tppo.core.text import Event
from tppo.evaluate.votes import Contest, vote
from tppo.judge.ledger import JudgeLedger
from tppo.judge.prompts import judge_question

ONLY_CUT = Settings(fault_rate=1.0, faults="truncated")
VERSION_1 = """
CREATE TABLE requests (
  key TEXT PRIMARY KEY, model TEXT NOT NULL, template TEXT NOT NULL, template_version INTEGER NOT NULL,
  rubric TEXT NOT NULL, content_sha256 TEXT NOT NULL,
  status TEXT NOT NULL CHECK (status IN ('ok', 'abstained', 'failed')),
  verdict TEXT, problem TEXT, finished REAL NOT NULL, CHECK ((status = 'ok') = (verdict IS NOT NULL))) WITHOUT ROWID;
CREATE TABLE attempts (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL, model TEXT NOT NULL, started REAL NOT NULL, seconds REAL NOT NULL,
  outcome TEXT NOT NULL, problem TEXT, reply TEXT, prompt_tokens INTEGER NOT NULL, reply_tokens INTEGER NOT NULL);
PRAGMA user_version = 1;
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "judge.sqlite"


def requests(server) -> int:
    return server.stats()["requests"]


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"response_format": "none"}])
def test_another_way_of_asking_has_verdicts_of_its_own(path, change):
    with running(Settings()) as server:
        judge(server, path).judge(items(5), "targets")
        judge(server, path, **change).judge(items(5), "targets")
        assert requests(server) == 10
        judge(server, path).judge(items(5), "targets")
        judge(server, path, **change).judge(items(5), "targets")
        assert requests(server) == 10, "each is paid for once"


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"response_format": "json_object"}])
def test_votes_too(path, change):
    contests = [Contest([Event("search", f"h {i}")], [f"n {i}"], f"a {i}", f"b {i}") for i in range(4)]
    with running(Settings()) as server:
        vote(judge(server, path), contests, "targets")
        vote(judge(server, path), contests, "targets")
        assert requests(server) == 8
        vote(judge(server, path, **change), contests, "targets")
        assert requests(server) == 16


def test_limits_are_no_part_of_a_verdict(path):
    """A reply that ended by itself is the same under a larger limit: nobody pays again for what is there."""
    with running(Settings()) as server:
        judge(server, path).judge(items(5), "targets")
        judge(server, path, max_reply_tokens=4096, reply_attempts=5).judge(items(5), "targets")
        judge(server, path, max_reply_tokens=512, reply_attempts=1).judge(items(5), "targets")
        assert requests(server) == 5


def abstentions(path: Path, **settings) -> None:
    """Five questions whose every reply was cut."""
    with running(ONLY_CUT) as server:
        verdicts = judge(server, path, **settings).judge(items(5), "targets")
    assert {verdict.status for verdict in verdicts} == {"abstained"}


def test_an_abstention_stays_until_it_may_end_otherwise(path):
    abstentions(path, max_reply_tokens=64, reply_attempts=2)
    limits = {"max_reply_tokens": 64, "reply_attempts": 2}
    with running(Settings()) as server:
        for same in ({}, {"max_reply_tokens": 32}, {"reply_attempts": 1}, {"timeout": 9.0, "max_concurrency": 1}):
            verdicts = judge(server, path, **limits | same).judge(items(5), "targets")
            assert {verdict.status for verdict in verdicts} == {"abstained"}
        assert requests(server) == 0
        verdicts = judge(server, path, **limits | {"max_reply_tokens": 1024}).judge(items(5), "targets")
        assert {verdict.status for verdict in verdicts} == {"ok"}
        assert requests(server) == 5


def test_more_attempts_go_on_where_the_others_ended(path):
    abstentions(path, reply_attempts=2)
    with running(ONLY_CUT) as server:
        judge(server, path, reply_attempts=3).judge(items(5), "targets")
        assert requests(server) == 5, "two of the three replies to each were paid for"
        judge(server, path, reply_attempts=3).judge(items(5), "targets")
        assert requests(server) == 5


def test_broken_replies_before_a_kill_count(path):
    """A question whose worker died after a broken reply goes on with the next reply."""
    abstentions(path, reply_attempts=2)
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM requests")
    with running(ONLY_CUT) as server:
        judge(server, path, reply_attempts=3).judge(items(5), "targets")
        assert requests(server) == 5


def test_redo_asks_again_what_was_abstained_on_and_nothing_else(tmp_path, path):
    make_run(tmp_path / "run", 12)

    def label(server, *more: str) -> list[str]:
        command = ["label", "--config", str(tmp_path / "run" / "recipe.yaml"), "--label.judge", "llm"]
        command += ["--judge.model", "m", "--judge.base_url", f"http://127.0.0.1:{server.port}/v1"]
        main([*command, "--judge.ledger", str(path), *more])
        return [row["status"] for row in read_table(tmp_path / "run/label/labels.parquet", LABELS).to_pylist()]

    with running(Settings(fault_rate=0.7, faults="truncated", seed=3)) as server:
        first = label(server, "--judge.reply_attempts", "1")
    assert {"ok", "abstained"} == set(first)
    with running(ONLY_CUT) as server:
        again = label(server, "--judge.reply_attempts", "1", "--redo", "label")
        assert again == first
        assert requests(server) == first.count("abstained")
        # Another run folder with the same ledger was not asked to do anything anew.
        make_run(tmp_path / "other", 12)
        main(
            [
                *("label", "--config", str(tmp_path / "other" / "recipe.yaml"), "--label.judge", "llm"),
                *("--judge.model", "m", "--judge.base_url", f"http://127.0.0.1:{server.port}/v1"),
                *("--judge.ledger", str(path), "--judge.reply_attempts", "1"),
            ]
        )
        assert requests(server) == first.count("abstained")
    with running(Settings()) as server:
        assert set(label(server, "--judge.reply_attempts", "1", "--redo", "label")) == {"ok"}


def version_1(path: Path, statuses: list[str], reply_tokens: int = 40) -> None:
    """A ledger as the first schema has it, of `items`: verdicts, and abstentions after a cut reply."""
    with sqlite3.connect(path) as connection:
        connection.executescript(VERSION_1)
        for item, status in zip(items(len(statuses)), statuses, strict=True):
            question = judge_question(item, "targets", "sentence")
            parts = [MODEL, "sentence", 1, "targets", question.system, question.user]
            key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
            verdict = json.dumps({"sentence": 1}) if status == "ok" else None
            problem = None if status == "ok" else "truncated: finish_reason is 'length', not 'stop'"
            request = (key, MODEL, "sentence", 1, "targets", question.content_sha256, status, verdict, problem, 1.0)
            connection.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", request)
            for _ in range(1 if status == "ok" else 3):
                tried = (key, MODEL, 1.0, 0.1, "ok" if status == "ok" else "broken", problem, "raw", 100, reply_tokens)
                connection.execute("INSERT INTO attempts VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)", tried)


def test_nothing_paid_for_in_an_older_ledger_is_lost(path, capsys):
    version_1(path, ["ok"] * 5)
    with running(Settings()) as server:
        first = judge(server, path, template="sentence", response_format="json_object")
        assert [verdict.sentence_relevant for verdict in first.judge(items(5), "targets")] == [True] * 5
        assert "5 finished requests of an older tppo" in capsys.readouterr().err
        first.judge(items(5), "targets")
        assert "older tppo" not in capsys.readouterr().err, "said once"
        assert requests(server) == 0
        judge(server, path, template="sentence", response_format="none").judge(items(5), "targets")
        assert requests(server) == 5, "they never stand for two formats"
    with JudgeLedger(path) as ledger:
        assert ledger.spent(MODEL)[0] >= 500
        assert [row["assumed"] for row in ledger.attempts()] == [1] * 5 + [0] * 5


def test_an_older_verdict_is_not_taken_for_one_of_another_temperature(path):
    version_1(path, ["ok"] * 5)
    with running(Settings()) as server:
        judge(server, path, template="sentence", temperature=0.7).judge(items(5), "targets")
        assert requests(server) == 5
        judge(server, path, template="sentence").judge(items(5), "targets")
        assert requests(server) == 5


def test_an_older_abstention_is_tried_again_when_its_replies_were_cut_and_may_be_longer(path):
    version_1(path, ["abstained"] * 4, reply_tokens=64)
    with running(Settings()) as server:
        old = judge(server, path, template="sentence", max_reply_tokens=64).judge(items(4), "targets")
        assert {verdict.status for verdict in old} == {"abstained"}
        assert requests(server) == 0
        new = judge(server, path, template="sentence", max_reply_tokens=1024).judge(items(4), "targets")
        assert {verdict.status for verdict in new} == {"ok"}
        assert requests(server) == 4


def test_an_older_ledger_is_shown_without_being_touched(path, capsys):
    version_1(path, ["ok", "abstained"])
    before = path.read_bytes()
    main(["ledger", "--judge.ledger", str(path)])
    assert "truncated" in capsys.readouterr().err
    main(["ledger", "--judge.ledger", str(path), "--ledger.export", str(path.with_suffix(".jsonl"))])
    assert len(path.with_suffix(".jsonl").read_text().splitlines()) == 4
    assert path.read_bytes() == before
