"""Losses of the token-level reward model: Eq. 1-3 of the paper, as pure tensor functions.

Departures from the paper, which cannot be taken literally:
 1. Eq. 1's indicator compares the *prediction* with c, which rewards any confident guess. The gold class
    it is. The sum is divided by the sum of the weights, so its size does not depend on batch and length.
 2. Eq. 2 averages an argmax, which has no gradient. Default: the expected class under the softmax over
    {1, 2}; option: straight-through (the argmax forward, the expectation's gradient backward).
 3. Eq. 2 compares classes 1 and 2 with a label of 0 or 1; here a class counts minus one: both in [0, 1].
 4. Eq. 2's mean over the valid set would include class 0, diluted by separators; here only tokens whose gold
    class is 1 or 2 count.
 5. The "probability mask" that keeps classes 1 and 2 within 1:3..3:1 is drawn per batch, drops tokens of the
    majority only, and acts in the local loss only (Eq. 2 sees whole responses).

Shapes: B responses, T tokens, C = 3 classes (0 separator, 1 irrelevant, 2 relevant).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tppo.core.config import Reward
from tppo.reward.align import IRRELEVANT, RELEVANT


class RewardLoss(NamedTuple):
    """Eq. 3 and its two parts."""

    total: Tensor
    local: Tensor
    global_: Tensor


def local_loss(
    logits_BTC: Tensor, classes_BT: Tensor, mask_BT: Tensor, class_weights: Tensor, keep_BT: Tensor
) -> Tensor:
    """Eq. 1: cross-entropy with the gold classes over the valid set, weighted by class.

    Args:
        mask_BT: True on response tokens.
        class_weights: (C,) the w_c of Eq. 1.
        keep_BT: True where `class_ratio_mask` keeps the token. The valid set is mask & keep.

    Returns:
        Scalar; 0 when the valid set is empty.
    """
    valid_BT = mask_BT & keep_BT
    if not valid_BT.any():
        return logits_BTC.sum() * 0.0
    return F.cross_entropy(logits_BTC[valid_BT], classes_BT[valid_BT], weight=class_weights)


def class_ratio_mask(classes_BT: Tensor, mask_BT: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """Which tokens stay in the local loss, so that classes 1 and 2 are at most `ratio` apart in a batch.

    Random tokens of the more frequent of the two are dropped, never one of the other or of class 0. A batch
    that lacks one of the two altogether is treated as if it held one such token. A ratio of 0 drops nothing.

    Returns:
        (B,T) bool, True = keep.
    """
    keep_BT = torch.ones_like(mask_BT, dtype=torch.bool)
    if ratio == 0:
        return keep_BT
    positions = [torch.nonzero(mask_BT & (classes_BT == c)) for c in (IRRELEVANT, RELEVANT)]
    minority, majority = sorted(positions, key=len)
    excess = len(majority) - int(ratio * max(len(minority), 1))
    if excess > 0:
        order = torch.randperm(len(majority), generator=generator)
        drop = majority[order[:excess].to(majority.device)]
        keep_BT[drop[:, 0], drop[:, 1]] = False
    return keep_BT


def expected_relevance(logits_BTC: Tensor) -> Tensor:
    """Expected class under the softmax over classes 1 and 2, minus 1: (B,T) in [0, 1].

    The two-way softmax is the sigmoid of the difference; the logit of class 0 plays no part.
    """
    return torch.sigmoid(logits_BTC[..., RELEVANT] - logits_BTC[..., IRRELEVANT])


def global_loss(
    logits_BTC: Tensor,
    classes_BT: Tensor,
    mask_BT: Tensor,
    labels_B: Tensor,
    estimator: Literal["expected", "straight_through"],
) -> Tensor:
    """Eq. 2: squared difference between a response's mean token reward and its label (0 or 1).

    Responses without any token of gold class 1 or 2 have no mean and are left out.
    """
    reward_BT = expected_relevance(logits_BTC)
    if estimator == "straight_through":
        reward_BT = reward_BT + ((reward_BT > 0.5).to(reward_BT) - reward_BT).detach()
    words_BT = (mask_BT & (classes_BT > 0)).to(reward_BT)
    count_B = words_BT.sum(dim=1)
    mean_B = (reward_BT * words_BT).sum(dim=1) / count_B.clamp(min=1)
    error_B = (mean_B - labels_B.to(mean_B)) ** 2 * (count_B > 0)
    return error_B.sum() / (count_B > 0).sum().clamp(min=1)


def total_loss(local: Tensor, global_: Tensor, local_weight: float, global_weight: float) -> RewardLoss:
    """Eq. 3."""
    return RewardLoss(local_weight * local + global_weight * global_, local, global_)


def token_loss(
    logits_BTC: Tensor, classes_BT: Tensor, mask_BT: Tensor, labels_B: Tensor, keep_BT: Tensor, settings: Reward
) -> RewardLoss:
    """Eq. 1-3 of a batch with the weights and the estimator of `settings`."""
    weights = torch.tensor(settings.class_weights, device=logits_BTC.device)
    return total_loss(
        local_loss(logits_BTC, classes_BT, mask_BT, weights, keep_BT),
        global_loss(logits_BTC, classes_BT, mask_BT, labels_B, settings.global_estimator),
        settings.local_weight,
        settings.global_weight,
    )


def as_numbers(loss: RewardLoss) -> dict[str, float]:
    """For logs."""
    total, local, global_ = (part.item() for part in loss)
    return {"loss": total, "local_loss": local, "global_loss": global_}


def sentence_loss(logits_B: Tensor, labels_B: Tensor, keep_B: Tensor, kind: Literal["bce", "mse"]) -> Tensor:
    """Loss of the sentence-level rival, mean over the kept responses; 0 when none is kept. No equation: the paper
    does not give it.

    `bce`: binary cross-entropy. `mse`: (sigmoid(logit) - label)^2, which is Eq. 2 with the probability in place of the
    mean token reward.
    """
    if not keep_B.any():
        return logits_B.sum() * 0.0
    logits_B, labels_B = logits_B[keep_B], labels_B[keep_B].to(logits_B)
    if kind == "mse":
        return F.mse_loss(torch.sigmoid(logits_B), labels_B)
    return F.binary_cross_entropy_with_logits(logits_B, labels_B)
