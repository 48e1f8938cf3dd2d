"""TRL 1.9.0's PPOTrainer on the work of benchmarks/rl_speed.py; run by it, in TRL's own environment.

Prints one JSON line: seconds of every update and what was really done. Imports nothing of tppo.

TRL wants a value model; it gets one linear head on the policy's own last hidden state, as tppo has. TRL runs the
trunk once more for it, here without gradients: with a value model of its own (TRL's examples) it would be slower.
The reward model is a function of the last token's id that costs nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Trunk(nn.Module):
    """The policy's trunk without gradients, and without owning its parameters."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = [policy]

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Any:
        return self.policy[0].base_model(**inputs)


class ValueProbe(nn.Module):
    base_model_prefix = "trunk"

    def __init__(self, policy: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.trunk = Trunk(policy)
        self.score = nn.Linear(policy.config.hidden_size, 1, dtype=dtype)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)


class ParityTrunk(nn.Module):
    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        return SimpleNamespace(hidden_states=[(input_ids % 2).float()[..., None]])


class ParityReward(nn.Module):
    """1 for an odd last token, 0 for an even one."""

    base_model_prefix = "trunk"

    def __init__(self) -> None:
        super().__init__()
        self.trunk = ParityTrunk()
        self.score = nn.Identity()


class Clock(TrainerCallback):
    """When each update ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def ppo_config(arguments: argparse.Namespace, output_dir: str) -> PPOConfig:
    return PPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,  # no autocast: weights and products are of one dtype
        gradient_checkpointing=False,
        per_device_train_batch_size=arguments.micro_batch,
        gradient_accumulation_steps=arguments.batch // arguments.micro_batch,
        local_rollout_forward_batch_size=arguments.batch,
        total_episodes=arguments.batch * arguments.updates,
        num_ppo_epochs=1,
        num_mini_batches=1,
        response_length=arguments.new_tokens,
        temperature=1.0,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        kl_coef=arguments.kl_coef,
        kl_estimator="k1",
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        gamma=1.0,
        lam=0.95,
        whiten_rewards=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        seed=arguments.seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model and its tokenizer")
    parser.add_argument("--prompts", required=True, help="JSON: lists of token ids, all of one length")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], required=True, help="of the weights")
    for name in ("batch", "micro_batch", "new_tokens", "updates", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("kl_coef", "learning_rate"):
        parser.add_argument(f"--{name}", type=float, required=True)
    arguments = parser.parse_args()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype) for _ in range(2))
    with open(arguments.prompts, encoding="utf-8") as file:
        prompts = Dataset.from_list([{"input_ids": ids} for ids in json.load(file)])
    clock = Clock()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = PPOTrainer(
            args=ppo_config(arguments, output_dir),
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=ParityReward(),
            value_model=ValueProbe(policy, dtype),
            train_dataset=prompts,
            eval_dataset=prompts,
            callbacks=[clock],
        )
        trainer.train()
    logs = [row for row in trainer.state.log_history if "objective/kl" in row]
    result = {
        "seconds": [end - start for start, end in zip(clock.times, clock.times[1:], strict=False)],
        "kl": [row["objective/kl"] for row in logs],
        "policy_loss": [row["loss/policy_avg"] for row in logs],
        "value_loss": [row["loss/value_avg"] for row in logs],
        "ended_responses": sum(row["val/num_eos_tokens"] for row in logs),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
