"""The command line: a subcommand per stage, the whole road, and what looks at its results."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tppo.core.common import UserError, console
from tppo.core.config import Recipe, TuningAlgorithm
from tppo.core.pipeline import check_sections, run_stages
from tppo.core.processes import Stopped, ended_by_signals, locked
from tppo.core.recipe import COMMANDS, check_readings, check_samples, parse_recipe
from tppo.core.run import RunFolder, run_stage
from tppo.core.stages import STAGES, all_stages, read_stages, rl_stage, split_stage

RENAMED = dict.fromkeys(("vote", "rejudge", "distance"), "read")
"""Commands that are called otherwise now."""


def run_one(recipe: Recipe, stage: str) -> bool:
    """Run a stage in this process unless it is done. True when work was done."""
    return run_stage(recipe, stage, importlib.import_module(STAGES[split_stage(stage)[0]].module).run)


def run(recipe: Recipe, stages: Sequence[str] = (), redo: Sequence[str] = ()) -> None:
    """Run the stages of a recipe that are not finished, each in a process of its own.

    >>> import tempfile
    >>> from tppo.core.config import Synthetic
    >>> recipe = Recipe(run_dir=tempfile.mkdtemp(), synthetic=Synthetic(users=60))
    >>> run(recipe, ["synthetic", "prepare"])
    >>> RunFolder(recipe).facts("prepare")["rows_read"] > 1000
    True

    Args:
        stages: those wanted; empty: all of the recipe's, left to right.
        redo: stages to make anew, with all that follows from them.

    Raises:
        UserError: a stage that the recipe does not have, one that stopped, or one finished with other settings.
    """
    known = all_stages(recipe)
    _check_names("stages", stages, known)
    _check_names("--redo", redo, known)
    check_samples(recipe)
    check_readings(recipe.evaluate, recipe.judge)
    wanted = [stage for stage in known if not stages or stage in stages]
    if unmade := sorted(set(redo) - set(wanted)):
        raise UserError(f"--redo {unmade}: not among the stages {wanted}, so deleted and not made anew: add them there")
    check_sections(recipe, RunFolder(recipe).check(wanted, redo))
    run_stages(recipe, wanted, redo=redo)


def _run_all(recipe: Recipe, redo: Sequence[str]) -> None:
    """Every stage, then the summary on the console."""
    run(recipe, redo=redo)
    from tppo.report.page import print_summary  # here: no other command draws

    folder = RunFolder(recipe)
    print_summary(folder)
    # Whole lines, so that they can be copied.
    console.print(f"report: {folder.path('report') / 'report.html'}", soft_wrap=True)
    console.print(f"serve:  tppo serve --config {folder.root / 'recipe.yaml'}", soft_wrap=True)


def _check_names(name: str, asked: Sequence[str], known: Sequence[str]) -> None:
    if unknown := sorted(set(asked) - set(known)):
        raise UserError(f"{name} {unknown}: this recipe's stages are {list(known)}")


def dispatch(command: str, arguments: Sequence[str]) -> None:
    recipe, redo = parse_recipe(command, arguments)
    if command == "run":
        _run_all(recipe, redo)
    elif command == "study":
        from tppo.study.run import run_study  # here: no other command needs it

        run_study(recipe, redo)
    elif action := COMMANDS[command].action:
        module, function = action.split(":")
        getattr(importlib.import_module(module), function)(recipe)
    else:
        _run_stages_of(command, recipe, redo)


def _run_stages_of(command: str, recipe: Recipe, redo: Sequence[str]) -> None:
    """The stage a command is called after; of one with variants those that the recipe names."""
    algorithms: dict[str, TuningAlgorithm] = {"rl": recipe.rl.algorithm, "dpo": "dpo"}
    stages = [command.replace("-", "_")]
    if algorithm := algorithms.get(command):
        stages = [rl_stage(algorithm)]
        if algorithm not in recipe.algorithms:
            recipe = replace(recipe, algorithms=[*recipe.algorithms, algorithm])
    if command == "read":
        check_readings(recipe.evaluate, recipe.judge)
        stages = read_stages(recipe)
        if not stages:
            raise UserError("evaluate.readings is empty: say who reads, as `--evaluate.readings '[{reader: vote}]'`")
    run = RunFolder(recipe)
    _check_names("--redo", redo, list(dict.fromkeys([*all_stages(recipe), *stages])))
    if "rl_dpo" in stages:
        check_samples(recipe)
    run.check_left(stages, redo)
    check_sections(recipe, run.check(stages, redo))
    if redo:
        with locked(run.root):  # nobody may be at work on what follows
            run.discard_from(*redo)
    for stage in stages:
        if not run_one(recipe, stage):
            print(f"{run.path(stage)} is finished already; --redo {stage} makes it anew")


def help_text() -> str:
    lines = [
        "tppo: from a search log to a model that writes the queries a user is about to type.",
        "",
        "usage: tppo COMMAND [--config recipe.yaml] [--section.field value ...]",
        "",
        *(f"  {name:<12} {command.help}" for name, command in COMMANDS.items()),
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
        print(f"tppo {importlib.metadata.version('tppo')}")
        return
    try:
        if command not in COMMANDS:
            close = [new] if (new := RENAMED.get(command)) else difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"; did you mean `tppo {close[0]}`?" if close else ""
            raise UserError(f"there is no command {command!r}{hint}\n\n{help_text()}")
        with ended_by_signals():
            dispatch(command, arguments)
    except UserError as error:
        _fail(str(error), 2)
    except OSError as error:
        if error.errno is None:
            raise
        _fail(f"{error.filename or 'the system'}: {os.strerror(error.errno)}. Finished stages stay valid", 3)
    except Stopped as stopped:
        _fail(f"stopped by {stopped}; give the same command again to go on", 128 + stopped.number)
    except KeyboardInterrupt:
        _fail("interrupted; give the same command again to go on", 130)


def _fail(message: str, status: int) -> Any:
    print(f"tppo: {message}", file=sys.stderr)
    raise SystemExit(status)
