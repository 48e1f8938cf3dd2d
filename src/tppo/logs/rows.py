"""What a row of a log is before anything is cleaned, how a file's rows lie, and every reason why one is rejected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from tppo.core.common import UserError
from tppo.core.config import Columns

REASONS: dict[str, str] = {
    # The line itself.
    "too_long_line": "the line (or quoted CSV record) is longer than 64 KiB",
    "nul_byte": "the line holds a NUL byte",
    "bad_utf8": "the line is not UTF-8 (or what prepare.encoding says), or a text is no Unicode",
    "blank_line": "the line is empty",
    "wrong_columns": "another number of columns than the header",
    "malformed": "CSV quoting that does not close before the next row, or no JSON object with each key once",
    # Its fields.
    "missing_value": "user, time, kind or text is missing, of the wrong type, or one of prepare.null_values",
    "shared_user": "the user id stands for several people (prepare.shared_users)",
    "bad_time": "no certain time (tppo.logs.times), out of 1990 to 2099, or of another kind than the file's first",
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


Rows = Iterator[RawRow | BadRow]


@dataclass(frozen=True)
class Layout:
    """How the rows of one file are taken apart."""

    format: str
    columns: Columns
    parquet: bool = False
    """Rows come as Parquet batches, not as lines."""
    width: int = 0
    """Number of columns; as the next four, of TSV and CSV only: places of the columns."""
    user: int = 0
    time: int = 0
    text: int = 0
    kind: int | None = None
    constants: tuple[tuple[str, str | None], ...] = ()
    """Columns of a Parquet file that its folders' names hold."""
    time_format: str = ""
    """What `columns.time_format` says, and for `auto` what the file's first time is."""

    def __post_init__(self) -> None:
        if not self.time_format:
            object.__setattr__(self, "time_format", "epoch_us" if self.format == "ga4" else self.columns.time_format)

    @property
    def rows(self) -> str:
        """Key of ROWS."""
        return f"parquet {self.format}" if self.parquet else self.format

    def user_field(self) -> str:
        """Field of a UBI or GA4 record that holds the user: `columns.user_id`, unless it was left as it is."""
        own = {"ubi": "client_id", "ga4": "user_pseudo_id"}[self.format]
        return own if self.columns.user_id == Columns().user_id else self.columns.user_id


def columns_of(path: Path, names: list[str], layout: Layout) -> Layout:
    """The layout with the places of the wanted columns.

    Raises:
        UserError: a wanted column is not there exactly once.
    """
    columns = layout.columns
    wanted = [name for name in (columns.user_id, columns.time, columns.kind, columns.text) if name]
    missing = [name for name in wanted if names.count(name) != 1]
    if missing:
        # Other names are not shown: the first line may be no header but somebody's data.
        known = [name for name in names if name in wanted]
        others = f" and {len(names) - len(known)} others" if len(names) > len(known) else ""
        found = f"has {known}{others}" if known else f"has {len(names)} columns, none of them expected"
        raise UserError(
            f"{path}: the columns {missing} are not there exactly once; its first line {found}. "
            f"Set prepare.columns.user_id, .time, .kind and .text, and check prepare.format"
        )
    return replace(
        layout,
        width=len(names),
        user=names.index(columns.user_id),
        time=names.index(columns.time),
        text=names.index(columns.text),
        kind=names.index(columns.kind) if columns.kind else None,
    )
