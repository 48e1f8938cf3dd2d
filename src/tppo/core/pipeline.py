"""Stages one after the other, each in a process of its own, from settings that are fixed and checked first."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from tppo.core.changes import resolved
from tppo.core.common import UserError, console
from tppo.core.config import Recipe
from tppo.core.files import write_text
from tppo.core.processes import FOLDER, locked
from tppo.core.recipe import check_recipe, check_samples, check_shared
from tppo.core.run import RunFolder
from tppo.core.stages import (
    STAGES,
    of_variant,
    split_stage,
    stage_command,
)

_RECIPE_HEAD = "# Every setting of the run in this folder, written by tppo; a copy of yours is kept beside it.\n"


def check_sections(recipe: Recipe, stages: Sequence[str], data: bool = True) -> None:
    """Every check of these stages that needs no stage to be made: the one that every command makes first.

    Args:
        data: look at the log as well, where there is one (a module's `check_data`).

    Raises:
        UserError: names the setting or the file.
    """
    check_shared(recipe)
    if "rl_dpo" in stages:
        check_samples(recipe)
    for stage in stages:
        module = importlib.import_module(STAGES[split_stage(stage)[0]].module)
        for name in ("check", "check_data") if data else ("check",):
            if check := getattr(module, name, None):
                check(of_variant(stage, recipe))


def write_recipe(run: RunFolder) -> Path:
    """Write the resolved recipe into the run folder, for commands to come. A recipe.yaml that says the same stays as it
    is; one that tppo has not written is kept beside it."""
    path = run.root / "recipe.yaml"
    run.root.mkdir(parents=True, exist_ok=True)
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        if not text.startswith(_RECIPE_HEAD):
            if _says(text, run.recipe):
                return path
            numbers = (number for number in range(1, sys.maxsize))
            path.rename(next(old for n in numbers if not (old := path.with_name(f"recipe.{n}.yaml")).exists()))
    write_text(path, _RECIPE_HEAD + yaml.safe_dump(resolved(run.recipe), sort_keys=False))
    return path


def _says(text: str, recipe: Recipe) -> bool:
    """Whether a recipe file resolves to this recipe."""
    try:
        return resolved(check_recipe(yaml.safe_load(text))) == resolved(recipe)
    except (UserError, yaml.YAMLError, TypeError, AttributeError, ValueError):
        return False


def run_stages(
    recipe: Recipe,
    stages: Sequence[str],
    call: Callable[[list[str]], int] | None = None,
    name: str = "",
    redo: Sequence[str] = (),
    *,
    wait: bool = False,
) -> None:
    """Run the stages that are not finished, each in a process of its own, so that memory returns to the machine and
    peaks can be told apart. They end with this process, and read the recipe as it is now, whatever becomes of
    recipe.yaml.

    Args:
        call: runs a command line and returns its exit status.
        name: shown before each stage.
        redo: stages to make anew first, with all that follows from them.
        wait: for another process that is at work in the folder, instead of refusing.

    Raises:
        UserError: a stage stopped, was made with other settings, or cannot be made; or the folder is in use.
    """
    run = RunFolder(recipe)
    run.check(stages, redo, wait=wait)
    with locked(run.root, wait=wait) as children:
        run.check(stages, redo, wait=wait)  # again, now that nobody else can change anything
        run.discard_from(*redo)
        write_recipe(run)
        fixed = run.root / FOLDER / "recipe.yaml"
        write_text(fixed, yaml.safe_dump(resolved(recipe), sort_keys=False))
        for number, stage in enumerate(stages, start=1):
            head = f"{name}[{number}/{len(stages)}] {stage}"
            if run.is_done(stage):
                console.print(f"{head}: done before, skipped", markup=False, soft_wrap=True)
                continue
            console.rule(head.replace("[", "\\["))
            command, flags = stage_command(stage, recipe)
            start = time.monotonic()
            status = (call or children.call)([sys.executable, "-m", "tppo", command, "--config", str(fixed), *flags])
            if status:
                told = "mend it and give the same command again"
                raise UserError(f"stage {stage} stopped (exit status {status}); {told}")
            console.print(f"{head}: {time.monotonic() - start:.0f} s", markup=False, soft_wrap=True)
