"""The RL stage: SFT model + reward models + training prompts -> a tuned policy, with curves and samples."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from tppo.config import RL, Algorithm, Recipe
from tppo.errors import UserError
from tppo.models import load_policy, save_policy
from tppo.policy.generate import encode_examples
from tppo.progress import console, progress_bar
from tppo.reward.models import SentenceRewardModel, TokenRewardModel
from tppo.rl.checkpoint import keep_rows_until, load_newest_checkpoint, save_checkpoint
from tppo.rl.policy import PolicyWithValue, copy_weights
from tppo.rl.query_reward import QueryReward, median_suggested_length
from tppo.rl.rewards import RewardScale
from tppo.rl.trainer import StepResult, TokenPPOTrainer
from tppo.run import RunFolder
from tppo.tables import Example, load_examples

SAMPLES_PER_UPDATE = 3


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Train `folder.name` = rl_<algorithm>; resumes from the newest checkpoint in `folder`."""
    config = replace(recipe.rl, algorithm=cast(Algorithm, folder.name.removeprefix("rl_")))
    examples = load_examples(run.require("prepare"), "train")
    trainer, scale, dropped_events = build_trainer(recipe, run, config, examples)
    if load_newest_checkpoint(trainer, folder):
        console.print(f"resuming {folder.name} after update {trainer.update}")
    for name in ("metrics.jsonl", "samples.jsonl"):
        keep_rows_until(folder / name, trainer.update)

    history: list[dict[str, float]] = []
    with progress_bar() as bar:
        task = bar.add_task(folder.name, total=config.updates, completed=trainer.update)
        while trainer.update < config.updates:
            result = trainer.step()
            history.append(result.metrics)
            _append(folder / "metrics.jsonl", [result.metrics])
            _append(folder / "samples.jsonl", sample_rows(result, trainer, examples))
            description = progress_line(folder.name, result.metrics)
            bar.update(task, completed=trainer.update, description=description)
            if not console.is_terminal:
                console.print(description)
            if trainer.update % config.save_every == 0 and trainer.update < config.updates:
                save_checkpoint(trainer, folder)

    copy_weights(trainer.policy.lm, trainer.rollout_model)
    card = (
        f"# Query suggestions: {config.algorithm}\n\nTuned from the run's SFT model by {trainer.update} updates of "
        f"{config.batch_size} prompts with tppo's `rl` stage. Writes a user's next searches, one per line, after "
        "the prompt of `tppo.text.render_prompt`.\n"
    )
    save_policy(trainer.rollout_model, trainer.tokenizer, folder / "model", card)
    for checkpoint in folder.glob("*checkpoint-*"):
        shutil.rmtree(checkpoint)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "algorithm": config.algorithm,
        "reward_scale": scale._asdict(),
        "prompts": len(examples),
        "prompts_with_dropped_events": dropped_events,
        "updates": len(rows),
        "first": rows[0],
        "last": rows[-1],
        "seconds_per_update": sum(row["seconds"] for row in rows) / len(rows),
    }


def build_trainer(
    recipe: Recipe, run: RunFolder, config: RL, examples: list[Example]
) -> tuple[TokenPPOTrainer, RewardScale, int]:
    """The trainer, what its rewards are measured in, and the number of history events dropped to fit the prompts."""
    if not examples:
        raise UserError(f"{run.path('prepare')}/examples.parquet has no training example to roll out from")
    sft_folder = run.require("sft") / "model"
    model, tokenizer = load_policy(sft_folder, dtype=torch.float32)
    reference, _ = load_policy(sft_folder, dtype=torch.float32)
    rollout_dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    rollout_model, _ = load_policy(sft_folder, dtype=rollout_dtype)
    prompts, dropped_events = encode_examples(tokenizer, examples, recipe.task)
    suggested_length = config.suggested_length or median_suggested_length(run.require("sample"), tokenizer, recipe.task)
    reward_folder = run.require("reward")
    labelled = run.facts("reward")["train"]
    scale = RewardScale(
        suggested_length,
        labelled["words_relevant"] / labelled["words"],
        labelled["responses_relevant"] / labelled["responses"],
    )
    reward_fn = QueryReward(
        TokenRewardModel.load(reward_folder / "token"),
        SentenceRewardModel.load(reward_folder / "sentence"),
        examples,
        config,
        recipe.task,
        scale,
    )
    trainer = TokenPPOTrainer(
        PolicyWithValue(model, detach_value=config.value_gradient == "head"),
        reference,
        rollout_model,
        tokenizer,
        prompts,
        reward_fn,
        config,
        max_response_tokens=recipe.task.max_response_tokens,
        seed=recipe.seed,
    )
    return trainer, scale, dropped_events


def sample_rows(result: StepResult, trainer: TokenPPOTrainer, examples: list[Example]) -> list[dict[str, Any]]:
    """Some responses of a rollout with the reward and class of every token, for the report."""
    rows = []
    count = len(result.rollout.generations)
    for row in range(0, count, max(1, count // SAMPLES_PER_UPDATE)):
        generation, spans = result.rollout.generations[row], result.rollout.spans[row]
        rewards = result.rewards.rewards[row, : len(spans)].tolist()
        classes = [None] * len(spans) if result.rewards.classes is None else result.rewards.classes[row].tolist()
        tokens = [
            [generation.response[start:end], round(reward, 4), klass]
            for (start, end), reward, klass in zip(spans, rewards, classes, strict=False)
        ]
        rows.append(
            {
                "update": trainer.update,
                "example_id": examples[result.rollout.prompt_index[row]].example_id,
                "prompt": trainer.tokenizer.decode(generation.prompt_ids),
                "response": generation.response,
                "tokens": tokens,
                "reward": round(sum(rewards), 4),
            }
        )
    return rows


def progress_line(name: str, metrics: dict[str, float]) -> str:
    return (
        f"{name} update {metrics['update']:.0f}: reward {metrics['reward_mean']:+.2f}±{metrics['reward_std']:.2f} "
        f"kl {metrics['kl']:.2f} entropy {metrics['entropy']:.2f} length {metrics['response_length']:.1f} "
        f"queries {metrics['queries']:.2f} clip {metrics['clip_fraction']:.3f} ev {metrics['explained_variance']:.2f} "
        f"{metrics['seconds']:.1f}s"
    )


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
