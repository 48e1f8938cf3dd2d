"""Training to the end, in a folder: checkpoints, metrics.jsonl, samples.jsonl, trackers, one progress line an update.

A run that was killed, or that an error stopped, goes on from its newest checkpoint when `train` is called again, and
ends with the same weights and metrics as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tppo.config import RL
from tppo.progress import console, progress_bar
from tppo.rl.checkpoint import (
    append_rows,
    cut_rows_after,
    load_newest_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from tppo.rl.guards import MaxKLExceeded
from tppo.rl.show import show_samples
from tppo.rl.trackers import open_trackers
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
        UserError: the folder holds another run, a tracker is missing, or an update was stopped by a guard. Call again
            to go on.
    """
    folder, config = Path(folder), trainer.config
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if load_newest_checkpoint(trainer, folder):
        console.print(f"resuming {folder.name} after update {trainer.update}")
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut_rows_after(folder / name, trainer.update)
    with open_trackers(config, folder) as trackers, progress_bar(lines=False) as bar:
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
            trackers.log(result.metrics)
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
