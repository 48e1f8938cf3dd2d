"""What every module may need: the error a user is meant to see, seeded randomness, the console and its progress bars.

One seed in the recipe gives independent streams by name. Everything human-readable goes to stderr, stdout is for
results; without a terminal (a log file, CI) a bar becomes a line with the time left every few seconds.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class UserError(ValueError):
    """A mistake the user can mend: the message names the file, row or setting and the way out.

    The CLI prints the message without a traceback and exits with status 2.
    """


Item = TypeVar("Item")


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names`: streams do not disturb each other."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng(seed: int, *names: str | int) -> np.random.Generator:
    return np.random.default_rng(stream_seed(seed, *names))


def draw(items: Sequence[Item], count: int | None, seed: int, *names: str | int) -> list[Item]:
    """`count` of the items, drawn without replacement and in their order; None means all."""
    return [items[index] for index in drawn_numbers(len(items), count, seed, *names)]


def drawn_numbers(total: int, count: int | None, seed: int, *names: str | int) -> np.ndarray:
    """Which of `total` items `draw` takes, ascending."""
    if count is None or total <= count:
        return np.arange(total)
    return np.sort(rng(seed, *names).choice(total, size=count, replace=False))


def seed_everything(seed: int, *names: str | int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    import torch  # here: commands that only draw with `rng` should start without torch

    value = stream_seed(seed, *names)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


T = TypeVar("T")
console = Console(stderr=True)


LINE_SECONDS = 5.0
"""Between two lines of progress where there is no terminal."""


class _Lines(Progress):
    """A hidden bar that says how far it is now and then."""

    said = 0.0

    def start(self) -> None:
        self.said = time.monotonic()
        super().start()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        if time.monotonic() - self.said < LINE_SECONDS:
            return
        self.said = time.monotonic()
        task = next(task for task in self.tasks if task.id == task_id)
        left = "" if task.time_remaining is None else f", {task.time_remaining:.0f} s left"
        total = "?" if task.total is None else f"{task.total:.0f}"
        console.print(f"{task.description}: {task.completed:.0f} of {total}{left}", soft_wrap=True, markup=False)


def progress_bar(note: bool = False, lines: bool = True) -> Progress:
    """A bar with counts, elapsed and remaining time; lines instead when stderr is no terminal.

    Args:
        note: show the task's field `note` at the end of the line (give it to `add_task`).
        lines: False for a caller that prints lines of its own when there is no terminal.
    """
    kind = _Lines if lines and not console.is_terminal else Progress
    return kind(
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
    """Iterate with a progress bar. Without a terminal, one line at the start, then one every few seconds."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if not console.is_terminal:
        console.print(f"{description} ({total if total is not None else '?'})", markup=False)
    with progress_bar() as bar:
        task = bar.add_task(description, total=total)
        for item in iterable:
            yield item
            bar.advance(task)
