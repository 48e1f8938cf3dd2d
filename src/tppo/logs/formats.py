"""Lines and records of each format -> rows. A block of lines is taken apart without knowing what stands before it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from tppo.core.common import UserError
from tppo.core.text import EVENT_KINDS
from tppo.logs import parquet
from tppo.logs.rows import BadRow, Layout, RawRow, Rows
from tppo.logs.streams import MAX_LINE_BYTES
from tppo.logs.times import parse_time

Line = tuple[int, str, str | None]
"""1-based number, text without line end, reason why the text is unusable."""
_LEAST_EPOCH = 1e8
"""A smaller number is no time in any unit (seconds of 1973)."""
_LONE_CR = re.compile(rb"\r(?!\r*(?:\n|\Z))")
"""A CR between two characters of a line."""
_UBI_KINDS = {
    **dict.fromkeys(("search", "on_search", "query"), "search"),
    **dict.fromkeys(("click", "item_click", "product_click", "click_through", "result_click"), "click"),
    **dict.fromkeys(("purchase", "buy", "order"), "purchase"),
    **dict.fromkeys(("view", "visit", "page_view", "item_view", "product_view"), "visit"),
}
"""Actions of ubi_events that are events; others (impressions, baskets, log messages) are unknown kinds."""
_GA4_KINDS = {
    **dict.fromkeys(("search", "view_search_results"), "search"),
    **dict.fromkeys(("select_item", "select_content", "click"), "click"),
    **dict.fromkeys(("purchase", "in_app_purchase"), "purchase"),
    **dict.fromkeys(("page_view", "view_item", "screen_view"), "visit"),
}


def text_lines(first: int, data: bytes) -> Iterator[Line]:
    """Every line of a block, whose first line has this number."""
    try:
        # At once, which is many times faster than line by line, as long as nothing is wrong.
        whole = None if b"\0" in data else data.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        whole = None
    if whole is None:
        yield from _doubtful_lines(first, data.removesuffix(b"\n").split(b"\n"))
        return
    for number, text in enumerate(whole, start=first):
        if len(text) >= MAX_LINE_BYTES // 4 and len(text.encode()) >= MAX_LINE_BYTES:
            yield number, "", "too_long_line"
        else:
            yield number, text.rstrip("\r"), None


def _doubtful_lines(first: int, lines: list[bytes]) -> Iterator[Line]:
    for number, line in enumerate(lines, start=first):
        if len(line) >= MAX_LINE_BYTES:
            yield number, "", "too_long_line"
        elif b"\0" in line:
            yield number, "", "nul_byte"
        else:
            try:
                yield number, line.decode().rstrip("\r"), None
            except UnicodeDecodeError:
                yield number, "", "bad_utf8"


def check_line_ends(path: Path, layout: Layout, first: int, data: bytes) -> None:
    """UserError where a line of a block, whose first line has this number, is several rows with CR between them: a file
    put together from one with LF and one with CR (Excel for Mac). A CR within a row is white space."""
    at = 0
    while found := _LONE_CR.search(data, at):
        start, end = data.rfind(b"\n", 0, found.start()) + 1, data.find(b"\n", found.start())
        at = len(data) if end < 0 else end
        rows = ROWS[layout.rows](layout, 0, data[start:at].replace(b"\r", b"\n"))
        times = (row.time for row in rows if isinstance(row, RawRow))
        if sum(parse_time(time, layout.columns.time_format) is not None for time in times) > 1:
            line = first + data.count(b"\n", 0, start)
            raise UserError(
                f"{path}: line {line} is several rows with CR between them, though "
                f"lines before it end with LF: `tr '\\r' '\\n' < FILE > NEW` makes all ends alike"
            )


def _aol_rows(layout: Layout, first: int, data: bytes) -> Rows:
    for number, text, reason in text_lines(first, data):
        if not text:
            yield BadRow(number, reason or "blank_line")
            continue
        fields = text.split("\t")
        if len(fields) == 5:
            yield RawRow(number, fields[0], fields[2], "search", fields[1], fields[4].strip() or None)
        elif len(fields) == 3:
            yield RawRow(number, fields[0], fields[2], "search", fields[1])
        else:
            yield BadRow(number, "wrong_columns")


def _row(layout: Layout, number: int, fields: list[str]) -> RawRow | BadRow:
    if len(fields) != layout.width:
        return BadRow(number, "wrong_columns")
    kind = "search" if layout.kind is None else fields[layout.kind]
    return RawRow(number, fields[layout.user], fields[layout.time], kind, fields[layout.text])


def _tsv_rows(layout: Layout, first: int, data: bytes) -> Rows:
    for number, text, reason in text_lines(first, data):
        yield _row(layout, number, text.split("\t")) if text else BadRow(number, reason or "blank_line")


def _csv_rows(layout: Layout, first: int, data: bytes) -> Rows:
    lines = list(text_lines(first, data))
    index = 0
    while index < len(lines):
        number, text, reason = lines[index]
        count = 1
        if not text:
            yield BadRow(number, reason or "blank_line")
        elif '"' not in text:
            yield _row(layout, number, text.split(","))
        else:
            record, count = _csv_record(layout, lines, index)
            # A record that cannot be read costs its first line only; the others are read again on their own.
            yield BadRow(number, record) if isinstance(record, str) else _row(layout, number, record)
            count = count or 1
        index += count


def csv_whole_records(layout: Layout, data: bytes) -> int:
    """Bytes of a block up to the record that goes on after it."""
    if b'"' not in data:
        return len(data)
    lines = list(text_lines(0, data))
    index = 0
    while index < len(lines):
        count = 1
        if lines[index][1].count('"') % 2:
            count = _csv_record(layout, lines, index)[1]
            if not count:
                return _offset(data, index)
        index += count
    return len(data)


def _offset(data: bytes, line: int) -> int:
    """Where a line (0-based) begins."""
    at = 0
    for _ in range(line):
        at = data.index(b"\n", at) + 1
    return at


def _csv_record(layout: Layout, lines: list[Line], index: int) -> tuple[list[str] | str, int]:
    """Fields of the record that begins at a line, or why it has none; and how many lines that takes, 0 when it is open
    where the lines end."""
    # A line with all its quotes in pairs is a record, or is broken: joining lines to it would be a guess.
    odd = lines[index][1].count('"') % 2
    end = len(lines) if odd else index + 1
    used = 0
    is_open = False

    def texts() -> Iterator[str]:
        nonlocal used, is_open
        size = 0
        for line in range(index, end):
            _, text, reason = lines[line]
            size += len(text) + 1
            if reason or size > MAX_LINE_BYTES:
                raise csv.Error
            if used and _looks_like_row(layout, text):
                raise csv.Error
            used += 1
            yield text + "\n"
        is_open = bool(odd)

    try:
        fields = next(csv.reader(texts(), strict=True))
    except csv.Error:
        return "malformed", 0 if is_open else 1
    return fields, used


def _looks_like_row(layout: Layout, text: str) -> bool:
    """Whether a line within a quoted field may be a row of its own, whole or not: it has as many columns, or the time
    or the kind of one among several. Taking a row for text would put its user's id into another's, so doubt counts."""
    fields = [field.strip('" ') for field in text.split(",")]
    if len(fields) == 1:
        return False
    time_format = layout.columns.time_format
    return len(fields) >= layout.width or any(
        field.lower() in EVENT_KINDS or parse_time(field, time_format) is not None for field in fields
    )


def _json_rows(layout: Layout, first: int, data: bytes) -> Rows:
    take = _RECORDS[layout.format]
    for number, text, reason in text_lines(first, data):
        if not text:
            yield BadRow(number, reason or "blank_line")
            continue
        try:
            record = _JSON.decode(text)
        except (ValueError, RecursionError):
            record = None
        yield take(layout, number, record) if isinstance(record, dict) else BadRow(number, "malformed")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError where a key stands twice, of which Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_once)


def _field(record: dict[str, Any], name: str) -> Any:
    """A field by its name, or by the names on the way to it."""
    if name in record or "." not in name:
        return record.get(name)
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def typed_row(line: int, user: Any, time: Any, kind: Any, text: Any) -> RawRow | BadRow:
    """A row of a typed format; whole numbers pass as user ids and texts, and numbers as times; nothing else is
    converted."""
    if isinstance(user, bytes) or isinstance(time, bytes) or isinstance(kind, bytes) or isinstance(text, bytes):
        return BadRow(line, "bad_utf8")
    if type(user) is int:
        user = str(user)
    if type(text) is int:
        text = str(text)
    if not (isinstance(user, str) and isinstance(kind, str) and isinstance(text, str)) or time is None:
        return BadRow(line, "missing_value")
    if type(time) is int and time.bit_length() < 128:
        time = str(time)
    elif type(time) is float and time > _LEAST_EPOCH:
        time = f"{time:.6f}"
    if not isinstance(time, str | datetime):
        return BadRow(line, "bad_time")
    return RawRow(line, user, time, kind, text)


def _plain_record(layout: Layout, line: int, record: dict[str, Any]) -> RawRow | BadRow:
    columns = layout.columns
    kind = _field(record, columns.kind) if columns.kind else "search"
    user, time, text = (_field(record, name) for name in (columns.user_id, columns.time, columns.text))
    return typed_row(line, user, time, kind, text)


def _ubi_record(layout: Layout, line: int, record: dict[str, Any]) -> RawRow | BadRow:
    """A document of ubi_queries (a search) or of ubi_events."""
    source = record if record.get("_source") is None else record["_source"]
    if not isinstance(source, dict):
        return BadRow(line, "malformed")
    action = source.get("action_name")
    user, time = _field(source, layout.user_field()), source.get("timestamp")
    if action is None:
        return typed_row(line, user, time, "search", source.get("user_query"))
    kind = _UBI_KINDS.get(str(action).strip().lower(), "")
    if kind in ("", "search"):
        text = source.get("user_query")
        return typed_row(line, user, time, kind, text) if kind else BadRow(line, "unknown_kind")
    item = _field(source, "event_attributes.object")
    names = ("name", "title", "description", "url")
    text = next((item[name] for name in names if item.get(name)), None) if isinstance(item, dict) else None
    return typed_row(line, user, time, kind, text)


def _ga4_record(layout: Layout, line: int, record: dict[str, Any]) -> RawRow | BadRow:
    """An event; its text is a parameter's or the first item's name."""
    kind = _GA4_KINDS.get(str(record.get("event_name")), "")
    if not kind:
        return BadRow(line, "unknown_kind")
    found = _ga4_parameters(record.get("event_params"))
    items = record.get("items")
    if isinstance(items, list) and items and isinstance(items[0], dict):
        found.setdefault("item_name", items[0].get("item_name"))
    names = {
        "search": ("search_term",),
        "visit": ("item_name", "page_title", "firebase_screen", "page_location"),
        "click": ("item_name", "link_text", "link_url", "content_id"),
        "purchase": ("item_name",),
    }[kind]
    text = next((found[name] for name in names if found.get(name)), None)
    return typed_row(line, record.get(layout.user_field()), record.get("event_timestamp"), kind, text)


def _ga4_parameters(parameters: Any) -> dict[str, Any]:
    """`event_params`: a list of {key, value: {string_value, int_value, ...}}."""
    found: dict[str, Any] = {}
    for parameter in parameters if isinstance(parameters, list) else []:
        if isinstance(parameter, dict) and isinstance(value := parameter.get("value"), dict):
            found[str(parameter.get("key"))] = next((v for v in value.values() if v is not None), None)
    return found


def _parquet_rows(layout: Layout, first: int, batch: Any) -> Rows:
    columns = layout.columns
    names = [columns.user_id, columns.time, columns.kind, columns.text]
    values = parquet.columns_values(batch, dict(layout.constants), names, layout.columns.time_zone)
    for number, fields in enumerate(zip(*values, strict=True), start=first):
        yield typed_row(number, *fields)


def _parquet_records(layout: Layout, first: int, batch: Any) -> Rows:
    take = _RECORDS[layout.format]
    for number, record in enumerate(parquet.records(batch, layout.columns.time_zone), start=first):
        yield take(layout, number, record)


_RECORDS: dict[str, Callable[[Layout, int, dict[str, Any]], RawRow | BadRow]] = {
    "jsonl": _plain_record,
    "ubi": _ubi_record,
    "ga4": _ga4_record,
}
ROWS: dict[str, Callable[[Layout, int, Any], Rows]] = {
    "aol": _aol_rows,
    "tsv": _tsv_rows,
    "csv": _csv_rows,
    **dict.fromkeys(_RECORDS, _json_rows),
    "parquet parquet": _parquet_rows,
    "parquet ubi": _parquet_records,
    "parquet ga4": _parquet_records,
}
"""(layout, number of the first row, block) -> rows, by Layout.rows."""
