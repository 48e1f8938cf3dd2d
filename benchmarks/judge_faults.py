"""`tppo label` against a server that fails: is every item finished or listed, right, and how fast?

    python benchmarks/judge_faults.py --items 10000 --fault_rate 0.3 --rate_limit 200 --rounds 5 --output faults.json

Items are made up, one request each; the server (tests/helpers/fault_server.py) runs in a process of its own, knows the
right verdicts and turns away what exceeds the rate limit. A round is one call of `tppo label`; rounds go on while
items are listed as failed, `--rounds` at most.

Rates, of the first round, from the first request's arrival to the last one's end:
- admitted: requests that passed the rate limit (faults included) a second, as a share of the limit R. The ideal is 1.
- verdicts: finished items a second, as a share of R x (1 - fault rate): the most a client can get out of this server,
  since a fault uses up an admission.
Seconds in which nothing but the last stragglers (a hang, a long Retry-After) is under way count in both; the same
rates until 95% of the items were answered are printed beside them.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

from judge_harness import (
    Labelling,
    Request,
    Settings,
    add_transport_options,
    check_labels,
    histogram,
    make_items,
    read_ledger,
    read_log,
    report,
    server_stats,
    span,
    spawned,
    transport_options,
    workplace,
)

TURNED_AWAY = ("rate_limited", "bad_request")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    run_dir, ledger, log = make_items(folder / "run", arguments.items), folder / "ledger.sqlite", folder / "log.jsonl"
    settings = Settings(
        fault_rate=arguments.fault_rate,
        rate_limit=arguments.rate_limit,
        latency=arguments.latency,
        seed=arguments.seed,
        log=str(log),
    )
    rounds = []
    with spawned(settings) as port:
        idle_seconds = server_stats(port)["cpu_seconds"]  # what its start cost
        labelling = Labelling(run_dir, port, ledger, transport_options(arguments))
        while len(rounds) < arguments.rounds:
            start = time.monotonic()
            status = labelling.run(folder / "label.log")
            counts = Counter(read_ledger(ledger).values())
            rounds.append({"exit_status": status, "seconds": round(time.monotonic() - start, 1), **counts})
            if len(rounds) == 1:
                first_round = read_log(log)
            if not counts["failed"]:
                break
        stats = server_stats(port)
    return {
        **items(arguments.items, ledger, run_dir),
        "rounds": rounds,
        **rates(first_round, arguments),
        **requests(read_log(log), stats, stats["cpu_seconds"] - idle_seconds),
    }


def items(count: int, ledger: Path, run_dir: Path) -> dict[str, Any]:
    """How the items ended. `missing` is neither finished nor listed as failed: it has to be 0."""
    states = Counter(read_ledger(ledger).values())
    labels = check_labels(run_dir)
    return {
        "items": count,
        "items_ok": states["ok"],
        "items_abstained": states["abstained"],
        "items_failed": states["failed"],
        "items_missing": count - sum(states.values()),
        "label_rows": labels["rows"],
        "labels_equal_to_truth": labels.get("equal", 0),
        "labels_wrong": labels.get("wrong", 0),
        "labels_abstained": labels.get("abstained", 0),
    }


def rates(log: list[Request], arguments: argparse.Namespace) -> dict[str, Any]:
    if not log:
        return {"seconds": 0.0}
    verdicts = sorted(r.ended for r in log if r.decision == "ok" and r.complete)
    admitted = [r for r in log if r.decision not in TURNED_AWAY]
    limit, start, seconds = arguments.rate_limit, min(r.arrived for r in log), span(log)
    ideal = limit * (1 - arguments.fault_rate)
    result: dict[str, Any] = {
        "seconds": seconds,
        "admitted_per_second": len(admitted) / seconds,
        "verdicts_per_second": len(verdicts) / seconds,
    }
    if limit and verdicts:
        end = verdicts[int(0.95 * (len(verdicts) - 1))]
        early = [r for r in admitted if r.arrived <= end]
        result |= {
            "admitted_share_of_limit": len(admitted) / seconds / limit,
            "verdicts_share_of_ideal": len(verdicts) / seconds / ideal,
            "admitted_share_until_95_percent": len(early) / max(end - start, 1e-9) / limit,
            "verdicts_share_until_95_percent": 0.95 * len(verdicts) / max(end - start, 1e-9) / ideal,
        }
    return result


def requests(log: list[Request], stats: dict[str, Any], cpu_seconds: float) -> dict[str, Any]:
    per_item = Counter(r.sha256 for r in log if r.sha256)
    answered = Counter(r.sha256 for r in log if r.decision == "ok" and r.complete)
    return {
        "requests_sent": stats["requests"],
        "requests_by_decision": dict(sorted(Counter(r.decision for r in log).items())),
        "requests_per_item": histogram(list(per_item.values())),
        "items_answered_more_than_once": sum(count > 1 for count in answered.values()),
        "most_requests_under_way": stats["max_in_flight"],
        "server_cpu_ms_per_request": 1e3 * cpu_seconds / max(1, stats["requests"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--fault_rate", type=float, default=0.3)
    parser.add_argument("--rate_limit", type=float, default=200.0, help="R, requests a second; 0: no limit")
    parser.add_argument("--latency", type=float, default=0.02, help="of the server, in seconds")
    parser.add_argument("--rounds", type=int, default=1, help="most calls of `tppo label`")
    add_transport_options(parser, concurrency=64, timeout=2.0, reply_attempts=3)
    arguments = parser.parse_args()
    with workplace(arguments) as folder:
        report("tppo label against a failing server", measure(arguments, folder), arguments)


if __name__ == "__main__":
    main()
