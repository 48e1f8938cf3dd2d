"""Staged rows -> event sequences -> windows -> examples, all in DuckDB, so that memory stays under its limit.

Definitions
- Event sequence of a user: events in the order of time, then file and line. The same user, time, kind and
  text counts once. A search that repeats the user's previous search is dropped, and so is any other event
  already seen since that search. Later returns to an old query stay: they are part of the history.
- New query: the first search of the user with that text (so it is nowhere in the history before it).
- Window: `num_queries` consecutive new queries of a user (the targets) and the `history_events` events
  right before the first of them. Windows end at the user's newest new query, and then every `window_stride`
  new queries back, `windows_per_user` at most.
- Split: by the keyed hash of the user. eval2 takes targets from the newest part of the log only, the other
  splits from before it only; the histories of eval2 users may reach back before the cut.
- Cut: the first full hour from which on at most `eval2_time_share` of the events lie. Counted in events and
  not in days, so that a few rows with a wrong year do not move it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from tppo.core.config import Prepare, Task
from tppo.core.tables import EXAMPLES, REJECTS

_EVENTS = """
CREATE TABLE first_events AS
SELECT * EXCLUDE (occurrence) FROM (
    SELECT *, row_number() OVER (
        PARTITION BY user_id, time, kind, text ORDER BY file, line, part) AS occurrence
    FROM (
        SELECT file, line, 0::TINYINT AS part, user_id, time, kind, text FROM rows WHERE reason IS NULL
        UNION ALL
        SELECT file, line, 1::TINYINT, user_id, time, 'click', click FROM rows WHERE click IS NOT NULL
    )
) WHERE occurrence = 1;

CREATE TABLE events AS
WITH marked AS (
    SELECT *, kind = 'search' AND text IS DISTINCT FROM lag(text) OVER (
        PARTITION BY user_id, kind ORDER BY time, file, line, part) AS starts_search
    FROM first_events
), numbered AS (
    SELECT *, sum(starts_search::INTEGER) OVER (
        PARTITION BY user_id ORDER BY time, file, line, part ROWS UNBOUNDED PRECEDING) AS search_number
    FROM marked
), fresh AS (
    SELECT *, row_number() OVER (
        PARTITION BY user_id, search_number, kind, text ORDER BY time, file, line, part) AS occurrence
    FROM numbered
)
SELECT user_id, kind, text, time, file, line,
       row_number() OVER (PARTITION BY user_id ORDER BY time, file, line, part) AS position
FROM fresh WHERE occurrence = 1;
"""
_REJECTS = """
CREATE TABLE rejects AS
SELECT file, line, coalesce(reason, CASE WHEN first_events.file IS NULL THEN 'duplicate' ELSE 'repeat' END) AS reason
FROM rows ANTI JOIN events USING (file, line)
LEFT JOIN (SELECT DISTINCT file, line FROM first_events) AS first_events USING (file, line);
"""
_CUT = """
WITH hours AS (SELECT date_trunc('hour', time) AS hour, count(*) AS events FROM events GROUP BY ALL),
     newer AS (SELECT hour, sum(events) OVER (ORDER BY hour DESC) AS events FROM hours)
SELECT coalesce(min(hour) FILTER (events <= $share * (SELECT count(*) FROM events)),
                (SELECT max(time) + INTERVAL 1 HOUR FROM events)) FROM newer
"""
_NEW_QUERIES = """
CREATE TABLE new_queries AS
WITH points AS (
    SELECT user_id, user_id / 18446744073709551616.0 AS point FROM (SELECT DISTINCT user_id FROM events)
), users AS (
    SELECT user_id, CASE WHEN point < $reward_eval THEN 'reward_eval'
                         WHEN point < $reward_eval + $eval1 THEN 'eval1'
                         WHEN point < $reward_eval + $eval1 + $eval2 THEN 'eval2'
                         ELSE 'train' END AS split
    FROM points
), first_searches AS (
    SELECT user_id, text, arg_min(time, position) AS time, min(position) AS position
    FROM events WHERE kind = 'search' GROUP BY user_id, text
), common AS (SELECT text FROM first_searches GROUP BY text HAVING count(*) >= $min_users)
SELECT user_id, split, text, time, position,
       row_number() OVER (PARTITION BY user_id ORDER BY position) AS number,
       count(*) OVER (PARTITION BY user_id) AS available
FROM first_searches JOIN users USING (user_id) SEMI JOIN common USING (text)
WHERE (split = 'eval2') = (time >= $cut)
"""
_WINDOWS = """
CREATE TABLE windows AS
WITH candidates AS (
    SELECT *, available - (number + $num_queries - 1) AS newer FROM new_queries
)
SELECT user_id, split, number, position, time, newer // $stride AS back,
       position > $min_history AS long_enough
FROM candidates WHERE newer >= 0 AND newer % $stride = 0 AND newer // $stride < $windows_per_user
"""
_EXAMPLES = """
WITH kept AS (SELECT * FROM windows WHERE long_enough),
histories AS (
    SELECT w.user_id, w.back, list({'kind': e.kind, 'text': e.text} ORDER BY e.position) AS history
    FROM (SELECT user_id, back, unnest(range(greatest(1, position - $history_events), position)) AS position
          FROM kept) w
    JOIN events e USING (user_id, position) GROUP BY ALL
), targets AS (
    SELECT w.user_id, w.back, list(n.text ORDER BY n.number) AS targets
    FROM (SELECT user_id, back, unnest(range(number, number + $num_queries)) AS number FROM kept) w
    JOIN new_queries n USING (user_id, number) GROUP BY ALL
)
SELECT printf('%016x-%d', user_id, back) AS example_id, printf('%016x', user_id) AS user_id, split,
       history, targets, time AS target_time
FROM kept JOIN histories USING (user_id, back) JOIN targets USING (user_id, back)
ORDER BY user_id, back
"""


def build_events(con: duckdb.DuckDBPyConnection) -> None:
    """Table `rows` -> tables `first_events` and `events`, and `rejects`: the rows that no event is left of."""
    con.execute(_EVENTS)
    con.execute(_REJECTS)


def build_windows(con: duckdb.DuckDBPyConnection, prepare: Prepare, task: Task) -> Any:
    """Table `events` -> tables `new_queries` and `windows`; returns the time cut."""
    cut = con.execute(_CUT, {"share": prepare.eval2_time_share}).fetchall()[0][0]
    new_queries = {
        "reward_eval": prepare.reward_eval_share,
        "eval1": prepare.eval1_share,
        "eval2": prepare.eval2_share,
        "min_users": prepare.min_users_per_target,
        "cut": cut,
    }
    windows = {
        "num_queries": task.num_queries,
        "stride": prepare.window_stride,
        "windows_per_user": prepare.windows_per_user,
        "min_history": prepare.min_history,
    }
    con.execute(_NEW_QUERIES, new_queries)
    con.execute(_WINDOWS, windows)
    return cut


def write_examples(con: duckdb.DuckDBPyConnection, path: Path, task: Task) -> None:
    """Write examples.parquet (tables.EXAMPLES), ordered by user and window."""
    query = con.sql(_EXAMPLES, params={"history_events": task.history_events, "num_queries": task.num_queries})
    _write(query, path, EXAMPLES)


def write_rejects(con: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Write rejects.parquet (tables.REJECTS), ordered by file and line."""
    query = "SELECT name AS file, line, reason FROM rejects JOIN files ON file = number ORDER BY number, line"
    _write(con.sql(query), path, REJECTS)


def _write(query: duckdb.DuckDBPyRelation, path: Path, schema: pa.Schema) -> None:
    """Write a query's rows as they come; the file appears whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with pq.ParquetWriter(temporary, schema) as writer:
        for batch in query.to_arrow_reader(20_000):
            writer.write_table(pa.Table.from_batches([batch]).cast(schema))
    temporary.replace(path)
