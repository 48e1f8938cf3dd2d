"""How far the training of a reward model is, kept so that it goes on after a stop and ends in the same numbers.

Batches and class balance depend on (seed, step) alone; dropout draws from torch's global generator, whose state is
kept. So weights, the best ones so far, optimizer moments, generator and the rows of metrics.jsonl are the whole state;
the learning rate follows from the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from tppo.core.checkpoint import load_moments, moments, newest_checkpoint, read_state, read_tensors, write_checkpoint
from tppo.core.common import console

SECONDS_BETWEEN_CHECKPOINTS = 30.0
"""What a kill may cost; more where a checkpoint takes longer to write than `WRITING_SHARE` of it."""
WRITING_SHARE = 0.05
Weights = dict[str, Tensor]


@dataclass
class Progress:
    """Where a training is."""

    step: int = 0
    worse: int = 0
    """Evaluations since the best one."""
    best: dict[str, Any] = field(default_factory=dict)
    """Step, epoch and held-out metrics of the best weights; empty before the first."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """What was logged."""
    best_weights: Weights = field(default_factory=dict)
    log: Callable[[dict[str, Any]], None] = lambda row: None
    """Gets every row."""

    def note(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.log(row)

    def take(self, scores: dict[str, Any], model: torch.nn.Module, rank: Callable[[dict[str, Any]], float]) -> None:
        """Note an evaluation: the weights are the best ones so far, or it counts as one without a better."""
        if not self.best or rank(scores) > rank(self.best):
            self.best, self.worse = scores, 0
            self.best_weights = {name: tensor.clone() for name, tensor in weights(model).items()}
        else:
            self.worse += 1


def weights(model: torch.nn.Module) -> Weights:
    """Every tensor that an update may change, live; tied ones once."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@torch.no_grad()
def load_weights(model: torch.nn.Module, saved: Weights) -> None:
    for name, tensor in weights(model).items():
        tensor.copy_(saved[name])


class Checkpoints:
    """The resumable state of one training in a folder of its own; None keeps nothing."""

    def __init__(
        self,
        folder: Path | None,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LambdaLR,
        log: Callable[[dict[str, Any]], None],
    ) -> None:
        self.folder, self.model, self.optimizer, self.schedule, self.log = folder, model, optimizer, schedule, log
        self.next_write = time.monotonic() + SECONDS_BETWEEN_CHECKPOINTS

    def restore(self, name: str) -> Progress:
        """The progress of the newest checkpoint, with model, optimizer and generators as they were; else of none.

        Args:
            name: of the model, to say so.
        """
        path = newest_checkpoint(self.folder) if self.folder else None
        if path is None:
            return Progress(log=self.log)
        load_weights(self.model, read_tensors(path, "model"))
        device = next(self.model.parameters()).device
        # Adam's step counters stay where they are made: beside the weights for the fused kind.
        saved = {name: tensor.to(device) for name, tensor in read_tensors(path, "optimizer").items()}
        load_moments(dict(self.model.named_parameters()), self.optimizer, saved)
        generators = read_tensors(path, "generators")
        torch.set_rng_state(generators["cpu"])
        if torch.cuda.is_available() and "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"])
        state = read_state(path)
        console.print(f"{name} reward model: taken up again after step {state['step']}")
        self._set_rates(state["step"])
        best_weights = {name: tensor.to(device) for name, tensor in read_tensors(path, "best").items()}
        for row in state["rows"]:
            self.log(row)
        return Progress(**state, best_weights=best_weights, log=self.log)

    def _set_rates(self, step: int) -> None:
        """The schedule as it is after so many steps."""
        schedule = self.schedule
        rates = [base * rate_at(step) for base, rate_at in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        counts = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        schedule.load_state_dict({**schedule.state_dict(), **counts})
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def save_if_due(self, progress: Progress) -> None:
        """Write a checkpoint when the last one is old enough."""
        start = time.monotonic()
        if self.folder is None or start < self.next_write:
            return
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.cuda.get_rng_state()
        parameters = dict(self.model.named_parameters())
        tensors = {
            "model": weights(self.model),
            "best": progress.best_weights,
            "optimizer": moments(parameters, self.optimizer),
            "generators": generators,
        }
        state = {name: getattr(progress, name) for name in ("step", "worse", "best", "rows")}
        write_checkpoint(self.folder, progress.step, tensors, state, keep=1)
        now = time.monotonic()
        self.next_write = now + max(SECONDS_BETWEEN_CHECKPOINTS, (now - start) / WRITING_SHARE)
