"""What SFT and DPO share around TRL's trainers: config, order of the examples, checkpoints, progress, saving."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from zipfile import BadZipFile, ZipFile

import pyarrow as pa
import torch
from datasets import Dataset, disable_progress_bars
from safetensors import SafetensorError, safe_open
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput

from tppo.core.common import UserError, console, progress_bar, stream_seed
from tppo.core.config import DPO, SFT, Task
from tppo.core.device import resolved, trainer_device
from tppo.core.models import sampling_config, save_model

WARMUP_SHARE = 0.05
"""Share of the steps over which the learning rate rises: enough for Adam's averages to settle, whatever the rate."""
MAX_GRAD_NORM = 1.0
"""Gradient clipping, as in RL."""

Arguments = TypeVar("Arguments", bound=TrainingArguments)
Metrics = Sequence[Mapping[str, str]]
"""Kinds of rows of metrics.jsonl; each maps the columns of a row, beside `step`, to the trainer's names."""


def check_batch_sizes(settings: SFT | DPO, section: str) -> None:
    """Raises a UserError when a batch is no whole number of micro-batches."""
    if settings.batch_size % settings.micro_batch_size:
        raise UserError(
            f"{section}.batch_size={settings.batch_size} has to be a multiple of "
            f"{section}.micro_batch_size={settings.micro_batch_size}"
        )


def planned_steps(settings: SFT | DPO, examples: int) -> int:
    """Optimiser steps of the whole training."""
    return math.ceil(examples / settings.batch_size * settings.epochs)


def trainer_config(
    kind: type[Arguments], settings: SFT | DPO, examples: int, seed: int, output_dir: Path, **further: Any
) -> Arguments:
    """Config of a TRL trainer with every default that matters here spelled out.

    Args:
        seed: of this stage's own stream.
        output_dir: folder of the checkpoints.
        further: what only this trainer has.
    """
    device = trainer_device()
    disable_progress_bars()
    with warnings.catch_warnings():
        # transformers announces a new name for gradient_checkpointing that its older 5.x does not know.
        warnings.simplefilter("ignore", FutureWarning)
        return kind(
            output_dir=str(output_dir),
            use_cpu=device == "cpu",
            bf16=resolved(settings.precision, device) == "bf16",
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.micro_batch_size,
            per_device_eval_batch_size=settings.micro_batch_size,
            gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=round(WARMUP_SHARE * planned_steps(settings, examples)),
            weight_decay=0.0,
            max_grad_norm=MAX_GRAD_NORM,
            seed=seed % 2**31,
            data_seed=seed % 2**31,
            gradient_checkpointing=False,
            max_length=None,
            pad_to_multiple_of=None,
            dataloader_pin_memory=device != "cpu",
            prediction_loss_only=True,
            save_strategy="steps",
            save_steps=settings.save_steps,
            save_total_limit=1,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            **further,
        )


class EpochSampler(LengthGroupedSampler):
    """Batches of similar length, in an order that depends on the seed and the epoch alone.

    The trainer's own sampler draws from the global generator: a run that is taken up again in the middle of an epoch
    would see some examples twice.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(stream_seed(self.seed, "epoch", self.epoch))
        return super().__iter__()


Rows: TypeAlias = Dataset | list[dict[str, Any]]
"""Ready for a trainer: ids as they are, and a `length`."""


def mapped_rows(path: Path, pieces: Iterable[list[dict[str, Any]]]) -> Dataset:
    """Rows of ids in a file that is mapped into memory, not read into it: a million examples of 200 tokens take no more
    than the pages in use, where Python's lists would take 10 GB.

    Args:
        path: written anew.
        pieces: rows, some at a time, all with the same columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = None
    with path.open("wb") as file:
        for rows in filter(None, pieces):
            if writer is None:
                ids, number = pa.list_(pa.int32()), pa.int32()
                kinds = {name: ids if isinstance(value, list) else number for name, value in rows[0].items()}
                schema = pa.schema(list(kinds.items()))
                writer = pa.ipc.new_stream(file, schema)
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        if writer is not None:
            writer.close()
    return Dataset.from_file(str(path)) if writer is not None else Dataset.from_list([])


class ReadyRows(Trainer):
    """Put before a trainer of TRL: rows of ids as they are, batched by their `length` in an order that resumes."""

    def __init__(self, train_rows: Rows, eval_rows: Rows, **arguments: Any) -> None:
        train, held_out = (
            rows if isinstance(rows, Dataset) or not rows else Dataset.from_list(rows)
            for rows in (train_rows, eval_rows)
        )
        super().__init__(train_dataset=train, eval_dataset=held_out if len(held_out) else None, **arguments)
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochSampler(batch_size, list(self.train_dataset["length"]), self.args.data_seed)


def train(trainer: Trainer, title: str, metrics: Metrics, path: Path) -> tuple[TrainOutput, int | None]:
    """Train, or go on from the newest whole checkpoint; the metrics go to `path` as they come.

    Returns:
        What the trainer says of the training, and the step that it was taken up again at.
    """
    trainer.add_callback(ProgressCallback(path, title, metrics))
    checkpoint = last_good_checkpoint(Path(trainer.args.output_dir))
    if checkpoint is None:
        return trainer.train(), None
    trainer.args.eval_on_start = False
    console.print(f"taking {title} up again at {checkpoint.name}")
    return trainer.train(resume_from_checkpoint=str(checkpoint)), _step_of(checkpoint)


def save_trained(
    trainer: Trainer, tokenizer: Any, settings: SFT | DPO, task: Task, folder: Path, title: str, made: str
) -> None:
    """Save what has been trained (adapters merged, bf16 when precision is bf16, set to sample at temperature 1, at
    which the likelihoods were trained). The checkpoints stay until the stage has nothing left to lose
    (`tppo.core.run.run_stage`).

    Args:
        title: of the model card.
        made: the card's sentence on how the model was made.
    """
    card = (
        f"# Query suggestions: {title}\n\n{made} Writes a user's next searches, one per line, after the prompt of "
        "`tppo.core.text.encode_prompt`.\n"
    )
    model = trainer.accelerator.unwrap_model(trainer.model)
    if settings.tuning == "lora":
        model = model.merge_and_unload()
    if trainer.args.bf16:
        model = model.to(torch.bfloat16)
    model.generation_config = sampling_config(model, tokenizer, max_new_tokens=task.max_response_tokens)
    save_model(model, tokenizer, folder, card)


def last_good_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; broken ones (a kill while writing) are deleted and reported."""
    for path in sorted(folder.glob("checkpoint-*"), key=_step_of, reverse=True):
        problem = _checkpoint_problem(path)
        if problem is None:
            return path
        console.print(f"skipping the broken checkpoint {path.name}: {problem}")
        shutil.rmtree(path)
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


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
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            ZipFile(path / name).close()
    except (OSError, json.JSONDecodeError, SafetensorError, BadZipFile) as error:
        return str(error)
    return None


def metric_rows(log_history: Sequence[Mapping[str, Any]], metrics: Metrics) -> list[dict[str, Any]]:
    """The trainer's log as rows of metrics.jsonl: an entry becomes a row of every kind whose names it has."""
    return [
        {"step": entry["step"], **{column: entry[name] for column, name in kind.items()}}
        for entry in log_history
        for kind in metrics
        if all(name in entry for name in kind.values())
    ]


class ProgressCallback(TrainerCallback):
    """One bar, and metrics.jsonl."""

    def __init__(self, path: Path, title: str, metrics: Metrics) -> None:
        self.path = path
        self.title = title
        self.metrics = metrics
        self.bar = progress_bar()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        size = args.train_batch_size * args.gradient_accumulation_steps
        console.print(f"{self.title}: {state.max_steps} steps of {size}")
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The whole file anew: on a resumed run the rows after the checkpoint are made again.
        rows = metric_rows(state.log_history, self.metrics)
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if "loss" in state.log_history[-1]:
            description = f"{self.title} loss {state.log_history[-1]['loss']:.2f}"
            self.bar.update(self.task, completed=state.global_step, description=description)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()
