"""Log files (AOL, CSV, TSV, JSONL, Parquet; plain or gzip) -> rows of one schema, one row at a time.

A *row* is a line of the log after the header (a record in CSV, which may span lines; a row in Parquet). Every row
read ends in exactly one of two places: it is kept, because at least one event in the examples' event sequence comes
from it, or it is in rejects.parquet with its file, line and one of REASONS. A row may yield two events (an AOL row:
a search and a click), so rows and events are counted apart.

Formats
- aol: tab-separated `AnonID Query QueryTime ItemRank ClickURL` with that header. A row is a search; one with a
  ClickURL is a click as well (ItemRank may be empty all the same). Rows cut off after QueryTime are taken.
- tsv: a header, then one line per row, no quoting (quotes are ordinary characters, common in searches).
- csv: a header, then RFC 4180 records; a quoted record may span lines and `line` is where it starts.
- jsonl: one object per line.
- parquet: `line` is the 1-based row.

Text files are read as bytes with a bounded line length: a line of any size or content costs one rejected row and at
most 64 KiB. Mistakes about a whole file (missing, empty, header, damaged gzip) are UserErrors, never rejects; their
messages do not quote the file, whose first line may well be a user's.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import itertools
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterator
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


MAX_LINE_BYTES = 1 << 16
AOL_HEADER = ("AnonID", "Query", "QueryTime", "ItemRank", "ClickURL")
_EPOCH = datetime(1970, 1, 1)
Rows = Iterator[RawRow | BadRow]
Line = tuple[int, str, str | None]
"""1-based number, text without line end, reason why the text is unusable."""
Lines = Iterator[Line]


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
        first = next(lines, None)
        if first is None:
            raise UserError(f"{path} is empty: remove it from prepare.source")
        if format == "jsonl":
            rows = _each_line(itertools.chain([first], lines), lambda number, text: _json_row(number, text, columns))
        else:
            _, header, reason = first
            if reason:
                raise UserError(f"{path}: line 1 is no header ({reason}): check prepare.format and the file's encoding")
            rows = _HEADED[format](path, header, lines, columns)
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
    """Every line of a text file."""
    number = 0
    while block := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(block) > MAX_LINE_BYTES:
            while block and not block.endswith(b"\n"):
                block = stream.readline(MAX_LINE_BYTES)
            yield number, "", "too_long_line"
        elif b"\0" in block:
            yield number, "", "nul_byte"
        else:
            try:
                text = block.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                yield number, "", "bad_utf8"
            else:
                yield number, text.rstrip("\r\n"), None


def _each_line(lines: Lines, parse: Callable[[int, str], RawRow | BadRow]) -> Rows:
    """Rows of a format with one row per line."""
    for number, text, reason in lines:
        yield parse(number, text) if text else BadRow(number, reason or "blank_line")


def _read_aol(path: Path, header: str, lines: Lines, columns: Columns) -> Rows:
    names = tuple(header.split("\t"))
    if names != AOL_HEADER:
        raise UserError(
            f"{path}: line 1 is not the AOL header '{' '.join(AOL_HEADER)}' (tab-separated): "
            f"it has {len(names)} columns. Is prepare.format right?"
        )
    return _each_line(lines, _aol_row)


def _aol_row(number: int, text: str) -> RawRow | BadRow:
    fields = text.split("\t")
    if len(fields) not in (3, 5):
        return BadRow(number, "wrong_columns")
    url = fields[4].strip() if len(fields) == 5 else ""
    return RawRow(number, fields[0], fields[2], "search", fields[1], url or None)


def _row_maker(path: Path, names: list[str], columns: Columns) -> Callable[[int, list[str]], RawRow | BadRow]:
    """(line, fields) -> row, of a file whose columns have these names.

    Raises:
        UserError: a wanted column is not there exactly once.
    """
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
    user, time, text = (names.index(wanted[key]) for key in ("user_id", "time", "text"))
    kind = names.index(columns.kind) if columns.kind else None

    def row(number: int, fields: list[str]) -> RawRow | BadRow:
        if len(fields) != len(names):
            return BadRow(number, "wrong_columns")
        return RawRow(number, fields[user], fields[time], "search" if kind is None else fields[kind], fields[text])

    return row


def _read_tsv(path: Path, header: str, lines: Lines, columns: Columns) -> Rows:
    row = _row_maker(path, header.split("\t"), columns)
    return _each_line(lines, lambda number, text: row(number, text.split("\t")))


def _read_csv(path: Path, header: str, lines: Lines, columns: Columns) -> Rows:
    try:
        names = next(csv.reader([header], strict=True), [])
    except csv.Error as error:
        raise UserError(f"{path}: line 1 is no CSV header ({error})") from None
    row = _row_maker(path, names, columns)
    again: deque[Line] = deque()

    def next_line() -> Line | None:
        return again.popleft() if again else next(lines, None)

    while first := next_line():
        number, text, reason = first
        if not text:
            yield BadRow(number, reason or "blank_line")
            continue
        record = [first]
        try:
            fields = next(csv.reader(_record_texts(record, next_line), strict=True))
        except csv.Error:
            # Only the line that the broken record starts at is lost; its other lines are read again on their own.
            again.extendleft(reversed(record[1:]))
            yield BadRow(number, "malformed")
        else:
            yield row(number, fields)


def _record_texts(record: list[Line], next_line: Callable[[], Line | None]) -> Iterator[str]:
    """Texts of `record` (its first line) and of the lines that csv.reader asks for to end it, which join `record`.

    Raises:
        csv.Error: the record runs too long or into an unusable line, so it cannot end well.
    """
    size = 0
    line: Line | None = record[0]
    while line:
        _, text, reason = line
        size += len(text) + 1
        if reason or size > MAX_LINE_BYTES:
            raise csv.Error
        yield text + "\n"
        if line := next_line():
            record.append(line)


_HEADED = {"aol": _read_aol, "tsv": _read_tsv, "csv": _read_csv}


def _json_row(number: int, text: str, columns: Columns) -> RawRow | BadRow:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    return _typed_row(number, record, columns) if isinstance(record, dict) else BadRow(number, "malformed")


def _typed_row(line: int, record: dict[str, Any], columns: Columns) -> RawRow | BadRow:
    """A row of a typed format; whole numbers pass as user ids and texts, nothing else is converted."""
    user, time, text = (record.get(name) for name in (columns.user_id, columns.time, columns.text))
    kind = record.get(columns.kind) if columns.kind else "search"
    if any(isinstance(value, bytes) for value in (user, time, kind, text)):
        return BadRow(line, "bad_utf8")
    user, text = (str(value) if type(value) is int else value for value in (user, text))
    if not (isinstance(user, str) and isinstance(kind, str) and isinstance(text, str)) or time is None:
        return BadRow(line, "missing_value")
    if not isinstance(time, str | datetime):
        return BadRow(line, "bad_time")
    return RawRow(line, user, time, kind, text)


def _read_parquet(path: Path, raw: BinaryIO, columns: Columns) -> Rows:
    try:
        file = pq.ParquetFile(raw)
        _row_maker(path, file.schema_arrow.names, columns)  # raises where a column is missing
        names = [name for name in (columns.user_id, columns.time, columns.kind, columns.text) if name]
        line = 0
        for batch in file.iter_batches(batch_size=1 << 14, columns=names):
            values = [_parquet_values(path, name, batch.column(name)) for name in names]
            for fields in zip(*values, strict=True):
                line += 1
                yield _typed_row(line, dict(zip(names, fields, strict=True)), columns)
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
