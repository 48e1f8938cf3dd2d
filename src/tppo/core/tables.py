"""The tables between stages: one schema each, checked when read and when written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tppo.core.common import UserError
from tppo.core.text import Event

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
    pq.write_table(table, temporary)
    temporary.replace(path)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a Parquet file and check it against `schema`.

    Raises:
        UserError: the file is missing, no Parquet, or lacks a column or its type.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: run the stage that writes it")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None
    missing = [column.name for column in schema if column.name not in table.column_names]
    if missing:
        raise UserError(f"{path} lacks the columns {missing}; it has {table.column_names}")
    try:
        return table.select(schema.names).cast(schema)
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


def load_examples(folder: Path, split: str | None = None) -> list[Example]:
    """Examples of a prepare folder, in file order; all splits or one."""
    rows = read_table(folder / "examples.parquet", EXAMPLES).to_pylist()
    return [
        Example(**{**row, "history": [Event(**event) for event in row["history"]]})
        for row in rows
        if split is None or row["split"] == split
    ]
