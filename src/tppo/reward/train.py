"""The reward stage: labels -> a token-level reward model and its sentence-level rival.

Both see the same rows in the same order from the same encoder; number of passes, learning rate and class balance are
the same unless the rival is given its own (`reward.sentence_*`); both keep the checkpoint with the best AUC on held-out
users. Writes token/, sentence/ (model folders) and metrics.jsonl: rows {model, step, epoch, split, ...}, split `train`
per optimiser step and `reward_eval` per evaluation. A stage that was stopped goes on (`tppo.reward.progress`) and ends
in the same models.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from tppo.core.checkpoint import remove_checkpoints
from tppo.core.common import UserError, console, rng, seed_everything, stream_seed, track
from tppo.core.config import Recipe, Reward
from tppo.core.device import autocast
from tppo.core.files import PARTS, write_json
from tppo.core.models import load_encoder_path
from tppo.core.run import RunFolder
from tppo.judge.legible import Legibility
from tppo.judge.verdict import CONSTRUCTED_FILE
from tppo.reward import losses
from tppo.reward.align import IRRELEVANT, RELEVANT
from tppo.reward.data import Item, LabelledResponse, collate, load_labelled, make_items, suggested_length, targets
from tppo.reward.metrics import evaluate, sentence_check, sentence_scores
from tppo.reward.models import RewardModel, SentenceRewardModel, TokenRewardModel
from tppo.reward.progress import Checkpoints, load_weights

KINDS: tuple[type[RewardModel], ...] = (TokenRewardModel, SentenceRewardModel)
WEIGHT_DECAY = 0.01
WARMUP_SHARE = 0.1
MAX_GRAD_NORM = 1.0
HEAD_LEARNING_RATE_FACTOR = 10  # the head starts from noise, the encoder does not
Log = Callable[[dict[str, Any]], None]


class Labels(NamedTuple):
    """Judged responses."""

    train: list[LabelledResponse]
    """Sampled ones to learn from."""
    held_out: list[LabelledResponse]
    """Sampled ones of held-out users."""
    abstained: dict[str, int]
    """How many the judge abstained on, by split, and of the constructed ones."""
    constructed: list[LabelledResponse]
    """Constructed ones to learn from (`label.constructed`)."""


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Train both reward models on the labels; returns facts for the manifest."""
    settings = recipe.reward
    labels = load_labels(run, settings)
    counts = {
        "train": _describe(labels.train),
        "constructed": _describe(labels.constructed),
        "reward_eval": _describe(labels.held_out),
    }
    facts: dict[str, Any] = {"abstained": labels.abstained, **counts}
    parts = folder / PARTS
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for kind in KINDS:
            rows: list[dict[str, Any]] = []

            def log(row: dict[str, Any], name: str = kind.kind, rows: list[dict[str, Any]] = rows) -> None:
                rows.append(row)
                file.write(json.dumps({"model": name, **row}) + "\n")
                file.flush()

            finished = parts / f"{kind.kind}.json"
            if finished.exists():
                before = json.loads(finished.read_text(encoding="utf-8"))
                found = before["found"]
                for row in before["rows"]:
                    log(row)
            else:
                shutil.rmtree(folder / kind.kind, ignore_errors=True)
                checkpoints = parts / kind.kind
                model, train_items, found = train_model(kind, labels, settings, recipe.seed, log, checkpoints)
                model.save(
                    folder / kind.kind,
                    rubric=settings.rubric,
                    metrics=found["best"],
                    sl=suggested_length(labels.train, train_items, recipe.task.num_queries),
                    **label_facts(run),
                    **counts,
                )
                checkpoints.mkdir(parents=True, exist_ok=True)
                write_json(finished, {"found": found, "rows": rows})
                remove_checkpoints(checkpoints)
            facts[kind.kind] = found
            if found["collapsed"]:
                console.print(
                    f"[bold red]WARNING: the {kind.kind} reward model has collapsed[/]: {found['why']}. Results of PPO "
                    "on it say nothing about sentence-level rewards. Search its settings (benchmarks/reward_study.py "
                    "search) or label more responses."
                )
            elif found["collapsed"] is None:
                told = f"Nobody can tell whether the {kind.kind} reward model has collapsed"
                console.print(f"[bold yellow]{told}[/]: {found['why']}")
    return facts


def label_facts(run: RunFolder) -> dict[str, Any]:
    """Who labelled, and how: {judge, template, repeats_irrelevant} of the run's label stage."""
    config = (run.manifest("label") or {})["config"]
    by_llm = config["label"]["judge"] == "llm"
    return {
        "judge": run.facts("label")["judge"],
        "template": config["judge"]["template"] if by_llm else None,
        "repeats_irrelevant": None if by_llm else config["label"]["repeats_irrelevant"],
    }


def load_labels(run: RunFolder, settings: Reward) -> Labels:
    """Labels of a run's finished label stage for `reward.rubric`.

    Raises:
        UserError: settings that make no sense, a stage that is not finished, or labels that cannot be learnt from.
    """
    check_settings(settings)
    label, prepare = run.require("label"), run.require("prepare")
    found = {split: load_labelled(label, prepare, settings.rubric, split) for split in ("train", "reward_eval")}
    found["constructed"] = [], 0
    if (label / CONSTRUCTED_FILE).exists():  # the label stage was asked for some
        found["constructed"] = load_labelled(label, prepare, settings.rubric, "train", CONSTRUCTED_FILE)
    train, held_out, constructed = (rows for rows, _ in found.values())
    labels = Labels(train, held_out, {name: abstained for name, (_, abstained) in found.items()}, constructed)
    check_labels(labels, label / "labels.parquet", settings)
    return labels


def check(recipe: Recipe) -> None:
    """Every check of the stage's settings that needs no data."""
    check_settings(recipe.reward)
    judge, rubric = recipe.judge, recipe.reward.rubric
    if recipe.label.judge == "llm" and rubric not in judge.rubrics:
        raise UserError(f"reward.rubric={rubric} is not among judge.rubrics={judge.rubrics}: nobody would label it")
    if recipe.label.judge == "llm" and judge.template == "sentence":
        raise UserError(
            "judge.template=sentence gives no word labels, which the token-level reward model learns from: use token"
        )


def check_settings(settings: Reward) -> None:
    """Raises a UserError that names the setting when a number is out of range."""
    rules: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
        (("epochs", "sentence_epochs", "batch_size", "evals_per_epoch"), lambda n: n >= 1, "at least 1"),
        (("patience", "encoder_layers"), lambda n: n >= 0, "at least 0"),
        (("class_ratio", "sentence_class_ratio"), lambda x: x >= 1 or x == 0, "at least 1, or 0 (no balance)"),
        (("dropout",), lambda x: 0 <= x < 1, "at least 0 and below 1, or null"),
        (("learning_rate", "sentence_learning_rate"), lambda x: x > 0, "above 0"),
        (("class_weights",), lambda w: len(w) == 3 and min(w) > 0, "three positive numbers, for classes 0, 1 and 2"),
    )
    for names, fits, rule in rules:
        for name in names:
            value = getattr(settings, name)
            if value is not None and not fits(value):
                raise UserError(f"reward.{name}={value} must be {rule}")
    parts = (settings.local_weight, settings.global_weight)
    if min(parts) < 0 or max(parts) == 0:
        raise UserError(f"reward.local_weight and global_weight are {parts}: none may be negative, one positive")


def _describe(rows: Sequence[LabelledResponse]) -> dict[str, Any]:
    classes = [c for row in rows for c in row.classes]
    return {
        "responses": len(rows),
        "responses_relevant": sum(row.sentence_label for row in rows),
        "words": len(classes),
        "words_relevant": classes.count(RELEVANT),
        "words_irrelevant": classes.count(IRRELEVANT),
    }


def check_labels(labels: Labels, path: Path, settings: Reward) -> None:
    """Raises a UserError when a split has no rows, or the training rows one class only; they are from `path`."""
    train = labels.train
    for split, rows in (("train", train), ("reward_eval", labels.held_out)):
        if not rows:
            raise UserError(
                f"{path} holds no judged response of split {split} for reward.rubric={settings.rubric}: "
                "draw more (sample.train_examples, sample.reward_eval_examples) and label them"
            )
    for level, seen in (
        ("word", {c == RELEVANT for row in train for c in row.classes}),
        ("response", {row.sentence_label == 1 for row in train}),
    ):
        if len(seen) < 2:
            only = "none at all" if not seen else "only relevant ones" if True in seen else "only irrelevant ones"
            raise UserError(
                f"{path}: of the {len(train)} training rows for reward.rubric={settings.rubric}, {level} "
                f"labels of both classes are needed and there are {only}. Draw more (sample.train_examples), "
                "train the policy longer (sft.max_examples), use the other reward.rubric, or lower "
                "label.null_quantile"
            )


def train_model(
    kind: type[RewardModel], labels: Labels, settings: Reward, seed: int, log: Log, checkpoints: Path | None = None
) -> tuple[RewardModel, list[Item], dict[str, Any]]:
    """One reward model from the start encoder, seeded; `log` gets the rows of metrics.jsonl.

    Args:
        checkpoints: folder of the resumable state; None keeps none.

    Returns:
        The model as its best checkpoint; the sampled responses it has learnt from, encoded; and the facts `fit` and
        `sentence_check` give, histories_truncated and seconds.
    """
    settings = settings_for(kind, settings)
    seed_everything(seed, "reward")
    start = time.monotonic()
    reward_model = kind.start(
        load_encoder_path(settings.encoder),
        settings.max_length,
        longformer_window=settings.attention_window if settings.to_longformer else None,
        global_attention=settings.global_attention,
        dropout=settings.dropout,
        layers=settings.encoder_layers,
    )
    Legibility(reward_model.tokenizer, spelling=False).check(
        (text for row in labels.train for text in [row.response, *(event.text for event in row.history)]),
        f"reward.encoder={settings.encoder}",
        "give reward.encoder an encoder for the log's languages",
    )
    if isinstance(reward_model, SentenceRewardModel):
        reward_model.use_pooling(settings.sentence_pooling)
    train_items, constructed_items, held_out_items = (
        make_items(reward_model.tokenizer, rows, settings.max_length)
        for rows in (labels.train, labels.constructed, labels.held_out)
    )
    rows = [*train_items, *constructed_items]
    fitted = fit(reward_model, rows, held_out_items, settings, seed, log, checkpoints)
    reward_model.info["encoder"] = settings.encoder
    check = sentence_check(
        sentence_scores(reward_model, held_out_items),
        np.array([item.label for item in held_out_items]),
        [row.user_id for row in labels.held_out],
    )
    cut = sum(item.dropped > 0 for item in [*train_items, *constructed_items, *held_out_items])
    seconds = round(time.monotonic() - start, 1)
    return reward_model, train_items, {**fitted, **check, "histories_truncated": cut, "seconds": seconds}


def settings_for(kind: type[RewardModel], settings: Reward) -> Reward:
    """The settings with the rival's own learning rate, epochs and balance in force when `kind` is the rival."""
    if kind is not SentenceRewardModel:
        return settings
    own = {name: getattr(settings, f"sentence_{name}") for name in ("learning_rate", "epochs", "class_ratio")}
    return replace(settings, **{name: value for name, value in own.items() if value is not None})


def fit(
    reward_model: RewardModel,
    train: Sequence[Item],
    held_out: Sequence[Item],
    settings: Reward,
    seed: int,
    log: Log,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Train in place; the model ends as its best checkpoint. `settings` are those of `settings_for`.

    Args:
        log: gets a row for every step and evaluation, those before a stop included.
        folder: resumable state; None keeps none.

    Held-out rows are scored in the precision of training here; final numbers come from `check_reward`, in float32.
    (On transformers' Trainer the same numbers came out, to the last bit, of twice the code: batches drawn beforehand,
    evaluations at uneven steps, the best weights and the rows for `log` each need a hook there.)

    Returns:
        best (step, epoch and held-out metrics of the kept checkpoint), steps, and planned_steps, of which early
        stopping leaves some out.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = reward_model.model.to(device)
    batches = [batch for epoch in range(settings.epochs) for batch in _batches(train, settings, seed, epoch)]
    per_epoch = len(batches) // settings.epochs
    # The end of each epoch, and evals_per_epoch - 1 points evenly between.
    evals = {round(i * per_epoch / settings.evals_per_epoch) for i in range(1, settings.evals_per_epoch + 1)}
    optimiser = torch.optim.AdamW(_parameter_groups(model, settings), weight_decay=WEIGHT_DECAY, fused=True)
    schedule = get_linear_schedule_with_warmup(optimiser, round(WARMUP_SHARE * len(batches)), len(batches))
    checkpoints = Checkpoints(folder, model, optimiser, schedule, log)
    progress = checkpoints.restore(reward_model.kind)

    def evaluated(where: dict[str, Any]) -> dict[str, Any]:
        with autocast(settings.precision, device.type):
            scores = evaluate(reward_model, held_out, settings)
        progress.note({**where, "split": "reward_eval", **scores})
        return {**where, **scores}

    if not progress.step:
        evaluated({"step": 0, "epoch": 0.0})
    model.train()
    for items in track(batches[progress.step :], f"{reward_model.kind} reward model"):
        if settings.patience and progress.worse >= settings.patience:
            break
        step = progress.step = progress.step + 1
        generator = torch.Generator().manual_seed(stream_seed(seed, "reward", "class_ratio", step))
        where = {"step": step, "epoch": round(step / per_epoch, 4)}
        made = _step(reward_model, items, settings, generator, optimiser, schedule)
        progress.note({**where, "split": "train", **made})
        if (step - 1) % per_epoch + 1 in evals:
            progress.take(evaluated(where), model, _rank)
        checkpoints.save_if_due(progress)
    load_weights(model, progress.best_weights)
    model.eval()
    console.print(
        f"{reward_model.kind} reward model: held-out AUC {progress.best['auc']}, step {progress.best['step']}"
    )
    return {"best": progress.best, "steps": progress.step, "planned_steps": len(batches)}


def _step(
    reward_model: RewardModel,
    items: Sequence[Item],
    settings: Reward,
    generator: torch.Generator,
    optimiser: torch.optim.Optimizer,
    schedule: LambdaLR,
) -> dict[str, float]:
    """One optimiser step; returns the parts of its loss, the norm of the gradient and the learning rate."""
    with autocast(settings.precision, reward_model.model.device.type):
        loss, parts = _objective(reward_model, items, settings, generator)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reward_model.model.parameters(), MAX_GRAD_NORM)
    rate = float(schedule.get_last_lr()[0])
    optimiser.step()
    schedule.step()
    optimiser.zero_grad()
    return {**parts, "grad_norm": norm.item(), "learning_rate": rate}


def _objective(
    reward_model: RewardModel, items: Sequence[Item], settings: Reward, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Training loss of a batch and its parts as numbers."""
    batch = collate(items, reward_model.tokenizer.pad_token_id, reward_model.model.device)
    mask_BT = batch.response_mask_BT
    classes_BT, labels_B = targets(items, batch)
    if isinstance(reward_model, TokenRewardModel):
        keep_BT = losses.class_ratio_mask(classes_BT, mask_BT, settings.class_ratio, generator)
        loss = losses.token_loss(reward_model.logits(batch), classes_BT, mask_BT, labels_B, keep_BT, settings)
        return loss.total, losses.as_numbers(loss)
    assert isinstance(reward_model, SentenceRewardModel)
    # The rival's class balance is the same mask, over responses in place of tokens.
    readable_B1 = mask_BT.any(dim=1, keepdim=True)
    keep_B1 = losses.class_ratio_mask(labels_B[:, None] + 1, readable_B1, settings.class_ratio, generator)
    keep_B = (keep_B1 & readable_B1)[:, 0]
    sentence = losses.sentence_loss(reward_model.pooled_logits(batch), labels_B, keep_B, settings.sentence_loss)
    return sentence, {"loss": sentence.item()}


def _rank(scores: dict[str, Any]) -> float:
    """What the best checkpoint is best in: AUC, or a low loss where the held-out rows have no AUC."""
    return scores["auc"] if scores["auc"] is not None else -scores["loss"]


def _batches(items: Sequence[Item], settings: Reward, seed: int, epoch: int) -> list[list[Item]]:
    """One epoch in random batches of like length: shuffled, sorted within windows of 8 batches, shuffled."""
    generator = rng(seed, "reward", "order", epoch)
    order = generator.permutation(len(items))
    window = 8 * settings.batch_size
    batches: list[list[Item]] = []
    for i in range(0, len(order), window):
        near = sorted(order[i : i + window], key=lambda j: len(items[j]))
        for k in range(0, len(near), settings.batch_size):
            batches.append([items[j] for j in near[k : k + settings.batch_size]])
    return [batches[i] for i in generator.permutation(len(batches))]


def _parameter_groups(model: Any, settings: Reward) -> list[dict[str, Any]]:
    """Encoder first, then the head with its higher rate."""
    encoder = {id(parameter) for parameter in model.base_model.parameters()}
    head = [parameter for parameter in model.parameters() if id(parameter) not in encoder]
    rate = settings.learning_rate
    return [
        {"params": list(model.base_model.parameters()), "lr": rate},
        {"params": head, "lr": rate * HEAD_LEARNING_RATE_FACTOR},
    ]
