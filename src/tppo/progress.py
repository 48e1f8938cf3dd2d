"""Progress bars and the console everything human-readable goes to (stderr; stdout is for results)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

console = Console(stderr=True)


def progress_bar(note: bool = False) -> Progress:
    """A bar with counts, elapsed and remaining time; silent when stderr is no terminal.

    Args:
        note: show the task's field `note` at the end of the line (give it to `add_task`).
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *([TextColumn("{task.fields[note]}")] if note else []),
        console=console,
        disable=not console.is_terminal,
    )


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar. Without a terminal, one line at the start instead."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if not console.is_terminal:
        console.print(f"{description} ({total if total is not None else '?'})")
    with progress_bar() as bar:
        yield from bar.track(iterable, total=total, description=description)
