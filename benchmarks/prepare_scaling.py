"""Time and peak memory of `prepare` on 1x, 10x and 100x of the synthetic log (400 users, 60 events each).

    python benchmarks/prepare_scaling.py --scales 1 10 100 --memory_limit 2GB --output results.json

Every size runs in processes of its own (one writes the log, another prepares it), one after the other, so
that peak memory is that of `prepare` alone: Python, DuckDB and pyarrow together. Rows per second count from
the first byte read to the last table written; the interpreter's start is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def stage(name: str, run_dir: str, scale: int, memory_limit: str, threads: int) -> None:
    """Run one stage in this process and print its measures as the last line, JSON."""
    from tppo.core.config import Recipe
    from tppo.core.run import RunFolder, run_stage
    from tppo.logs import prepare, synthetic

    recipe = Recipe(run_dir=run_dir)
    recipe.synthetic.users *= scale
    recipe.prepare.memory_limit = memory_limit
    recipe.prepare.threads = threads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    run_stage(recipe, name, prepare.run if name == "prepare" else synthetic.run)
    manifest = RunFolder(recipe).manifest(name)
    assert manifest is not None
    print(json.dumps({**manifest, "memory_before_mib": before}))


def measure(scale: int, memory_limit: str, threads: int, folder: Path) -> dict[str, Any]:
    """Write the log of one size, prepare it, and return the measures of `prepare`."""
    for name in ("synthetic", "prepare"):
        command = [
            sys.executable,
            __file__,
            "--stage",
            name,
            "--run_dir",
            str(folder),
            "--scales",
            str(scale),
        ]
        command += ["--memory_limit", memory_limit, "--threads", str(threads)]
        manifest = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    facts = manifest["facts"]
    return {
        "scale": scale,
        "rows": facts["rows_read"],
        "log_mb": round((folder / "synthetic" / "log.tsv").stat().st_size / 1e6, 1),
        "examples": sum(facts["examples"].values()),
        "seconds": facts["seconds"],
        "rows_per_second": facts["rows_per_second"],
        "peak_mib": manifest["peak_memory_mib"],
        "imports_mib": manifest["memory_before_mib"],
        "memory_limit": memory_limit,
        "threads": threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--memory_limit", default="2GB", help="prepare.memory_limit")
    parser.add_argument("--threads", type=int, default=2, help="prepare.threads")
    parser.add_argument("--output", type=Path, help="write the measures as JSON")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--run_dir", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        stage(arguments.stage, arguments.run_dir, arguments.scales[0], arguments.memory_limit, arguments.threads)
        return
    measures = []
    for scale in arguments.scales:
        with tempfile.TemporaryDirectory() as folder:
            measures.append(measure(scale, arguments.memory_limit, arguments.threads, Path(folder)))
    table = Table(title=f"prepare, memory limit {arguments.memory_limit}, {arguments.threads} threads")
    for name in measures[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in measures:
        table.add_row(*(f"{value:,}" if isinstance(value, int | float) else value for value in row.values()))
    Console().print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(measures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
