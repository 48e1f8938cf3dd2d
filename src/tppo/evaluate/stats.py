"""Intervals by a bootstrap over users, paired across models.

Responses to one user resemble each other, so users (clusters) are drawn with replacement, not responses. All
models are measured on the same examples and the same draws: the difference of two models is taken within each
draw, so what is common to both (easy users, hard users) cancels out.

Percentile intervals after Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; clusters
as in Field and Welsh, Bootstrapping clustered data, JRSS B 69 (2007). They are a little narrow for few users:
the report says so below 30.

Shapes: N examples, U users, B draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LEVEL = (2.5, 97.5)
FEW_USERS = 30
_BLOCK = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval. All three numbers are None when nothing was measured.

    `low` and `high` alone are None when there is only one user: one cluster shows no spread.
    """

    value: float | None
    low: float | None
    high: float | None
    examples: int
    users: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class UserBootstrap:
    """Draws of users with replacement, the same ones for every number asked of it."""

    def __init__(self, user_ids: Sequence[str], draws: int, seed: int) -> None:
        """`user_ids` (N): the user of each example, in the order of all values given later."""
        names, inverse = np.unique(np.asarray(user_ids, dtype=object).astype(str), return_inverse=True)
        self.user_of_N = inverse.reshape(-1)
        self.users = len(names)
        self.draws = draws
        self.seed = seed
        self._kept: np.ndarray | None = None  # all draws, when they fit into one block

    def mean(self, values_N: Sequence[float | None] | np.ndarray) -> Estimate:
        """Mean over the measured examples (None and NaN are not measured) and its interval."""
        values = _as_float(values_N)
        assert len(values) == len(self.user_of_N), (len(values), len(self.user_of_N))
        measured = ~np.isnan(values)
        examples = int(measured.sum())
        if not examples:
            return Estimate(None, None, None, 0, 0)
        sums_U = np.bincount(self.user_of_N, np.where(measured, values, 0.0), self.users)
        counts_U = np.bincount(self.user_of_N, measured, self.users)
        users = int((counts_U > 0).sum())
        value = float(values[measured].mean())
        if users < 2:
            return Estimate(value, None, None, examples, users)
        means_B = self._means(sums_U, counts_U)
        low, high = np.nanpercentile(means_B, LEVEL)
        return Estimate(value, float(low), float(high), examples, users)

    def difference(
        self, a_N: Sequence[float | None] | np.ndarray, b_N: Sequence[float | None] | np.ndarray
    ) -> Estimate:
        """Mean of a - b over the examples where both were measured, and its interval."""
        return self.mean(_as_float(a_N) - _as_float(b_N))

    def _means(self, sums_U: np.ndarray, counts_U: np.ndarray) -> np.ndarray:
        """Mean of each draw (B); NaN for a draw that holds no measured example."""
        means = []
        for weights_BU in self._weights():
            totals_B = weights_BU @ counts_U
            totals_B[totals_B == 0] = np.nan
            means.append((weights_BU @ sums_U) / totals_B)
        return np.concatenate(means)

    def _weights(self) -> Iterator[np.ndarray]:
        """How often each user is drawn, in blocks of draws (the seed makes them the same for every call)."""
        generator = np.random.default_rng(self.seed)
        block = max(1, _BLOCK // self.users)
        for start in range(0, self.draws, block):
            if self._kept is not None:
                yield self._kept
                return
            size = min(block, self.draws - start)
            weights_BU = generator.multinomial(self.users, np.full(self.users, 1 / self.users), size).astype(float)
            if size == self.draws:
                self._kept = weights_BU
            yield weights_BU


def verdict(difference: Estimate, better: str = "higher") -> str:
    """What the interval allows to say of a difference.

    Returns one of "an improvement", "worse", "no difference shown", "not measured". For a measure where
    neither direction is better: "higher", "lower".
    """
    if difference.value is None or difference.low is None or difference.high is None:
        return "not measured"
    if difference.low <= 0 <= difference.high:
        return "no difference shown"
    up = difference.low > 0
    if better == "neither":
        return "higher" if up else "lower"
    return "an improvement" if up == (better == "higher") else "worse"


@dataclass(frozen=True)
class WinTieLose:
    """How often a scored higher than b on the same example. Shares are None when nothing was compared."""

    win: float | None
    tie: float | None
    lose: float | None
    net: Estimate
    """Win minus lose, with its interval."""


def win_tie_lose(bootstrap: UserBootstrap, a_N: Sequence[float | None], b_N: Sequence[float | None]) -> WinTieLose:
    """Compare paired scores: higher wins, equal within 1e-6 ties, an unmeasured score is no comparison."""
    difference_N = _as_float(a_N) - _as_float(b_N)
    sign_N = np.where(np.isnan(difference_N), np.nan, np.sign(np.where(np.abs(difference_N) <= 1e-6, 0, difference_N)))
    net = bootstrap.mean(sign_N)
    compared = sign_N[~np.isnan(sign_N)]
    if not len(compared):
        return WinTieLose(None, None, None, net)
    return WinTieLose(float((compared > 0).mean()), float((compared == 0).mean()), float((compared < 0).mean()), net)


def _as_float(values: Sequence[float | None] | np.ndarray) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)
