"""A stage in a process of its own that is killed, for real (SIGKILL), after a number of files have appeared."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
from pathlib import Path

from tppo.core.config import Recipe

_context = multiprocessing.get_context("forkserver")
# Imported once, and forked from there: a fresh interpreter takes seconds to import torch.
_context.set_forkserver_preload(
    [
        "tppo.generate.sample",
        "tppo.evaluate.readings",
        "tppo.reward.train",
        "tppo.judge.embedding",
        "tests.helpers.killed",
    ]
)
MOST_ATTEMPTS = 30
SMALL_CHUNK = 4
"""Items that the offline judge labels at a time here."""


def run_with_kills(recipe: Recipe, stage: str, files: int) -> int:
    """Run a stage to its end, killing it whenever `files` files have appeared since it was started; in every second
    attempt the last of them does not appear any more. Returns the number of kills.

    AssertionError: an attempt ended with an error, or they do not come to an end.
    """
    for attempt in range(MOST_ATTEMPTS):
        process = _context.Process(target=_attempt, args=(recipe, stage, files, attempt % 2 == 0))
        process.start()
        process.join(120)
        if process.exitcode == 0:
            return attempt
        assert process.exitcode == -signal.SIGKILL, f"exit status {process.exitcode}"
    raise AssertionError(f"still not finished after {MOST_ATTEMPTS} kills")


def _attempt(recipe: Recipe, stage: str, files: int, appears: bool) -> None:
    from tppo.core import resume
    from tppo.core.run import run_stage
    from tppo.core.stages import STAGES, split_stage
    from tppo.judge import label
    from tppo.reward import progress

    resume.SECONDS_BETWEEN_WRITES = progress.SECONDS_BETWEEN_CHECKPOINTS = -1.0
    progress.WRITING_SHARE = float("inf")
    label.CHUNK = SMALL_CHUNK
    seen = 0

    def dying(real):
        def move(path: Path, target: Path) -> Path:
            nonlocal seen
            seen += 1
            if seen < files:
                return real(path, target)
            if appears:
                real(path, target)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("dead")

        return move

    for name in ("replace", "rename"):
        setattr(Path, name, dying(getattr(Path, name)))
    run_stage(recipe, stage, importlib.import_module(STAGES[split_stage(stage)[0]].module).run)
