"""One interaction schema for every log format, and every reason for which a row is not kept.

A *row* is a line of the log after the header (a record in CSV, which may span lines; a row in Parquet).
Every row read ends in exactly one of two places: it is kept, because at least one event in the examples'
event sequence comes from it, or it is in rejects.parquet with its file, line and one reason. A row may
yield two events (an AOL row: a search and a click), so rows and events are counted apart.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

import pyarrow as pa

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
