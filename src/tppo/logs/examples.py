"""Pass 2 of `prepare`: cleaned rows -> event sequences -> windows -> examples, in DuckDB, a bucket of users at a time.

Everything but three counts is within a user, so memory does not grow with the log. The counts go over all buckets: the
hours of the events (for the cut), the users of each search (for `min_users_per_target`), and the facts of the manifest.
Each bucket's tables and examples are kept in its folder, so that what is finished is not done again.

Definitions
- Event sequence of a user: events in the order of time, then file and line. The same user, time, kind and
  text counts once. A search that repeats the user's previous search is dropped, and so is any other event
  already seen since that search. Later returns to an old query stay: they are part of the history.
- New query: the first search of the user with that text (so it is nowhere in the history before it).
- Window: `num_queries` consecutive new queries of a user (the targets) and the `history_events` events
  right before the first of them. Windows end at the user's newest new query, and then every `window_stride`
  new queries back, `windows_per_user` at most.
- Split: by a hash of seed and user id, so it is the same on every machine (`clean.user_draw`). eval2 takes targets from
  the newest part of the log only, the other splits from before it only; the histories of eval2 users may reach back
  before the cut.
- Order of the examples: by bucket (another hash of seed and user id), the time of the user's first event, and window.
  It is the same on every machine as well; the ids that are shown hang on the secret key.
- Cut: the first full hour from which on at most `eval2_time_share` of the events lie. Counted in events and
  not in days, so that a few rows with a wrong year do not move it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tppo.core.common import UserError
from tppo.core.config import Prepare, Task
from tppo.core.files import write_json
from tppo.core.tables import EXAMPLES, REJECTS, SPLITS
from tppo.core.text import EVENT_KINDS
from tppo.logs.staging import REASON_NAMES, file_and_line, read_bucket, rejected_rows

_SEARCH = EVENT_KINDS.index("search")
_CLICK = EVENT_KINDS.index("click")
_EVAL2 = SPLITS.index("eval2")
# Texts are numbers in here (table `texts`), and an event's `place` is twice its row's, plus 1 for the click of a row.
_EVENTS = f"""
CREATE TABLE first_events AS
SELECT user_id, time, kind, text, min(place) AS place
FROM (
    SELECT place * 2 AS place, user_id, time, kind, text FROM rows
    UNION ALL
    SELECT place * 2 + 1, user_id, time, {_CLICK}::UTINYINT, click FROM rows WHERE click IS NOT NULL
) GROUP BY user_id, time, kind, text;

CREATE TABLE kept AS
WITH marked AS (
    SELECT *, kind = {_SEARCH} AND text IS DISTINCT FROM lag(text) OVER (
        PARTITION BY user_id, kind ORDER BY time, place) AS starts_search
    FROM first_events
), numbered AS (
    SELECT *, row_number() OVER sequence AS number, sum(starts_search::INTEGER) OVER (
        sequence ROWS UNBOUNDED PRECEDING) AS search_number
    FROM marked WINDOW sequence AS (PARTITION BY user_id ORDER BY time, place)
)
SELECT user_id, kind, text, min(number) AS number, arg_min(time, number) AS time, arg_min(place, number) AS place
FROM numbered GROUP BY user_id, search_number, kind, text;

-- Users are numbered by what they did first: an order that is the same on every machine, and says nothing of their ids.
CREATE TABLE users AS
SELECT user_id, any_value(split) AS split,
       (row_number() OVER (ORDER BY min(first_time), min(first_place)))::INTEGER AS person
FROM (SELECT user_id, min(time) AS first_time, arg_min(place, number) AS first_place FROM kept GROUP BY user_id)
JOIN (SELECT DISTINCT user_id, split FROM rows) USING (user_id) GROUP BY user_id;

CREATE TABLE events AS
SELECT person, kind, text, time, place,
       (row_number() OVER (PARTITION BY person ORDER BY number))::INTEGER AS position
FROM kept JOIN users USING (user_id);
"""
_REJECTS = f"""
SELECT place, (CASE WHEN seen.place IS NULL THEN {REASON_NAMES.index("duplicate")} ELSE {REASON_NAMES.index("repeat")}
               END)::UTINYINT AS reason
FROM rows ANTI JOIN (SELECT place // 2 AS place FROM events) USING (place)
LEFT JOIN (SELECT DISTINCT place // 2 AS place FROM first_events) AS seen USING (place)
"""
_NEW_QUERIES = f"""
CREATE TABLE new_queries AS
WITH first_searches AS (
    SELECT person, text, arg_min(time, position) AS time, min(position) AS position
    FROM events WHERE kind = {_SEARCH} GROUP BY person, text
)
SELECT person, text, time, position,
       row_number() OVER (PARTITION BY person ORDER BY position) AS number,
       count(*) OVER (PARTITION BY person) AS available
FROM first_searches JOIN users USING (person) SEMI JOIN common USING (text)
WHERE (split = {_EVAL2}) = (time >= $cut)
"""
_WINDOWS = """
CREATE TABLE windows AS
WITH candidates AS (
    SELECT *, available - (number + $num_queries - 1) AS newer FROM new_queries
)
SELECT person, number, position, time, newer // $stride AS back, position > $min_history AS long_enough
FROM candidates WHERE newer >= 0 AND newer % $stride = 0 AND newer // $stride < $windows_per_user
"""
_EXAMPLES = f"""
WITH kept AS (SELECT * FROM windows WHERE long_enough),
histories AS (
    SELECT w.person, w.back, list({{'kind': {list(EVENT_KINDS)}[e.kind + 1], 'text': t.string}}
                                   ORDER BY e.position) AS history
    FROM (SELECT person, back, unnest(range(greatest(1, position - $history_events), position)) AS position
          FROM kept) w
    JOIN events e USING (person, position) JOIN texts t USING (text) GROUP BY ALL
), targets AS (
    SELECT w.person, w.back, list(t.string ORDER BY n.number) AS targets
    FROM (SELECT person, back, unnest(range(number, number + $num_queries)) AS number FROM kept) w
    JOIN new_queries n USING (person, number) JOIN texts t USING (text) GROUP BY ALL
)
SELECT printf('%016x-%d', user_id, back) AS example_id, printf('%016x', user_id) AS user_id,
       {list(SPLITS)}[split + 1] AS split,
       history, targets, time AS target_time
FROM kept JOIN histories USING (person, back) JOIN targets USING (person, back) JOIN users USING (person)
ORDER BY person, back
"""
_SEARCHERS = f"""
SELECT string, count(*) AS users FROM (SELECT DISTINCT person, text FROM events WHERE kind = {_SEARCH})
JOIN texts USING (text) GROUP BY string
"""
NO_TIME = "1970-01-01 00:00:00"
"""Of a log without events."""


@dataclass(frozen=True)
class Work:
    """What the buckets' jobs share."""

    scratch: Path
    prepare: Prepare
    task: Task
    memory: int
    """Limit of each DuckDB, in bytes."""
    threads: int

    def bucket(self, number: int) -> Path:
        return self.scratch / "buckets" / f"{number:05d}"


def memory_bytes(limit: str) -> int | None:
    """A memory limit as DuckDB writes it (`1GB`, `512 MiB`) in bytes; None for what is no such limit."""
    number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", limit, re.IGNORECASE)
    return number and int(float(number[1]) * (1024 if number[3] else 1000) ** ("KMGT".index(number[2].upper()) + 1))


@contextmanager
def connect(memory: int, threads: int, spill: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in memory that spills into a folder.

    Raises:
        UserError: the memory is not enough.
    """
    settings = {
        "memory_limit": f"{memory}B",
        "threads": threads,
        "temp_directory": str(spill),
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,
    }
    try:
        with duckdb.connect(":memory:", config=settings) as con:
            con.execute("SET enable_progress_bar = false")  # it has our own in its way
            yield con
    except duckdb.OutOfMemoryException:
        raise UserError(
            f"DuckDB needs more than the {memory >> 20} MiB that prepare.memory_limit gives each process: raise it, "
            f"or lower prepare.threads, and give the same command again (what was read is kept)"
        ) from None
    except duckdb.IOException:
        raise OSError(f"DuckDB cannot read or write in {spill.parent}: is the disk full?") from None
    finally:
        shutil.rmtree(spill, ignore_errors=True)
        pa.default_memory_pool().release_unused()


def sequence_bucket(work: Work, number: int) -> dict[str, Any]:
    """Rows of a bucket -> its folder with tables `events`, `users`, `texts` and `rejects`; returns facts. A folder that
    is there already is taken as it is."""
    folder = work.bucket(number)
    if not folder.exists():
        unfinished = folder.with_suffix(".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with connect(work.memory, work.threads, folder.with_suffix(".spill")) as con:
            rows, texts = _numbered_texts(read_bucket(work.scratch / "rows", number))
            con.register("rows", rows)
            con.register("texts", texts)
            build_events(con)
            for table, query in (
                ("rejects", _REJECTS),
                ("events", "FROM events ORDER BY person, position"),
                ("users", "FROM users"),
                ("texts", "FROM texts"),
            ):
                _write_parquet(con, query, unfinished / f"{table}.parquet")
            if work.prepare.min_users_per_target > 1:
                _write_parquet(con, _SEARCHERS, unfinished / "searchers.parquet")
            write_json(unfinished / "facts.json", _sequence_facts(con))
        unfinished.rename(folder)
    return json.loads((folder / "facts.json").read_text(encoding="utf-8"))


def build_events(con: duckdb.DuckDBPyConnection) -> None:
    """Table `rows` -> tables `first_events`, `users` and `events`."""
    con.execute(_EVENTS)


def _numbered_texts(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows with numbers for their texts and clicks, and what the numbers stand for: DuckDB then sorts and compares
    numbers only."""
    both = pa.chunked_array([*rows["text"].chunks, *rows["click"].chunks], pa.large_string())
    encoded = both.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    texts = pa.table(
        {"text": pa.array(np.arange(len(encoded.dictionary), dtype=np.int32)), "string": encoded.dictionary}
    )
    text, click = encoded.indices[: len(rows)], encoded.indices[len(rows) :]
    rows = rows.drop_columns(["reason", "text", "click"])
    return rows.append_column("text", text).append_column("click", click), texts


def _sequence_facts(con: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Counts of a bucket; asserts that each of its rows is either kept or rejected."""
    kept = _all(con, "SELECT count(DISTINCT place // 2) FROM events")[0][0]
    rows_of_users = "SELECT rows, count(*) FROM (SELECT count(*) AS rows FROM rows GROUP BY user_id) GROUP BY rows"
    return {
        "rows_kept": kept,
        "users": _all(con, "SELECT count(*) FROM users")[0][0],
        "kinds": _all(con, "SELECT kind, count(*) FROM events GROUP BY kind"),
        "hours": [
            (hour.isoformat(), count)
            for hour, count in _all(con, "SELECT date_trunc('hour', time), count(*) FROM events GROUP BY 1")
        ],
        "times": [str(time) for time in _all(con, "SELECT min(time), max(time) FROM events")[0] if time],
        "rows_of_users": _all(con, rows_of_users),
    }


def time_cut(hours: Counter[str], last: datetime, share: float) -> datetime:
    """The first hour from which on at most `share` of the events lie; one after all when the last has more."""
    total, newer, cut = sum(hours.values()), 0, last + timedelta(hours=1)
    for hour in sorted(hours, reverse=True):
        newer += hours[hour]
        if newer > share * total:
            break
        cut = datetime.fromisoformat(hour)
    return cut


def find_common(work: Work, buckets: int) -> None:
    """Write common.parquet: the searches of at least min_users_per_target users (in one bucket each)."""
    files = [str(work.bucket(number) / "searchers.parquet") for number in range(buckets)]
    with connect(work.memory, work.threads, work.scratch / "common.spill") as con:
        query = "SELECT string FROM read_parquet($files) GROUP BY string HAVING sum(users) >= $least"
        parameters = {"files": files, "least": work.prepare.min_users_per_target}
        _write_parquet(con, query, work.scratch / "common.parquet", parameters)


def window_bucket(work: Work, cut: datetime, number: int) -> dict[str, Any]:
    """Events of a bucket -> examples.arrow (tables.EXAMPLES) in its folder; returns facts. Examples that are there are
    taken as they are."""
    folder = work.bucket(number)
    finished = folder / "windows.json"
    if not finished.exists():
        with connect(work.memory, work.threads, folder.with_suffix(".spill")) as con:
            for table in ("events", "users", "texts"):
                con.execute(
                    f"CREATE TABLE {table} AS FROM read_parquet($file)", {"file": str(folder / f"{table}.parquet")}
                )
            if work.prepare.min_users_per_target > 1:
                common = "SELECT text FROM texts SEMI JOIN read_parquet($file) USING (string)"
                con.execute(f"CREATE TABLE common AS {common}", {"file": str(work.scratch / "common.parquet")})
            else:
                con.execute("CREATE VIEW common AS SELECT text FROM texts")
            build_windows(con, work.prepare, work.task, cut)
            write_examples(con, folder / "examples.arrow", work.task)
            write_json(finished, _window_facts(con, work.task))
    return json.loads(finished.read_text(encoding="utf-8"))


def build_windows(con: duckdb.DuckDBPyConnection, prepare: Prepare, task: Task, cut: datetime) -> None:
    """Tables `events`, `users` and `common` -> tables `new_queries` and `windows`."""
    windows = {
        "num_queries": task.num_queries,
        "stride": prepare.window_stride,
        "windows_per_user": prepare.windows_per_user,
        "min_history": prepare.min_history,
    }
    con.execute(_NEW_QUERIES, {"cut": cut})
    con.execute(_WINDOWS, windows)


def _window_facts(con: duckdb.DuckDBPyConnection, task: Task) -> dict[str, Any]:
    by_split = "SELECT split, count(*), count(DISTINCT person) FROM windows JOIN users USING (person) WHERE long_enough"
    history = f"SELECT least(position - 1, {task.history_events}), count(*) FROM windows WHERE long_enough GROUP BY 1"
    without = "SELECT count(*) FROM users ANTI JOIN (FROM windows WHERE long_enough) USING (person)"
    return {
        "splits": _all(con, f"{by_split} GROUP BY split"),
        "history": _all(con, history),
        "too_short": _all(con, "SELECT count(*) FROM windows WHERE NOT long_enough")[0][0],
        "users_without": _all(con, without)[0][0],
    }


def write_examples(con: duckdb.DuckDBPyConnection, path: Path, task: Task) -> None:
    """Write the examples (tables.EXAMPLES) of a bucket as Arrow IPC, ordered by user and window."""
    query = con.sql(_EXAMPLES, params={"history_events": task.history_events, "num_queries": task.num_queries})
    temporary = path.with_suffix(".tmp")
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(temporary, EXAMPLES, options=options) as writer:
        for batch in query.to_arrow_reader(20_000):
            writer.write_table(pa.Table.from_batches([batch]).cast(EXAMPLES))
    temporary.replace(path)


class ExamplesWriter:
    """examples.parquet from the buckets' parts, one after the other; the file appears whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_suffix(".tmp")
        self._writer = pq.ParquetWriter(self._temporary, EXAMPLES)

    def add(self, part: Path) -> None:
        with pa.memory_map(str(part)) as source:
            reader = pa.ipc.open_file(source)
            for index in range(reader.num_record_batches):
                self._writer.write_table(pa.Table.from_batches([reader.get_batch(index)], EXAMPLES))

    def finish(self) -> None:
        self._writer.close()
        self._temporary.replace(self._path)


def write_rejects(work: Work, buckets: int, files: list[str], path: Path) -> Counter[str]:
    """Write rejects.parquet (tables.REJECTS), ordered by file and line; returns how many rows each reason has."""
    counts: Counter[str] = Counter()
    last = -1
    names, reasons = pa.array(files), pa.array(REASON_NAMES)
    temporary = path.with_suffix(".tmp")
    with connect(work.memory, work.threads, work.scratch / "rejects.spill") as con:
        found = [str(work.bucket(number) / "rejects.parquet") for number in range(buckets)]
        con.execute("CREATE TABLE rejects AS SELECT place, reason FROM read_parquet($found)", {"found": found})
        con.register("rejected", pa.RecordBatchReader.from_batches(*rejected_rows(work.scratch / "rows")))
        con.execute("INSERT INTO rejects FROM rejected")
        with pq.ParquetWriter(temporary, REJECTS) as writer:
            for batch in con.sql("FROM rejects ORDER BY place").to_arrow_reader(100_000):
                place, reason = (batch.column(name).to_numpy() for name in ("place", "reason"))
                assert (np.diff(place, prepend=last) > 0).all(), "a row was rejected twice"
                last = place[-1]
                file, line = file_and_line(place)
                writer.write_table(
                    pa.table(
                        [names.take(pa.array(file)), pa.array(line), reasons.take(pa.array(reason))], schema=REJECTS
                    )
                )
                for number, count in enumerate(np.bincount(reason)):
                    if count:
                        counts[REASON_NAMES[number]] += int(count)
    temporary.replace(path)
    return counts


def _write_parquet(
    con: duckdb.DuckDBPyConnection, query: str, path: Path, parameters: dict[str, Any] | None = None
) -> None:
    """Write what a query gives as it comes; the file appears whole or not at all."""
    temporary = path.with_suffix(".tmp")
    reader = con.sql(query, params=parameters).to_arrow_reader(100_000)
    with pq.ParquetWriter(temporary, reader.schema, compression="lz4") as writer:
        for batch in reader:
            writer.write_batch(batch)
    temporary.replace(path)


def _all(con: duckdb.DuckDBPyConnection, query: str) -> list[Any]:
    return con.execute(query).fetchall()
