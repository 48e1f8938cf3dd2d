"""Stage `prepare`: interaction log -> examples.parquet and rejects.parquet.

Each row is read, cleaned and hashed on its own in Python, streaming; whatever compares rows (duplicates,
repeats, windows, splits) is SQL in DuckDB over a scratch database in the stage's folder, within
`prepare.memory_limit` (DuckDB's; Python and its libraries come on top, about 200 MB). The scratch holds no
user id of the log, only keyed hashes, and is deleted at the end.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from rich.table import Table

from tppo.core.common import UserError, console, progress_bar
from tppo.core.config import Columns, Prepare, Recipe, Task
from tppo.core.run import RunFolder
from tppo.core.tables import SPLITS
from tppo.core.text import EVENT_KINDS
from tppo.logs import examples, readers
from tppo.logs.clean import UserHasher, clean_text, clean_url, hash_key
from tppo.logs.readers import BAD_ROWS, INTERACTIONS, BadRow, RawRow

SYNTHETIC_KEY = b"synthetic users need no secret, and the same splits everywhere"
BATCH_ROWS = 20_000


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
            rows_read = _stage_files(con, files, format, columns, UserHasher(key), recipe.prepare.max_text_chars)
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


def check_settings(prepare: Prepare) -> None:
    """UserError for a number out of range."""
    for name in (
        "min_history",
        "windows_per_user",
        "window_stride",
        "min_users_per_target",
        "max_text_chars",
        "threads",
    ):
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
    con: duckdb.DuckDBPyConnection,
    files: list[Path],
    format: str,
    columns: Columns,
    hasher: UserHasher,
    max_text_chars: int,
) -> int:
    """Fill the tables `files`, `rows` and `rejects`; returns the number of rows read."""
    con.execute("CREATE TABLE files (number INTEGER, name VARCHAR)")
    for name, schema in (("rows", INTERACTIONS), ("rejects", BAD_ROWS)):
        con.register("empty", schema.empty_table())
        con.execute(f"CREATE TABLE {name} AS FROM empty")
    rows_read = 0
    total = sum(path.stat().st_size for path in files)
    done = 0
    console.print(f"prepare: reading {len(files)} file(s), {total / 1e6:.1f} MB")
    with progress_bar() as bar:
        task = bar.add_task("kB read", total=total // 1000)
        for number, path in enumerate(files):
            con.execute("INSERT INTO files VALUES (?, ?)", [number, str(path)])
            with path.open("rb") as raw:
                rows = readers.read_rows(path, raw, format, columns)
                for kept, bad in _batches(rows, number, hasher, max_text_chars):
                    rows_read += len(kept) + len(bad)
                    _insert(con, "rows", kept, INTERACTIONS)
                    _insert(con, "rejects", bad, BAD_ROWS)
                    bar.update(task, completed=(done + raw.tell()) // 1000)
            done += path.stat().st_size
    return rows_read


def _insert(con: duckdb.DuckDBPyConnection, table: str, rows: list[tuple[Any, ...]], schema: pa.Schema) -> None:
    if rows:
        columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)]
        con.register("batch", pa.Table.from_arrays(columns, schema=schema))
        con.execute(f"INSERT INTO {table} FROM batch")
        con.unregister("batch")


Batch = tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]


def _batches(rows: readers.Rows, file: int, hasher: UserHasher, max_text_chars: int) -> Iterator[Batch]:
    """(rows as INTERACTIONS, rows as BAD_ROWS), some ten thousand at a time."""
    kept: list[tuple[Any, ...]] = []
    bad: list[tuple[Any, ...]] = []
    for row in rows:
        cleaned = row.reason if isinstance(row, BadRow) else clean_row(row, max_text_chars)
        if isinstance(cleaned, str):
            bad.append((file, row.line, cleaned))
        else:
            assert isinstance(row, RawRow)
            when, kind, text, click = cleaned
            kept.append((file, row.line, hasher.hash(row.user), when, kind, text, click))
        if len(kept) + len(bad) == BATCH_ROWS:
            yield kept, bad
            kept, bad = [], []
    yield kept, bad


def clean_row(row: RawRow, max_text_chars: int) -> tuple[datetime, str, str, str | None] | str:
    """(time in UTC, kind, normalised text, clicked host or None), or the reason to reject the row."""
    if not row.user.strip():
        return "missing_value"
    when = parse_time(row.time)
    if when is None:
        return "bad_time"
    kind = row.kind if row.kind in EVENT_KINDS else row.kind.strip().lower()
    if kind not in EVENT_KINDS:
        return "unknown_kind"
    text, reason = clean_text(kind, row.text, max_text_chars)
    click = None
    if reason is None and row.url is not None:
        click, reason = clean_url(row.url, max_text_chars)
    return reason or (when, kind, text, click)


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
    by_split = {
        split: (count, users)
        for split, count, users in _all(
            con,
            "SELECT split, count(*), count(DISTINCT user_id) FROM windows WHERE long_enough GROUP BY split",
        )
    }
    history = "SELECT median(least(position - 1, ?)) FROM windows WHERE long_enough"
    median = con.execute(history, [task.history_events]).fetchall()[0][0] or 0
    users_without = "SELECT count(*) FROM (SELECT DISTINCT user_id FROM events) ANTI JOIN {} USING (user_id)"
    return {
        "examples": {split: by_split.get(split, (0, 0))[0] for split in SPLITS},
        "example_users": {split: by_split.get(split, (0, 0))[1] for split in SPLITS},
        "windows_too_short": _all(con, "SELECT count(*) FROM windows WHERE NOT long_enough")[0][0],
        "users_too_few_events": _all(con, users_without.format("(FROM windows WHERE long_enough)"))[0][0],
        "median_history": median,
    }


def _all(con: duckdb.DuckDBPyConnection, query: str) -> list[Any]:
    return con.execute(query).fetchall()


def _check_splits(facts: dict[str, Any], prepare: Prepare) -> None:
    for split, count in facts["examples"].items():
        if count:
            continue
        setting = {
            "train": "lower the other shares",
            "reward_eval": f"raise prepare.reward_eval_share ({prepare.reward_eval_share:g})",
            "eval1": f"raise prepare.eval1_share ({prepare.eval1_share:g})",
            "eval2": f"raise prepare.eval2_share ({prepare.eval2_share:g}) or prepare.eval2_time_share "
            f"({prepare.eval2_time_share:g})",
        }[split]
        raise UserError(
            f"split {split} has no examples ({facts['users']} users in the log, "
            f"{facts['users_too_few_events']} of them with too few events): {setting}, "
            f"lower prepare.min_history ({prepare.min_history}) or prepare.min_users_per_target "
            f"({prepare.min_users_per_target}), or give a log with more users"
        )


def print_summary(facts: dict[str, Any]) -> None:
    """The facts as a table on the console."""
    table = Table(title="prepare", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name in ("files", "rows_read", "rows_kept", "rows_rejected"):
        table.add_row(name.replace("_", " "), f"{facts[name]:,}")
    for reason, count in facts["rejected"].items():
        table.add_row(f"  rejected: {reason}", f"{count:,}")
    table.add_section()
    for kind, count in facts["events"].items():
        table.add_row(f"events: {kind}", f"{count:,}")
    table.add_row("time span", f"{facts['first_time']:%Y-%m-%d} to {facts['last_time']:%Y-%m-%d}")
    table.add_row("users", f"{facts['users']:,}")
    table.add_row("users with too few events", f"{facts['users_too_few_events']:,}")
    table.add_section()
    for split, count in facts["examples"].items():
        table.add_row(f"examples: {split}", f"{count:,} of {facts['example_users'][split]:,} users")
    table.add_row("eval2 targets from", f"{facts['time_cut']:%Y-%m-%d %H:%M}")
    table.add_row("windows with too short a history", f"{facts['windows_too_short']:,}")
    table.add_row("median events in a history", f"{facts['median_history']:g}")
    table.add_section()
    table.add_row("seconds", f"{facts['seconds']:.1f}")
    table.add_row("rows per second", f"{facts['rows_per_second']:,}")
    console.print(table)
