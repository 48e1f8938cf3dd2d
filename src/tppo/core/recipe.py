"""A recipe from YAML and flags: one definition (`tppo.core.config`) gives the schema, the flags, the help and the
errors.

Every command takes the whole recipe, so one file serves them all; its help shows only the sections that the command
reads.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from tppo.core.common import UserError
from tppo.core.config import REPLACED, RETIRED, Evaluate, JudgeSettings, Recipe
from tppo.core.stages import STAGES, stage_names

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class Command:
    """A command that is not the one stage it is called after."""

    help: str
    action: str = ""
    """`module:function` that does it, with the recipe; empty: stages are made (`tppo.cli`)."""
    sections: tuple[str, ...] = ()
    """Sections shown in its help beside its own."""


COMMANDS: dict[str, Command] = {
    "run": Command("all stages of a recipe, left to right: skips finished ones, resumes unfinished ones"),
    "study": Command(
        "a grid of algorithms x seeds x settings from shared SFT, labels and reward models; resumes, then reports"
    ),
    "plan": Command(
        "dry run: check every section of a recipe; memory and time of each stage, without data, GPU or download",
        "tppo.plan:print_plan",
    ),
    **{name.replace("_", "-"): Command(stage.help, sections=stage.sections) for name, stage in STAGES.items()},
    "ledger": Command(
        "what the LLM judge was asked, answered and cost; --ledger.export writes every attempt to a file",
        "tppo.judge.ledger:show_ledger",
        ("judge",),
    ),
    "serve": Command(
        "suggestions over HTTP, with a page that shows the models beside each other", "tppo.serve.app:serve"
    ),
    "agreement": Command(
        "check the labels: a blind sheet for people, and agreement with them or with another judge",
        "tppo.judge.agreement:run_action",
    ),
}
"""In the order of the help."""
WHOLE_RECIPE = ("run", "study", "plan")
"""Commands that take the recipe as their first word."""
SHARED = ("run_dir", "seed", "algorithms", "stage_dirs", "shared_seed", "task")
EXAMPLES = {
    "run": "tppo run recipes/demo.yaml\n  tppo run recipes/demo.yaml --run_dir runs/other --rl.updates 60\n"
    "  tppo run recipes/demo.yaml --redo reward",
    "study": "tppo study recipes/study-demo.yaml --study.action plan\n  tppo study recipes/study-demo.yaml\n"
    "  tppo study recipes/study-demo.yaml --redo evaluate",
    "plan": "tppo plan recipes/paper-aol.yaml\n  tppo plan recipes/demo.yaml --plan.tflops 0.1 --plan.bandwidth 0.02",
    "rl": "tppo rl --config recipes/demo.yaml --rl.algorithm ppo_sum",
    "label": "tppo label --config recipes/demo.yaml --label.judge llm --judge.model qwen2.5:7b "
    "--judge.base_url http://127.0.0.1:11434/v1",
    "ledger": "tppo ledger\n  tppo ledger --ledger.export attempts.parquet",
    "read": "tppo read --config recipes/demo.yaml --evaluate.readings '[{reader: distance, examples: 50}]'\n"
    "  tppo read --config recipes/demo.yaml --evaluate.readings '[{reader: llm, examples: 100}, {reader: vote}]'\\\n"
    "    --judge.model qwen2.5:7b --judge.base_url http://127.0.0.1:11434/v1\n"
    "  tppo read --run_dir runs/votes --stage_dirs '{prepare: runs/a/prepare}'\\\n"
    "    --evaluate.readings '[{reader: vote}]' --judge.model qwen2.5:7b\\\n"
    "    --evaluate.answers '{tppo: runs/a/evaluate, sft: runs/b/evaluate}'",
    "dpo": "tppo dpo --config recipes/demo.yaml --dpo.tuning lora --dpo.learning_rate 1e-4",
    "serve": "tppo serve --config recipes/demo.yaml --serve.port 8080",
    "agreement": "tppo agreement --config recipes/demo.yaml\n"
    "  tppo agreement --config recipes/demo.yaml --agreement.action page --agreement.answers '[anna.csv]'\n"
    "  tppo agreement --config recipes/demo.yaml --agreement.action compare --agreement.answers '[anna.csv, ben.csv]'\n"
    "  tppo agreement --config recipes/demo.yaml --agreement.action compare --agreement.other llm/labels.parquet",
}


class _Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Types and defaults beside every option; the example keeps its line breaks."""


def stage_parser(command: str) -> ArgumentParser:
    """The parser of one subcommand."""
    example = EXAMPLES.get(command, f"tppo {command} --config recipes/demo.yaml")
    parser = ArgumentParser(
        prog=f"tppo {command}",
        description=COMMANDS[command].help,
        epilog=f"example:\n  {example}",
        formatter_class=_Help,
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="recipe in YAML; flags given after it win")
    if not COMMANDS[command].action:
        parser.add_argument(
            "--redo",
            type=list[str] | str,
            default=[],
            help="stage (or [stage, stage]) to make anew, with all that follows from them (their folders are deleted)",
        )
    parser.add_class_arguments(Recipe)
    if command != "run":
        _hide_other_sections(parser, command)
    return parser


def _hide_other_sections(parser: ArgumentParser, command: str) -> None:
    shown = {*SHARED, command.replace("-", "_"), *COMMANDS[command].sections, "config", "redo", "help", "print_config"}
    for action in parser._actions:
        if action.dest.split(".")[0] not in shown:
            action.help = argparse.SUPPRESS
    for group in parser._action_groups:
        if group._group_actions and all(action.help == argparse.SUPPRESS for action in group._group_actions):
            group.title = group.description = None


def parse_recipe(command: str, arguments: Sequence[str]) -> tuple[Recipe, list[str]]:
    """Recipe and the stages to redo.

    Raises:
        UserError: a setting that does not exist or does not fit, with the nearest name.
    """
    parser = stage_parser(command)
    arguments = list(arguments)
    if command in WHOLE_RECIPE and arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    try:
        namespace = parser.parse_args(arguments)
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UserError(f"{error}{_way_out(parser, str(error), _named(arguments))}") from None
    redo = namespace.get("redo") or []
    redo = [redo] if isinstance(redo, str) else redo
    return _instantiate(parser, namespace), redo


def check_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from nested values, checked like one from a file.

    Raises:
        UserError: a setting that does not exist or does not fit, with the nearest name.
    """
    parser = stage_parser("run")
    try:
        return _instantiate(parser, parser.parse_object(values))
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UserError(f"{error}{_way_out(parser, str(error), _dotted(values))}") from None


def _instantiate(parser: ArgumentParser, namespace: Namespace) -> Recipe:
    recipe = parser.instantiate_classes(_without(namespace, "config", "redo"))
    if unknown := sorted(recipe["stage_dirs"].keys() - set(stage_names())):
        raise UserError(f"stage_dirs: {unknown} are no stages; there are {stage_names()}")
    return Recipe(**{name: recipe[name] for name in Recipe.__dataclass_fields__})


def _without(namespace: Namespace, *keys: str) -> Namespace:
    namespace = namespace.clone()
    for key in keys:
        namespace.pop(key, None)
    return namespace


def _dotted(values: Any) -> set[str]:
    """`section.name` of every setting in nested values."""
    sections = values.items() if isinstance(values, dict) else ()
    return {f"{section}.{name}" for section, given in sections if isinstance(given, dict) for name in given}


def _named(arguments: Sequence[str]) -> set[str]:
    """`section.name` of every setting that flags and recipe files give, as far as the files can be read."""
    names, files = set(), []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, _, value = argument.partition("=")
        names.add(flag.removeprefix("--"))
        if flag == "--config":
            files.append(value or following)
    for file in files:
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            names |= _dotted(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    return names


def _way_out(parser: ArgumentParser, message: str, given: set[str]) -> str:
    """What to write in place of settings that there are not: what became of them, of all at once; or the nearest name.

    Args:
        given: `section.name` of what was given.
    """
    gone = []
    for name in (*RETIRED, *REPLACED):
        section, _, key = name.partition(".")
        told = re.search(rf"{re.escape(name)}\b", message) or f"'{section}' does not accept option '{key}'" in message
        if told or name in given:
            new = f"use {REPLACED[name]}" if name in REPLACED else f"it is {RETIRED[name]!r} for good, so take it out"
            gone.append(f"\n{name} is no setting any more: {new}")
    if gone:
        return "".join(gone)
    known = [action.dest for action in parser._actions]
    for word in message.replace("'", " ").replace('"', " ").replace("--", " ").replace("=", " ").split():
        if "_" in word or "." in word or word.isalpha():
            close = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
            if close and word not in known:
                return f"\nDid you mean {close[0]}?"
    return ""


def check_readings(evaluate: Evaluate, judge: JudgeSettings | None = None) -> None:
    """Refuse, before anything runs, readings that nobody could make.

    Args:
        judge: None where the judge is checked elsewhere.

    Raises:
        UserError: names the setting and what it has to be.
    """
    readers = [reading.reader for reading in evaluate.readings]
    by_model = [reader for reader in readers if reader in ("llm", "vote")]
    wrong = [
        (len(set(readers)) < len(readers), f"names a reader twice: {readers}"),
        (any(reading.examples < 0 for reading in evaluate.readings), "examples: give 0 (all) or more"),
        (
            by_model and judge is not None and not judge.model,
            f"{by_model} ask the LLM judge, but judge.model is empty: name it",
        ),
        (
            "distance" in readers and evaluate.answers,
            "distance reads policies, not answers: leave evaluate.answers empty, and name the policies' stages in "
            "stage_dirs",
        ),
    ]
    for is_wrong, words in wrong:
        if is_wrong:
            raise UserError(f"evaluate.readings: {words}")


_AT_LEAST: dict[float, tuple[str, ...]] = {
    1: (
        *("task.num_queries", "task.history_events", "task.max_prompt_tokens", "task.max_response_tokens"),
        *("sft.batch_size", "sft.micro_batch_size", "sft.save_steps", "dpo.batch_size", "dpo.micro_batch_size"),
        *("dpo.save_steps", "rl.batch_size", "rl.minibatch_size", "rl.micro_batch_size", "rl.ppo_epochs"),
        *("sample.samples_per_example", "sample.batch_size", "label.calibration_examples", "rl.lora_r", "sft.lora_r"),
        *("dpo.lora_r", "sft.scratch.hidden_size", "sft.scratch.layers", "sft.scratch.heads", "synthetic.users"),
    ),
    0: (
        *("seed", "sft.max_examples", "sft.max_eval_examples", "sft.learning_rate", "sft.epochs", "dpo.learning_rate"),
        *("dpo.epochs", "dpo.beta", "rl.learning_rate", "rl.value_learning_rate", "rl.value_coef", "rl.kl_coef"),
        *("rl.clip_range", "rl.value_clip_range", "rl.warmup_updates", "rl.critic_warmup", "rl.length_penalty_alpha"),
        *("rl.gamma", "rl.gae_lambda", "sample.train_examples", "sample.reward_eval_examples", "sample.temperature"),
        *("sample.seen_examples", "label.null_quantile", "serve.temperature"),
    ),
}
_AT_MOST: dict[float, tuple[str, ...]] = {1: ("rl.gamma", "rl.gae_lambda", "label.null_quantile")}


def check_ranges(recipe: Recipe) -> None:
    """Refuse numbers with which no stage could do anything, NaN and infinity among them.

    Raises:
        UserError: names the setting.
    """
    for bounds, words, fits in (
        (_AT_LEAST, "at least", lambda value, bound: value >= bound),
        (_AT_MOST, "at most", lambda value, bound: value <= bound),
    ):
        for bound, names in bounds.items():
            for name in names:
                value = attrgetter(name)(recipe)
                if not (math.isfinite(value) and fits(value, bound)):
                    raise UserError(f"{name}={value}: it must be {words} {bound}")


def check_shared(recipe: Recipe) -> None:
    """Refuse what no stage could make sense of.

    Raises:
        UserError: names the setting.
    """
    check_ranges(recipe)
    if not recipe.prepare.source:
        raise UserError("prepare.source is empty: give log files or globs, or [synthetic]")
    if len(set(recipe.algorithms)) < len(recipe.algorithms):
        raise UserError(f"algorithms={recipe.algorithms} names one twice")


def check_samples(recipe: Recipe) -> None:
    """Refuse, before anything runs, a recipe whose draws or judged pairs could never be made.

    Raises:
        UserError: shares of users that cannot be; judged pairs are asked for, but one response per prompt is sampled.
    """
    from tppo.core.parts import check_parts  # here: a command's help need not wait for Arrow

    check_parts(recipe.parts)
    if "dpo" in recipe.algorithms and recipe.dpo.pairs == "judged" and recipe.sample.samples_per_example < 2:
        raise UserError(
            "dpo.pairs=judged compares several responses to one prompt, but sample.samples_per_example="
            f"{recipe.sample.samples_per_example}: give --sample.samples_per_example 2 or more (and --redo sample "
            "when the stage is finished), or --dpo.pairs sft_output"
        )
