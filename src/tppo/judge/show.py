"""`tppo ledger`: what the LLM judge was asked, what it answered, and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from rich.box import SIMPLE
from rich.table import Table

from tppo.config import Recipe
from tppo.errors import UserError
from tppo.judge.ledger import JudgeLedger
from tppo.judge.llm import ledger_path
from tppo.progress import console

_FORMATS = {".csv": "(FORMAT csv, HEADER)", ".jsonl": "(FORMAT json)", ".parquet": "(FORMAT parquet)"}


def show_ledger(recipe: Recipe) -> None:
    """Print totals by model and template, or write every attempt to `ledger.export`.

    Raises:
        UserError: there is no ledger, or the export's file name has another ending.
    """
    path = ledger_path(recipe.judge)
    with JudgeLedger(path, read_only=True) as ledger:
        if recipe.ledger.export:
            rows = ledger.attempts()
            export(rows, Path(recipe.ledger.export))
            console.print(f"{len(rows)} attempts of {path} written to {recipe.ledger.export}", soft_wrap=True)
            return
        console.print(f"{path}", soft_wrap=True)
        for title, rows in (("requests", ledger.totals()), ("attempts without a verdict", ledger.problems())):
            if rows:
                console.print(_table(title, rows))


def export(rows: list[dict[str, Any]], path: Path) -> None:
    """Rows to a .csv, .jsonl or .parquet file. Replies hold words of users' logs: treat the file alike."""
    if path.suffix not in _FORMATS:
        raise UserError(f"ledger.export={path} has to end in one of {', '.join(_FORMATS)}")
    if not rows:
        raise UserError("the ledger holds no attempt to export")
    table = pa.Table.from_pylist(rows)
    connection = duckdb.connect()
    connection.register("attempts", table)
    connection.execute(f"COPY attempts TO '{str(path).replace(chr(39), chr(39) * 2)}' {_FORMATS[path.suffix]}")


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v if v is not None else "") for v in row.values()))
    return table
