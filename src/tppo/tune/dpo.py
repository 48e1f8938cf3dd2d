"""The DPO stage: SFT model + preference pairs -> a tuned policy, by TRL's DPOTrainer. No reward model is read.

L = -log sigmoid(beta (log pi(c)/ref(c) - log pi(r)/ref(r))) for the chosen c and the rejected r, log-probabilities
summed over the response, end-of-sequence included (Rafailov et al. 2023, Eq. 7). The reference is the SFT model:
a frozen copy in full tuning, the model without its adapters in LoRA.

There are two kinds of pairs. The paper's (App. H) prefers the true next queries to what the SFT model wrote. The
judged kind, which is ours, is on-policy: both responses of a pair come from the SFT model, so the policy learns what
is better among the things it does write, and the judge's verdicts are the same that train the reward models.

Departures from the paper's App. H: pairs come from the prompts of the sample stage (sample.train_examples of them,
the paper has 20k), and beta, which it does not give, is TRL's.

Departures from DPOTrainer's ways, and why:

1. It takes the ids as they are (`_prepare_dataset`). DPOTrainer would encode prompt + response as one text and cut it
   where the ids begin to differ, and append end-of-sequence to a sampled response that was cut off by the limit.
2. Pairs of similar length share a batch, in an order that resumes (`tppo.tune.trl.EpochSampler`).

Its loss is used as it stands, also where it is slower than need be: on a CPU its fused head multiplies the prompt's
positions with the vocabulary, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from trl import DPOConfig, DPOTrainer

from tppo.core.common import UserError, draw, stream_seed
from tppo.core.config import DPO, Recipe, Rubric, Task
from tppo.core.files import CHECKPOINTS
from tppo.core.models import load_policy, lora_config, with_adapters
from tppo.core.recipe import check_samples
from tppo.core.run import RunFolder
from tppo.core.tables import LABELS, RESPONSES, Example, load_examples, read_table
from tppo.core.text import render_response
from tppo.generate.engine import encode_examples
from tppo.judge.verdict import RELEVANT
from tppo.tune.sft import encode_response
from tppo.tune.trl import ReadyRows, check_batch_sizes, metric_rows, save_trained, train, trainer_config

_MEASURES = {
    "loss": "loss",
    "reward_margin": "rewards/margins",
    "reward_accuracy": "rewards/accuracies",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "chosen_logprob": "logps/chosen",
    "rejected_logprob": "logps/rejected",
    "entropy": "entropy",
}
METRICS = (
    {**_MEASURES, "grad_norm": "grad_norm", "learning_rate": "learning_rate"},
    {f"eval_{column}": f"eval_{name}" for column, name in _MEASURES.items()},
)
"""Rows of metrics.jsonl, beside `step`. A reward is beta log(pi / ref) of a whole response; accuracy is the share of
pairs whose chosen response has the larger one."""
Row = dict[str, Any]


class Pair(NamedTuple):
    """Two responses to the prompt of one example. Ids end with end-of-sequence iff the response is finished."""

    example_id: str
    chosen_ids: list[int]
    rejected_ids: list[int]


class Pairs(NamedTuple):
    pairs: list[Pair]
    dropped: Counter[str]
    """Why an example gave no pair -> how many; with `pairs`, every example is accounted for."""


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Train, or take up an unfinished training again; writes model/ and metrics.jsonl.

    Raises:
        UserError: settings that cannot be, or no pair is left to train on.
    """
    settings, rubric = recipe.dpo, recipe.reward.rubric
    check_batch_sizes(settings, "dpo")
    check_samples(recipe)
    sft_folder = run.require("sft") / "model"
    model, tokenizer = load_policy(sft_folder, dtype=torch.float32, task=recipe.task)
    rows, facts = make_pairs(run, settings.pairs, rubric, recipe.task, tokenizer, "train")
    held_out, held_out_facts = make_pairs(run, settings.pairs, rubric, recipe.task, tokenizer, "reward_eval")
    if not rows:
        raise UserError(
            f"no pair is left to train on ({facts}): raise sample.train_examples or sample.samples_per_example"
        )
    measured = draw(held_out, recipe.sft.max_eval_examples, recipe.data_seed, "dpo", "eval")
    reference = load_policy(sft_folder, dtype=torch.float32)[0] if settings.tuning == "full" else None
    seed = stream_seed(recipe.seed, "dpo")
    trainer = make_trainer(model, reference, tokenizer, rows, measured, settings, seed, folder / CHECKPOINTS)
    result, resumed_from = train(trainer, "DPO", METRICS, folder / "metrics.jsonl")
    made = f"Tuned from the run's SFT model on {len(rows)} pairs ({settings.pairs}) by tppo's `dpo` stage."
    save_trained(trainer, tokenizer, settings, recipe.task, folder / "model", "dpo", made)
    return {
        "algorithm": "dpo",
        "pairs": settings.pairs,
        "rubric": rubric if settings.pairs == "judged" else None,
        "train": facts,
        "reward_eval": {**held_out_facts, "measured_pairs": len(measured)},
        "steps": result.global_step,
        "resumed_from_step": resumed_from,
        # The newest of every measure, training and held out.
        "last": dict(item for row in metric_rows(trainer.state.log_history, METRICS) for item in row.items()),
    }


def check(recipe: Recipe) -> None:
    """Every check of the stage's settings that needs no data."""
    check_batch_sizes(recipe.dpo, "dpo")


def make_pairs(
    run: RunFolder, kind: Literal["sft_output", "judged"], rubric: Rubric, task: Task, tokenizer: Any, split: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Pairs of a split from the sample stage's responses, with the very prompt ids they were sampled from.

    Returns:
        Rows for the trainer, and counts for the manifest: pairs, why the other examples gave none, mean lengths.
    """
    responses = _rows_of(run.require("sample") / "responses.parquet", RESPONSES, split)
    known = load_examples(run.require("prepare"), split).with_ids({row["example_id"] for row in responses})
    examples = {example.example_id: example for example in known}
    facts: dict[str, Any] = {"responses": len(responses)}
    if unknown := [row["example_id"] for row in responses if row["example_id"] not in examples]:
        raise UserError(
            f"responses.parquet has {len(unknown)} responses to {split} examples that examples.parquet lacks (first: "
            f"{unknown[0]}): it was sampled from another prepare stage; give `--redo sample`"
        )
    if kind == "sft_output":
        limit = task.max_response_tokens
        pairs, dropped = sft_output_pairs(
            responses, examples, lambda queries: encode_response(tokenizer, queries), limit
        )
    else:
        labels = _rows_of(run.require("label") / "labels.parquet", LABELS, split)
        labels = [row for row in labels if row["rubric"] == rubric]
        facts["abstained_responses"] = sum(row["status"] == "abstained" for row in labels)
        pairs, dropped = judged_pairs(responses, labels)
    prompts, dropped_events = encode_examples(tokenizer, [examples[pair.example_id] for pair in pairs], task)
    facts |= {
        "history_events_dropped_to_fit_the_prompt": dropped_events,
        "pairs": len(pairs),
        "examples_without_pair": dict(dropped),
        "mean_chosen_tokens": sum(len(pair.chosen_ids) for pair in pairs) / len(pairs) if pairs else None,
        "mean_rejected_tokens": sum(len(pair.rejected_ids) for pair in pairs) / len(pairs) if pairs else None,
    }
    return trainer_rows(pairs, prompts), facts


def _rows_of(path: Path, schema: Any, split: str) -> list[Row]:
    return read_table(path, schema, split=split).to_pylist()


def trainer_rows(pairs: Sequence[Pair], prompts: Sequence[list[int]]) -> list[Row]:
    """Rows with the column names of DPOTrainer's collator; `length` sorts pairs into batches."""
    return [
        {
            "prompt_ids": prompt,
            "chosen_ids": pair.chosen_ids,
            "rejected_ids": pair.rejected_ids,
            "length": len(prompt) + max(len(pair.chosen_ids), len(pair.rejected_ids)),
        }
        for pair, prompt in zip(pairs, prompts, strict=True)
    ]


class PairTrainer(ReadyRows, DPOTrainer):
    """DPOTrainer on ready-made ids."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return dataset


def make_trainer(
    model: Any,
    reference: Any | None,
    tokenizer: Any,
    train_rows: list[Row],
    eval_rows: list[Row],
    settings: DPO,
    seed: int,
    output_dir: Path,
) -> PairTrainer:
    """The trainer. `reference` is the frozen SFT model, or None for LoRA (adapters off)."""
    assert (reference is None) == (settings.tuning == "lora")
    if settings.tuning == "lora":
        with torch.random.fork_rng(devices=[]):
            model = with_adapters(model, settings.lora_r).unload()  # that they fit; DPOTrainer adds its own
    config = trainer_config(
        DPOConfig,
        settings,
        len(train_rows),
        seed,
        output_dir,
        beta=settings.beta,
        loss_type=["sigmoid"],
        disable_dropout=True,
        eval_strategy="epoch" if eval_rows else "no",
    )
    return PairTrainer(
        train_rows,
        eval_rows,
        model=model,
        ref_model=reference,
        args=config,
        processing_class=tokenizer,
        peft_config=lora_config(settings.lora_r, model) if settings.tuning == "lora" else None,
    )


def sft_output_pairs(
    responses: Sequence[Row],
    examples: Mapping[str, Example],
    encode: Callable[[Sequence[str]], list[int] | None],
    max_response_tokens: int,
) -> Pairs:
    """App. H: chosen are the true next queries, rejected is the example's first sampled response as it was drawn.

    Args:
        responses: rows of responses.parquet; samples after an example's first are not used.
        examples: by example_id.
        encode: queries -> ids of the response, end-of-sequence included; None when they cannot be written.
        max_response_tokens: longer true queries are dropped, as in SFT: they could never be written.
    """
    pairs, dropped = [], Counter[str]()
    for row in responses:
        if row["sample"] != 0:
            continue
        targets = examples[row["example_id"]].targets
        chosen_ids = encode(targets)
        if chosen_ids is None:
            dropped["true_queries_not_writable"] += 1
        elif len(chosen_ids) > max_response_tokens:
            dropped["true_queries_too_long"] += 1
        elif row["finished"] and row["response"] == render_response(targets):
            dropped["sampled_the_true_queries"] += 1
        else:
            pairs.append(Pair(row["example_id"], chosen_ids, list(row["response_ids"])))
    return Pairs(pairs, dropped)


def standing(response: Row, label: Row) -> tuple[int, float]:
    """What orders judged responses: the sentence label first, then the share of relevant words.

    An unparseable one is worth nothing, as in the evaluation: nobody is shown it. A judge of whole responses gives no
    word labels; the sentence label alone then orders them.
    """
    assert label["status"] == "ok", "an abstained response has no standing"
    words = label["words"]
    if response["problem"] is not None:
        return 0, 0.0
    share = sum(word["label"] == RELEVANT for word in words) / len(words) if words else 0.0
    return label["sentence_label"], share


def judged_pairs(responses: Sequence[Row], labels: Sequence[Row]) -> Pairs:
    """Best against worst of the sampled responses to each prompt; of equals, the one sampled first.

    Args:
        responses: rows of responses.parquet.
        labels: rows of labels.parquet of one rubric.

    Raises:
        UserError: a response has no label, or another text than was labelled.
    """
    by_key = {(row["example_id"], row["sample"]): row for row in labels}
    by_example: dict[str, list[tuple[tuple[int, float], Row]]] = {}
    for row in sorted(responses, key=lambda row: row["sample"]):
        judged = by_example.setdefault(row["example_id"], [])
        label = by_key.get((row["example_id"], row["sample"]))
        if label is None or label["response"] != row["response"]:
            raise UserError(
                f"labels.parquet has no verdict on sample {row['sample']} of example {row['example_id']}: it was "
                "made from other responses; give `--redo label`"
            )
        if label["status"] == "ok":
            judged.append((standing(row, label), row))
    pairs, dropped = [], Counter[str]()
    for example_id, judged in by_example.items():
        if len(judged) < 2:
            dropped["fewer_than_two_judged_responses"] += 1
            continue
        best, chosen = max(judged, key=lambda item: item[0])
        worst, rejected = min(judged, key=lambda item: item[0])
        if best == worst:
            dropped["tie"] += 1
        else:
            pairs.append(Pair(example_id, list(chosen["response_ids"]), list(rejected["response_ids"])))
    return Pairs(pairs, dropped)
