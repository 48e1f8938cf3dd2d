"""The tables between stages: one schema each, checked when read and when written.

Of a table only those columns and rows are read that are used, and they stay in Arrow's columns (some 300 bytes for an
example) until somebody looks at one: a million examples as Python objects would take 10 GB.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from tppo.core.common import UserError, drawn_numbers
from tppo.core.text import Event

ROW_GROUP = 65_536
"""Rows that are read together: few enough to be passed over one group at a time."""
_AT_ONCE = 1024
SPLITS = ("train", "reward_eval", "eval1", "eval2")


def field(name: str, kind: pa.DataType, doc: str, nullable: bool = False) -> pa.Field:
    """A documented column."""
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc})


EVENT = pa.struct([("kind", pa.string()), ("text", pa.string())])
WORD = pa.struct(
    [
        ("i", pa.int32()),
        ("word", pa.string()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("query", pa.int32()),
        ("score", pa.float32()),
        ("label", pa.int8()),
    ]
)
EXAMPLES = pa.schema(
    [
        field("example_id", pa.string(), "unique id: hashed user and window number"),
        field("user_id", pa.string(), "keyed hash of the user id of the log"),
        field("split", pa.string(), "train, reward_eval, eval1 or eval2; users are in one split only"),
        field("history", pa.list_(EVENT), "events before the first target, oldest first"),
        field("targets", pa.list_(pa.string()), "the next distinct new queries, in order"),
        field("target_time", pa.timestamp("us"), "time of the first target"),
    ]
)
REJECTS = pa.schema(
    [
        field("file", pa.string(), "log file"),
        field("line", pa.int64(), "1-based line; null when the whole file is meant", nullable=True),
        field("reason", pa.string(), "why the row was not kept"),
    ]
)
RESPONSES = pa.schema(
    [
        field("example_id", pa.string(), "example responded to"),
        field("split", pa.string(), "split of the example"),
        field("sample", pa.int32(), "number of the response among those to this example"),
        field("response_ids", pa.list_(pa.int32()), "generated token ids, end-of-sequence included when finished"),
        field("response", pa.string(), "decoded text without special tokens"),
        field("finished", pa.bool_(), "the model ended the response itself"),
        field("problem", pa.string(), "why the response is unparseable, else null", nullable=True),
    ]
)
LABELS = pa.schema(
    [
        field("example_id", pa.string(), "example responded to"),
        field("split", pa.string(), "split of the example"),
        field("sample", pa.int32(), "number of the response among those to this example"),
        field("rubric", pa.string(), "targets or history: what relevance is judged against"),
        field("judge", pa.string(), "judge and version"),
        field("response", pa.string(), "the judged text"),
        field("words", pa.list_(WORD), "the words in order; label 1 irrelevant, 2 relevant; empty: not judged"),
        field("sentence_score", pa.float32(), "score of the whole response", nullable=True),
        field("sentence_label", pa.int8(), "1 relevant, 0 not, null when abstained", nullable=True),
        field("status", pa.string(), "ok or abstained"),
        field("problem", pa.string(), "why the judge abstained, else null", nullable=True),
    ]
)
TRAINED_ON = pa.schema(
    [
        field("example_id", pa.string(), "example that the SFT model learnt from"),
        field("user_id", pa.string(), "its user"),
    ]
)
CONSTRUCTED = LABELS.append(field("kind", pa.string(), "how the response was constructed: a name in tppo.judge.probes"))


def write_table(path: Path, rows: Sequence[dict[str, Any]] | pa.Table, schema: pa.Schema) -> None:
    """Write a Parquet file that has exactly `schema`; the file appears whole or not at all."""
    table = rows.cast(schema) if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), schema=schema)
    for column in schema:
        if not column.nullable and table[column.name].null_count:
            raise ValueError(f"{path}: column {column.name} holds nulls")
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        pq.write_table(table, file, row_group_size=ROW_GROUP)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_table(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None, **equal: str) -> pa.Table:
    """Read a Parquet file and check it against `schema`.

    Args:
        columns: those that are read; None: all of the schema's.
        equal: values that columns of the rows wanted have; other rows are not kept in memory.

    Raises:
        UserError: the file is missing, no Parquet, or lacks a column or its type.
    """
    wanted = pa.schema([schema.field(name) for name in columns or schema.names])
    try:
        opened = _open(path, schema)
        condition = None
        for name, value in equal.items():
            same = ds.field(name) == value
            condition = same if condition is None else condition & same
        return _checked(opened.to_table(columns=wanted.names, filter=condition), wanted, path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None
    except pa.ArrowNotImplementedError as error:  # no way to compare the column with text
        raise UserError(f"{path} has a column of another type than documented: {error}") from None


def _open(path: Path, schema: pa.Schema) -> ds.Dataset:
    """A Parquet file whose rows are still to be read; UserError: missing, or without a column of the schema."""
    if not path.exists():
        raise UserError(f"{path} does not exist: run the stage that writes it")
    # Also of the wrong kind of file: pyarrow says so when it reads the schema.
    opened = ds.dataset(path, format="parquet")
    if missing := [name for name in schema.names if name not in opened.schema.names]:
        raise UserError(f"{path} lacks the columns {missing}; it has {opened.schema.names}")
    return opened


def _checked(table: pa.Table, schema: pa.Schema, path: Path) -> pa.Table:
    try:
        return table.cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise UserError(f"{path} has a column of another type than documented: {error}") from None


@dataclass(frozen=True)
class Example:
    """A row of examples.parquet."""

    example_id: str
    user_id: str
    split: str
    history: list[Event]
    targets: list[str]
    target_time: datetime


class Examples(Sequence[Example]):
    """Rows of examples.parquet, each made an `Example` when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self.table.take(np.arange(*index.indices(len(self)))))
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(index)
        return _examples(self.table.slice(number, 1))[0]

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), _AT_ONCE):
            yield from _examples(self.table.slice(start, _AT_ONCE))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def with_ids(self, ids: Collection[str]) -> Examples:
        """Those of these ids, in file order."""
        return self.among("example_id", ids)

    def among(self, column: str, values: Collection[str]) -> Examples:
        """Those whose column has one of these values, in file order."""
        return Examples(self.table.filter(pc.is_in(self.table[column], pa.array(values, pa.string()))))


def _examples(table: pa.Table) -> list[Example]:
    return [Example(**{**row, "history": [Event(**event) for event in row["history"]]}) for row in table.to_pylist()]


def load_examples(folder: Path, split: str | None = None) -> Examples:
    """Examples of a prepare folder, in file order; all splits or one."""
    return Examples(read_table(folder / "examples.parquet", EXAMPLES, **({"split": split} if split else {})))


def concatenated(parts: Iterable[Examples]) -> Examples:
    """Examples one after the other."""
    return Examples(pa.concat_tables([part.table for part in parts]))


def drawn_examples(
    folder: Path,
    split: str,
    count: int | None,
    seed: int,
    *names: str | int,
    among: tuple[str, Collection[str]] | None = None,
) -> Examples:
    """`count` examples of a split, as `tppo.core.common.draw` draws them from all (None: all). Only theirs are kept in
    memory: the split's size says which rows they are.

    Args:
        among: a column, and the values of it that examples are drawn from.
    """
    path = folder / "examples.parquet"
    known = read_table(path, EXAMPLES, ["split", *([among[0]] if among else [])])
    wanted = pc.equal(known["split"], split)
    if among:
        wanted = pc.and_(wanted, pc.is_in(known[among[0]], pa.array(among[1], pa.string())))
    rows = np.flatnonzero(wanted.to_numpy(zero_copy_only=False))
    return Examples(_rows(path, EXAMPLES, rows[drawn_numbers(len(rows), count, seed, *names)]))


def _rows(path: Path, schema: pa.Schema, numbers: np.ndarray) -> pa.Table:
    """These rows (ascending) of a table, read a piece at a time."""
    found, first = [], 0
    for batch in pq.ParquetFile(path).iter_batches(_AT_ONCE, columns=schema.names):
        low, high = np.searchsorted(numbers, [first, first + batch.num_rows])
        if high > low:
            # A copy: a slice would keep the whole piece in memory.
            found.append(pa.Table.from_batches([batch]).take(numbers[low:high] - first))
        first += batch.num_rows
    return _checked(pa.concat_tables(found) if found else schema.empty_table(), schema, path)
