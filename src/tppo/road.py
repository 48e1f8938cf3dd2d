"""Going down the road: the stages of a run one after the other, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from tppo.config import Recipe
from tppo.errors import UserError
from tppo.progress import console
from tppo.run import RunFolder, stage_command, write_text


def write_recipe(run: RunFolder) -> Path:
    """Write the resolved recipe into the run folder: what its stages are called with."""
    path = run.root / "recipe.yaml"
    run.root.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(asdict(run.recipe), sort_keys=False))
    return path


def run_stages(
    recipe: Recipe,
    stages: Sequence[str],
    call: Callable[[list[str]], int] = subprocess.call,
    name: str = "",
) -> None:
    """Run the stages that are not finished, each in a process of its own, so that memory returns to the machine and
    peaks can be told apart.

    Args:
        call: runs a command line and returns its exit status.
        name: shown before each stage.

    Raises:
        UserError: a stage stopped, or was finished with other settings.
    """
    run = RunFolder(recipe)
    path = write_recipe(run)
    for number, stage in enumerate(stages, start=1):
        head = f"{name}[{number}/{len(stages)}] {stage}"
        if run.is_done(stage):
            console.print(f"{head}: done before, skipped", markup=False, soft_wrap=True)
            continue
        console.rule(head.replace("[", "\\["))
        command, flags = stage_command(stage)
        start = time.monotonic()
        status = call([sys.executable, "-m", "tppo", command, "--config", str(path), *flags])
        if status:
            raise UserError(f"stage {stage} stopped (exit status {status}); mend it and give the same command again")
        console.print(f"{head}: {time.monotonic() - start:.0f} s", markup=False, soft_wrap=True)
