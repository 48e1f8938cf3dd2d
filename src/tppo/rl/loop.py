"""Training to the end, in a folder: checkpoints, metrics.jsonl, samples.jsonl, trackers, one progress line an update.

A run that was killed, or that an error stopped, goes on from its newest checkpoint when `train` is called again, and
ends with the same weights and metrics as one that was never stopped.

metrics.jsonl is the record, a tracker shows a copy of it: update u is its step u. `trackers.json` notes how far each
tracker has got and which of its runs is ours, so that a resumed run goes on in that run: updates made again are not
logged again (they have the same numbers), and rows a tracker has not had, because it failed or was added later, are
logged first. A kill between a log and its note makes one update come twice: TensorBoard drops the first, W&B the
second, the others show one more point of the same value. Only metrics and settings go to a tracker, never text of the
log or of a response.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from rich.color import Color, blend_rgb
from rich.color_triplet import ColorTriplet
from rich.console import Console
from rich.style import Style
from rich.text import Text

from tppo.core.common import UserError, console, progress_bar
from tppo.core.config import RL
from tppo.core.files import read_jsonl, write_json
from tppo.rl.checkpoint import (
    append_rows,
    claim,
    cut_rows_after,
    load_newest_checkpoint,
    remove_leftovers,
    save_checkpoint,
    size_until,
)
from tppo.rl.guards import MaxKLExceeded
from tppo.rl.trainer import StepResult, TokenPPOTrainer

SAMPLES_PER_UPDATE = 3
TIME_COLUMNS = (
    *("seconds", "seconds_rollout", "seconds_score", "seconds_reward", "seconds_token_reward", "seconds_update"),
    "tokens_per_second",
)
"""Columns of metrics.jsonl that differ from run to run; every other one is reproducible. An update is rollout, score
and update; the reward function is part of score, and the token-level reward model of the reward function."""


def train(
    trainer: TokenPPOTrainer, folder: Path | str, example_ids: Sequence[str] | None = None
) -> dict[str, Any] | None:
    """Train until `config.updates`, or until `max_kl` halts it; the facts of the halt are returned then.

    Args:
        folder: takes metrics.jsonl, samples.jsonl and the checkpoints; one run per folder.
        example_ids: names of the prompts in samples.jsonl; their numbers by default.

    Raises:
        UserError: the folder holds another run (other settings, prompts, limits or start weights) or what no run has
            made, a tracker is missing, or an update was stopped by a guard. Call again to go on.
    """
    folder, config = Path(folder), trainer.config
    folder.mkdir(parents=True, exist_ok=True)
    claim(trainer, folder)
    remove_leftovers(folder)
    if load_newest_checkpoint(trainer, folder):
        console.print(f"resuming {folder.name} after update {trainer.update}")
    for step in (size_until, cut_rows_after):  # both files are looked through before either is cut
        for name in ("metrics.jsonl", "samples.jsonl"):
            step(folder / name, trainer.update)
    with open_trackers(config, folder) as track, progress_bar(lines=False) as bar:
        task = bar.add_task(folder.name, total=config.updates, completed=trainer.update)
        while trainer.update < config.updates:
            try:
                result = trainer.step()
            except MaxKLExceeded as halt:
                console.print(f"{folder.name} {halt}", soft_wrap=True)
                return halt.facts
            append_rows(folder / "metrics.jsonl", [result.metrics])
            samples = sample_rows(result, example_ids)
            append_rows(folder / "samples.jsonl", samples)
            track(result.metrics)
            description = progress_line(folder.name, result.metrics, config)
            bar.update(task, completed=trainer.update, description=description)
            if not console.is_terminal:
                console.print(description, soft_wrap=True)
            if trainer.update % config.save_every == 0 or trainer.update == config.updates:
                save_checkpoint(trainer, folder)
                show_samples(samples, console)
    return None


def sample_rows(result: StepResult, example_ids: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Some responses of a rollout with the reward (without KL) and class of every token, for the report."""
    rows = []
    samples, classes = result.rollout.samples, result.rewards.classes
    for row in range(0, len(samples), max(1, len(samples) // SAMPLES_PER_UPDATE)):
        sample = samples[row]
        rewards = result.rewards.rewards[row, : len(sample.spans)].tolist()
        shown = classes[row] if classes is not None else [None] * len(sample.spans)
        rows.append(
            {
                "update": int(result.metrics["update"]),
                "example_id": example_ids[sample.prompt_index] if example_ids else str(sample.prompt_index),
                "prompt": sample.prompt,
                "response": sample.response,
                "tokens": [
                    [sample.response[start:end], round(reward, 4), klass]
                    for (start, end), reward, klass in zip(sample.spans, rewards, shown, strict=True)
                ],
                "reward": round(sum(rewards), 4),
            }
        )
    return rows


def progress_line(name: str, metrics: dict[str, float], config: RL) -> str:
    queries = f"queries {metrics['queries']:.2f} " if "queries" in metrics else ""
    minutes_left = (config.updates - metrics["update"]) * metrics["seconds"] / 60
    return (
        f"{name} update {metrics['update']:.0f}/{config.updates}: "
        f"reward {metrics['reward_mean']:+.2f}±{metrics['reward_std']:.2f} "
        f"kl {metrics['kl']:.2f} entropy {metrics['entropy']:.2f} length {metrics['response_length']:.1f} {queries}"
        f"clip {metrics['clip_fraction']:.3f} ev {metrics['explained_variance']:.2f} "
        f"{metrics['seconds']:.1f}s {metrics['tokens_per_second']:.0f} tokens/s, {minutes_left:.0f} min left"
    )


NOTES = "trackers.json"
PROJECT = "tppo"
"""Project (mlflow: experiment) that runs are logged under, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, the
trackers' own variables, say otherwise."""
_WAY_OUT = {"wandb": ". Set WANDB_API_KEY, run `wandb login` once, or set WANDB_MODE=offline"}


@contextlib.contextmanager
def open_trackers(config: RL, folder: Path) -> Iterator[Callable[..., None]]:
    """Start the trackers of `rl.trackers` and log what metrics.jsonl of `folder` holds; gives the function that logs
    further rows. None of them can stop training once it has started: a row that one did not take is tried again.

    By accelerate's tracker classes: its `Accelerator.log` ends at the first tracker that fails.

    Raises:
        UserError: one is not installed, or does not start.
    """
    names: list[str] = list(dict.fromkeys(config.trackers))
    for name in names:
        if name not in map(str, get_available_trackers()):
            raise UserError(f"rl.trackers names {name}, which is not installed: `pip install {name}`, or leave it out")
    notes: dict[str, dict[str, Any]] = {}
    if names and (folder / NOTES).exists():
        notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
    rows = read_jsonl(folder / "metrics.jsonl") if names else []
    started: dict[str, Any] = {}
    failing: set[str] = set()

    def log(*new_rows: dict[str, Any]) -> None:
        if not started:
            return
        rows.extend(new_rows)
        for name, tracker in started.items():
            try:
                for row in rows:
                    update = int(row["update"])
                    if update > notes[name]["logged"]:
                        tracker.log({key: value for key, value in row.items() if key != "update"}, step=update)
                        notes[name]["logged"] = update
                failing.discard(name)
            except Exception as error:  # a tracker's errors have no common base
                if name not in failing:
                    console.print(f"{name} failed, training goes on and tries again: {error}", soft_wrap=True)
                failing.add(name)
        write_json(folder / NOTES, notes)

    try:
        for name in names:
            started[name] = _start_tracker(name, config, folder, notes)
        log()
        yield log
    finally:
        for name, tracker in started.items():
            try:
                tracker.finish()
            except Exception as error:  # as above; the model is worth more than the end of a curve
                console.print(f"{name} did not finish: {error}", soft_wrap=True)


def _start_tracker(name: str, config: RL, folder: Path, notes: dict[str, dict[str, Any]]) -> Any:
    """Start the run that the tracker's note tells of, or go on in it."""
    new = name not in notes
    note = notes.setdefault(name, {"logged": 0, "run": secrets.token_hex(4)})
    shown = f"{folder.resolve().parent.name}-{folder.name}"
    arguments: dict[str, dict[str, Any]] = {
        "tensorboard": {"run_name": name, "logging_dir": str(folder), "purge_step": note["logged"] + 1},
        "wandb": {
            "run_name": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": shown,
            "id": note["run"],
            "resume": "allow",
            "dir": str(folder),
        },
        "trackio": {"run_name": PROJECT, "name": f"{shown}-{note['run']}", "resume": "allow"},
        "mlflow": {"experiment_name": PROJECT, "run_name": shown, "run_id": None if new else note["run"]},
    }
    PartialState()  # accelerate's trackers log through it
    tracker = LOGGER_TYPE_TO_CLASS[name](**arguments[name])
    try:
        with _no_questions():
            tracker.start()
        if name == "mlflow":
            note["run"] = tracker.tracker.info.run_id
        write_json(folder / NOTES, notes)
        if new:
            settings = {key: value for key, value in asdict(config).items() if not isinstance(value, list)}
            tracker.store_init_configuration(settings)
    except Exception as error:  # a tracker's errors have no common base
        raise UserError(f"{name} does not start: {error}{_WAY_OUT.get(name, '')}") from error
    return tracker


@contextlib.contextmanager
def _no_questions() -> Iterator[None]:
    """Without a terminal to ask on, W&B raises where it would ask for a login and wait."""
    with open(os.devnull, encoding="utf-8") as nothing:
        stdin, sys.stdin = sys.stdin, nothing
        try:
            yield
        finally:
            sys.stdin = stdin


SHOWN_PROMPT = 120
"""Characters of a prompt's end that are shown."""
_WHITE, _GREEN, _RED = ColorTriplet(255, 255, 255), ColorTriplet(46, 160, 67), ColorTriplet(218, 54, 51)


class ShownToken(NamedTuple):
    text: str
    """As shown: ⏎ for a line break, ∎ for a token without text, · for what cannot be printed."""
    reward: float
    shade: float
    """Size of the reward, 0 to 1: a share of the largest among the responses shown together."""


def shown_tokens(rows: Sequence[dict[str, Any]]) -> list[list[ShownToken]]:
    """The tokens of rows of samples.jsonl that are shown together."""
    largest = max((abs(reward) for row in rows for _, reward, _ in row["tokens"]), default=0) or 1.0
    return [
        [ShownToken(_visible(text), reward, abs(reward) / largest) for text, reward, _ in row["tokens"]] for row in rows
    ]


def show_samples(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print responses of a rollout (rows of samples.jsonl). Only on a terminal: they hold text of a log's users.

    Without colour (NO_COLOR, a terminal that has none) the reward stands behind each token.
    """
    if not console.is_terminal or not rows:
        return
    coloured = console.color_system is not None and not console.no_color
    legend = Text(f"update {rows[0]['update']}, rewards of tokens (without KL): ")
    if coloured:
        for reward, text in ((1.0, "positive"), (-1.0, "negative"), (0.0, "zero")):
            legend.append(text, token_style(reward, 1.0)).append(", ")
        legend.append("the stronger the larger")
    else:
        legend.append("(number) behind a token, none is zero")
    console.print(legend)
    for row, tokens in zip(rows, shown_tokens(rows), strict=True):
        prompt = row["prompt"].rstrip()
        cut = "…" if len(prompt) > SHOWN_PROMPT else ""
        line = Text("  ").append(cut + _visible(prompt[-SHOWN_PROMPT:]), "dim").append("\n  ")
        for token in tokens:
            line.append(token.text, token_style(token.reward, token.shade) if coloured else "")
            if not coloured and token.reward:
                line.append(f"({token.reward:+.2f})")
        console.print(line.append(f"  sum {row['reward']:+.2f}"), soft_wrap=True)


def token_style(reward: float, shade: float) -> Style:
    """Green for positive, red and underlined for negative, dim for zero; pale for a small shade."""
    if not reward:
        return Style(dim=True)
    mixed = blend_rgb(_WHITE, _GREEN if reward > 0 else _RED, 0.25 + 0.75 * shade)
    return Style(color="black", bgcolor=Color.from_triplet(mixed), underline=reward < 0)


def _visible(text: str) -> str:
    """One line of printable characters: a sampled control character must not reach the terminal."""
    shown = text.replace("\n", "⏎") or "∎"
    return "".join(character if character.isprintable() else "·" for character in shown)
