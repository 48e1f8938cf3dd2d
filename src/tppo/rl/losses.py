"""The PPO losses, and KL to the reference: pure tensor functions. Shapes: B responses, T response tokens.

Each loss is a sum over the tokens of a micro-batch divided by `num_tokens`, the number of response tokens of the whole
minibatch. Losses of micro-batches therefore simply add up, and 1 x 32 equals 8 x 4.
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


_LARGEST_LOG_RATIO = 20.0
"""exp() of more would overflow k3 long after the policy is lost; the same bound as verl's."""


def kl_estimate(kind: str, logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) at each token from the policy's own samples, in nats, (B, T).

    k1 is unbiased and may be negative; k2 is biased, and its gradient is that of the KL; k3 is unbiased and
    never negative (Schulman, "Approximating KL Divergence", 2020).
    """
    log_ratio_BT = ref_logprobs_BT - logprobs_BT
    if kind == "k1":
        return -log_ratio_BT
    if kind == "k2":
        return 0.5 * log_ratio_BT.square()
    if kind == "k3":
        return torch.exp(log_ratio_BT.clamp(max=_LARGEST_LOG_RATIO)) - 1 - log_ratio_BT
    raise ValueError(f"unknown rl.kl_estimator {kind!r}: use 'k1', 'k2' or 'k3'")


def next_kl_coef(coef: float, kl: float, target: float, horizon: int, batch_size: int) -> float:
    """The coefficient after a rollout: fixed when `target` is 0, else the controller of Ziegler et al. 2019 (2.2).

    `kl` (the rollout's mean) and `target` are in nats per response; the relative error, clipped to +-0.2, counts by
    batch_size / horizon.
    """
    if target == 0:
        return coef
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * batch_size / horizon)
