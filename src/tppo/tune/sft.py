"""The SFT stage: history -> the true next queries, by TRL's SFTTrainer, loss on the response only.

Departures from SFTTrainer's ways, and why:

1. Prompt and response are tokenised apart and joined as ids (`input_ids` and `labels` are given ready-made), so that
   training sees the same boundary as sampling; the end-of-sequence id is added here, once.
2. Responses above task.max_response_tokens are left out and counted: a cut response would teach never to end; and so
   are those that the tokenizer cannot write. Prompts lose their oldest events first (counted).
3. `compute_loss` asks the model for logits of the last positions only. TRL's own fused head does so on a GPU, but on a
   CPU it multiplies every position with the vocabulary: with 49,152 words and one response token in ten that was most
   of the time.
4. Examples of similar length share a batch, in an order that resumes (`tppo.tune.trl.EpochSampler`).

Full tuning trains float32 weights, under bf16 autocast when sft.precision is bf16; LoRA adapters are merged into the
saved model. The saved weights are bf16 when precision is bf16: every later stage then starts from the very same
numbers (the reference, the rollouts and the evaluation run in bf16, and RL's float32 master copy begins at them),
where saving float32 would make RL start from a policy that was never evaluated.

Shapes: B examples, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from trl import SFTConfig, SFTTrainer

from tppo.core.causal import takes
from tppo.core.common import UserError, stream_seed, track
from tppo.core.config import SFT, Recipe, Task
from tppo.core.encode import brings_back, encode_text
from tppo.core.files import CHECKPOINTS, PARTS
from tppo.core.models import SCRATCH, load_policy, with_adapters
from tppo.core.parts import drawn_train_examples, say_fewer, write_trained_on
from tppo.core.resume import chunks
from tppo.core.run import RunFolder
from tppo.core.tables import Example, drawn_examples
from tppo.core.text import render_response
from tppo.generate.engine import encode_examples
from tppo.tune.scratch import check_settings as check_scratch
from tppo.tune.scratch import start_from_scratch
from tppo.tune.trl import (
    ReadyRows,
    Rows,
    check_batch_sizes,
    mapped_rows,
    planned_steps,
    save_trained,
    train,
    trainer_config,
)

IGNORED = -100
_AT_ONCE = 4096  # examples encoded as Python objects at a time
METRICS = ({"loss": "loss", "learning_rate": "learning_rate"}, {"eval_loss": "eval_loss"})
"""Rows of metrics.jsonl, beside `step` (see tppo.tune.trl.Metrics)."""


class Encoded(NamedTuple):
    """Rows {input_ids, labels, length} ready for the trainer, and what was lost on the way to them."""

    rows: Rows
    too_long_responses: int
    dropped_events: int
    unwritable_responses: int
    """With characters that the tokenizer cannot write."""
    response_tokens: int
    """In all rows, end-of-sequence included."""
    kept: list[str]
    """Ids of the examples of the rows."""


def encode_response(tokenizer: Any, queries: Sequence[str]) -> list[int] | None:
    """Ids of a response as a model should write it: its text, then one end-of-sequence id. None when the tokenizer
    cannot write it: a policy would learn to write something else."""
    text = render_response(queries)
    ids = encode_text(tokenizer, text)
    return [*ids, tokenizer.eos_token_id] if brings_back(tokenizer, text, ids) else None


def encode_training(tokenizer: Any, examples: Sequence[Example], task: Task) -> Encoded:
    """Prompt ids + response ids + end-of-sequence; labels on the response only."""
    responses = [encode_response(tokenizer, example.targets) for example in examples]
    written = [(example, ids) for example, ids in zip(examples, responses, strict=True) if ids is not None]
    kept = [pair for pair in written if len(pair[1]) <= task.max_response_tokens]
    kept_examples = [example for example, _ in kept]
    prompts, dropped = encode_examples(tokenizer, kept_examples, task)
    rows = [
        {
            "input_ids": prompt + response,
            "labels": [IGNORED] * len(prompt) + response,
            "length": len(prompt) + len(response),
        }
        for prompt, (_, response) in zip(prompts, kept, strict=True)
    ]
    tokens = sum(len(response) for _, response in kept)
    ids = [example.example_id for example in kept_examples]
    return Encoded(rows, len(written) - len(kept), dropped, len(examples) - len(written), tokens, ids)


def encode_to_file(tokenizer: Any, examples: Sequence[Example], task: Task, path: Path) -> Encoded:
    """As `encode_training`, a piece at a time; the rows are mapped into memory from `path`."""
    lost: list[Encoded] = []

    def pieces() -> Iterator[list[dict[str, Any]]]:
        numbers = chunks(len(examples), _AT_ONCE)
        for part in track(numbers, "encoding examples") if len(numbers) > 1 else numbers:
            piece = encode_training(tokenizer, examples[part.start : part.stop], task)
            lost.append(piece._replace(rows=[]))
            yield list(piece.rows)

    rows = mapped_rows(path, pieces())
    counts = {name: sum(getattr(piece, name) for piece in lost) for name in Encoded._fields[1:-1]}
    return Encoded(rows, **counts, kept=[example_id for piece in lost for example_id in piece.kept])


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Train, or take up an unfinished training again; writes model/ and metrics.jsonl."""
    settings = recipe.sft
    check_batch_sizes(settings, "sft")
    prepared = run.require("prepare")
    limit = settings.max_examples or None
    examples = drawn_train_examples(prepared, "sft", recipe.parts, recipe.data_seed, limit, recipe.seed, "sft", "train")
    say_fewer(len(examples), settings.max_examples, "sft.max_examples", recipe.parts, "sft")
    held_out = drawn_examples(prepared, "reward_eval", settings.max_eval_examples, recipe.seed, "sft", "eval")
    model, tokenizer = _start_model(settings, examples, recipe.task, recipe.seed)
    train_set, eval_set = (
        encode_to_file(tokenizer, part, recipe.task, folder / PARTS / f"{name}.arrow")
        for name, part in (("train", examples), ("eval", held_out))
    )
    rows = train_set.rows
    write_trained_on(folder, examples.with_ids(train_set.kept))
    if not len(rows):
        raise UserError(
            f"no training example is left: {train_set.too_long_responses} of {len(examples)} have a response "
            f"above task.max_response_tokens={recipe.task.max_response_tokens}; raise it, or prepare more"
            f"{_unwritable(train_set, settings.model)}"
        )
    base = f"Base model: `{settings.model}`"
    if settings.model == SCRATCH:
        base = (
            f"Made from scratch ({model.num_parameters():,} random weights, a tokenizer of {len(tokenizer):,} tokens "
            "trained on the same examples) for demos, tests and controlled studies: it knows nothing but this log"
        )
    trainer = make_trainer(model, tokenizer, rows, eval_set.rows, settings, recipe.seed, folder / CHECKPOINTS)
    result, resumed_from = train(trainer, "SFT", METRICS, folder / "metrics.jsonl")
    eval_loss = _final_eval_loss(trainer) if len(eval_set.rows) else None
    made = f"{base}; {settings.tuning} tuning on {len(rows)} examples by tppo's `sft` stage."
    save_trained(trainer, tokenizer, settings, recipe.task, folder / "model", "supervised start", made)
    tokens = sum(trainer.train_dataset["length"])
    trained_share = 1 - (resumed_from or 0) / max(1, result.global_step)
    return {
        "train_examples": len(rows),
        "eval_examples": len(eval_set.rows),
        "too_long_responses_excluded": train_set.too_long_responses,
        "too_long_eval_responses_excluded": eval_set.too_long_responses,
        "unwritable_responses_excluded": train_set.unwritable_responses + eval_set.unwritable_responses,
        "history_events_dropped_to_fit_the_prompt": train_set.dropped_events,
        "mean_tokens": tokens / len(rows),
        "mean_response_tokens": train_set.response_tokens / len(rows),
        "steps": result.global_step,
        "resumed_from_step": resumed_from,
        # Of every step: the trainer's own mean leaves out the steps before a stop.
        "train_loss": fmean(row["loss"] for row in trainer.state.log_history if "loss" in row),
        "eval_loss": eval_loss,
        # Evaluation and checkpoints included.
        "tokens_per_second": round(tokens * settings.epochs * trained_share / result.metrics["train_runtime"], 1),
    }


def check(recipe: Recipe) -> None:
    """Every check of the stage's settings that needs no data."""
    check_batch_sizes(recipe.sft, "sft")
    if recipe.sft.model == SCRATCH:
        check_scratch(recipe.sft.scratch)


def _unwritable(encoded: Encoded, model: str) -> str:
    """What is said of responses that the tokenizer cannot write; nothing when there is none."""
    if not encoded.unwritable_responses:
        return ""
    return (
        f"; {encoded.unwritable_responses} have characters that the tokenizer of sft.model={model} cannot write: take "
        "a model that knows the log's script"
    )


def _start_model(settings: SFT, examples: Sequence[Example], task: Task, seed: int) -> tuple[Any, Any]:
    """The model to train, with fresh adapters for LoRA, and its tokenizer."""
    if settings.model == SCRATCH:
        if task.prompt == "chat":
            raise UserError(f"task.prompt=chat: sft.model={SCRATCH} has no chat template; use task.prompt=plain")
        model, tokenizer = start_from_scratch(settings.scratch, examples, task, stream_seed(seed, "sft", "scratch"))
    else:
        model, tokenizer = load_policy(settings.model, dtype=torch.float32, task=task)
    if settings.tuning == "lora":
        torch.manual_seed(stream_seed(seed, "sft", "lora"))
        model = with_adapters(model, settings.lora_r)
    return model, tokenizer


class ResponseOnlySFTTrainer(ReadyRows, SFTTrainer):
    """SFTTrainer whose loss needs the logits of the last positions only."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert not return_outputs, "only losses are asked for: prediction_loss_only is set"
        inputs = dict(inputs)
        targets_BT = inputs.pop("labels")[:, 1:]
        mask_BT = targets_BT != IGNORED
        # The logits at a position predict the next one; the earliest position any row of the batch needs.
        first = int(mask_BT.any(0).nonzero()[0, 0])
        keep = mask_BT.shape[1] - first + 1
        if takes(self.accelerator.unwrap_model(model), "logits_to_keep"):
            inputs["logits_to_keep"] = keep  # a family that cannot choose makes all
        logits_BTV = model(**inputs, use_cache=False).logits[:, -keep:-1]
        targets_BT, mask_BT = targets_BT[:, first:], mask_BT[:, first:]
        loss_sum = torch.nn.functional.cross_entropy(logits_BTV[mask_BT].float(), targets_BT[mask_BT], reduction="sum")
        if num_items_in_batch is None:
            return loss_sum / mask_BT.sum()
        # As in SFTTrainer: DDP averages over processes, but the count is that of all of them.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss_sum / num_items_in_batch * processes


def make_trainer(
    model: Any,
    tokenizer: Any,
    train_rows: Rows,
    eval_rows: Rows,
    settings: SFT,
    seed: int,
    output_dir: Path,
) -> ResponseOnlySFTTrainer:
    steps = planned_steps(settings, len(train_rows))
    config = trainer_config(
        SFTConfig,
        settings,
        len(train_rows),
        stream_seed(seed, "sft"),
        output_dir,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        eval_strategy="steps" if len(eval_rows) else "no",
        # Before, half-way, and after (if need be by `run`): an evaluation costs as much as several steps.
        eval_on_start=len(eval_rows) > 0,
        eval_steps=math.ceil(steps / 2),
    )
    return ResponseOnlySFTTrainer(train_rows, eval_rows, model=model, args=config, processing_class=tokenizer)


def _final_eval_loss(trainer: ResponseOnlySFTTrainer) -> float:
    """The evaluation loss after the last step: logged already when the step count is even."""
    evals = [row for row in trainer.state.log_history if "eval_loss" in row]
    if evals and evals[-1]["step"] == trainer.state.global_step:
        return evals[-1]["eval_loss"]
    return trainer.evaluate()["eval_loss"]
