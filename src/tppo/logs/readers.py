"""Log files (AOL, CSV, TSV, JSONL, Parquet, OpenSearch UBI, GA4) -> blocks of rows, and rows of one schema.

A *row* is a line of the log after the header (a record in CSV, which may span lines; a row in Parquet). Every row
read ends in exactly one of two places: it is kept, because at least one event in the examples' event sequence comes
from it, or it is in rejects.parquet with its file, line and one of REASONS. A row may yield two events (an AOL row:
a search and a click), so rows and events are counted apart.

Formats (`tppo.logs.formats` takes their rows apart)
- aol: tab-separated `AnonID Query QueryTime ItemRank ClickURL` with that header. A row is a search; one with a
  ClickURL is a click as well (ItemRank may be empty all the same). Rows cut off after QueryTime are taken.
- tsv: a header, then one line per row, no quoting (quotes are ordinary characters, common in searches).
- csv: a header, then RFC 4180 records; a quoted record may span lines and `line` is where it starts; but where one
  of its lines may be a row of its own, a quote was left open, and the row that it opens in is rejected.
- jsonl: one object per line; `user.id` as a column is the `id` in the object `user`.
- parquet: `line` is the 1-based row. A folder is read as one log, and the keys in the names of the
  folders below it (`.../day=2024-01-20/`) are columns.
- ubi: OpenSearch User Behavior Insights, the documents of ubi_queries and ubi_events as JSON lines (as they are, or
  under `_source`) or Parquet, in any order.
- ga4: the BigQuery export of Google Analytics 4, as JSON lines or Parquet.

Text files are read as bytes with a bounded line length (`tppo.logs.streams`): a line of any size or content costs one
rejected row and at most 64 KiB. Mistakes about a whole file (missing, empty, header, damaged compression) are
UserErrors, never rejects; their messages do not quote the file, whose first line may well be a user's.
"""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from tppo.core.common import UserError
from tppo.core.config import Columns
from tppo.core.files import walk_data
from tppo.logs import parquet
from tppo.logs.formats import ROWS, check_line_ends, csv_whole_records, text_lines
from tppo.logs.rows import REASONS, BadRow, Layout, RawRow, Rows, columns_of
from tppo.logs.streams import MAX_LINE_BYTES, read_blocks
from tppo.logs.times import time_kind

AOL_HEADER = ("AnonID", "Query", "QueryTime", "ItemRank", "ClickURL")
PARQUET_ENDINGS = (".parquet", ".parq", ".pq")
_TABLES = {"_delta_log", ".hoodie"}
"""What lies in the folder of a table of Delta Lake or Hudi."""
_SMALL_BLOCK = 1 << 16


class Block(NamedTuple):
    """Successive rows of a file, not yet taken apart, and how to do that. `data` are lines or a Parquet batch."""

    layout: Layout
    first_line: int
    data: bytes | pa.RecordBatch

    def rows(self) -> Rows:
        """The block's rows, in order."""
        return ROWS[self.layout.rows](self.layout, self.first_line, self.data)


def list_files(sources: list[str], format: str = "") -> dict[Path, Path]:
    """The log files that `prepare.source` names, globs and folders of Parquet files expanded, each once, in order; and
    for each the folder that was given: only below it do folders' names hold columns.

    Raises:
        UserError: a file or glob that matches nothing, a folder of something else, an empty file.
    """
    files: dict[Path, Path] = {}
    seen: set[Path] = set()
    for source in sources:
        matches = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
        if not matches:
            raise UserError(f"prepare.source: {source} does not exist (and matches no file as a pattern)")
        given = Path(*takewhile(lambda part: not glob.has_magic(part), Path(source).parts))
        for match in map(Path, matches):
            for path in _parquet_files(match, format) if match.is_dir() else [match]:
                if not path.is_file():
                    raise UserError(f"prepare.source: {path} is no ordinary file: write the log into one")
                if path.stat().st_size == 0:
                    raise UserError(f"{path} is empty: remove it from prepare.source")
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    is_given = match == Path(source)
                    files[path] = given if not is_given else match if match.is_dir() else match.parent
    if not files:
        raise UserError("prepare.source names no file")
    return files


def _parquet_files(folder: Path, format: str) -> list[Path]:
    """The files of a partitioned data set in the order of their paths."""
    data: list[Path] = []
    for path, names, files in walk_data(folder):
        if managers := _TABLES.intersection(names):
            raise UserError(
                f"prepare.source: {path} is a table with a log of its own ({managers.pop()}), whose folder may hold "
                f"rows that were deleted: write the table's present rows as plain Parquet, and give that folder"
            )
        data += [path / file for file in files]
    if format not in ("parquet", "ubi", "ga4") or not data:
        raise UserError(f"prepare.source: {folder} is a folder: give files or a pattern such as {folder}/*.gz")
    others = sorted(path for path in data if path.suffix not in PARQUET_ENDINGS)
    if others:
        raise UserError(
            f"prepare.source: {folder} holds {len(others)} file(s) that are not named .parquet, {others[0]} for one: "
            f"give a pattern such as {folder}/**/*.parquet"
        )
    return sorted(data)


def read_log(
    path: Path,
    raw: BinaryIO,
    format: str,
    columns: Columns,
    encoding: str = "auto",
    size: int = _SMALL_BLOCK,
    given: Path | None = None,
) -> Iterator[Block]:
    """The rows of one open log file in blocks, in order. `raw` is the file at its start (callers may watch its
    position); equal sizes give equal blocks. `given` is the folder below which folders' names hold columns; None: all.

    Raises:
        UserError: wrong header or columns, not the named format, damaged compression.
    """
    if format == "parquet" or (format in ("ubi", "ga4") and parquet.is_parquet(raw)):
        batches = parquet.read_batches(path, raw, Layout(format, columns), given)
        blocks: Iterator[Block] = (Block(*batch) for batch in batches)
    else:
        blocks = _text_blocks(path, raw, Layout(format, columns), encoding, size)
    settled: Layout | None = None
    for block in blocks:
        if settled is None:
            settled = _settle_time(block)
        yield block._replace(layout=settled)


def read_rows(path: Path, raw: BinaryIO, format: str, columns: Columns, encoding: str = "auto") -> Rows:
    """As read_log, row by row."""
    for block in read_log(path, raw, format, columns, encoding):
        yield from block.rows()


def _settle_time(block: Block) -> Layout:
    """The layout with the kind of time that the first row of the file with a time has (`columns.time_format: auto`)."""
    layout = block.layout
    if layout.time_format != "auto":
        return layout
    data = block.data
    head = data[: data.find(b"\n", _SMALL_BLOCK) + 1] if isinstance(data, bytes) else data.slice(0, 100)
    for part in (head, data):  # nearly always, a few rows are enough
        for row in block._replace(data=part).rows():
            if isinstance(row, RawRow) and (kind := time_kind(row.time)):
                return replace(layout, time_format=kind)
    return layout


def _text_blocks(path: Path, raw: BinaryIO, layout: Layout, encoding: str, size: int) -> Iterator[Block]:
    blocks = read_blocks(path, raw, encoding, size)
    number, data = next(blocks, (1, b""))
    if not data:
        raise UserError(f"{path} is empty: remove it from prepare.source")
    if layout.format in ("jsonl", "ubi", "ga4"):
        if data.lstrip()[:1] == b"[":
            raise UserError(
                f"{path} is a JSON array: one object per line is needed; `jq -c '.[]' FILE > FILE.jsonl` makes them"
            )
    else:
        end = data.find(b"\n") + 1 or len(data)
        layout = _read_header(path, data[:end], layout)
        number, data = 2, data[end:]
    rest = b""
    while True:
        data = rest + data
        following = next(blocks, None)
        cut = len(data)
        if layout.format == "csv" and following is not None:
            cut = csv_whole_records(layout, data)
        rest = data[cut:]
        if cut:
            check_line_ends(path, layout, number, data[:cut])
            yield Block(layout, number, data[:cut])
        if following is None:
            return
        number += data.count(b"\n", 0, cut)
        data = following[1]


def _read_header(path: Path, line: bytes, layout: Layout) -> Layout:
    """The layout with the places of the columns that the first line names."""
    _, header, reason = next(text_lines(1, line))
    if reason:
        raise UserError(
            f"{path}: line 1 is no header ({reason}): check prepare.format and the file's encoding (prepare.encoding)"
        )
    if layout.format == "aol":
        names = tuple(header.split("\t"))
        if names != AOL_HEADER:
            raise UserError(
                f"{path}: line 1 is not the AOL header '{' '.join(AOL_HEADER)}' (tab-separated): "
                f"it has {len(names)} columns. Is prepare.format right?"
            )
        return layout
    if layout.format == "tsv":
        return columns_of(path, header.split("\t"), layout)
    try:
        return columns_of(path, next(csv.reader([header], strict=True), []), layout)
    except csv.Error:
        raise UserError(
            f"{path}: line 1 is no CSV header (its quotes do not match): is prepare.format right?"
        ) from None


__all__ = ["MAX_LINE_BYTES", "REASONS", "BadRow", "Block", "RawRow", "list_files", "read_log", "read_rows"]
