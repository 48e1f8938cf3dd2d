"""The SFT stage: history -> the true next queries, by TRL's SFTTrainer, loss on the response only.

Departures from SFTTrainer's ways, and why:

1. Prompt and response are tokenised apart and joined as ids (`input_ids` and `labels` are given ready-made),
   so that training sees the same boundary as sampling; the end-of-sequence id is added here, once.
2. Responses above task.max_response_tokens are left out and counted: a cut response would teach never to end.
   Prompts lose their oldest events first (counted).
3. `compute_loss` asks the model for logits of the last positions only. TRL's own fused head does so on a GPU,
   but on a CPU it multiplies every position with the vocabulary: with 49,152 words and one response token in
   ten that was most of the time.
4. Examples of similar length share a batch, in an order that can be taken up again in the middle of an epoch:
   the trainer's own sampler draws from the global generator, so a resumed run would see some examples twice.

Full tuning trains float32 weights, under bf16 autocast when sft.precision is bf16; LoRA adapters are merged
into the saved model. The saved weights are bf16 when precision is bf16: every later stage then starts from
the very same numbers (the reference, the rollouts and the evaluation run in bf16, and RL's float32 master
copy begins at them), where saving float32 would make RL start from a policy that was never evaluated.

Shapes: B examples, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from tppo.core.common import UserError, console, draw, stream_seed
from tppo.core.config import SFT, Recipe, Task
from tppo.core.models import SCRATCH, load_policy, lora_config
from tppo.core.run import RunFolder
from tppo.core.tables import Example, load_examples
from tppo.core.text import render_response
from tppo.generate.engine import encode_examples
from tppo.tune.scratch import start_from_scratch
from tppo.tune.trl import (
    EpochSampler,
    ProgressCallback,
    check_batch_sizes,
    configured,
    last_good_checkpoint,
    save_trained,
    training_arguments,
)

IGNORED = -100
METRICS = ({"loss": "loss", "learning_rate": "learning_rate"}, {"eval_loss": "eval_loss"})
"""Rows of metrics.jsonl, beside `step` (see ProgressCallback)."""


@dataclass(frozen=True)
class Encoded:
    """Rows {input_ids, labels, length} ready for the trainer, and what was lost on the way to them."""

    rows: list[dict[str, Any]]
    too_long_responses: int
    dropped_events: int

    @property
    def response_tokens(self) -> int:
        return sum(label != IGNORED for row in self.rows for label in row["labels"])


def encode_response(tokenizer: Any, queries: Sequence[str]) -> list[int]:
    """Ids of a response as a model should write it: its text, then one end-of-sequence id."""
    return [*tokenizer(render_response(queries), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def encode_training(tokenizer: Any, examples: Sequence[Example], task: Task) -> Encoded:
    """Prompt ids + response ids + end-of-sequence; labels on the response only."""
    responses = [encode_response(tokenizer, example.targets) for example in examples]
    fits = [len(ids) <= task.max_response_tokens for ids in responses]
    kept = [example for example, fit in zip(examples, fits, strict=True) if fit]
    prompts, dropped = encode_examples(tokenizer, kept, task)
    rows = []
    for prompt, response in zip(prompts, [ids for ids, fit in zip(responses, fits, strict=True) if fit], strict=True):
        ids = prompt + response
        rows.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + response, "length": len(ids)})
    return Encoded(rows, len(examples) - len(kept), dropped)


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Train, or take up an unfinished training again; writes model/ and metrics.jsonl."""
    settings = recipe.sft
    check_batch_sizes(settings, "sft")
    prepared = run.require("prepare")
    train = draw(load_examples(prepared, "train"), settings.max_examples or None, recipe.seed, "sft", "train")
    held_out = draw(load_examples(prepared, "reward_eval"), settings.max_eval_examples, recipe.seed, "sft", "eval")
    if settings.model == SCRATCH:
        weights_seed = stream_seed(recipe.seed, "sft", "scratch")
        model, tokenizer = start_from_scratch(settings.scratch, train, recipe.task, weights_seed)
    else:
        model, tokenizer = load_policy(settings.model, dtype=torch.float32)
    train_set, eval_set = (encode_training(tokenizer, part, recipe.task) for part in (train, held_out))
    if not train_set.rows:
        raise UserError(
            f"no training example is left: {train_set.too_long_responses} of {len(train)} have a response "
            f"above task.max_response_tokens={recipe.task.max_response_tokens}; raise it, or prepare more"
        )
    if settings.tuning == "lora":
        torch.manual_seed(stream_seed(recipe.seed, "sft", "lora"))
        model = get_peft_model(model, lora_config(settings.lora_r))
    checkpoints = folder / "checkpoints"
    callback = ProgressCallback(folder / "metrics.jsonl", "SFT", METRICS)
    trainer = make_trainer(model, tokenizer, train_set.rows, eval_set.rows, settings, recipe.seed, checkpoints)
    trainer.add_callback(callback)
    resume = last_good_checkpoint(checkpoints)
    if resume:
        trainer.args.eval_on_start = False
        console.print(f"taking SFT up again at {resume.name}")
    start = time.monotonic()
    result = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds = time.monotonic() - start
    final_eval = _final_eval_loss(trainer) if eval_set.rows else None
    callback.write(trainer.state)
    base = f"Base model: `{settings.model}`"
    if settings.model == SCRATCH:
        base = (
            f"Made from scratch ({model.num_parameters():,} random weights, a tokenizer of {len(tokenizer):,} tokens "
            "trained on the same examples) for demos, tests and controlled studies: it knows nothing but this log"
        )
    card = (
        f"# Query suggestions: supervised start\n\n{base}; {settings.tuning} tuning "
        f"on {len(train_set.rows)} examples by tppo's `sft` stage. Writes a user's next searches, one per "
        "line, after the prompt of `tppo.core.text.render_prompt`.\n"
    )
    save_trained(trainer, tokenizer, settings, folder / "model", card)
    shutil.rmtree(checkpoints, ignore_errors=True)
    first_step = int(resume.name.rsplit("-", 1)[1]) if resume else 0
    tokens = sum(row["length"] for row in train_set.rows) * settings.epochs
    trained_share = 1 - first_step / max(1, result.global_step)
    return {
        "train_examples": len(train_set.rows),
        "eval_examples": len(eval_set.rows),
        "too_long_responses_excluded": train_set.too_long_responses,
        "too_long_eval_responses_excluded": eval_set.too_long_responses,
        "history_events_dropped_to_fit_the_prompt": train_set.dropped_events,
        "mean_tokens": sum(row["length"] for row in train_set.rows) / len(train_set.rows),
        "mean_response_tokens": train_set.response_tokens / len(train_set.rows),
        "steps": result.global_step,
        "resumed_from_step": first_step or None,
        "train_loss": result.training_loss,
        "eval_loss": final_eval,
        # Evaluation and checkpoints included.
        "tokens_per_second": round(tokens * trained_share / seconds, 1),
    }


class ResponseOnlySFTTrainer(SFTTrainer):
    """SFTTrainer whose loss needs the logits of the last positions only, and whose order resumes."""

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochSampler(batch_size, list(self.train_dataset["length"]), self.args.data_seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert not return_outputs, "only losses are asked for: prediction_loss_only is set"
        inputs = dict(inputs)
        targets_BT = inputs.pop("labels")[:, 1:]
        mask_BT = targets_BT != IGNORED
        # The logits at a position predict the next one; the earliest position any row of the batch needs.
        first = int(mask_BT.any(0).nonzero()[0, 0])
        outputs = model(**inputs, use_cache=False, logits_to_keep=mask_BT.shape[1] - first + 1)
        logits_BTV, targets_BT, mask_BT = outputs.logits[:, :-1], targets_BT[:, first:], mask_BT[:, first:]
        loss_sum = torch.nn.functional.cross_entropy(logits_BTV[mask_BT].float(), targets_BT[mask_BT], reduction="sum")
        if num_items_in_batch is None:
            return loss_sum / mask_BT.sum()
        # As in SFTTrainer: DDP averages over processes, but the count is that of all of them.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss_sum / num_items_in_batch * processes


def make_trainer(
    model: Any,
    tokenizer: Any,
    train_rows: list[dict[str, Any]],
    eval_rows: list[dict[str, Any]],
    settings: SFT,
    seed: int,
    output_dir: Path,
) -> ResponseOnlySFTTrainer:
    """The trainer with every default that matters here spelled out."""
    steps = math.ceil(len(train_rows) / settings.batch_size * settings.epochs)
    arguments = training_arguments(settings, stream_seed(seed, "sft"), steps, output_dir)
    config = configured(
        SFTConfig,
        **arguments,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        eval_strategy="steps" if eval_rows else "no",
        # Before, half-way, and after (if need be by `run`): an evaluation costs as much as several steps.
        eval_on_start=bool(eval_rows),
        eval_steps=max(1, math.ceil(steps / 2)) if steps > 1 else 1,
    )
    trainer = ResponseOnlySFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _final_eval_loss(trainer: ResponseOnlySFTTrainer) -> float:
    """The evaluation loss after the last step: logged already when the step count is even."""
    evals = [row for row in trainer.state.log_history if "eval_loss" in row]
    if evals and evals[-1]["step"] == trainer.state.global_step:
        return evals[-1]["eval_loss"]
    return trainer.evaluate()["eval_loss"]
