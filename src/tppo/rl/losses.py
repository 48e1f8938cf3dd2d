"""The PPO losses, as pure tensor functions of (B, T) tensors.

Each returns sums over the tokens of a micro-batch divided by `num_tokens`, the number of response tokens of
the whole minibatch. Losses of micro-batches therefore simply add up, and 1 x 32 equals 8 x 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClippedLoss(NamedTuple):
    loss: Tensor
    """Scalar, to be minimised."""
    clip_fraction: Tensor
    """Share of tokens where the clipped term was the active one."""


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    response_mask_BT: Tensor,
    clip_range: float,
    num_tokens: Tensor | int,
    dual_clip: float = 0.0,
) -> ClippedLoss:
    """Eq. 6, negated: -min(r A, clip(r, 1 - eps, 1 + eps) A), with Eq. 7's ratio r against the old policy.

    The paper's pi_ref in Eq. 7 is the policy that sampled the rollout (old), not the frozen SFT reference.
    `dual_clip` c > 1 (Ye et al. 2020, Eq. 5) bounds the loss by -c A where A < 0, where r alone is unbounded; 0 is off.
    """
    ratio_BT = torch.exp(logprobs_BT - old_logprobs_BT)
    unclipped_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip_range, 1 + clip_range)
    loss_BT = torch.maximum(unclipped_BT, clipped_BT)
    if dual_clip:
        loss_BT = torch.where(advantages_BT < 0, torch.minimum(loss_BT, -advantages_BT * dual_clip), loss_BT)
    loss = (loss_BT * response_mask_BT).sum() / num_tokens
    clip_fraction = ((clipped_BT > unclipped_BT) * response_mask_BT).sum() / num_tokens
    return ClippedLoss(loss, clip_fraction.detach())


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    response_mask_BT: Tensor,
    clip_range: float,
    num_tokens: Tensor | int,
) -> ClippedLoss:
    """Clipped squared error, 0.5 max((V - R)^2, (V_clipped - R)^2), as in TRL and verl."""
    clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip_range, clip_range)
    error_BT = (values_BT - returns_BT) ** 2
    clipped_error_BT = (clipped_BT - returns_BT) ** 2
    loss = 0.5 * (torch.maximum(error_BT, clipped_error_BT) * response_mask_BT).sum() / num_tokens
    clip_fraction = ((clipped_error_BT > error_BT) * response_mask_BT).sum() / num_tokens
    return ClippedLoss(loss, clip_fraction.detach())
