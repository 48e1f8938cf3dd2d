"""The reward stage: labels -> a token-level reward model and its sentence-level rival.

Both see the same rows in the same order for the same number of steps, from the same encoder, with the same
class balance; both keep the checkpoint with the best AUC on held-out users. Writes token/, sentence/ (model
folders) and metrics.jsonl: rows {model, step, epoch, split, ...}, split `train` per optimiser step and
`reward_eval` per evaluation. An unfinished attempt is done anew: it is a matter of minutes.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import get_linear_schedule_with_warmup

from tppo.config import Recipe, Reward
from tppo.errors import UserError
from tppo.models import load_encoder_path
from tppo.progress import console, track
from tppo.reward import losses, metrics
from tppo.reward.align import IRRELEVANT, RELEVANT
from tppo.reward.data import Batch, Item, LabelledResponse, collate, load_labelled, make_items, targets
from tppo.reward.models import (
    RewardModel,
    SentenceRewardModel,
    TokenRewardModel,
    pool_sentence,
    sentence_probability,
    softmax,
)
from tppo.run import RunFolder
from tppo.seeding import rng, seed_everything, stream_seed

WEIGHT_DECAY = 0.01
WARMUP_SHARE = 0.1
MAX_GRAD_NORM = 1.0
HEAD_LEARNING_RATE_FACTOR = 10  # the head starts from noise, the encoder does not
KINDS: tuple[type[RewardModel], ...] = (TokenRewardModel, SentenceRewardModel)

Log = Callable[[dict[str, Any]], None]


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Train both reward models on the labels; returns facts for the manifest."""
    settings = recipe.reward
    check_settings(settings)
    label, prepare = run.require("label"), run.require("prepare")
    train_rows, train_abstained = load_labelled(label, prepare, settings.rubric, "train")
    eval_rows, eval_abstained = load_labelled(label, prepare, settings.rubric, "reward_eval")
    _check_rows(train_rows, eval_rows, label / "labels.parquet", settings)

    for kind in KINDS:
        shutil.rmtree(folder / kind.kind, ignore_errors=True)
    facts: dict[str, Any] = {
        "abstained": {"train": train_abstained, "reward_eval": eval_abstained},
        "train": _describe(train_rows),
        "reward_eval": _describe(eval_rows),
    }
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for kind in KINDS:

            def log(row: dict[str, Any], name: str = kind.kind) -> None:
                file.write(json.dumps({"model": name, **row}) + "\n")
                file.flush()

            seed_everything(recipe.seed, "reward")
            start = time.monotonic()
            reward_model = kind.start(load_encoder_path(settings.encoder), settings.max_length)
            train_items = make_items(reward_model.tokenizer, train_rows, settings.max_length)
            eval_items = make_items(reward_model.tokenizer, eval_rows, settings.max_length)
            best = fit(reward_model, train_items, eval_items, settings, recipe.seed, log)
            reward_model.info["encoder"] = settings.encoder
            reward_model.save(folder / kind.kind, rubric=settings.rubric, metrics=best)
            cut = sum(item.pair.dropped > 0 for item in [*train_items, *eval_items])
            facts[kind.kind] = {
                "best": best,
                "histories_truncated": cut,
                "seconds": round(time.monotonic() - start, 1),
            }
    return facts


def fit(
    reward_model: RewardModel,
    train: Sequence[Item],
    held_out: Sequence[Item],
    settings: Reward,
    seed: int,
    log: Log,
) -> dict[str, Any]:
    """Train in place; the model ends as its best checkpoint. Returns that checkpoint's held-out metrics."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = reward_model.model.to(device)
    batches = [batch for epoch in range(settings.epochs) for batch in _batches(train, settings, seed, epoch)]
    per_epoch = len(batches) // settings.epochs
    # The end of each epoch, and evals_per_epoch - 1 points evenly between.
    evals = {round(i * per_epoch / settings.evals_per_epoch) for i in range(1, settings.evals_per_epoch + 1)}
    optimiser = torch.optim.AdamW(_parameter_groups(model, settings), weight_decay=WEIGHT_DECAY)
    schedule = get_linear_schedule_with_warmup(optimiser, round(WARMUP_SHARE * len(batches)), len(batches))
    log({"step": 0, "epoch": 0.0, "split": "reward_eval", **evaluate(reward_model, held_out, settings)})
    best: dict[str, Any] = {}
    best_weights: dict[str, Tensor] = {}
    model.train()
    for step, items in enumerate(track(batches, f"{reward_model.kind} reward model"), start=1):
        batch = collate([item.pair for item in items], reward_model.tokenizer.pad_token_id, device)
        generator = torch.Generator().manual_seed(stream_seed(seed, "reward", "class_ratio", step))
        loss, parts = _objective(reward_model, batch, items, settings, generator)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        rate = schedule.get_last_lr()[0]
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        where = {"step": step, "epoch": round(step / per_epoch, 4)}
        log({**where, "split": "train", **parts, "grad_norm": float(norm), "learning_rate": rate})
        if (step - 1) % per_epoch + 1 in evals:
            scores = evaluate(reward_model, held_out, settings)
            log({**where, "split": "reward_eval", **scores})
            if not best or _rank(scores) > _rank(best):
                best, best_weights = {**where, **scores}, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    model.eval()
    console.print(f"{reward_model.kind} reward model: held-out AUC {best['auc']}, step {best['step']}")
    return best


def _objective(
    reward_model: RewardModel,
    batch: Batch,
    items: Sequence[Item],
    settings: Reward,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """Training loss of a batch and its parts as numbers."""
    mask_BT = batch.response_mask_BT
    classes_BT, labels_B = targets(items, batch)
    logits_BTC = reward_model.logits(batch)
    if isinstance(reward_model, TokenRewardModel):
        keep_BT = losses.class_ratio_mask(classes_BT, mask_BT, settings.class_ratio, generator)
        loss = _token_loss(logits_BTC, classes_BT, mask_BT, labels_B, keep_BT, settings)
        return loss.total, _numbers(loss)
    # The rival's class balance is the same mask, over responses in place of tokens.
    readable_B1 = mask_BT.any(dim=1, keepdim=True)
    keep_B1 = losses.class_ratio_mask(labels_B[:, None] + 1, readable_B1, settings.class_ratio, generator)
    logits_B = pool_sentence(logits_BTC, mask_BT)
    sentence = losses.sentence_loss(logits_B, labels_B, (keep_B1 & readable_B1)[:, 0])
    return sentence, {"loss": sentence.item()}


def _token_loss(
    logits_BTC: Tensor,
    classes_BT: Tensor,
    mask_BT: Tensor,
    labels_B: Tensor,
    keep_BT: Tensor,
    settings: Reward,
) -> losses.RewardLoss:
    weights = torch.tensor(settings.class_weights, device=logits_BTC.device)
    return losses.total_loss(
        losses.local_loss(logits_BTC, classes_BT, mask_BT, weights, keep_BT),
        losses.global_loss(logits_BTC, classes_BT, mask_BT, labels_B, settings.global_estimator),
        settings.local_weight,
        settings.global_weight,
    )


def _numbers(loss: losses.RewardLoss) -> dict[str, float]:
    total, local, global_ = (part.item() for part in loss)
    return {"loss": total, "local_loss": local, "global_loss": global_}


def evaluate(reward_model: RewardModel, items: Sequence[Item], settings: Reward) -> dict[str, Any]:
    """Held-out losses (without the class-ratio mask) and metrics; `auc` picks the checkpoint."""
    logits = reward_model.response_logits([item.pair for item in items])
    labels = np.array([item.label for item in items])
    if isinstance(reward_model, TokenRewardModel):
        return _evaluate_tokens(logits, [item.classes for item in items], labels, settings)
    scores = np.array([sentence_probability(logits_T1) for logits_T1 in logits])
    readable = np.array([len(logits_T1) > 0 for logits_T1 in logits])
    means = np.array([logits_T1.mean() if len(logits_T1) else 0.0 for logits_T1 in logits])
    loss = losses.sentence_loss(torch.tensor(means), torch.tensor(labels), torch.tensor(readable))
    sentence_auc = metrics.auc(labels == 1, scores)
    return {
        "loss": loss.item(),
        "auc": sentence_auc,
        "sentence_auc": sentence_auc,
        "sentence_f1": metrics.f1(labels == 1, scores > 0.5),
        "sentence_ece": metrics.calibration_error(labels == 1, scores),
    }


def _evaluate_tokens(
    logits: Sequence[np.ndarray], classes: Sequence[Sequence[int]], labels: np.ndarray, settings: Reward
) -> dict[str, Any]:
    logits_BTC = pad_sequence([torch.tensor(logits_TC) for logits_TC in logits], batch_first=True)
    classes_BT = pad_sequence([torch.tensor(row, dtype=torch.long) for row in classes], batch_first=True)
    mask_BT = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in classes], batch_first=True)
    keep_BT = torch.ones_like(mask_BT)
    loss = _token_loss(logits_BTC, classes_BT, mask_BT, torch.tensor(labels), keep_BT, settings)
    probs = [softmax(logits_TC) if len(logits_TC) else logits_TC for logits_TC in logits]
    flat_probs, flat_classes = np.concatenate(probs), np.concatenate([np.array(row, int) for row in classes])
    words = flat_classes > 0
    relevance, relevant = metrics.word_relevance(flat_probs[words]), flat_classes[words] == RELEVANT
    sentence_scores = np.array([metrics.response_relevance(probs_TC) for probs_TC in probs])
    token_auc = metrics.auc(relevant, relevance)
    return {
        **_numbers(loss),
        "auc": token_auc,
        "token_auc": token_auc,
        "weighted_auc": metrics.weighted_auc(flat_classes, flat_probs),
        "token_f1": metrics.f1(relevant, relevance > 0.5),
        "token_ece": metrics.calibration_error(relevant, relevance),
        "sentence_auc": metrics.auc(labels == 1, sentence_scores),
        "sentence_ece": metrics.calibration_error(labels == 1, sentence_scores),
    }


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
        near = sorted(order[i : i + window], key=lambda j: len(items[j].pair))
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


def check_settings(settings: Reward) -> None:
    """UserError for a number out of range."""
    for name, least in (("epochs", 1), ("batch_size", 1), ("evals_per_epoch", 1), ("class_ratio", 1.0)):
        if getattr(settings, name) < least:
            raise UserError(f"reward.{name}={getattr(settings, name)} must be at least {least}")
    weights = settings.class_weights
    if len(weights) != 3 or min(weights) <= 0:
        raise UserError(f"reward.class_weights={weights} must be three positive numbers, for classes 0, 1 and 2")
    parts = (settings.local_weight, settings.global_weight)
    if min(parts) < 0 or max(parts) == 0:
        raise UserError(f"reward.local_weight and global_weight are {parts}: none may be negative, one positive")


def _check_rows(
    train: Sequence[LabelledResponse], held_out: Sequence[LabelledResponse], path: Path, settings: Reward
) -> None:
    """Refuse to train on what cannot be learnt from."""
    for split, rows in (("train", train), ("reward_eval", held_out)):
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


def _describe(rows: Sequence[LabelledResponse]) -> dict[str, Any]:
    classes = [c for row in rows for c in row.classes]
    return {
        "responses": len(rows),
        "responses_relevant": sum(row.sentence_label for row in rows),
        "words": len(classes),
        "words_relevant": classes.count(RELEVANT),
        "words_irrelevant": classes.count(IRRELEVANT),
    }
