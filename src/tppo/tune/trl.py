"""What the SFT and DPO stages share around transformers' Trainer: arguments, order, checkpoints, progress, saving."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import disable_progress_bars
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from tppo.core.common import UserError, console, progress_bar, stream_seed
from tppo.core.config import DPO, SFT
from tppo.core.device import resolved, trainer_device
from tppo.core.models import save_model

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def check_batch_sizes(settings: SFT | DPO, section: str) -> None:
    """Raises a UserError when a batch is no whole number of micro-batches."""
    if settings.batch_size % settings.micro_batch_size:
        raise UserError(
            f"{section}.batch_size={settings.batch_size} has to be a multiple of "
            f"{section}.micro_batch_size={settings.micro_batch_size}"
        )


def training_arguments(settings: SFT | DPO, seed: int, steps: int, output_dir: Path) -> dict[str, Any]:
    """Arguments of TRL's trainers with every default that matters here spelled out.

    Args:
        seed: of this stage's own stream.
        steps: optimiser steps of the whole training, of which `settings.warmup_share` warm up.
        output_dir: folder of the checkpoints.
    """
    device = trainer_device()
    on_cpu = device == "cpu"
    return {
        "output_dir": str(output_dir),
        "use_cpu": on_cpu,
        "bf16": resolved(settings.precision, device) == "bf16",
        "fp16": False,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.micro_batch_size,
        "per_device_eval_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // settings.micro_batch_size,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": round(settings.warmup_share * steps),
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": seed % 2**31,
        "data_seed": seed % 2**31,
        "gradient_checkpointing": False,
        "max_length": None,
        "pad_to_multiple_of": None,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": not on_cpu,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def configured(kind: type[Arguments], **arguments: Any) -> Arguments:
    """A trainer's config, made without the noise of the libraries underneath."""
    disable_progress_bars()
    with warnings.catch_warnings():
        # transformers announces a new name for gradient_checkpointing that its older 5.x does not know.
        warnings.simplefilter("ignore", FutureWarning)
        return kind(**arguments)


class EpochSampler(LengthGroupedSampler):
    """Batches of similar length, in an order that depends on the seed and the epoch alone (departure 4)."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(stream_seed(self.seed, "epoch", self.epoch))
        return super().__iter__()


def save_trained(trainer: Any, tokenizer: Any, settings: SFT | DPO, folder: Path, card: str) -> None:
    """Save what a trainer of transformers has trained: adapters merged, bf16 when precision is bf16."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if settings.tuning == "lora":
        model = model.merge_and_unload()
    if trainer.args.bf16:
        model = model.to(torch.bfloat16)
    save_model(model, tokenizer, folder, card)


def last_good_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; broken ones (a kill while writing) are deleted and reported."""
    candidates = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rsplit("-", 1)[1]))
    for path in candidates:
        problem = _checkpoint_problem(path)
        if problem is None:
            return path
        console.print(f"skipping the broken checkpoint {path.name}: {problem}")
        shutil.rmtree(path)
    return None


def _checkpoint_problem(path: Path) -> str | None:
    """Why a checkpoint cannot be resumed from. A cut-off file lacks its end, where the zip directory is,
    or is shorter than its safetensors header says."""
    weights = list(path.glob("*.safetensors"))
    if not weights:
        return "no weights"
    try:
        # The trainer writes trainer_state.json last.
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        for file in weights:
            with safe_open(file, framework="pt"):
                pass
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        return str(error)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        if not zipfile.is_zipfile(path / name):
            return f"{name} is missing or cut off"
    return None


class ProgressCallback(TrainerCallback):
    """One bar, and metrics.jsonl.

    Args:
        title: what is being trained, for the bar.
        metrics: kinds of rows; each maps the columns of a row, beside `step`, to the trainer's names. A log entry
            of the trainer becomes a row of every kind whose names it has.
    """

    def __init__(self, path: Path, title: str, metrics: Sequence[Mapping[str, str]]) -> None:
        self.path = path
        self.title = title
        self.metrics = metrics
        self.bar = progress_bar()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        size = args.train_batch_size * args.gradient_accumulation_steps
        console.print(f"{self.title}: {state.max_steps} steps of {size}")
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write(state)
        if state.log_history and "loss" in state.log_history[-1]:
            self.bar.update(self.task, description=f"{self.title} loss {state.log_history[-1]['loss']:.2f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()

    def rows(self, state: Any) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl so far."""
        return [
            {"step": entry["step"], **{column: entry[name] for column, name in kind.items()}}
            for entry in state.log_history
            for kind in self.metrics
            if all(name in entry for name in kind.values())
        ]

    def write(self, state: Any) -> None:
        """The whole file anew: on a resumed run the rows after the checkpoint are made again."""
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows(state)), encoding="utf-8")
