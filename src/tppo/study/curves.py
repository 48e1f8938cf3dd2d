"""What training curves say when algorithms are compared: at equal KL, and by how soon they get somewhere.

Pure functions on the curve of one training: one number per update, in order (T).

A rollout is a small sample, so curves are smoothed over `WINDOW` updates before anything is read off them. KL need not
rise steadily: "at KL k" means when the smoothed KL reaches k for the first time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WINDOW = 3


def smooth(values_T: Sequence[float], window: int = WINDOW) -> np.ndarray:
    """Centred moving average; at the ends over what there is."""
    values = np.asarray(values_T, dtype=float)
    reach = window // 2
    return np.array([values[max(0, t - reach) : t + reach + 1].mean() for t in range(len(values))])


def value_at_kl(kl_T: np.ndarray, values_T: np.ndarray, level: float) -> float | None:
    """The value when `kl_T` first reaches `level`, linear between the two updates; None when it never does."""
    reached = np.flatnonzero(kl_T >= level)
    if not len(reached):
        return None
    after = int(reached[0])
    if after == 0:
        return float(values_T[0])
    before = after - 1
    part = (level - kl_T[before]) / (kl_T[after] - kl_T[before])
    return float(values_T[before] + part * (values_T[after] - values_T[before]))


def common_kl(curves: Sequence[np.ndarray]) -> float | None:
    """The largest KL that every curve reaches; None when one of them never leaves 0."""
    level = min((float(kl_T.max()) for kl_T in curves if len(kl_T)), default=0.0)
    return level if level > 0 and all(len(kl_T) for kl_T in curves) else None


class Reached(NamedTuple):
    """How soon one training gets to the best of another."""

    best: float
    """Best smoothed value of the other training."""
    best_update: int
    """Update (from 1) at which the other training has it."""
    update: int | None
    """First update at which this training has at least that much; None: never."""

    @property
    def share(self) -> float | None:
        """`update` / `best_update`."""
        return None if self.update is None else self.update / self.best_update


def updates_to_reach(values_T: np.ndarray, other_T: np.ndarray) -> Reached:
    """When `values_T` first reaches the best of `other_T`."""
    best_at = int(other_T.argmax())
    reached = np.flatnonzero(values_T >= other_T[best_at])
    return Reached(float(other_T[best_at]), best_at + 1, int(reached[0]) + 1 if len(reached) else None)


class Steadiness(NamedTuple):
    """How much a curve differs between seeds and jumps from update to update, in its own unit."""

    over_seeds: float | None
    """Standard deviation between seeds at the same update, mean over the updates; None for one seed."""
    over_steps: float | None
    """Standard deviation around the trend: of the change from one update to the next, divided by the root of 2 (von
    Neumann 1941), mean over the seeds; None for fewer than three updates."""


def steadiness(values_ST: np.ndarray) -> Steadiness:
    """Steadiness of a measure (S seeds, T updates)."""
    seeds, updates = values_ST.shape
    between = float(values_ST.std(axis=0, ddof=1).mean()) if seeds > 1 else None
    if updates < 3:
        return Steadiness(between, None)
    return Steadiness(between, float((np.diff(values_ST, axis=1).std(axis=1, ddof=1) / np.sqrt(2)).mean()))
