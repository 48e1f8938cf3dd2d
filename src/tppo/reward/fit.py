"""The training loop of both reward models: the same rows in the same order, the same balance, the best checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from tppo.config import Reward
from tppo.precision import autocast
from tppo.progress import console, track
from tppo.reward import losses
from tppo.reward.data import Batch, Item, collate, targets
from tppo.reward.evaluate import evaluate
from tppo.reward.models import RewardModel, SentenceRewardModel, TokenRewardModel
from tppo.seeding import rng, stream_seed

WEIGHT_DECAY = 0.01
WARMUP_SHARE = 0.1
MAX_GRAD_NORM = 1.0
HEAD_LEARNING_RATE_FACTOR = 10  # the head starts from noise, the encoder does not

Log = Callable[[dict[str, Any]], None]


class Fit(NamedTuple):
    best: dict[str, Any]
    """Step, epoch and held-out metrics of the kept checkpoint."""
    steps: int
    """Optimiser steps done; fewer than planned when training stopped early."""
    planned_steps: int


def settings_for(kind: type[RewardModel], settings: Reward) -> Reward:
    """The settings with the rival's own learning rate, epochs and balance in force when `kind` is the rival."""
    if kind is not SentenceRewardModel:
        return settings
    own = {
        "learning_rate": settings.sentence_learning_rate,
        "epochs": settings.sentence_epochs,
        "class_ratio": settings.sentence_class_ratio,
    }
    return replace(settings, **{name: value for name, value in own.items() if value is not None})  # type: ignore[arg-type]


def fit(
    reward_model: RewardModel,
    train: Sequence[Item],
    held_out: Sequence[Item],
    settings: Reward,
    seed: int,
    log: Log,
) -> Fit:
    """Train in place; the model ends as its best checkpoint. `settings` are those of `settings_for`.

    Held-out rows are scored in the precision of training here; final numbers come from `check_reward`, in float32.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = reward_model.model.to(device)
    batches = [batch for epoch in range(settings.epochs) for batch in _batches(train, settings, seed, epoch)]
    per_epoch = len(batches) // settings.epochs
    # The end of each epoch, and evals_per_epoch - 1 points evenly between.
    evals = {round(i * per_epoch / settings.evals_per_epoch) for i in range(1, settings.evals_per_epoch + 1)}
    optimiser = torch.optim.AdamW(_parameter_groups(model, settings), weight_decay=WEIGHT_DECAY, fused=True)
    schedule = get_linear_schedule_with_warmup(optimiser, round(WARMUP_SHARE * len(batches)), len(batches))

    def held_out_scores() -> dict[str, Any]:
        with autocast(settings.precision, device.type):
            return evaluate(reward_model, held_out, settings)

    log({"step": 0, "epoch": 0.0, "split": "reward_eval", **held_out_scores()})
    best: dict[str, Any] = {}
    best_weights: dict[str, Tensor] = {}
    worse = step = 0
    model.train()
    for step, items in enumerate(track(batches, f"{reward_model.kind} reward model"), start=1):
        batch = collate([item.pair for item in items], reward_model.tokenizer.pad_token_id, device)
        generator = torch.Generator().manual_seed(stream_seed(seed, "reward", "class_ratio", step))
        with autocast(settings.precision, device.type):
            loss, parts = _objective(reward_model, batch, items, settings, generator)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        rate = schedule.get_last_lr()[0]
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        where = {"step": step, "epoch": round(step / per_epoch, 4)}
        log({**where, "split": "train", **parts, "grad_norm": float(norm), "learning_rate": rate})
        if (step - 1) % per_epoch + 1 not in evals:
            continue
        scores = held_out_scores()
        log({**where, "split": "reward_eval", **scores})
        if not best or _rank(scores) > _rank(best):
            best, best_weights, worse = {**where, **scores}, copy.deepcopy(model.state_dict()), 0
        else:
            worse += 1
        if settings.patience and worse >= settings.patience:
            break
    model.load_state_dict(best_weights)
    model.eval()
    console.print(f"{reward_model.kind} reward model: held-out AUC {best['auc']}, step {best['step']}")
    return Fit(best, step, len(batches))


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
