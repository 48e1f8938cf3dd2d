"""Time and peak memory of `prepare` on 1x, 10x and 100x of the synthetic log (400 users, 60 events each).

    python benchmarks/prepare_scaling.py --scales 1 10 100 --memory_limit 2GB --output results.json

Every size runs by the commands a user gives, `tppo synthetic` and `tppo prepare`, one after the other, so that peak
memory is that of `prepare` alone: Python, DuckDB and pyarrow together. Rows per second count from the first byte read
to the last table written; the interpreter's start is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tppo.core.config import Synthetic
from tppo.core.run import MANIFEST
from tppo.logs.prepare import DUCKDB_THREADS


def measure(scale: int, memory_limit: str, folder: Path) -> dict[str, Any]:
    """Write the log of one size, prepare it, and return the measures of `prepare`."""
    flags = ["--run_dir", str(folder), "--synthetic.users", str(Synthetic().users * scale)]
    flags += ["--prepare.memory_limit", memory_limit]
    for stage in ("synthetic", "prepare"):
        subprocess.run([sys.executable, "-m", "tppo", stage, *flags], check=True)
    manifest = json.loads((folder / "prepare" / MANIFEST).read_text(encoding="utf-8"))
    facts = manifest["facts"]
    return {
        "scale": scale,
        "rows": facts["rows_read"],
        "log_mb": round((folder / "synthetic" / "log.tsv").stat().st_size / 1e6, 1),
        "examples": sum(facts["examples"].values()),
        "seconds": facts["seconds"],
        "rows_per_second": facts["rows_per_second"],
        "peak_mib": manifest["peak_memory_mib"],
        "memory_limit": memory_limit,
        "threads": DUCKDB_THREADS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--memory_limit", default="2GB", help="prepare.memory_limit")
    parser.add_argument("--output", type=Path, help="write the measures as JSON")
    arguments = parser.parse_args()
    measures = []
    for scale in arguments.scales:
        with tempfile.TemporaryDirectory() as folder:
            measures.append(measure(scale, arguments.memory_limit, Path(folder)))
    table = Table(title=f"prepare, memory limit {arguments.memory_limit}, {DUCKDB_THREADS} threads")
    for name in measures[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in measures:
        table.add_row(*(f"{value:,}" if isinstance(value, int | float) else value for value in row.values()))
    Console().print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(measures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
