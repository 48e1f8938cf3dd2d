from __future__ import annotations

import sqlite3
import stat

import pytest

from tppo.core.common import UserError
from tppo.judge.ledger import Attempt, JudgeLedger, Outcome
from tppo.judge.prompts import Question

QUESTION = Question("sentence", "targets", "system", "user", ())
OK = Outcome("ok", {"sentence": 1}, None)


def attempt(outcome: str = "ok", tokens: int = 5) -> Attempt:
    return Attempt(1.0, 0.5, outcome, None if outcome == "ok" else f"{outcome}: why", "raw", tokens, 1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "judge.sqlite"


def test_finished_requests_are_remembered_failed_ones_are_not(path):
    with JudgeLedger(path) as ledger:
        ledger.record("a", "m", attempt("broken"), None, QUESTION)
        ledger.record("a", "m", attempt(), OK, QUESTION)
        ledger.record("b", "m", attempt("broken"), Outcome("abstained", None, "count: 2"), QUESTION)
        ledger.record("c", "m", attempt("timeout"), Outcome("failed", None, "timeout"), QUESTION)
    with JudgeLedger(path) as ledger:
        assert ledger.outcomes(["a", "b", "c", "d"]) == {"a": OK, "b": Outcome("abstained", None, "count: 2")}
        assert ledger.spent("m") == (20, 4)
        assert ledger.spent("other") == (0, 0)
        ledger.record("c", "m", attempt(), OK, QUESTION)
        assert ledger.outcomes(["c"]) == {"c": OK}
        (row,) = ledger.totals()
        assert (row["ok"], row["abstained"], row["failed"], row["attempts"], row["broken_replies"]) == (2, 1, 0, 5, 2)
        assert {(p["outcome"], p["fault"], p["attempts"]) for p in ledger.problems()} == {
            ("broken", "broken", 2),
            ("timeout", None, 1),
        }
        assert [row["reply"] for row in ledger.attempts()] == ["raw"] * 5


def test_an_attempt_and_its_outcome_are_stored_together_or_not_at_all(path):
    with JudgeLedger(path) as ledger:
        with pytest.raises(sqlite3.IntegrityError):
            ledger.record("a", "m", attempt(), Outcome("ok", None, None), QUESTION)  # ok without a verdict
        assert ledger.attempts() == []
        ledger.record("a", "m", attempt(), OK, QUESTION)
        assert len(ledger.attempts()) == 1


def test_a_full_disk_is_said_and_loses_nothing(path):
    with JudgeLedger(path) as ledger:
        ledger.record("a", "m", attempt(), OK, QUESTION)
        (pages,) = ledger.connection.execute("PRAGMA page_count").fetchone()
        ledger.connection.execute(f"PRAGMA max_page_count = {pages}")

        def fill() -> None:
            for number in range(1000):
                ledger.record(str(number), "m", attempt(), OK, QUESTION)

        with pytest.raises(UserError, match="cannot be written: database or disk is full"):
            fill()
    with JudgeLedger(path) as ledger:
        assert ledger.outcomes(["a"]) == {"a": OK}


def test_many_keys(path):
    with JudgeLedger(path) as ledger:
        for number in range(1200):
            ledger.record(str(number), "m", attempt(), OK, QUESTION)
        assert len(ledger.outcomes(map(str, range(2000)))) == 1200


def test_only_the_owner_may_read_it(path):
    with JudgeLedger(path):
        pass
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_is_no_ledger_is_refused(path, tmp_path):
    with pytest.raises(UserError, match="no judge model has been asked"):
        JudgeLedger(path, read_only=True)
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match="cannot be used"):
        JudgeLedger(path)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    with pytest.raises(UserError, match="something else"):
        JudgeLedger(other)
    with sqlite3.connect(tmp_path / "newer.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="version 99"):
        JudgeLedger(tmp_path / "newer.sqlite")


def test_a_damaged_file_is_said_to_be_one(path):
    with JudgeLedger(path) as ledger:
        for number in range(300):
            ledger.record(f"key {number}", "m", attempt(), OK, QUESTION)
    whole = path.read_bytes()
    page = 4096
    path.write_bytes(whole[:page] + bytes([7]) * (len(whole) - 2 * page) + whole[-page:])
    with JudgeLedger(path) as ledger:
        for use in (
            lambda: ledger.outcomes([f"key {number}" for number in range(300)]),
            ledger.attempts,
            lambda: ledger.record("new", "m", attempt(), OK, QUESTION),
        ):
            with pytest.raises(UserError, match=r"judge\.sqlite is damaged .*malformed.*\.recover"):
                use()
