"""Seconds of an SFT step, a rollout and a PPO update in fp32 and in bf16 on this machine, and what `auto` chooses.

    python benchmarks/precision.py
    python benchmarks/precision.py --model smollm2
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/precision.py   # as on an AVX2-only CPU

Both precisions take turns in one process, on the same prompts of the synthetic log with the same seeds; figures are the
median (smallest to largest) of the steps after the first. The reward is free (the length), so an update is rollout,
scoring by policy and reference, and backward pass.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from tppo.core.config import RL, SFT, Recipe, Scratch, Synthetic
from tppo.core.device import bf16_slowdown, choose
from tppo.core.models import SCRATCH, load_policy
from tppo.core.run import RunFolder, run_stage
from tppo.core.tables import Example, load_examples
from tppo.generate.engine import encode_examples
from tppo.logs import prepare, synthetic
from tppo.rl.trainer import TokenPPOTrainer
from tppo.tune.scratch import start_from_scratch
from tppo.tune.sft import encode_training, make_trainer

PRECISIONS = ("fp32", "bf16")
Times = dict[str, list[float]]


class StepTimes(TrainerCallback):
    """Seconds of every optimiser step of a transformers trainer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def examples_of_the_log(folder: Path) -> tuple[Recipe, list[Example]]:
    recipe = Recipe(run_dir=str(folder), synthetic=Synthetic(users=300))
    recipe.task.history_events, recipe.task.max_prompt_tokens = 5, 112
    run_stage(recipe, "synthetic", synthetic.run)
    run_stage(recipe, "prepare", prepare.run)
    return recipe, load_examples(RunFolder(recipe).require("prepare"), "train")


def start_model(name: str, recipe: Recipe, examples: list[Example]) -> tuple[Any, Any]:
    if name == SCRATCH:
        return start_from_scratch(Scratch(), examples, recipe.task, seed=0)
    return load_policy(name, dtype=torch.float32)


def sft_steps(name: str, recipe: Recipe, examples: list[Example], precision: str, steps: int, batch: int) -> Times:
    model, tokenizer = start_model(name, recipe, examples)
    rows = encode_training(tokenizer, examples[: (steps + 1) * batch], recipe.task).rows
    settings = SFT(precision=precision, batch_size=batch, micro_batch_size=batch, save_steps=10**6)  # type: ignore[arg-type]
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokenizer, rows, [], settings, 0, Path(folder))
        trainer.add_callback(times)
        trainer.train()
    return {"SFT step": times.seconds[1 : steps + 1]}


def ppo_updates(name: str, recipe: Recipe, examples: list[Example], precision: str, updates: int, batch: int) -> Times:
    model, tokenizer = start_model(name, recipe, examples)
    prompts, _ = encode_examples(tokenizer, examples, recipe.task)
    config = RL(precision=precision, batch_size=batch, minibatch_size=batch, micro_batch_size=min(16, batch))  # type: ignore[arg-type]
    trainer = TokenPPOTrainer(
        model,
        lambda samples: [float(len(sample.response_ids)) for sample in samples],
        prompts,
        config,
        tokenizer=tokenizer,
        max_response_tokens=recipe.task.max_response_tokens,
    )
    rows = [trainer.step().metrics for _ in range(updates + 1)][1:]
    return {
        "rollout": [row["seconds_rollout"] for row in rows],
        "PPO update": [row["seconds"] for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SCRATCH, help="scratch, smollm2, or a model folder")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="measured SFT steps, and measured PPO updates")
    arguments = parser.parse_args()
    print(f"auto: {choose('auto')}; {torch.get_num_threads()} threads")
    print(f"a bf16 product takes {bf16_slowdown():.2f} times as long as the fp32 one")
    table = Table(title=f"{arguments.model}, {arguments.batch_size} rows, seconds: median (smallest to largest)")
    table.add_column("")
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe, examples = examples_of_the_log(Path(folder))
        for precision in arguments.precisions:
            table.add_column(precision, justify="right")
            for measure in (sft_steps, ppo_updates):
                times = measure(arguments.model, recipe, examples, precision, arguments.steps, arguments.batch_size)
                for what, seconds in times.items():
                    found.setdefault(what, {})[precision] = seconds
    for what, by_precision in found.items():
        cells = [
            f"{median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})" for seconds in by_precision.values()
        ]
        table.add_row(what, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
