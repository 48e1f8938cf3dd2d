"""Parquet files of a log -> batches of the columns that are read, and their values as Python's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from tppo.core.common import UserError
from tppo.logs.rows import Layout, columns_of
from tppo.logs.times import EPOCH

_BATCH_ROWS = {"parquet": 1 << 16, "ubi": 1 << 14, "ga4": 1 << 14}
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
_MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 0}
_OUT_OF_RANGE = "out of range"
"""A text that is no time."""


def is_parquet(raw: BinaryIO) -> bool:
    """Whether a file begins as Parquet does; leaves it at its start."""
    magic = raw.read(4)
    raw.seek(0)
    return magic == b"PAR1"


def read_batches(
    path: Path, raw: BinaryIO, layout: Layout, given: Path | None = None
) -> Iterator[tuple[Layout, int, pa.RecordBatch]]:
    """(layout, number of the first row, batch) of one file, in order. Folders' names hold columns below `given`.

    Raises:
        UserError: no Parquet, or a column missing or of a type that is not read.
    """
    layout = replace(layout, parquet=True)
    try:
        # As nanoseconds, Arrow's default for INT96 (Spark, Impala), a year after 2262 would wrap to a plausible one.
        file = pq.ParquetFile(raw, coerce_int96_timestamp_unit="us")
        schema = file.schema_arrow
        if layout.format == "parquet":
            layout, names = _plain_columns(path, given, schema, layout)
        elif layout.format == "ga4":
            names = _ga4_columns(path, schema, layout)
        else:
            names = None
        number = 1
        for batch in file.iter_batches(batch_size=_BATCH_ROWS[layout.format], columns=names):
            yield layout, number, batch
            number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # Arrow's message may quote values.
        raise UserError(f"{path} is not a readable Parquet file: check prepare.format, or get the file again") from None


def _ga4_columns(path: Path, schema: pa.Schema, layout: Layout) -> list[str]:
    """The columns that are read of those that the file has."""
    needed = ("event_name", "event_timestamp", layout.user_field())
    if missing := [name for name in needed if schema.names.count(name) != 1]:
        raise UserError(
            f"{path}: the columns {missing} of a GA4 export are not there exactly once: check prepare.format and "
            f"prepare.columns.user_id, or export the table whole"
        )
    return [name for name in (*needed, "event_params", "items") if name in schema.names]


def _plain_columns(path: Path, given: Path | None, schema: pa.Schema, layout: Layout) -> tuple[Layout, list[str]]:
    """The layout with the columns that the folders' names hold, and the names of those that the file holds."""
    columns = layout.columns
    wanted = {columns.user_id: "user_id", columns.time: "time", columns.kind: "kind", columns.text: "text"}
    wanted.pop("", None)
    folders = (path.relative_to(given) if given else path).parts[:-1]
    keys = dict(part.split("=", 1) for part in folders if "=" in part)
    constants = {
        name: None if keys[name] == _NO_VALUE else unquote(keys[name])
        for name in wanted
        if name in keys and name not in schema.names
    }
    columns_of(path, [*schema.names, *constants], layout)  # raises where a column is missing
    names = [name for name in wanted if name not in constants]
    for name in names:
        kind = schema.field(name).type
        if not _is_read(kind, is_time=wanted[name] == "time"):
            allowed = "string, integer, timestamp or date" if wanted[name] == "time" else "string or integer"
            raise UserError(f"{path}: column {name} is {kind}; {allowed} is needed: cast it when writing the file")
    return replace(layout, constants=tuple(constants.items())), names


def _is_read(kind: pa.DataType, is_time: bool) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_read(kind.value_type, is_time)
    if _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind):
        return True
    if pa.types.is_decimal(kind):
        return is_time or kind.scale == 0
    return is_time and (pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_floating(kind))


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)) or (
        types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    )


def columns_values(
    batch: pa.RecordBatch, constants: dict[str, str | None], names: list[str], zone: str
) -> list[list[Any]]:
    """Values of the columns, in this order; an empty name is the kind of a log of searches only.

    Args:
        zone: of times without zone; empty: they are taken as they are.
    """
    values: list[list[Any]] = []
    for name in names:
        if not name or name in constants:
            values.append([constants[name] if name else "search"] * batch.num_rows)
        else:
            values.append(_values(batch.column(name), zone))
    return values


def records(batch: pa.RecordBatch, zone: str) -> Iterator[dict[str, Any]]:
    """The rows of a batch with nested columns."""
    names = batch.schema.names
    columns = [_values(column, zone) for column in batch.columns]
    for fields in zip(*columns, strict=True):
        yield dict(zip(names, fields, strict=True))


def _values(column: pa.Array, zone: str) -> list[Any]:
    """Python values: str, int, float, datetime, None; bytes where a text is not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if _is_text(kind):
        return [_decode(value) for value in column.cast(pa.large_binary()).to_pylist()]
    if pa.types.is_timestamp(kind):
        # Not cast by Arrow, where one value out of range fails the whole column.
        local = bool(zone) and kind.tz is None
        return [_instant(value, kind.unit, local) for value in column.cast(pa.int64()).to_pylist()]
    if pa.types.is_date(kind):
        days = column.cast(pa.int32() if pa.types.is_date32(kind) else pa.int64()).to_pylist()
        size = timedelta(days=1) if pa.types.is_date32(kind) else timedelta(milliseconds=1)
        return [_day(value, size) for value in days]
    if pa.types.is_decimal(kind):
        return [_decimal(value) for value in column.to_pylist()]
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # UnicodeDecodeError is one of them
        return [_nested(column[index]) for index in range(len(column))]


def _instant(value: int | None, unit: str, local: bool) -> datetime | str | None:
    """UTC time without zone, or a local time as text; a text that is no time when out of Python's years 1 to 9999."""
    if value is None:
        return None
    try:
        when = EPOCH + timedelta(microseconds=value * _MICROSECONDS[unit] if unit != "ns" else value // 1000)
    except OverflowError:
        return _OUT_OF_RANGE
    return when.isoformat() if local else when


def _day(value: int | None, size: timedelta) -> str | None:
    try:
        return None if value is None else date.isoformat((EPOCH + value * size).date())
    except OverflowError:
        return _OUT_OF_RANGE


def _decimal(value: Decimal | None) -> int | str | None:
    return None if value is None else int(value) if value == int(value) else f"{value:f}"


def _nested(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        return b""


def _decode(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value
