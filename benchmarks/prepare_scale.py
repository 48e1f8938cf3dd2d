"""Time and peak memory of `tppo prepare` on a made-up log of the shape of AOL, and with users of very many rows.

    python benchmarks/prepare_scale.py --users 27778                                      # 1.0 million rows
    python benchmarks/prepare_scale.py --users 1000000 --heavy_users 4                    # 36.4 million, as many as AOL
    python benchmarks/prepare_scale.py --users 1000000 --heavy_users 1000                 # 136 million

A query is two to four words of a vocabulary with Zipf's frequencies; a user comes back to an earlier query in 3 of 10
rows; half of the rows have a click. Rows are in the order of users and time, as AOL's. Rows per second count from the
first byte read to the last table written. Memory is the largest sum of the resident sizes of the command's processes,
looked at five times a second: pages that they share (libraries) count for each. Processor time is that of all of them,
their start included: on a machine with other work it says more than the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from tppo.core.run import MANIFEST

HEADER = "AnonID\tQuery\tQueryTime\tItemRank\tClickURL\n"
START = datetime(2006, 3, 1)
DAYS = 90
VOCABULARY = 60_000
SYLLABLES = [*("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu"), *("pla", "gre", "sti", "cho", "fun", "tor")]


def vocabulary(generator: np.random.Generator) -> list[str]:
    """Words of two to four syllables; none has a digit, so none is rejected as a number."""
    lengths = generator.integers(2, 5, VOCABULARY)
    return ["".join(generator.choice(SYLLABLES, size)) for size in lengths]


def user_rows(user: int, count: int, words: list[str], generator: np.random.Generator) -> Iterator[str]:
    """Lines of a user, in the order of time."""
    seconds = np.sort(generator.integers(0, DAYS * 86_400, count)).tolist()
    # u^3 has the long tail of word frequencies, and is many times faster to draw than Zipf's law itself.
    places = (generator.random((count, 4)) ** 3 * VOCABULARY).astype(np.int64).tolist()
    lengths = generator.integers(2, 5, count).tolist()
    returns = generator.random(count).tolist()
    seen: list[str] = []
    for index in range(count):
        if seen and returns[index] < 0.3:
            query = seen[int(returns[index] / 0.3 * len(seen))]
        else:
            query = " ".join(words[place] for place in places[index][: lengths[index]])
            seen.append(query)
        when = START + timedelta(seconds=seconds[index])
        host = f"http://www.{words[places[index][3]]}.com" if returns[index] * 10 % 1 < 0.5 else ""
        yield f"{user + 1}\t{query}\t{when}\t{1 if host else ''}\t{host}\n"


def write_log(path: Path, users: int, rows: int, heavy_users: int, heavy_rows: int, seed: int = 0) -> int:
    """Write the log; returns the number of rows. Heavy users stand among the others."""
    generator = np.random.default_rng(seed)
    words = vocabulary(generator)
    heavy = set(generator.choice(users + heavy_users, heavy_users, replace=False).tolist())
    with path.open("w", encoding="utf-8") as file:
        file.write(HEADER)
        for user in range(users + heavy_users):
            file.writelines(user_rows(user, heavy_rows if user in heavy else rows, words, generator))
    return users * rows + heavy_users * heavy_rows


def tree_memory(root: int) -> int:
    """Resident bytes of a process and all below it (Linux)."""
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        try:
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in Path(f"/proc/{process}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, IndexError):
            continue  # it has ended
    return total


def measure(log: Path, folder: Path, flags: list[str]) -> dict[str, Any]:
    """Prepare the log by the command a user gives."""
    command = [sys.executable, "-m", "tppo", "prepare", "--run_dir", str(folder), "--prepare.format", "aol"]
    command += ["--prepare.source", json.dumps([str(log)]), *flags]
    peak, before = 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"prepare ended with status {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts = json.loads((folder / "prepare" / MANIFEST).read_text(encoding="utf-8"))["facts"]
    return {
        "rows": facts["rows_read"],
        "log_mb": round(log.stat().st_size / 1e6, 1),
        "users": facts["users"],
        "heavy_users": facts["heavy_users"],
        "examples": sum(facts["examples"].values()),
        "seconds": facts["seconds"],
        "seconds_with_start": round(time.monotonic() - start, 1),
        "rows_per_second": facts["rows_per_second"],
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_mib": peak >> 20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=27_778, help="ordinary users")
    parser.add_argument("--rows", type=int, default=36, help="rows of each")
    parser.add_argument("--heavy_users", type=int, default=0, help="users with very many rows")
    parser.add_argument("--heavy_rows", type=int, default=100_000, help="rows of each")
    parser.add_argument("--folder", type=Path, help="where to work; the log there is used again (default: temporary)")
    parser.add_argument("--output", type=Path, help="write the measures as JSON")
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        name = f"log-{arguments.users}x{arguments.rows}-{arguments.heavy_users}x{arguments.heavy_rows}.tsv"
        log = (arguments.folder or Path(temporary)) / name
        if not log.exists():
            unfinished = log.with_suffix(".tmp")
            write_log(unfinished, arguments.users, arguments.rows, arguments.heavy_users, arguments.heavy_rows)
            unfinished.replace(log)
        measures = measure(log, Path(temporary) / "run", flags)
    print(json.dumps(measures, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(measures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
