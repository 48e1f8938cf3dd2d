"""KL to the reference: estimates from the sampled tokens, and the adaptive coefficient.

Shapes: B responses, T response tokens. Estimators k1, k2, k3 as in Schulman, "Approximating KL Divergence" (2020).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST_LOG_RATIO = 20.0
"""exp() of more would overflow k3 long after the policy is lost; the same bound as verl's."""


def kl_estimate(kind: str, logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) at each token from the policy's own samples, in nats, (B, T).

    k1 is unbiased and may be negative; k2 is biased, and its gradient is that of the KL; k3 is unbiased and
    never negative.
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

    Args:
        coef: the coefficient now.
        kl: mean KL of the rollout, in nats per response.
        target: the KL to hold, in nats per response.
        horizon: the relative error, clipped to +-0.2, counts by batch_size / horizon.
    """
    if target == 0:
        return coef
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * batch_size / horizon)
