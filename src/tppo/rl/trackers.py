"""Experiment trackers beside metrics.jsonl, through accelerate's tracker classes: update u is a tracker's step u.

metrics.jsonl is the record, a tracker shows a copy of it. `trackers.json` notes how far each tracker has got and which
of its runs is ours, so that a resumed run goes on in that run: updates made again are not logged again (they have the
same numbers), and rows a tracker has not had, because it failed or was added later, are logged first. A kill between
a log and its note makes one update come twice: TensorBoard drops the first, W&B the second, the others show one more
point of the same value.

Only metrics and settings go to a tracker, never text of the log or of a response.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import is_mlflow_available, is_tensorboard_available, is_trackio_available, is_wandb_available

from tppo.config import RL
from tppo.errors import UserError
from tppo.progress import console
from tppo.run import read_jsonl, write_json

NOTES = "trackers.json"
INSTALLED: dict[str, Callable[[], bool]] = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "trackio": is_trackio_available,
    "mlflow": is_mlflow_available,
}
"""By tracker, which is also its name as a pip package."""


@contextlib.contextmanager
def open_trackers(config: RL, folder: Path) -> Iterator[Trackers]:
    """The trackers of `rl.trackers`, started and told what metrics.jsonl of `folder` holds; finished at the end.

    Raises:
        UserError: one is not installed, or does not start.
    """
    for name in config.trackers:
        if not INSTALLED[name]():
            raise UserError(f"rl.trackers names {name}, which is not installed: `pip install {name}`, or leave it out")
    trackers = Trackers(config, folder)
    try:
        trackers.start()
        yield trackers
    finally:
        trackers.finish()


class Trackers:
    """Started trackers and how far each has got. None of them can stop training once it has started."""

    def __init__(self, config: RL, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.notes: dict[str, dict[str, Any]] = {}
        self.started: dict[str, Any] = {}
        self.failing: set[str] = set()

    def start(self) -> None:
        """Start every tracker, and log the rows of metrics.jsonl that it has not had."""
        if not self.config.trackers:
            return
        PartialState()  # accelerate's trackers log through it
        notes, metrics = self.folder / NOTES, self.folder / "metrics.jsonl"
        if notes.exists():
            self.notes = json.loads(notes.read_text(encoding="utf-8"))
        self.rows = read_jsonl(metrics)
        for name in dict.fromkeys(self.config.trackers):
            self.started[name] = self._start(name)
        self._catch_up()

    def log(self, row: dict[str, Any]) -> None:
        """Log a row of metrics.jsonl, after those a tracker has not had."""
        if self.started:
            self.rows.append(row)
            self._catch_up()

    def _catch_up(self) -> None:
        for name, tracker in self.started.items():
            try:
                for row in self.rows:
                    update = int(row["update"])
                    if update > self.notes[name]["logged"]:
                        tracker.log({key: value for key, value in row.items() if key != "update"}, step=update)
                        self.notes[name]["logged"] = update
                self.failing.discard(name)
            except Exception as error:  # a tracker's errors have no common base
                if name not in self.failing:
                    console.print(f"{name} failed, training goes on and tries again: {error}", soft_wrap=True)
                self.failing.add(name)
        write_json(self.folder / NOTES, self.notes)

    def finish(self) -> None:
        for name, tracker in self.started.items():
            try:
                tracker.finish()
            except Exception as error:  # as above; the model is worth more than the end of a curve
                console.print(f"{name} did not finish: {error}", soft_wrap=True)

    def _start(self, name: str) -> Any:
        new = name not in self.notes
        note = self.notes.setdefault(name, {"logged": 0, "run": secrets.token_hex(4)})
        tracker = LOGGER_TYPE_TO_CLASS[name](**self._arguments(name, note, new))
        try:
            with _no_questions():
                tracker.start()
            if name == "mlflow":
                note["run"] = tracker.tracker.info.run_id
            write_json(self.folder / NOTES, self.notes)
            if new:
                settings = {key: value for key, value in asdict(self.config).items() if not isinstance(value, list)}
                tracker.store_init_configuration(settings)
        except Exception as error:  # as in _catch_up
            raise UserError(f"{name} does not start: {error}{_WAY_OUT.get(name, '')}") from error
        return tracker

    def _arguments(self, name: str, note: dict[str, Any], new: bool) -> dict[str, Any]:
        """What this tracker's class needs to start the run of the note, or to go on in it."""
        project, shown = self.config.tracker_project, f"{self.folder.resolve().parent.name}-{self.folder.name}"
        if name == "tensorboard":
            return {"run_name": name, "logging_dir": str(self.folder), "purge_step": note["logged"] + 1}
        if name == "wandb":
            return {
                "run_name": project,
                "name": shown,
                "id": note["run"],
                "resume": "allow",
                "dir": str(self.folder),
            }
        if name == "trackio":
            return {"run_name": project, "name": f"{shown}-{note['run']}", "resume": "allow"}
        assert name == "mlflow"
        return {"experiment_name": project, "run_name": shown, "run_id": None if new else note["run"]}


_WAY_OUT = {"wandb": ". Set WANDB_API_KEY, run `wandb login` once, or set WANDB_MODE=offline"}


@contextlib.contextmanager
def _no_questions() -> Iterator[None]:
    """Without a terminal to ask on, W&B raises where it would ask for a login and wait."""
    with open(os.devnull, encoding="utf-8") as nothing:
        stdin, sys.stdin = sys.stdin, nothing
        try:
            yield
        finally:
            sys.stdin = stdin
