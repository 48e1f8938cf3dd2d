"""What stops an update: numbers that are none, samples from another distribution, memory, too much KL.

Every `GuardError` leaves weights and optimizer state as they were before the update (`Snapshot` takes back the
steps of earlier minibatches) and names the tensor or setting, the update and the sample.

Shapes: B responses, T response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tppo.core.common import UserError
from tppo.core.config import RL
from tppo.core.device import resolved
from tppo.rl.reward_function import Sample, name_sample

RATIO_TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (5e-3, 5e-2)}
"""Mean and largest |log ratio| of a micro-batch of the first minibatch that are rounding and not a bug. The mean tells
a small fault of every token from the rounding of a rare one."""
_SIGMAS = 6.0
"""Standard errors that still count as noise: a false alarm about once in a billion rollouts."""
_MIN_RESPONSES = 8
"""A standard error over fewer responses says too little to stop a run."""
_ROUNDING = 0.02
"""Nats by which a bf16 rollout copy may differ from the policy, per token or per response."""


class GuardError(UserError):
    """The update was not made; weights and optimizer state are those before it."""


class MaxKLExceeded(Exception):
    """The rollout's KL is above `max_kl`; the update was not made."""

    def __init__(self, update: int, kl: float, limit: float) -> None:
        super().__init__(
            f"halted before update {update}: the rollout's KL to the reference is {kl:.3g} nats per response, above "
            f"rl.max_kl={limit:g}. A larger rl.kl_coef or a smaller rl.learning_rate holds the policy closer"
        )
        self.facts = {"before_update": update, "kl": kl, "max_kl": limit}


def check_finite(name: str, tensor: Tensor, update: int, samples: Sequence[Sample]) -> None:
    """Every row of `tensor` (B, ...) is finite.

    Raises:
        GuardError: names the tensor, the update and the first bad sample.
    """
    bad_B = ~tensor.isfinite().flatten(1).all(-1)
    if bad_B.any():
        row = int(bad_B.nonzero()[0])
        raise GuardError(
            f"NaN or infinity in the {name} of update {update}, {name_sample(samples, row)}; the weights are "
            f"unchanged.{_way_out(name)}"
        )


def _way_out(name: str) -> str:
    if name == "reward":
        return " Mend the reward function for this sample"
    return " A smaller rl.learning_rate or rl.precision=fp32 may keep it finite; the last checkpoint is whole"


def raise_for_gradients(policy: nn.Module, update: int, samples: Sequence[Sample]) -> NoReturn:
    """Their norm is no number: name the first gradient that is at fault, before anything scales or uses them.

    Raises:
        GuardError: names the first bad parameter and the update.
    """
    gradients = [(name, parameter.grad) for name, parameter in policy.named_parameters() if parameter.grad is not None]
    bad = [name for name, gradient in gradients if not gradient.isfinite().all()]
    what = f"NaN or infinity in the gradient of {bad[0]}" if bad else "the norm of the gradients is infinite"
    raise GuardError(
        f"{what}, update {update}, minibatch of {len(samples)} samples from {name_sample(samples, 0)} on; "
        f"the weights are unchanged.{_way_out('gradient')}"
    )


def check_first_ratio(
    log_ratio_BT: Tensor, response_mask_BT: Tensor, policy: nn.Module, config: RL, update: int
) -> None:
    """Before any step of an update the policy is the one that was scored: |log ratio| within rounding.

    Raises:
        GuardError: names the cause.
    """
    size_N = log_ratio_BT[response_mask_BT].abs()
    mean, largest = size_N.mean().item(), size_N.max().item()
    precision = resolved(config.precision)
    mean_tolerance, largest_tolerance = RATIO_TOLERANCE[precision]
    if mean <= mean_tolerance and largest <= largest_tolerance:
        return
    if policy.training:
        cause = "policy.train() was called, so dropout is on: call policy.eval(); the trainer needs no train mode"
    else:
        cause = (
            "the model gives other log-probabilities for the same tokens at the second call: look for noise inside its "
            f"forward pass, or a temperature other than rl.temperature={config.temperature:g} in one of them"
        )
    raise GuardError(
        f"before any step of update {update} the ratio to the old policy must be 1, but |log ratio| is {mean:.3g} on "
        f"average and reaches {largest:.3g} (rounding under rl.precision={precision}: {mean_tolerance:g} and "
        f"{largest_tolerance:g}); {cause}"
    )


def check_sampling(
    logprobs_BT: Tensor, entropy_BT: Tensor, kl_B: Tensor, response_mask_BT: Tensor, config: RL, update: int
) -> None:
    """The rollout was drawn from the distribution its log-probabilities are taken from.

    For such samples surprise - entropy is a martingale difference, so its mean is 0 within its standard error,
    and the mean KL (k1) is not negative.

    Raises:
        GuardError: names the sampling setting at fault.
    """
    if len(response_mask_BT) < _MIN_RESPONSES:
        return
    excess_N = (-logprobs_BT - entropy_BT)[response_mask_BT]
    count = len(excess_N)
    excess = excess_N.mean().item()
    # A nearly certain policy shows no spread until a rare token comes: 10 log(n)/n covers those not seen yet.
    noise = _SIGMAS * excess_N.square().sum().sqrt().item() / count + 10 * math.log(count + 1) / count + _ROUNDING
    kl_noise = _SIGMAS * kl_B.std().item() / math.sqrt(len(kl_B)) + _ROUNDING
    if abs(excess) <= noise and kl_B.mean().item() >= -kl_noise:
        return
    if excess < 0:
        cause = f"a temperature below rl.temperature={config.temperature:g}, top-k, top-p or a minimum length"
    else:
        cause = f"a temperature above rl.temperature={config.temperature:g}, or a sampling copy with other weights"
    raise GuardError(
        f"the responses of update {update} were not drawn from the policy they are scored with: surprise minus entropy "
        f"is {excess:+.3g} nats per token (noise: {noise:.2g}), KL {kl_B.mean().item():+.3g} nats per response. "
        f"Sampling used {cause}"
    )


@contextmanager
def out_of_memory_named(config: RL, phase: str) -> Iterator[None]:
    """Turn running out of memory into an error that names the setting to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(
            sign in text for sign in ("not enough memory", "can't allocate memory")
        ):
            raise
        setting = (
            f"rl.batch_size (now {config.batch_size})"
            if phase == "rollout"
            else f"rl.micro_batch_size (now {config.micro_batch_size})"
        )
        raise GuardError(
            f"out of memory in the {phase}: lower {setting}; the weights are unchanged "
            f"({text.splitlines()[0][:200] if text else 'MemoryError'})"
        ) from error


class Snapshot:
    """Weights and optimizer state before an update, to take back the steps of a stopped one."""

    def __init__(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = [(p, p.detach().clone()) for p in policy.parameters() if p.requires_grad]
        self.state: dict[Any, dict[str, Tensor]] = {
            parameter: {name: value.clone() for name, value in state.items()}
            for parameter, state in optimizer.state.items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, value in self.parameters:
            parameter.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


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
