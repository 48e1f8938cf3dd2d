"""One interaction schema for every log format, and every reason for which a row is not kept.

A *row* is a line of the log after the header (a record in CSV, which may span lines; a row in Parquet).
Every row read ends in exactly one of two places: it is kept, because at least one event in the examples'
event sequence comes from it, or it is in rejects.parquet with its file, line and one reason. A row may
yield two events (an AOL row: a search and a click), so rows and events are counted apart.

Log files -> rows: AOL, CSV, TSV, JSONL and Parquet, plain or gzip, one row at a time.

Formats
- aol: tab-separated `AnonID Query QueryTime ItemRank ClickURL` with that header. A row is a search; one
  with a ClickURL is a click as well (ItemRank may be empty all the same). Rows cut off after QueryTime are
  taken.
- tsv: a header, then one line per row, no quoting (quotes are ordinary characters, common in searches).
- csv: a header, then RFC 4180 records; a quoted record may span lines and `line` is where it starts.
- jsonl: one object per line.
- parquet: `line` is the 1-based row.

Text files are read as bytes with a bounded line length: a line of any size or content costs one rejected
row and at most 64 KiB. Mistakes about a whole file (missing, empty, header, damaged gzip) are UserErrors,
never rejects; their messages do not quote the file, whose first line may well be a user's.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import zlib
from collections import deque
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tppo.core.common import UserError
from tppo.core.config import Columns

REASONS: dict[str, str] = {
    # The line itself.
    "too_long_line": "the line (or quoted CSV record) is longer than 64 KiB",
    "nul_byte": "the line holds a NUL byte",
    "bad_utf8": "the line is not UTF-8",
    "blank_line": "the line is empty",
    "wrong_columns": "another number of columns than the header",
    "malformed": "CSV quoting that does not close, or a line that is no JSON object",
    # Its fields.
    "missing_value": "user, time, kind or text is missing or of the wrong type",
    "bad_time": "the time is not ISO 8601",
    "unknown_kind": "the kind is not search, click, purchase or visit",
    "no_text": "the text has no letter and no digit (AOL's '-', for one)",
    "too_long_text": "the text is longer than prepare.max_text_chars",
    # What it says (the whole row goes, with the click of an AOL row).
    "email": "the text or URL holds an e-mail address",
    "phone": "the text or URL holds a telephone number",
    "ssn": "the text or URL holds a number written like a US social security number",
    "card": "the text or URL holds 13 to 19 digits with a valid card checksum",
    "long_number": "the text holds 7 or more digits in a row",
    "navigational": "a search for a site by its address or bare name: no useful target",
    # Compared with other rows.
    "duplicate": "same user, time, kind and text as an earlier row",
    "repeat": "repeats the user's previous search, or an event already seen since that search",
}


class RawRow(NamedTuple):
    """A row as a reader found it. `url` is the click that an AOL row carries besides its search."""

    line: int
    user: str
    time: str | datetime
    kind: str
    text: str
    url: str | None = None


class BadRow(NamedTuple):
    """A row that a reader could not take apart; `reason` is a key of REASONS."""

    line: int
    reason: str


INTERACTIONS = pa.schema(
    [
        pa.field("file", pa.int32(), metadata={"doc": "number of the log file"}),
        pa.field("line", pa.int64(), metadata={"doc": "1-based line of the row"}),
        pa.field("user_id", pa.uint64(), metadata={"doc": "keyed hash of the user id"}),
        pa.field("time", pa.timestamp("us"), metadata={"doc": "time in UTC (as given, when without a zone)"}),
        pa.field("kind", pa.string(), metadata={"doc": "search, click, purchase or visit"}),
        pa.field("text", pa.string(), metadata={"doc": "normalised text"}),
        pa.field("click", pa.string(), metadata={"doc": "host clicked in the same row (AOL), else null"}),
    ]
)
"""Staged rows: cleaned one by one, not yet compared with each other."""
BAD_ROWS = pa.schema([("file", pa.int32()), ("line", pa.int64()), ("reason", pa.string())])
MAX_LINE_BYTES = 1 << 16
AOL_HEADER = ("AnonID", "Query", "QueryTime", "ItemRank", "ClickURL")
_EPOCH = datetime(1970, 1, 1)
Rows = Iterator[RawRow | BadRow]
Lines = Iterator[tuple[int, str, str | None]]


def list_files(sources: list[str]) -> list[Path]:
    """The log files that `prepare.source` names, globs expanded, each once.

    Raises:
        UserError: a file or glob that matches nothing, a folder, an empty file.
    """
    files: dict[Path, Path] = {}
    for source in sources:
        matches = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
        if not matches:
            raise UserError(f"prepare.source: {source} does not exist (and matches no file as a pattern)")
        for path in map(Path, matches):
            if path.is_dir():
                raise UserError(f"prepare.source: {path} is a folder: give files or a pattern such as {path}/*.gz")
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty: remove it from prepare.source")
            files.setdefault(path.resolve(), path)
    if not files:
        raise UserError("prepare.source names no file")
    return list(files.values())


def read_rows(path: Path, raw: BinaryIO, format: str, columns: Columns) -> Rows:
    """Rows of one open log file, in order. `raw` is the file at its start (callers may watch its position).

    Raises:
        UserError: wrong header or columns, not the named format, damaged compression.
    """
    if format == "parquet":
        yield from _read_parquet(path, raw, columns)
        return
    line = 0
    try:
        lines = _lines(_decompressed(path, raw))
        if format == "aol":
            rows = _read_aol(path, lines)
        elif format == "tsv":
            rows = _read_tsv(path, lines, columns)
        elif format == "csv":
            rows = _read_csv(path, lines, columns)
        else:
            rows = _read_jsonl(path, lines, columns)
        for row in rows:
            line = row.line
            yield row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip data after line {line} ({error}): get the file again") from None


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    """The file's content; gzip is recognised by its first bytes."""
    magic = raw.read(2)
    raw.seek(0)
    if magic == b"\x1f\x8b":
        stream: BinaryIO = io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 18)
        return stream
    if path.suffix == ".gz":
        raise UserError(f"{path} is named .gz but is not gzip data: rename it or get it again")
    return raw


def _lines(stream: BinaryIO) -> Lines:
    """(1-based number, text without line end, reason why the text is unusable) of every line."""
    number = 0
    while block := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(block) > MAX_LINE_BYTES:
            while block and not block.endswith(b"\n"):
                block = stream.readline(MAX_LINE_BYTES)
            yield number, "", "too_long_line"
            continue
        if b"\0" in block:
            yield number, "", "nul_byte"
            continue
        try:
            text = block.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            yield number, "", "bad_utf8"
            continue
        yield number, text.rstrip("\r\n"), None


def _header(path: Path, lines: Lines) -> str:
    number, text, reason = next(lines, (0, "", None))
    if number == 0:
        raise UserError(f"{path} is empty: remove it from prepare.source")
    if reason:
        raise UserError(f"{path}: line 1 is no header ({reason}): check prepare.format and the file's encoding")
    return text


def _read_aol(path: Path, lines: Lines) -> Rows:
    header = _header(path, lines).split("\t")
    if tuple(header) != AOL_HEADER:
        raise UserError(
            f"{path}: line 1 is not the AOL header '{' '.join(AOL_HEADER)}' (tab-separated): "
            f"it has {len(header)} columns. Is prepare.format right?"
        )
    for number, text, reason in lines:
        if reason or not text:
            yield BadRow(number, reason or "blank_line")
            continue
        fields = text.split("\t")
        if len(fields) == 5:
            yield RawRow(number, fields[0], fields[2], "search", fields[1], fields[4].strip() or None)
        elif len(fields) == 3:
            yield RawRow(number, fields[0], fields[2], "search", fields[1])
        else:
            yield BadRow(number, "wrong_columns")


def _positions(path: Path, names: list[str], columns: Columns) -> tuple[int, int, int | None, int]:
    """Where user, time, kind (None: every row is a search) and text are among the columns of a file."""
    wanted = {"user_id": columns.user_id, "time": columns.time, "kind": columns.kind, "text": columns.text}
    if not columns.kind:
        del wanted["kind"]
    missing = [name for name in wanted.values() if names.count(name) != 1]
    if missing:
        # Named columns are shown only when line 1 surely is a header: it might be somebody's data.
        found = f"has {names}" if len(missing) < len(wanted) else f"has {len(names)} columns, none of them expected"
        raise UserError(
            f"{path}: the columns {missing} are not there exactly once; its first line {found}. "
            f"Set prepare.columns.user_id, .time, .kind and .text, and check prepare.format"
        )
    index = {key: names.index(name) for key, name in wanted.items()}
    return index["user_id"], index["time"], index.get("kind"), index["text"]


def _read_tsv(path: Path, lines: Lines, columns: Columns) -> Rows:
    names = _header(path, lines).split("\t")
    user, time, kind, text = _positions(path, names, columns)
    for number, line, reason in lines:
        if reason or not line:
            yield BadRow(number, reason or "blank_line")
            continue
        fields = line.split("\t")
        if len(fields) != len(names):
            yield BadRow(number, "wrong_columns")
            continue
        yield RawRow(number, fields[user], fields[time], "search" if kind is None else fields[kind], fields[text])


class _Broken(Exception):
    """A CSV record that cannot end well: it ran too long or into an unusable line."""


class _RecordLines:
    """Feeds lines to csv.reader and keeps those of the record at hand, to undo a broken one."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.again: deque[tuple[int, str, str | None]] = deque()
        self.taken: list[tuple[int, str, str | None]] = []
        self.size = 0
        self.bad: list[BadRow] = []

    def __iter__(self) -> Iterator[str]:
        while item := self.again.popleft() if self.again else next(self.lines, None):
            number, text, reason = item
            if not self.taken and (reason or not text):
                self.bad.append(BadRow(number, reason or "blank_line"))
                continue
            self.taken.append(item)
            self.size += len(text) + 1
            if reason or self.size > MAX_LINE_BYTES:
                raise _Broken
            yield text + "\n"

    def start_record(self) -> None:
        self.taken, self.size = [], 0

    def undo_all_but_first_line(self) -> BadRow:
        """Reject the line a broken record starts at; its other lines are read again on their own."""
        number = self.taken[0][0]
        self.again.extendleft(reversed(self.taken[1:]))
        self.start_record()
        return BadRow(number, "malformed")


def _read_csv(path: Path, lines: Lines, columns: Columns) -> Rows:
    try:
        names = next(csv.reader([_header(path, lines)], strict=True), [])
    except csv.Error as error:
        raise UserError(f"{path}: line 1 is no CSV header ({error})") from None
    user, time, kind, text = _positions(path, names, columns)
    source = _RecordLines(lines)
    reader = csv.reader(iter(source), strict=True)
    while True:
        try:
            fields = next(reader, None)
        except (csv.Error, _Broken):
            fields, broken = [], source.undo_all_but_first_line()
            source.bad.append(broken)
            reader = csv.reader(iter(source), strict=True)
        yield from source.bad
        source.bad.clear()
        if fields is None:
            return
        if source.taken:
            number = source.taken[0][0]
            source.start_record()
            if len(fields) != len(names):
                yield BadRow(number, "wrong_columns")
            else:
                yield RawRow(
                    number,
                    fields[user],
                    fields[time],
                    "search" if kind is None else fields[kind],
                    fields[text],
                )


def _read_jsonl(path: Path, lines: Lines, columns: Columns) -> Rows:
    number = 0
    for number, text, reason in lines:
        if reason or not text:
            yield BadRow(number, reason or "blank_line")
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            yield BadRow(number, "malformed")
            continue
        kind = record.get(columns.kind) if columns.kind else "search"
        yield _typed(number, record.get(columns.user_id), record.get(columns.time), kind, record.get(columns.text))
    if number == 0:
        raise UserError(f"{path} is empty: remove it from prepare.source")


def _typed(line: int, user: Any, time: Any, kind: Any, text: Any) -> RawRow | BadRow:
    """Values of a typed format; whole numbers pass as user ids and texts, nothing else is converted."""
    user, text = (str(value) if type(value) is int else value for value in (user, text))
    if not (isinstance(user, str) and isinstance(kind, str) and isinstance(text, str)) or time is None:
        return BadRow(line, "missing_value")
    if not isinstance(time, str | datetime):
        return BadRow(line, "bad_time")
    return RawRow(line, user, time, kind, text)


def _read_parquet(path: Path, raw: BinaryIO, columns: Columns) -> Rows:
    try:
        file = pq.ParquetFile(raw)
        _positions(path, file.schema_arrow.names, columns)
        names = [name for name in (columns.user_id, columns.time, columns.kind, columns.text) if name]
        line = 0
        for batch in file.iter_batches(batch_size=1 << 14, columns=names):
            values = {name: _parquet_values(path, name, batch.column(name)) for name in names}
            kinds = values[columns.kind] if columns.kind else ["search"] * len(batch)
            for fields in zip(values[columns.user_id], values[columns.time], kinds, values[columns.text], strict=True):
                line += 1
                if any(isinstance(value, bytes) for value in fields):
                    yield BadRow(line, "bad_utf8")
                else:
                    yield _typed(line, *fields)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error}): check prepare.format") from None


def _parquet_values(path: Path, name: str, column: pa.Array) -> list[Any]:
    """Python values: str, int, datetime, None; bytes where a string is not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [_decode(value) for value in column.cast(pa.large_binary()).to_pylist()]
    if pa.types.is_timestamp(kind):
        microseconds = column.cast(pa.timestamp("us", kind.tz), safe=kind.unit != "ns").cast(pa.int64())
        return [_instant(value) for value in microseconds.to_pylist()]
    if pa.types.is_integer(kind):
        return column.to_pylist()
    raise UserError(f"{path}: column {name} is {kind}; string, integer or timestamp is needed")


def _instant(microseconds: int | None) -> datetime | str | None:
    """UTC time without zone; a text that parses as no time when out of Python's years 1 to 9999."""
    try:
        return None if microseconds is None else _EPOCH + timedelta(microseconds=microseconds)
    except OverflowError:
        return "out of range"


def _decode(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value
