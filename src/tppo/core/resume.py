"""Rows that take long to make, kept as they come: a stage that was stopped goes on where it was.

The work is cut into units, whose rows depend on the unit alone: so what comes out is the same, to the last bit, however
often it was stopped on the way. Finished units are written together every few seconds, each file at once or not at all.
A stage keeps them in the folder `parts` of its own; `run_stage` deletes that when the stage has nothing left to lose.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from tppo.core.common import console, track
from tppo.core.tables import write_table

SECONDS_BETWEEN_WRITES = 5.0
"""What a kill may lose, beside the unit under way."""
Row = dict[str, Any]
Unit = TypeVar("Unit")


def make_rows(
    folder: Path | None,
    schema: pa.Schema,
    units: Sequence[Unit],
    make: Callable[[Unit], Sequence[Row]],
    *,
    made_with: dict[str, Any],
    description: str | None = None,
) -> pa.Table:
    """The rows of all units, in their order; those that `folder` holds already are not made again.

    Args:
        folder: of this table alone; None keeps nothing.
        make: rows of a unit.
        made_with: what the rows depend on beside the settings and inputs of the stage; parts made with something else,
            or by another version of the package, are made anew.
        description: label of a progress bar; None shows none.
    """
    mark = json.dumps({**made_with, "units": len(units), "version": importlib.metadata.version("tppo")}, sort_keys=True)
    found = _read_parts(folder, schema, mark) if folder else {}
    done = {unit for units_of_part, _ in found.values() for unit in units_of_part}
    missing = [number for number in range(len(units)) if number not in done]
    if done and missing and description:
        console.print(f"{description}: {len(done)} of {len(units)} were made before", markup=False, soft_wrap=True)
    rows: list[Row] = []
    made: list[int] = []
    last_write = time.monotonic()

    def write() -> None:
        nonlocal last_write
        if made:
            table = pa.Table.from_pylist(rows, schema=schema)
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                notes = {"units": json.dumps(made), "mark": mark}
                write_table(folder / f"{made[0]:09}.parquet", table, schema.with_metadata(notes))
            found[made[0]] = list(made), table
            rows.clear()
            made.clear()
        last_write = time.monotonic()

    for number in track(missing, description) if description and missing else missing:
        # A part holds neighbours, so that parts in order are units in order.
        if made and (number != made[-1] + 1 or time.monotonic() - last_write > SECONDS_BETWEEN_WRITES):
            write()
        rows += make(units[number])
        made.append(number)
    write()
    tables = [table.replace_schema_metadata(None) for _, (_, table) in sorted(found.items())]
    plain = pa.schema(list(schema))
    return pa.concat_tables(tables) if tables else plain.empty_table()


def _read_parts(folder: Path, schema: pa.Schema, mark: str) -> dict[int, tuple[list[int], pa.Table]]:
    """Units and rows of each part, by its first unit. What cannot be read, or was made otherwise, is deleted."""
    found = {}
    for path in sorted(folder.glob("*.parquet")):
        try:
            table = pq.read_table(path)
            notes = table.schema.metadata or {}
            units = json.loads(notes[b"units"])
            if notes[b"mark"].decode() != mark:
                raise ValueError("it was made with other settings, or by another version")
            found[units[0]] = units, table.cast(schema)
        except (OSError, LookupError, ValueError) as error:  # pa.ArrowInvalid is a ValueError
            console.print(f"{path} is made anew: {error}", markup=False, soft_wrap=True)
            path.unlink()
    return found


def chunks(count: int, size: int) -> list[range]:
    """Row numbers 0 to count - 1 in units of `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
