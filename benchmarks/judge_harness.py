"""What the judge benchmarks share: the fault server, `tppo label` as a process, the ledger and labels read back.

The server and the made-up items are those of the tests (tests/judge), so what is measured is what is tested.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.helpers import many_items
from tests.helpers.fault_server import Request, Settings, read_log, spawned, truth
from tppo.core.tables import LABELS, load_examples, read_table
from tppo.judge.verdict import split_response

__all__ = ["Request", "Settings", "read_log", "spawned", "truth"]

FINISHED = ("ok", "abstained")


@dataclass(frozen=True)
class Labelling:
    """One way to call `tppo label`: where the items are, which server and ledger, and the transport's settings."""

    run_dir: Path
    port: int
    ledger: Path
    options: tuple[str, ...] = ()

    def command(self) -> list[str]:
        fixed = {
            "config": self.run_dir / "recipe.yaml",
            "label.judge": "llm",
            "judge.base_url": f"http://127.0.0.1:{self.port}/v1",
            "judge.model": "truth",
            "judge.ledger": self.ledger,
        }
        flags = [part for name, value in fixed.items() for part in (f"--{name}", str(value))]
        return [sys.executable, "-m", "tppo", "label", *flags, *self.options]

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        """The process, leader of a group of its own; its output is appended to `log`."""
        with log.open("ab") as file:
            return subprocess.Popen(self.command(), stdout=file, stderr=file, start_new_session=True)

    def run(self, log: Path) -> int:
        """Exit status of the process, which does not outlive an interrupted benchmark."""
        process = self.start(log)
        try:
            return process.wait()
        finally:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9 for the process and whatever it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def workplace(arguments: argparse.Namespace) -> Iterator[Path]:
    """The benchmark's folder: `--folder`, or a temporary one. SIGTERM leaves through every `finally`, so that no
    server or client of the benchmark stays behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def make_items(run_dir: Path, count: int, first: int = 0) -> Path:
    many_items.make_run(run_dir, count, first)
    return run_dir


def server_stats(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats", timeout=60) as answer:
        return json.load(answer)


def read_ledger(path: Path) -> dict[str, str]:
    """Status by content hash, read without writing: also while the ledger's owner is dead or at work.

    Raises:
        ValueError: a content has two rows (the benchmarks ask one model with one template).
    """
    if not path.exists():
        return {}
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'requests'").fetchone():
            return {}
        rows = connection.execute("SELECT content_sha256, status FROM requests").fetchall()
    found = dict(rows)
    if len(found) != len(rows):
        raise ValueError(f"{path}: {len(rows)} requests have only {len(found)} distinct contents")
    return found


def finished(path: Path) -> set[str]:
    return {sha256 for sha256, status in read_ledger(path).items() if status in FINISHED}


def check_labels(run_dir: Path) -> dict[str, int]:
    """Rows of labels.parquet against the truth of what the judge was shown, word by word."""
    if not (run_dir / "label" / "labels.parquet").exists():
        return {"rows": 0}
    examples = {example.example_id: example for example in load_examples(run_dir / "prepare")}
    counts: Counter[str] = Counter(rows=0, equal=0, wrong=0, abstained=0)
    for row in read_table(run_dir / "label" / "labels.parquet", LABELS).to_pylist():
        counts["rows"] += 1
        if row["status"] == "abstained":
            counts["abstained"] += 1
            continue
        example, parsed = examples[row["example_id"]], split_response(row["response"])
        shown: dict[str, Any] = {
            "history": [vars(event) for event in example.history],
            "returned_queries": parsed.queries,
            "words": [{"i": i, "word": word.text} for i, word in enumerate(parsed.words)],
        }
        if row["rubric"] == "targets":
            shown["next_queries"] = example.targets
        right = truth(shown)
        scores = [int(word["label"] == 2) for word in row["words"] or []]
        # The sentence template has no word labels.
        good_words = not scores or scores == [word["score"] for word in right["words"]]
        counts["equal" if good_words and row["sentence_label"] == right["sentence"] else "wrong"] += 1
    return dict(counts)


def add_transport_options(
    parser: argparse.ArgumentParser, *, concurrency: int, timeout: float, reply_attempts: int
) -> None:
    """Options of `tppo label` that every judge benchmark has, with defaults of its own."""
    parser.add_argument("--template", choices=["token", "sentence"], default="token", help="judge.template")
    parser.add_argument("--concurrency", type=int, default=concurrency, help="judge.max_concurrency")
    parser.add_argument("--timeout", type=float, default=timeout, help="judge.timeout in seconds")
    parser.add_argument("--reply_attempts", type=int, default=reply_attempts)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep logs, ledger and runs here instead of a temporary folder")
    parser.add_argument("--output", type=Path, help="write the measures as JSON")


def transport_options(arguments: argparse.Namespace) -> tuple[str, ...]:
    flags = {
        "template": arguments.template,
        "max_concurrency": arguments.concurrency,
        "timeout": arguments.timeout,
        "reply_attempts": arguments.reply_attempts,
    }
    return tuple(part for name, value in flags.items() for part in (f"--judge.{name}", str(value)))


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command line of a measurement, to be kept beside its figures."""
    hidden = ("output", "folder", "generate", "bodies")
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(arguments).items() if name not in hidden}


def report(title: str, measures: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the measures as a table and as one line of JSON, and write them to --output."""
    table = Table(title=title, show_header=False)
    for name, value in measures.items():
        text = f"{value:,.4g}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), text)
    Console().print(table)
    result = {"settings": settings_of(arguments), "measures": measures}
    print(json.dumps(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def histogram(values: Sequence[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def span(requests: Sequence[Request]) -> float:
    """Seconds from the first request's arrival to the last one's end, as the server saw them."""
    return max(r.ended for r in requests) - min(r.arrived for r in requests)
