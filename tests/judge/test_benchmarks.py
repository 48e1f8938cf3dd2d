"""The parts of the judge benchmarks that decide what is counted, on made-up logs, ledgers and labels."""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import judge_faults
import judge_harness
import judge_kills
import judge_overhead
import pytest
from judge_kills import Kill

from tests.helpers.fault_server import Request, Settings, read_log, spawned, truth
from tests.helpers.many_items import item, make_run
from tppo.core.tables import LABELS, write_table
from tppo.judge.verdict import Verdict, WordVerdict, split_response, verdict_to_row


def request(sha256: str, arrived: float, ended: float, decision: str = "ok", **fields: object) -> Request:
    values = {"complete": decision == "ok", "client_gone": False, **fields}
    return Request(0, arrived, sha256, 1, decision, ended=ended, **values)  # type: ignore[arg-type]


def kill(moment: float, *finished: str, started: float = 0.0) -> Kill:
    return Kill(started, moment - 0.01, moment, frozenset(finished), sent=True, busy=True)


def test_lost_verdicts_are_those_once_finished_and_later_not():
    kills = [kill(1, "a"), kill(2, "a", "b"), kill(3, "b", "c")]
    assert judge_kills.lost(kills, {"a", "b", "c"}) == {"a"}
    assert judge_kills.lost(kills[:2], {"a"}) == {"b"}
    assert judge_kills.lost(kills[:2], {"a", "b", "z"}) == set()


def test_asked_again_is_a_request_after_the_kill_that_saw_it_finished():
    log = [request("a", 0.1, 0.2), request("a", 1.5, 1.6), request("b", 0.5, 0.6), request("b", 1.2, 1.3)]
    assert judge_kills.asked_again([kill(1, "a")], log) == {"a"}
    assert judge_kills.asked_again([kill(1), kill(2, "a", "b")], log) == set()


def test_asked_again_within_a_run_needs_no_kill_in_between():
    log = [request("a", 0.1, 0.2), request("a", 0.3, 0.4), request("b", 0.5, 0.6), request("b", 1.2, 1.3)]
    log += [request("c", 0.1, 0.2, "truncated"), request("c", 0.3, 0.4), request("d", 0.1, 0.2)]
    assert judge_kills.asked_again_within_a_run([kill(1)], log) == {"a"}
    assert judge_kills.asked_again_within_a_run([], log) == {"a", "b"}


def test_asked_twice_counts_what_was_under_way_or_answered_but_not_stored():
    first = [
        request("stored", 0.2, 0.3),
        request("answered", 0.9, 0.95),
        request("open", 0.98, 1.001, "ok", complete=False, client_gone=True),
        request("failed before", 0.2, 0.3, "500"),
        request("timed out before", 0.2, 0.5, "hang", client_gone=True),
        request("never again", 0.9, 0.95),
    ]
    names = ("answered", "open", "failed before", "timed out before")
    later = [request(name, 2.0, 2.1) for name in names]
    assert judge_kills.under_way(kill(1), first) == {"open"}
    assert judge_kills.asked_twice([kill(1, "stored")], [*first, *later]) == [2]
    assert judge_kills.asked_twice([kill(1, "stored"), kill(3, *names, started=1.5)], [*first, *later]) == [2, 0]


def test_fewest_between_leaves_kills_during_the_start_out():
    early = Kill(0, 1, 1, frozenset({"a", "b", "c"}), sent=False, busy=False)
    assert judge_kills.fewest_between([kill(1, "a", "b", "c"), early, kill(2, *"abcdefg")]) == 3
    assert judge_kills.fewest_between([]) == 0


_WRITER = """
import sqlite3, sys, time
ledger = sqlite3.connect(sys.argv[1])
ledger.execute("PRAGMA journal_mode=WAL")
ledger.execute("CREATE TABLE requests (key TEXT PRIMARY KEY, content_sha256 TEXT, status TEXT)")
for i, status in enumerate(["ok", "abstained", "failed", "ok"]):
    with ledger:
        ledger.execute("INSERT INTO requests VALUES (?, ?, ?)", (f"k{i}", f"c{i}", status))
ledger.execute("BEGIN IMMEDIATE")
ledger.execute("INSERT INTO requests VALUES ('k9', 'c9', 'ok')")
print("ready", flush=True)
time.sleep(600)
"""


def test_ledger_is_read_after_kill_nine_and_left_as_it_was(tmp_path):
    path = tmp_path / "ledger.sqlite"
    assert judge_harness.read_ledger(path) == {}
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    expected = {"c0": "ok", "c1": "abstained", "c2": "failed", "c3": "ok"}
    assert judge_harness.read_ledger(path) == expected  # the writer alive, in the middle of a transaction
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    before = path.read_bytes(), Path(f"{path}-wal").read_bytes()
    assert judge_harness.read_ledger(path) == expected
    assert judge_harness.finished(path) == {"c0", "c1", "c3"}
    assert (path.read_bytes(), Path(f"{path}-wal").read_bytes()) == before


def test_two_rows_of_one_content_are_not_taken_for_one(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with sqlite3.connect(path) as ledger:
        ledger.execute("CREATE TABLE requests (key TEXT PRIMARY KEY, content_sha256 TEXT, status TEXT)")
        ledger.executemany("INSERT INTO requests VALUES (?, 'c', 'ok')", [("k0",), ("k1",)])
    ledger.close()
    with pytest.raises(ValueError, match="2 requests have only 1"):
        judge_harness.read_ledger(path)


def test_labels_are_held_against_the_truth(tmp_path):
    make_run(tmp_path, 4)
    assert judge_harness.check_labels(tmp_path) == {"rows": 0}
    rows = []
    for number in range(4):
        example, response = item(number)
        parsed = split_response(response)
        words = [{"i": i, "word": word.text} for i, word in enumerate(parsed.words)]
        history = [{"kind": event.kind, "text": event.text} for event in example.history]
        shown = {"history": history, "next_queries": example.targets, "returned_queries": parsed.queries}
        right = truth({**shown, "words": words})
        scores = [word["score"] for word in right["words"]]
        if number == 1:
            scores[2] = 1 - scores[2]
        if number == 2:
            right["sentence"] = 1 - right["sentence"]
        verdict = Verdict(
            [WordVerdict(s, s == 1) for s in scores], right["sentence"], right["sentence"] == 1, "ok", None
        )
        if number == 3:
            verdict = Verdict(None, 0.0, False, "abstained", "cut")
        rows.append(verdict_to_row(example, 0, "targets", "j", response, verdict))
    (tmp_path / "label").mkdir()
    write_table(tmp_path / "label" / "labels.parquet", rows, LABELS)
    assert judge_harness.check_labels(tmp_path) == {"rows": 4, "equal": 1, "wrong": 2, "abstained": 1}


def test_rates_are_shares_of_what_the_server_allows():
    """100 items in 10 s at a limit of 20/s with half of the requests faulty: 200 admissions, all of them used."""
    log = [request(f"i{n}", n / 10, n / 10 + 0.1) for n in range(100)]
    log += [request(f"i{n}", n / 10, n / 10 + 0.05, "500") for n in range(100)]
    log += [request(f"i{n}", n / 10, n / 10, "rate_limited") for n in range(50)]
    found = judge_faults.rates(log, argparse.Namespace(rate_limit=20.0, fault_rate=0.5))
    assert found["seconds"] == pytest.approx(10.0)
    assert found["admitted_share_of_limit"] == pytest.approx(1.0)
    assert found["verdicts_share_of_ideal"] == pytest.approx(1.0)
    assert found["admitted_share_until_95_percent"] == pytest.approx(1.0, abs=0.05)
    counted = judge_faults.requests(log, {"requests": 250, "max_in_flight": 3}, 0.5)
    assert counted["requests_per_item"] == {"2": 50, "3": 50}
    assert counted["requests_by_decision"] == {"500": 100, "ok": 100, "rate_limited": 50}
    assert counted["server_cpu_ms_per_request"] == pytest.approx(2.0)


@pytest.mark.parametrize("client", ["httpx", "openai"])
def test_load_generator_sends_every_body_once(tmp_path, client):
    texts = [json.dumps({"history": [], "returned_queries": [str(n)]}) for n in range(12)]
    bodies = tmp_path / "bodies"
    calls = [{"model": "truth", "messages": [{"role": "user", "content": text}]} for text in texts]
    bodies.write_text("".join(json.dumps(call) + "\n" for call in calls))
    with spawned(Settings(log=str(tmp_path / "log"))) as port:
        command = [sys.executable, judge_overhead.__file__, "--generate", str(port), "--bodies", str(bodies)]
        subprocess.run([*command, "--concurrency", "5", "--client", client], check=True)
    log = read_log(tmp_path / "log")
    assert sorted(r.sha256 for r in log) == sorted(hashlib.sha256(text.encode()).hexdigest() for text in texts)
    assert all(r.decision == "ok" and r.complete for r in log)
