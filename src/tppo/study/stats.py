"""Intervals over users and seeds, p-values, and their correction for many comparisons.

Every model answers the same examples under every seed: users and seeds are crossed. Both are drawn with replacement,
each apart (the pigeonhole bootstrap of Owen, Annals of Applied Statistics 1 (2007)); the difference of two models is
taken within a seed and an example, so what is common to both cancels out. Of R seeds R - 1 are drawn (Rao and Wu,
JASA 83 (1988)): with R draws of few seeds the variance between them would come out too small by (R - 1) / R.
With one seed the intervals cover the choice of users only.

Shapes: N answers, U users, S seeds, B draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from tppo.evaluate.stats import Estimate, UserBootstrap, percentile_interval


@dataclass(frozen=True)
class SeedEstimate(Estimate):
    """A mean over users' examples and seeds."""

    seeds: int
    p_value: float | None
    """Two-sided, against 0; for differences only."""


class SeedUserBootstrap(UserBootstrap):
    """Means over answers, with users and seeds as crossed clusters."""

    def __init__(self, user_ids: Sequence[str], seeds: Sequence[int], draws: int, seed: int) -> None:
        """`user_ids` and `seeds` (N): of each answer, in the order of all values given later."""
        super().__init__(user_ids, draws, seed)
        self.seed_numbers, inverse = np.unique(np.asarray(seeds), return_inverse=True)
        self.seed_of_N = inverse.reshape(-1)

    def mean(self, values_N: Sequence[float | None] | np.ndarray) -> SeedEstimate:
        """Mean over the measured answers (None and NaN are not measured) and its interval."""
        return self._estimate(values_N)[0]

    def difference(
        self, a_N: Sequence[float | None] | np.ndarray, b_N: Sequence[float | None] | np.ndarray
    ) -> SeedEstimate:
        """Mean of a - b over the answers where both were measured, its interval and its p-value."""
        a_N, b_N = (np.asarray(values, dtype=float) for values in (a_N, b_N))
        found, drawn_B = self._estimate(a_N - b_N)
        if not len(drawn_B):
            return found
        return SeedEstimate(**{**found.as_dict(), "p_value": bootstrap_p_value(drawn_B)})

    def _estimate(self, values_N: Sequence[float | None] | np.ndarray) -> tuple[SeedEstimate, np.ndarray]:
        """The estimate, and its draws (B); none when there is nothing to draw from."""
        values = np.asarray(values_N, dtype=float)
        measured = ~np.isnan(values)
        of_seed_SN = (np.arange(len(self.seed_numbers))[:, None] == self.seed_of_N) & measured
        seeds = np.flatnonzero(of_seed_SN.any(axis=1))
        examples = int(measured.sum())
        if not examples:
            return SeedEstimate(None, None, None, 0, 0, 0, None), np.array([])
        totals_US = self.sums(np.where(of_seed_SN[seeds], values, 0.0).T)
        counts_US = self.sums(of_seed_SN[seeds].astype(float).T)
        value, users = float(values[measured].mean()), int((counts_US.sum(axis=1) > 0).sum())
        if users < 2:
            return SeedEstimate(value, None, None, examples, users, len(seeds), None), np.array([])
        weights_BS = self._seed_weights(seeds)
        totals_B = (self.drawn_totals(totals_US) * weights_BS).sum(axis=1)
        counts_B = (self.drawn_totals(counts_US) * weights_BS).sum(axis=1)
        counts_B[counts_B == 0] = np.nan  # a draw that holds no measured answer
        drawn_B = totals_B / counts_B
        found = percentile_interval(value, drawn_B)
        return SeedEstimate(value, found.low, found.high, examples, users, len(seeds), None), drawn_B

    def _seed_weights(self, seeds: np.ndarray) -> np.ndarray:
        """How often each of `seeds` is drawn (B, len(seeds)); the same for every question about these seeds."""
        count = len(seeds)
        if count == 1:
            return np.ones((self.draws, 1))
        generator = np.random.default_rng([self.seed, *(int(number) for number in seeds)])
        return generator.multinomial(count - 1, np.full(count, 1 / count), self.draws).astype(float)


def bootstrap_p_value(drawn_B: np.ndarray) -> float:
    """Two-sided p-value of "the difference is 0": twice the share of draws on the rarer side of 0, at most 1.

    It is below 0.05 when the 95% percentile interval leaves 0 out (Efron and Tibshirani 1993, section 15.4); one draw
    is added to each side, so that it is never 0 (Davison and Hinkley 1997, section 4.2).
    """
    drawn_B = drawn_B[~np.isnan(drawn_B)]
    rarer = min(int((drawn_B <= 0).sum()), int((drawn_B >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(drawn_B) + 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values corrected for the number of comparisons (Holm, Scandinavian Journal of Statistics 6 (1979)).

    None (no p-value) stays None and is not counted.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[place] = largest
    return corrected


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds with its 95% interval by Student's t; the interval is None for fewer than two seeds."""

    value: float
    low: float | None
    high: float | None
    seeds: int


def mean_over_seeds(values_S: Sequence[float]) -> SeedMean | None:
    """Mean of one number per seed and its t interval; None when there is no number."""
    count = len(values_S)
    if not count:
        return None
    value = float(np.mean(values_S))
    if count < 2:
        return SeedMean(value, None, None, count)
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values_S, ddof=1) / math.sqrt(count))
    return SeedMean(value, value - half, value + half, count)
