"""Throughput of `tppo label` against a bare asyncio load generator: same server, same requests, same concurrency.

    python benchmarks/judge_overhead.py --items 2000 --pairs 5 --latency 0.1 --latency_max 0.5 --output overhead.json

A first run of `tppo label` (not measured) makes the server keep the bodies of the requests; the load generator sends
those very bodies, with N workers, no ledger, no checks, no retries. Both clients are processes of their own. Measured
runs alternate, and the order within a pair does, too. Every run of `tppo label` starts with an empty ledger.

Throughput is requests answered by the time between the first arrival and the last answer, as the server saw them: the
start of Python does not count, the slow start of `tppo label` and its writing of the ledger do. The server's latencies
are uniform between the two values, seeded by content, so that both clients wait the same in all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
from judge_harness import (
    Labelling,
    Settings,
    add_transport_options,
    check_labels,
    make_items,
    read_log,
    report,
    span,
    spawned,
    transport_options,
    workplace,
)


async def generate_load(port: int, bodies: list[bytes], concurrency: int, client: str) -> None:
    """Send every body once, `concurrency` at a time, and read every answer."""
    waiting = iter(bodies)
    url = f"http://127.0.0.1:{port}/v1"
    if client == "openai":
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as openai_client:
            await asyncio.gather(*(_ask_openai(openai_client, waiting) for _ in range(concurrency)))
        return
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=60) as http_client:
        await asyncio.gather(*(_ask_httpx(http_client, url, waiting) for _ in range(concurrency)))


async def _ask_openai(client: openai.AsyncOpenAI, waiting: Iterator[bytes]) -> None:
    for body in waiting:
        await client.chat.completions.create(**json.loads(body))


async def _ask_httpx(client: httpx.AsyncClient, url: str, waiting: Iterator[bytes]) -> None:
    headers = {"Content-Type": "application/json"}
    for body in waiting:
        answer = await client.post(f"{url}/chat/completions", content=body, headers=headers)
        answer.raise_for_status().json()


class Bench:
    """Runs both clients against servers of one kind; every run gets a server and a log of its own."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder, self.runs = arguments, folder, 0
        self.run_dir = make_items(folder / "run", arguments.items)
        self.bodies = folder / "bodies.jsonl"

    def server(self, log: Path, bodies: str = "") -> Settings:
        a = self.arguments
        return Settings(latency=a.latency, latency_max=a.latency_max, seed=a.seed, log=str(log), bodies=bodies)

    def label(self, bodies: str = "") -> float:
        """Requests a second of `tppo label`, whose labels have to be right and complete."""
        self.runs += 1
        log, ledger = self.folder / f"log{self.runs}.jsonl", self.folder / f"ledger{self.runs}.sqlite"
        with spawned(self.server(log, bodies)) as port:
            options = ("--redo+", "label", *transport_options(self.arguments))
            status = Labelling(self.run_dir, port, ledger, options).run(self.folder / "label.log")
        labels = check_labels(self.run_dir)
        if status or labels.get("equal") != self.arguments.items:
            raise SystemExit(f"tppo label: exit status {status}, labels {labels}; see {self.folder / 'label.log'}")
        return self.throughput(log)

    def bare(self) -> float:
        """Requests a second of the load generator."""
        self.runs += 1
        log = self.folder / f"log{self.runs}.jsonl"
        with spawned(self.server(log)) as port:
            command = [sys.executable, __file__, "--generate", str(port), "--bodies", str(self.bodies)]
            command += ["--concurrency", str(self.arguments.concurrency), "--client", self.arguments.client]
            subprocess.run(command, check=True)
        return self.throughput(log)

    def throughput(self, log: Path) -> float:
        requests = read_log(log)
        good = sum(r.decision == "ok" and r.complete for r in requests)
        if good != self.arguments.items or len(requests) != good:
            raise SystemExit(f"{log}: {good} of {len(requests)} requests answered, {self.arguments.items} items")
        return good / span(requests)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    bench = Bench(arguments, folder)
    bench.label(bodies=str(bench.bodies))
    pairs = []
    for number in range(arguments.pairs):
        if number % 2:
            bare = bench.bare()
            label = bench.label()
        else:
            label = bench.label()
            bare = bench.bare()
        pairs.append((label, bare))
    ratios = [label / bare for label, bare in pairs]
    mean_latency = (arguments.latency + max(arguments.latency, arguments.latency_max)) / 2
    return {
        "pairs": len(pairs),
        "label_requests_per_second": [round(label, 2) for label, _ in pairs],
        "bare_requests_per_second": [round(bare, 2) for _, bare in pairs],
        "most_by_concurrency_and_latency": arguments.concurrency / mean_latency if mean_latency else None,
        "ratio_median": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--latency", type=float, default=0.1, help="least latency of the server, in seconds")
    parser.add_argument("--latency_max", type=float, default=0.5, help="largest; latencies are uniform in between")
    parser.add_argument("--client", choices=["httpx", "openai"], default="httpx", help="of the load generator")
    parser.add_argument("--generate", type=int, help=argparse.SUPPRESS)  # the load generator's process: a port
    parser.add_argument("--bodies", type=Path, help=argparse.SUPPRESS)
    add_transport_options(parser, concurrency=16, timeout=60.0, reply_attempts=1)
    arguments = parser.parse_args()
    if arguments.generate:
        bodies = arguments.bodies.read_bytes().splitlines()
        asyncio.run(generate_load(arguments.generate, bodies, arguments.concurrency, arguments.client))
        return
    with workplace(arguments) as folder:
        report("throughput of tppo label and of a bare client", measure(arguments, folder), arguments)


if __name__ == "__main__":
    main()
