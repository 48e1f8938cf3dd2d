"""The command line: a subcommand per stage, nothing else.

Every command takes the whole recipe (`--config recipe.yaml`), so one file serves them all; its help shows only
the sections the stage reads.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jsonargparse

from tppo import __version__
from tppo.core.common import UserError
from tppo.core.config import Recipe, TuningAlgorithm
from tppo.core.recipe import ACTIONS, COMMANDS, parse_recipe
from tppo.core.run import RunFolder, run_stage, run_stages
from tppo.core.stages import MODULES, all_stages, rl_stage, split_stage

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def run_one(recipe: Recipe, stage: str) -> bool:
    """Run a stage in this process unless it is done. True when work was done."""
    module = importlib.import_module(MODULES[split_stage(stage)[0]])
    return run_stage(recipe, stage, module.run)


def run_all(recipe: Recipe, redo: Sequence[str]) -> None:
    """Every stage of the recipe, then the summary on the console."""
    from tppo.core.common import console
    from tppo.core.recipe import check_samples

    run = RunFolder(recipe)
    stages = all_stages(recipe)
    if unknown := set(redo) - set(stages):
        raise UserError(f"--redo {sorted(unknown)}: this recipe's stages are {stages}")
    check_samples(recipe)
    _discard(run, redo)
    run_stages(recipe, stages)
    from tppo.report.page import print_summary

    print_summary(run)
    # Whole lines, so that they can be copied.
    console.print(f"report: {run.path('report') / 'report.html'}", soft_wrap=True)
    console.print(f"serve:  tppo serve --config {run.root / 'recipe.yaml'}", soft_wrap=True)


def _discard(run: RunFolder, redo: Sequence[str]) -> None:
    for stage in redo:
        run.check_own(stage)
    for stage in redo:
        run.discard_from(stage)


def dispatch(command: str, arguments: Sequence[str]) -> None:
    recipe, redo = parse_recipe(command, arguments)
    if command == "run":
        run_all(recipe, redo)
    elif command == "study":
        from tppo.study.run import run_study

        run_study(recipe, redo)
    elif command in ACTIONS:
        module, function = ACTIONS[command]
        getattr(importlib.import_module(module), function)(recipe)
    else:
        algorithms: dict[str, TuningAlgorithm] = {"rl": recipe.rl.algorithm, "dpo": "dpo"}
        algorithm = algorithms.get(command)
        stage = rl_stage(algorithm) if algorithm else command.replace("-", "_")
        _discard(RunFolder(recipe), redo)
        if algorithm and algorithm not in recipe.algorithms:
            recipe = replace(recipe, algorithms=[*recipe.algorithms, algorithm])
        if not run_one(recipe, stage):
            print(f"{RunFolder(recipe).path(stage)} is finished already; --redo {stage} makes it anew")


def help_text() -> str:
    lines = [
        "tppo: from a search log to a model that writes the queries a user is about to type.",
        "",
        "usage: tppo COMMAND [--config recipe.yaml] [--section.field value ...]",
        "",
        *(f"  {name:<12} {text}" for name, text in COMMANDS.items()),
        "",
        "Each command has its own --help and --print_config. Start with: tppo run recipes/demo.yaml",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments.pop(0) if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(help_text())
        return
    if command == "--version":
        print(f"tppo {__version__}")
        return
    try:
        if command not in COMMANDS:
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"; did you mean `tppo {close[0]}`?" if close else ""
            raise UserError(f"there is no command {command!r}{hint}\n\n{help_text()}")
        dispatch(command, arguments)
    except UserError as error:
        _fail(str(error), 2)
    except OSError as error:
        if error.errno is None:
            raise
        _fail(f"{error.filename or 'the system'}: {os.strerror(error.errno)}. Finished stages stay valid", 3)
    except KeyboardInterrupt:
        _fail("interrupted; give the same command again to go on", 130)


def _fail(message: str, status: int) -> Any:
    print(f"tppo: {message}", file=sys.stderr)
    raise SystemExit(status)
