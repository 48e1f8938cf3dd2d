"""The ledger: a SQLite file with every request to a judge model, every attempt and every verdict (`tppo ledger`).

A verdict is stored in the same transaction as the attempt that brought it, before anything else sees it. A killed
run therefore loses at most the requests that were under way: a question goes on after the broken replies that it has
had. A request is known by all that its verdict depends on (`Question.key`). A finished one is never sent again, in
whichever run or stage it comes up: a verdict (`ok`) stays, and an abstention (`abstained`) stays until its question may
end otherwise (`Limits`). A `failed` one (the server could not be reached) is sent again.

Version 1 of the schema did not note temperature, response format and reply limit. Its rows are kept. A verdict among
them counts for the default temperature only, and for the one response format that asks for it first: from then on it is
known by both (`assumed` says that they were not noted), and never stands for another.

Prompts are not stored, only their hashes; replies are, as they came (an audit needs them), so the file is readable
by its owner only. WAL mode without fsync at each commit: a killed process loses nothing, a power cut at worst the
last few verdicts, never the file.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa

from tppo.core.common import UserError, console
from tppo.core.config import JudgeSettings, Recipe
from tppo.core.files import cache_dir
from tppo.core.show import Table
from tppo.judge.prompts import TEMPLATE_VERSION, Question

Status = Literal["ok", "abstained", "failed"]
_SCHEMA_VERSION = 2
_TABLES = """
CREATE TABLE IF NOT EXISTS requests (
  key TEXT PRIMARY KEY,
  model TEXT NOT NULL,
  template TEXT NOT NULL,
  template_version INTEGER NOT NULL,
  rubric TEXT NOT NULL,
  content_sha256 TEXT NOT NULL,
  status TEXT NOT NULL CHECK (status IN ('ok', 'abstained', 'failed')),
  verdict TEXT,
  problem TEXT,
  finished REAL NOT NULL,
  temperature REAL,
  response_format TEXT,
  max_reply_tokens INTEGER,
  replies INTEGER,
  assumed INTEGER NOT NULL DEFAULT 0,
  CHECK ((status = 'ok') = (verdict IS NOT NULL))
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempts (
  id INTEGER PRIMARY KEY,
  key TEXT NOT NULL,
  model TEXT NOT NULL,
  started REAL NOT NULL,
  seconds REAL NOT NULL,
  outcome TEXT NOT NULL,
  problem TEXT,
  reply TEXT,
  prompt_tokens INTEGER NOT NULL,
  reply_tokens INTEGER NOT NULL,
  max_reply_tokens INTEGER,
  reply_number INTEGER
);
CREATE INDEX IF NOT EXISTS attempts_key ON attempts (key);
CREATE INDEX IF NOT EXISTS attempts_model ON attempts (model, prompt_tokens, reply_tokens);
"""
_TO_VERSION_2 = """
ALTER TABLE requests ADD COLUMN temperature REAL;
ALTER TABLE requests ADD COLUMN response_format TEXT;
ALTER TABLE requests ADD COLUMN max_reply_tokens INTEGER;
ALTER TABLE requests ADD COLUMN replies INTEGER;
ALTER TABLE requests ADD COLUMN assumed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE attempts ADD COLUMN max_reply_tokens INTEGER;
ALTER TABLE attempts ADD COLUMN reply_number INTEGER;
"""
_STANDS = "replies >= :attempts AND ifnull(max_reply_tokens >= :tokens, TRUE) AND finished >= :since"
"""Whether an abstention is what asking under `Limits` would end in. No limit noted: no reply was cut."""
_KNOWN_FROM_VERSION_1 = """
replies = (SELECT count(*) FROM attempts a WHERE a.key = requests.key AND a.outcome IN ('ok', 'broken')),
max_reply_tokens = CASE status WHEN 'abstained' THEN (
  SELECT max(a.reply_tokens) FROM attempts a WHERE a.key = requests.key AND a.problem LIKE 'truncated:%') END
"""
"""What the attempts tell of a request of version 1. Its limit was at least the longest reply that was cut."""


@dataclass(frozen=True)
class Attempt:
    """One try of a request. `outcome`: ok, broken (the reply), or the transport error's name."""

    started: float
    seconds: float
    outcome: str
    problem: str | None
    reply: str | None
    prompt_tokens: int
    reply_tokens: int
    max_reply_tokens: int | None = None
    """The limit that the reply had."""
    reply_number: int = 1
    """Which reply to the question it is, or was to be: a broken one is followed by the next."""


@dataclass(frozen=True)
class Limits:
    """How long a question is tried. A verdict counts whatever it took; an abstention stands unless there may be more
    replies, or longer ones, than it was made of, or it is older than `since`."""

    max_reply_tokens: int
    reply_attempts: int
    since: float = 0.0
    """Unix time at which abstentions before it were asked to be tried again (`--redo`)."""


@dataclass(frozen=True)
class Outcome:
    """How a request ended. `verdict` is the checked reply as a plain object, None unless `status` is ok."""

    status: Status
    verdict: dict[str, Any] | None
    problem: str | None


class JudgeLedger:
    """The ledger at `path`, made if need be. UserError: it is no ledger, of another version, or cannot be opened."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        if read_only and not path.exists():
            raise UserError(f"{path} does not exist: no judge model has been asked yet (judge.ledger names the file)")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not read_only:
                path.touch(mode=0o600)
            self.connection = sqlite3.connect(path, timeout=60, isolation_level=None)
            self.connection.row_factory = sqlite3.Row
            if not read_only:
                self.connection.execute("PRAGMA journal_mode=WAL")
                self.connection.execute("PRAGMA synchronous=NORMAL")
            self._check_version(read_only)
        except sqlite3.Error as error:
            raise UserError(f"judge.ledger {path} cannot be used: {error}. Name another file") from None

    def _check_version(self, read_only: bool) -> None:
        (version,) = self.connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            if self.connection.execute("SELECT * FROM sqlite_master").fetchone():
                raise UserError(f"judge.ledger {self.path} is a database of something else: name another file")
            self.connection.executescript(f"{_TABLES} PRAGMA user_version = {_SCHEMA_VERSION};")
        elif version == 1:
            self._update(read_only)
        elif version != _SCHEMA_VERSION:
            raise UserError(
                f"judge.ledger {self.path} has version {version}, this tppo writes {_SCHEMA_VERSION}: name another file"
            )

    def _update(self, read_only: bool) -> None:
        """Bring a ledger of version 1 up to this one: in place, or in memory for somebody who only reads it."""
        if read_only:
            copy = sqlite3.connect(":memory:", isolation_level=None)
            copy.row_factory = sqlite3.Row
            self.connection.backup(copy)
            self.connection.close()
            self.connection = copy
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            (version,) = self.connection.execute("PRAGMA user_version").fetchone()
            if version == 1:  # else another process was faster
                for statement in _TO_VERSION_2.strip().split("\n"):
                    self.connection.execute(statement)
                self.connection.execute(f"UPDATE requests SET {_KNOWN_FROM_VERSION_1}")
                self.connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def __enter__(self) -> JudgeLedger:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def outcomes(self, keys: Iterable[str], limits: Limits | None = None) -> dict[str, Outcome]:
        """Outcomes of those of `keys` that are finished and stand under these limits (None: all that are finished)."""
        stands = f"AND (status = 'ok' OR {_STANDS})" if limits else ""
        rows = self._rows(
            "SELECT key, status, verdict, problem FROM requests WHERE status != 'failed' "
            f"AND key IN (SELECT value FROM json_each(:keys)) {stands}",
            keys=json.dumps(list(keys)),
            **(_named(limits) if limits else {}),
        )
        return {
            row["key"]: Outcome(row["status"], row["verdict"] and json.loads(row["verdict"]), row["problem"])
            for row in rows
        }

    def broken_replies(self, keys: Iterable[str], limits: Limits) -> dict[str, int]:
        """How many broken replies these questions have had under the very same limit, and since `limits.since`."""
        rows = self._rows(
            "SELECT key, max(reply_number) AS replies FROM attempts WHERE outcome = 'broken' "
            "AND max_reply_tokens = :tokens AND started >= :since "
            "AND key IN (SELECT value FROM json_each(:keys)) GROUP BY key",
            keys=json.dumps(list(keys)),
            **_named(limits),
        )
        return {row["key"]: row["replies"] for row in rows}

    def adopt(self, questions: Mapping[str, Question], model: str) -> int:
        """Give finished requests of version 1 the keys of the questions that ask for them now; returns how many."""
        key_of = {question.first_key(model): key for key, question in questions.items()}
        found = self._rows(
            "SELECT key FROM requests WHERE temperature IS NULL AND status != 'failed' "
            "AND key IN (SELECT value FROM json_each(:keys))",
            keys=json.dumps(list(key_of)),
        )
        if not found:
            return 0
        with self._written():
            for row in found:
                key = key_of[row["key"]]
                names = {"new": key, "old": row["key"], **_asked_with(questions[key])}
                self.connection.execute(
                    "UPDATE OR IGNORE requests SET key = :new, temperature = :temperature, "
                    "response_format = :response_format, assumed = 1 WHERE key = :old",
                    names,
                )
                self.connection.execute("UPDATE attempts SET key = :new WHERE key = :old", names)
        return len(found)

    def record(self, key: str, model: str, attempt: Attempt, outcome: Outcome | None, question: Question) -> None:
        """Store an attempt and, when it ends the request, the outcome: both or neither.

        UserError when the file cannot be written (disk full, another process holds it).
        """
        with self._written():
            self._insert("INSERT", "attempts", {"key": key, "model": model, **asdict(attempt)})
            if outcome:
                self._insert(
                    "INSERT OR REPLACE",
                    "requests",
                    {
                        **{"key": key, "model": model, "template": question.template},
                        **{"template_version": TEMPLATE_VERSION, "rubric": question.rubric},
                        "content_sha256": question.content_sha256,
                        "status": outcome.status,
                        "verdict": outcome.verdict and json.dumps(outcome.verdict, ensure_ascii=False),
                        "problem": outcome.problem,
                        "finished": time.time(),
                        **_asked_with(question),
                        "max_reply_tokens": attempt.max_reply_tokens,
                        "replies": attempt.reply_number,
                    },
                )

    def _insert(self, verb: str, table: str, row: dict[str, Any]) -> None:
        columns, places = ", ".join(row), ", ".join("?" * len(row))
        self.connection.execute(
            f"{verb} INTO {table} ({columns}) VALUES ({places})", [_storable(value) for value in row.values()]
        )

    @contextmanager
    def _written(self) -> Iterator[None]:
        """A transaction: all that is written inside, or nothing."""
        try:
            with self._intact(), self.connection:
                self.connection.execute("BEGIN IMMEDIATE")
                yield
        except sqlite3.OperationalError as error:
            raise UserError(f"judge.ledger {self.path} cannot be written: {error}. What it holds stays valid") from None

    def spent(self, model: str) -> tuple[int, int]:
        """Prompt and reply tokens of every attempt with this model so far."""
        (row,) = self._rows(
            "SELECT sum(prompt_tokens) AS prompt, sum(reply_tokens) AS reply FROM attempts WHERE model = :model",
            model=model,
        )
        return row["prompt"] or 0, row["reply"] or 0

    def totals(self) -> list[dict[str, Any]]:
        """A row per model, template, version and rubric: requests by status, attempts, tokens, seconds."""
        return self._rows(
            """
            WITH tries AS (
              SELECT key, count(*) AS attempts, sum(outcome = 'broken') AS broken, sum(prompt_tokens) AS prompt_tokens,
                     sum(reply_tokens) AS reply_tokens, sum(seconds) AS seconds
              FROM attempts GROUP BY key)
            SELECT model, template, template_version AS version, rubric, sum(status = 'ok') AS ok,
                   sum(status = 'abstained') AS abstained, sum(status = 'failed') AS failed,
                   sum(attempts) AS attempts, sum(broken) AS broken_replies, sum(prompt_tokens) AS prompt_tokens,
                   sum(reply_tokens) AS reply_tokens, round(sum(seconds) / count(*), 3) AS seconds_per_request
            FROM requests LEFT JOIN tries USING (key)
            GROUP BY model, template, template_version, rubric ORDER BY model, template, template_version, rubric
            """
        )

    def problems(self) -> list[dict[str, Any]]:
        """How often each kind of attempt did not bring a verdict, most frequent first."""
        return self._rows(
            """
            SELECT model, outcome, CASE outcome WHEN 'broken' THEN substr(problem, 1, instr(problem, ':') - 1) END
                   AS fault, count(*) AS attempts
            FROM attempts WHERE outcome != 'ok' GROUP BY 1, 2, 3 ORDER BY attempts DESC
            """
        )

    def attempts(self) -> list[dict[str, Any]]:
        """Every attempt, with its request's template, rubric, status and verdict."""
        return self._rows(
            """
            SELECT a.id, a.key, a.model, r.template, r.template_version, r.rubric, r.content_sha256, r.status,
                   r.verdict, r.temperature, r.response_format, r.assumed, a.max_reply_tokens, a.started, a.seconds,
                   a.outcome, a.problem, a.reply, a.prompt_tokens, a.reply_tokens
            FROM attempts a LEFT JOIN requests r USING (key) ORDER BY a.id
            """
        )

    def _rows(self, query: str, **values: Any) -> list[dict[str, Any]]:
        """The rows of a query, by column."""
        with self._intact():
            return [dict(row) for row in self.connection.execute(query, values)]

    @contextmanager
    def _intact(self) -> Iterator[None]:
        """Raise UserError for a damaged file; errors of a kind of their own (a lock, a constraint) stay as they are."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:
                raise
            raise UserError(
                f"judge.ledger {self.path} is damaged ({error}): name another file, or save what can be read with "
                f"`sqlite3 {self.path} .recover | sqlite3 new.sqlite` and name that"
            ) from None


def _asked_with(question: Question) -> dict[str, Any]:
    return {"temperature": question.temperature, "response_format": question.response_format}


def _named(limits: Limits) -> dict[str, Any]:
    """Limits as parameters of a query."""
    return {"tokens": limits.max_reply_tokens, "attempts": limits.reply_attempts, "since": limits.since}


def _storable(value: Any) -> Any:
    """Text without lone surrogates (SQLite takes none): they are written as escapes."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


_FORMATS = {".csv": "(FORMAT csv, HEADER)", ".jsonl": "(FORMAT json)", ".parquet": "(FORMAT parquet)"}


def show_ledger(recipe: Recipe) -> None:
    """Print totals by model and template, or write every attempt to `ledger.export`."""
    path = ledger_path(recipe.judge)
    with JudgeLedger(path, read_only=True) as ledger:
        if recipe.ledger.export:
            rows = ledger.attempts()
            export(rows, Path(recipe.ledger.export))
            console.print(f"{len(rows)} attempts of {path} written to {recipe.ledger.export}", soft_wrap=True)
            return
        console.print(f"{path}", soft_wrap=True)
        for title, rows in (("requests", ledger.totals()), ("attempts without a verdict", ledger.problems())):
            if rows:
                heads = [name.replace("_", " ") for name in rows[0]]
                Table(heads, [[_cell(value) for value in row.values()] for row in rows], title).print()


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "")


def export(rows: list[dict[str, Any]], path: Path) -> None:
    """Rows to a .csv, .jsonl or .parquet file. Replies hold words of users' logs: treat the file alike."""
    if path.suffix not in _FORMATS:
        raise UserError(f"ledger.export={path} has to end in one of {', '.join(_FORMATS)}")
    if not rows:
        raise UserError("the ledger holds no attempt to export")
    attempts = pa.Table.from_pylist(rows)
    quoted = str(path).replace("'", "''")
    duckdb.connect().register("attempts", attempts).execute(f"COPY attempts TO '{quoted}' {_FORMATS[path.suffix]}")


def ledger_path(settings: JudgeSettings) -> Path:
    """The ledger of `judge.ledger`, or the one in the cache folder."""
    return Path(settings.ledger) if settings.ledger else cache_dir() / "judge.sqlite"
