"""The RL stage: SFT model + reward models + training prompts -> a tuned policy, with curves and samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from tppo.config import RL, Algorithm, Recipe
from tppo.errors import UserError
from tppo.logs.truth import known_truth
from tppo.models import load_policy, save_model
from tppo.policy.generate import encode_examples
from tppo.reward.gate import require_passed
from tppo.reward.models import SentenceRewardModel, TokenRewardModel
from tppo.rl.checkpoint import remove_checkpoints
from tppo.rl.loop import train
from tppo.rl.query_reward import QueryReward, median_suggested_length, score_with_models
from tppo.rl.rewards import RewardScale
from tppo.rl.trainer import TokenPPOTrainer
from tppo.run import RunFolder, read_jsonl, split_stage
from tppo.tables import Example, load_examples


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Train `folder.name` = rl_<algorithm>; resumes from the newest checkpoint in `folder`."""
    config = replace(recipe.rl, algorithm=cast(Algorithm, split_stage(folder.name)[1]))
    reward_check = require_passed(recipe, run, config)
    examples = load_examples(run.require("prepare"), "train")
    trainer, scale, dropped_events = build_trainer(recipe, run, config, examples)
    halted = train(trainer, folder, [example.example_id for example in examples])
    model, saved_update = trainer.policy_to_save(halted is not None)
    card = (
        f"# Query suggestions: {config.algorithm}\n\nTuned from the run's SFT model by {saved_update} updates of "
        f"{config.batch_size} prompts with tppo's `rl` stage. Writes a user's next searches, one per line, after "
        "the prompt of `tppo.text.render_prompt`.\n"
    )
    save_model(model, trainer.tokenizer, folder / "model", card)
    remove_checkpoints(folder)
    rows = read_jsonl(folder / "metrics.jsonl")
    return {
        "algorithm": config.algorithm,
        "reward_check": reward_check,
        "reward_scale": scale._asdict(),
        "prompts": len(examples),
        "prompts_with_dropped_events": dropped_events,
        "updates": len(rows),
        "halted": halted,
        "saved_update": saved_update,
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
    prompts, dropped_events = encode_examples(tokenizer, examples, recipe.task)
    reward_fn = query_reward(recipe, run, config, examples, tokenizer)
    trainer = TokenPPOTrainer(
        model,
        reward_fn,
        prompts,
        config,
        tokenizer=tokenizer,
        max_response_tokens=recipe.task.max_response_tokens,
        seed=recipe.seed,
    )
    return trainer, reward_fn.scale, dropped_events


def query_reward(recipe: Recipe, run: RunFolder, config: RL, examples: list[Example], tokenizer: Any) -> QueryReward:
    """The reward of responses to `examples` by the run's reward models; `prompt_index` counts these examples."""
    suggested_length = config.suggested_length or median_suggested_length(run.require("sample"), tokenizer, recipe.task)
    reward_folder = run.require("reward")
    labelled = run.facts("reward")["train"]
    scale = RewardScale(
        suggested_length,
        labelled["words_relevant"] / labelled["words"],
        labelled["responses_relevant"] / labelled["responses"],
    )
    return QueryReward(
        score_with_models(
            TokenRewardModel.load(reward_folder / "token"), SentenceRewardModel.load(reward_folder / "sentence")
        ),
        examples,
        config,
        recipe.task,
        scale,
        known_truth(run),
    )
