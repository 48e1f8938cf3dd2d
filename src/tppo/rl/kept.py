"""Policies kept beside the one in training: that of the last rollout within `max_kl`, and the best so far.

A policy is judged by its own rollout, so what is kept is the copy that sampled it, in its precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tppo.errors import UserError


@dataclass
class KeptPolicy:
    update: int
    """Updates it had."""
    value: float
    """What it was kept for."""
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, model: Any, update: int, value: float) -> KeptPolicy:
        return cls(update, value, {name: p.detach().clone() for name, p in model.named_parameters()})

    @torch.no_grad()
    def copy_to(self, model: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(self.weights[name])


class KeptPolicies:
    """Keeps what the settings ask for, and nothing when both are off.

    Args:
        best_metric: a metric, higher is better; with a leading `-` lower is. Empty: off.
        max_kl: above 0, the last policy is kept (the caller shows only those within the limit).
    """

    def __init__(self, best_metric: str, max_kl: float) -> None:
        self.metric = best_metric.removeprefix("-")
        self.sign = -1.0 if best_metric.startswith("-") else 1.0
        self.keep_last = max_kl > 0
        self.best: KeptPolicy | None = None
        self.last_good: KeptPolicy | None = None

    def see(self, update: int, metrics: dict[str, float], rollout_model: Any) -> None:
        """A policy of `update` updates whose rollout had these metrics; `rollout_model` is the copy that sampled.

        Raises:
            UserError: there is no such metric.
        """
        if self.keep_last:
            self.last_good = KeptPolicy.of(rollout_model, update, metrics["kl"])
        if not self.metric:
            return
        if self.metric not in metrics:
            raise UserError(f"rl.best_metric={self.metric!r} is no metric of a rollout: choose of {sorted(metrics)}")
        value = metrics[self.metric]
        if not math.isnan(value) and (self.best is None or self.sign * value > self.sign * self.best.value):
            self.best = KeptPolicy.of(rollout_model, update, value)
