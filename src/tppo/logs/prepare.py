"""Stage `prepare`: interaction log -> examples.parquet and rejects.parquet.

Each row is read, cleaned and hashed on its own in Python, streaming; whatever compares rows (duplicates, repeats,
windows, splits) is SQL in DuckDB over a scratch database in the stage's folder, within `prepare.memory_limit`
(DuckDB's; Python and its libraries come on top, about 200 MB). The scratch holds no user id of the log, only keyed
hashes, and is deleted at the end.
"""

from __future__ import annotations

import shutil
import time
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from rich.table import Table

from tppo.core.common import UserError, console, progress_bar
from tppo.core.config import Columns, Prepare, Recipe, Task
from tppo.core.run import RunFolder
from tppo.core.tables import SPLITS, field
from tppo.core.text import EVENT_KINDS
from tppo.logs import examples, readers
from tppo.logs.clean import clean_text, clean_url, hash_key, hash_user
from tppo.logs.readers import BadRow, RawRow

SYNTHETIC_KEY = b"synthetic users need no secret, and the same splits everywhere"
BATCH_ROWS = 20_000
STAGED = pa.schema(
    [
        field("file", pa.int32(), "number of the log file"),
        field("line", pa.int64(), "1-based line of the row"),
        field("reason", pa.string(), "why the row is rejected, else null; of a rejected row nothing else is kept"),
        field("user_id", pa.uint64(), "keyed hash of the user id"),
        field("time", pa.timestamp("us"), "time in UTC (as given, when without a zone)"),
        field("kind", pa.string(), "search, click, purchase or visit"),
        field("text", pa.string(), "normalised text"),
        field("click", pa.string(), "host clicked in the same row (AOL), else null"),
    ]
)
"""Table `rows`: cleaned one by one, not yet compared with each other."""


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Write examples.parquet and rejects.parquet into `folder`; returns counts and times, no text of the log.

    Raises:
        UserError: a setting out of range, an unusable file, no usable row, or a split without examples.
    """
    check_settings(recipe.prepare)
    start = time.monotonic()
    files, format, columns, key = _source(recipe.prepare, run)
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        with _connect(recipe.prepare, scratch) as con:
            rows_read = _stage_files(con, files, format, columns, key, recipe.prepare.max_text_chars)
            facts: dict[str, Any] = {"files": len(files), "rows_read": rows_read}
            console.print("prepare: event sequences, windows and splits")
            examples.build_events(con)
            examples.write_rejects(con, folder / "rejects.parquet")
            facts |= _row_facts(con, rows_read)
            facts["time_cut"] = examples.build_windows(con, recipe.prepare, recipe.task)
            examples.write_examples(con, folder / "examples.parquet", recipe.task)
            facts |= _example_facts(con, recipe.task)
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"DuckDB needs more than prepare.memory_limit={recipe.prepare.memory_limit}: raise it ({error})"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    facts["seconds"] = round(time.monotonic() - start, 2)
    facts["rows_per_second"] = round(rows_read / (time.monotonic() - start))
    print_summary(facts)
    _check_splits(facts, recipe.prepare)
    return facts


def check(recipe: Recipe) -> None:
    """Every check of the stage's settings that needs no data."""
    check_settings(recipe.prepare)


def check_settings(prepare: Prepare) -> None:
    """UserError for a number out of range."""
    counts = ("min_history", "windows_per_user", "window_stride", "min_users_per_target", "max_text_chars", "threads")
    for name in counts:
        if getattr(prepare, name) < 1:
            raise UserError(f"prepare.{name} is {getattr(prepare, name)}: it must be at least 1")
    shares = ("reward_eval_share", "eval1_share", "eval2_share", "eval2_time_share")
    for name in shares:
        if not 0 < getattr(prepare, name) < 1:
            raise UserError(f"prepare.{name} is {getattr(prepare, name)}: it must lie between 0 and 1")
    held_out = sum(getattr(prepare, name) for name in shares[:3])
    if held_out >= 1:
        raise UserError(f"prepare: {' + '.join(shares[:3])} is {held_out:g}: no user is left to train on")


def _source(prepare: Prepare, run: RunFolder) -> tuple[list[Path], str, Columns, bytes]:
    """Files, format, columns and hash key of the log."""
    if prepare.source == ["synthetic"]:
        # A fixed key: these users are made up, and the demo gets the same splits on every machine.
        return [run.require("synthetic") / "log.tsv"], "tsv", Columns(), SYNTHETIC_KEY
    if "synthetic" in prepare.source:
        raise UserError("prepare.source: `synthetic` cannot be mixed with files")
    return readers.list_files(prepare.source), prepare.format, prepare.columns, hash_key()


def _connect(prepare: Prepare, scratch: Path) -> duckdb.DuckDBPyConnection:
    try:
        return duckdb.connect(
            str(scratch / "log.duckdb"),
            config={
                "memory_limit": prepare.memory_limit,
                "threads": prepare.threads,
                "temp_directory": str(scratch / "spill"),
                "preserve_insertion_order": False,
                "autoinstall_known_extensions": False,
            },
        )
    except duckdb.Error as error:
        raise UserError(f"prepare.memory_limit={prepare.memory_limit} or .threads is not usable: {error}") from None


def _stage_files(
    con: duckdb.DuckDBPyConnection, files: list[Path], format: str, columns: Columns, key: bytes, max_text_chars: int
) -> int:
    """Fill the tables `files` and `rows` (STAGED); returns the number of rows read."""
    con.execute("CREATE TABLE files (number INTEGER, name VARCHAR)")
    con.register("batch", STAGED.empty_table())
    con.execute("CREATE TABLE rows AS FROM batch")
    rows_read = done = 0
    total = sum(path.stat().st_size for path in files)
    console.print(f"prepare: reading {len(files)} file(s), {total / 1e6:.1f} MB")
    with progress_bar() as bar:
        task = bar.add_task("kB read", total=total // 1000)
        for number, path in enumerate(files):
            con.execute("INSERT INTO files VALUES (?, ?)", [number, str(path)])
            with path.open("rb") as raw:
                rows = readers.read_rows(path, raw, format, columns)
                while batch := list(islice(rows, BATCH_ROWS)):
                    staged = [(number, row.line, *clean_row(row, key, max_text_chars)) for row in batch]
                    con.register("batch", pa.table(list(zip(*staged, strict=True)), schema=STAGED))
                    con.execute("INSERT INTO rows FROM batch")
                    rows_read += len(batch)
                    bar.update(task, completed=(done + raw.tell()) // 1000)
            done += path.stat().st_size
    return rows_read


def clean_row(row: RawRow | BadRow, key: bytes, max_text_chars: int) -> tuple[Any, ...]:
    """The columns of STAGED from `reason` on: why the row is rejected, or what is kept of it."""
    if isinstance(row, BadRow):
        return _rejected(row.reason)
    if not row.user.strip():
        return _rejected("missing_value")
    when = parse_time(row.time)
    if when is None:
        return _rejected("bad_time")
    kind = row.kind if row.kind in EVENT_KINDS else row.kind.strip().lower()
    if kind not in EVENT_KINDS:
        return _rejected("unknown_kind")
    text, reason = clean_text(kind, row.text, max_text_chars)
    click = None
    if reason is None and row.url is not None:
        click, reason = clean_url(row.url, max_text_chars)
    return _rejected(reason) if reason else (None, hash_user(key, row.user), when, kind, text, click)


def _rejected(reason: str) -> tuple[Any, ...]:
    return reason, None, None, None, None, None


def parse_time(value: str | datetime) -> datetime | None:
    """ISO 8601 -> time without zone: in UTC when it has one, else as given; None when it is no time."""
    try:
        when = value if isinstance(value, datetime) else datetime.fromisoformat(value.strip())
        return when.astimezone(UTC).replace(tzinfo=None) if when.tzinfo else when
    except (ValueError, OverflowError):
        return None


def _row_facts(con: duckdb.DuckDBPyConnection, rows_read: int) -> dict[str, Any]:
    """Facts about rows and events; asserts that every row read is either kept or rejected, once."""
    rejected = dict(_all(con, "SELECT reason, count(*) FROM rejects GROUP BY reason ORDER BY 2 DESC, 1"))
    rows_rejected = sum(rejected.values())
    distinct = _all(con, "SELECT count(*) FROM (SELECT DISTINCT file, line FROM rejects)")[0][0]
    rows_kept = _all(con, "SELECT count(*) FROM (SELECT DISTINCT file, line FROM events)")[0][0]
    assert rows_rejected == distinct, "a row was rejected twice"
    assert rows_read == rows_kept + rows_rejected, (rows_read, rows_kept, rejected)
    if not rows_kept:
        counts = ", ".join(f"{reason} {count}" for reason, count in rejected.items()) or "no row at all"
        raise UserError(
            f"no row of the log could be kept ({counts}): check prepare.format and prepare.columns; "
            f"rejects.parquet in the stage's folder lists file and line"
        )
    first, last, users = _all(con, "SELECT min(time), max(time), count(DISTINCT user_id) FROM events")[0]
    return {
        "rows_kept": rows_kept,
        "rows_rejected": rows_rejected,
        "rejected": rejected,
        "events": dict(_all(con, "SELECT kind, count(*) FROM events GROUP BY kind ORDER BY 2 DESC, 1")),
        "users": users,
        "first_time": first,
        "last_time": last,
    }


def _example_facts(con: duckdb.DuckDBPyConnection, task: Task) -> dict[str, Any]:
    """Facts about windows and splits."""
    by_split = "SELECT split, count(*), count(DISTINCT user_id) FROM windows WHERE long_enough GROUP BY split"
    counts = {split: numbers for split, *numbers in _all(con, by_split)}
    examples, users = ({split: counts.get(split, (0, 0))[i] for split in SPLITS} for i in range(2))
    history = f"SELECT median(least(position - 1, {task.history_events})) FROM windows WHERE long_enough"
    without = "SELECT count(DISTINCT user_id) FROM events ANTI JOIN (FROM windows WHERE long_enough) USING (user_id)"
    return {
        "examples": examples,
        "example_users": users,
        "windows_too_short": _all(con, "SELECT count(*) FROM windows WHERE NOT long_enough")[0][0],
        "users_too_few_events": _all(con, without)[0][0],
        "median_history": _all(con, history)[0][0] or 0,
    }


def _all(con: duckdb.DuckDBPyConnection, query: str) -> list[Any]:
    return con.execute(query).fetchall()


def _check_splits(facts: dict[str, Any], prepare: Prepare) -> None:
    ways_out = {
        "train": "lower the other shares",
        "reward_eval": f"raise prepare.reward_eval_share ({prepare.reward_eval_share:g})",
        "eval1": f"raise prepare.eval1_share ({prepare.eval1_share:g})",
        "eval2": f"raise prepare.eval2_share ({prepare.eval2_share:g}) or prepare.eval2_time_share "
        f"({prepare.eval2_time_share:g})",
    }
    for split, way_out in ways_out.items():
        if not facts["examples"][split]:
            raise UserError(
                f"split {split} has no examples ({facts['users']} users in the log, "
                f"{facts['users_too_few_events']} of them with too few events): {way_out}, "
                f"lower prepare.min_history ({prepare.min_history}) or prepare.min_users_per_target "
                f"({prepare.min_users_per_target}), or give a log with more users"
            )


def print_summary(facts: dict[str, Any]) -> None:
    """The facts as a table on the console."""
    table = Table(title="prepare", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in facts.items():
        for key, number in value.items() if isinstance(value, dict) else [("", value)]:
            label = f"{name} {key}".replace("_", " ")
            table.add_row(label, f"{number:,}" if isinstance(number, int | float) else str(number))
    console.print(table)
