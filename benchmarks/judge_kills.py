"""kill -9 of `tppo label` at random moments on one ledger: is a finished verdict ever lost, or asked again?

    python benchmarks/judge_kills.py --kills 200 --seed 0 --output kills.json

Each run is killed (its whole process group) a random time after its first request of the run reached the server;
a share of further kills lands while the program still starts. When a run finishes before its kill, the next one gets
fresh items on the same ledger. At the end a run without a kill finishes what is left.

After each kill the ledger is read without writing. What is counted:
- verdicts lost: finished after an earlier kill, not finished now. Has to be 0.
- asked again: requests that reached the server after a kill for a content finished by then, or within one run after
  its verdict was stored. Has to be 0.
- asked twice: contents under way at a kill (no answer yet, or an answer that did not reach the ledger) that a later
  run asked again. At most the concurrency a kill: printed as total and most.
A request is tied to its row by `content_sha256`, the hash of the user message.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from judge_harness import (
    FINISHED,
    Labelling,
    Request,
    Settings,
    add_transport_options,
    check_labels,
    finished,
    kill,
    make_items,
    read_ledger,
    read_log,
    report,
    server_stats,
    spawned,
    transport_options,
    workplace,
)


@dataclass(frozen=True)
class Kill:
    """A run started, killed between `signalled` and `moment` (monotonic seconds), and what the ledger held then.

    `sent`: the run had sent requests; `busy`: the server was working on some right before the kill.
    """

    started: float
    signalled: float
    moment: float
    finished: frozenset[str]
    sent: bool
    busy: bool


class Killer:
    """Starts runs on one ledger and kills them."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, port: int) -> None:
        self.arguments, self.folder, self.port = arguments, folder, port
        self.ledger, self.random = folder / "ledger.sqlite", random.Random(arguments.seed)
        self.run_dirs: list[Path] = []
        self.kills: list[Kill] = []
        self.next_items()

    def next_items(self) -> None:
        count = self.arguments.items
        first = count * len(self.run_dirs)
        self.run_dirs.append(make_items(self.folder / f"run{len(self.run_dirs)}", count, first))

    def labelling(self, run_dir: Path) -> Labelling:
        return Labelling(run_dir, self.port, self.ledger, transport_options(self.arguments))

    def one(self, early: bool) -> None:
        """One run and its kill; nothing is counted when the run was over before."""
        settings = self.arguments
        delay = self.random.uniform(0, settings.early_within if early else settings.kill_within)
        before, started = server_stats(self.port)["requests"], time.monotonic()
        process = self.labelling(self.run_dirs[-1]).start(self.folder / "label.log")
        try:
            self.wait_for_the_moment(process, before, delay, early)
        except BaseException:
            kill(process)
            raise
        if process.poll() is not None:
            # 2: some items failed, which is for the last run to mend; without a request, the call itself is wrong.
            asked = server_stats(self.port)["requests"] > before
            if process.returncode and not (process.returncode == 2 and asked):
                raise SystemExit(f"tppo label stopped with {process.returncode}: see {self.folder / 'label.log'}")
            self.next_items()
            return
        stats, signalled = server_stats(self.port), time.monotonic()
        kill(process)
        moment = time.monotonic()
        self.wait_for_quiet()
        sent, busy = stats["requests"] > before, stats["in_flight"] > 0
        self.kills.append(Kill(started, signalled, moment, frozenset(finished(self.ledger)), sent, busy))

    def wait_for_the_moment(self, process: subprocess.Popen[bytes], before: int, delay: float, early: bool) -> None:
        """`delay` seconds after the first request of the run (after its start, for an early kill), or its end."""
        while not early and process.poll() is None and server_stats(self.port)["requests"] == before:
            time.sleep(0.005)
        deadline = time.monotonic() + delay
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)

    def wait_for_quiet(self) -> None:
        """Until the server has noticed that the client is gone, and has logged what was under way."""
        deadline = time.monotonic() + 60
        while server_stats(self.port)["in_flight"] and time.monotonic() < deadline:
            time.sleep(0.01)

    def finish(self) -> list[int]:
        """Every run once more without a kill, so that nothing may be missing afterwards."""
        return [self.labelling(run_dir).run(self.folder / "label.log") for run_dir in self.run_dirs]


def asked_again(kills: Sequence[Kill], log: Sequence[Request]) -> set[str]:
    """Contents that were requested after a kill at which they were finished already."""
    first_finished: dict[str, float] = {}
    for each in kills:
        for sha256 in each.finished:
            first_finished.setdefault(sha256, each.moment)
    return {r.sha256 for r in log if r.sha256 in first_finished and r.arrived > first_finished[r.sha256]}


def asked_again_within_a_run(kills: Sequence[Kill], log: Sequence[Request]) -> set[str]:
    """Contents requested again by the very run that had got their verdict.

    A reply that came whole counts as a verdict; a killed run's last replies may not have been read, but then that
    run asks nothing more.
    """
    answered: dict[str, float] = {}
    found = set()
    moments = [each.moment for each in kills]
    for request in sorted(log, key=lambda r: r.arrived):
        before = answered.get(request.sha256)
        # A kill between the answer and this request: another run's business, see `asked_again`.
        if before is not None and not any(before < moment < request.arrived for moment in moments):
            found.add(request.sha256)
        if request.decision == "ok" and request.complete:
            answered[request.sha256] = request.ended
    return found


def lost(kills: Sequence[Kill], last: set[str]) -> set[str]:
    """Contents finished after one kill and not after a later one, or at the end."""
    missing: set[str] = set()
    known: set[str] = set()
    for state in [*(each.finished for each in kills), last]:
        missing |= known - state
        known |= state
    return missing


def under_way(each: Kill, log: Sequence[Request]) -> set[str]:
    """Contents that the server was busy with when the client died."""
    return {r.sha256 for r in log if r.arrived <= each.moment and r.ended >= each.signalled}


def asked_twice(kills: Sequence[Kill], log: Sequence[Request]) -> list[int]:
    """For each kill: contents under way then, or answered and not stored, that were asked again later."""
    counts = []
    for each in kills:
        run = [r for r in log if each.started < r.arrived <= each.moment]
        answered = {r.sha256 for r in run if r.decision == "ok" and r.complete}
        open_then = (under_way(each, run) | answered) - each.finished
        later = {r.sha256 for r in log if r.arrived > each.moment}
        counts.append(len(open_then & later))
    return counts


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    log_path = folder / "log.jsonl"
    settings = Settings(
        fault_rate=arguments.fault_rate,
        rate_limit=arguments.rate_limit,
        latency=arguments.latency,
        seed=arguments.seed,
        log=str(log_path),
    )
    with spawned(settings) as port:
        killer = Killer(arguments, folder, port)
        while sum(each.busy for each in killer.kills) < arguments.kills:
            killer.one(early=killer.random.random() < arguments.early_share)
        statuses = killer.finish()
    states = read_ledger(killer.ledger)
    log, kills = read_log(log_path), killer.kills
    done = {sha256 for sha256, status in states.items() if status in FINISHED}
    twice = asked_twice(kills, log)
    open_at_kills = [len(under_way(each, log)) for each in kills if each.busy]
    labels: Counter[str] = Counter()
    for run_dir in killer.run_dirs:
        labels.update(check_labels(run_dir))
    return {
        "kills_while_requests_were_under_way": sum(each.busy for each in kills),
        "kills_before_the_first_request": sum(not each.sent for each in kills),
        "kills_between_requests_or_after_the_last": sum(each.sent and not each.busy for each in kills),
        "runs_of_items": len(killer.run_dirs),
        "items": arguments.items * len(killer.run_dirs),
        "finished_at_the_end": len(done),
        "items_missing_at_the_end": arguments.items * len(killer.run_dirs) - len(states),
        "exit_status_of_the_last_runs": statuses,
        "verdicts_lost": len(lost(kills, done)),
        "finished_verdicts_asked_again": len(asked_again(kills, log)),
        "asked_again_within_a_run": len(asked_again_within_a_run(kills, log)),
        "in_flight_at_a_kill_mean": sum(open_at_kills) / len(open_at_kills),
        "in_flight_at_a_kill_most": max(open_at_kills),
        "in_flight_asked_twice_total": sum(twice),
        "in_flight_asked_twice_most_at_a_kill": max(twice, default=0),
        "concurrency": arguments.concurrency,
        "finished_between_kills_fewest": fewest_between(kills),
        "labels_equal_to_truth": labels["equal"],
        "labels_wrong": labels["wrong"],
        "labels_abstained": labels["abstained"],
        "requests": len(log),
    }


def fewest_between(kills: Sequence[Kill]) -> int:
    """Fewest verdicts that a run got stored before its kill: that the runs did move on is part of the claim."""
    states = [frozenset(), *(each.finished for each in kills if each.sent)]
    return min((len(b - a) for a, b in pairwise(states)), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="kills to land while requests are under way")
    parser.add_argument("--items", type=int, default=400, help="items of a run; more are made when they are used up")
    parser.add_argument(
        "--kill_within", type=float, default=2.0, help="latest kill, seconds after a run's first request"
    )
    parser.add_argument("--early_share", type=float, default=0.05, help="share of kills that aim at the start-up")
    parser.add_argument("--early_within", type=float, default=3.0, help="latest of those, seconds after the start")
    parser.add_argument("--fault_rate", type=float, default=0.1)
    parser.add_argument("--rate_limit", type=float, default=0.0)
    parser.add_argument("--latency", type=float, default=0.05, help="of the server, in seconds")
    add_transport_options(parser, concurrency=16, timeout=2.0, reply_attempts=3)
    arguments = parser.parse_args()
    with workplace(arguments) as folder:
        report("kill -9 of tppo label", measure(arguments, folder), arguments)


if __name__ == "__main__":
    main()
