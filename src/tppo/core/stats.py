"""Intervals by a bootstrap over clusters: users in the evaluation, responses in the label check.

Responses to one user resemble each other, so users (clusters) are drawn with replacement, not responses. All
models are measured on the same examples and the same draws: the difference of two models is taken within each
draw, so what is common to both (easy users, hard users) cancels out. The words of a response resemble each other
as well: the label check (`tppo.judge.agreement`) draws responses, not words.

Percentile intervals after Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; clusters
as in Field and Welsh, Bootstrapping clustered data, JRSS B 69 (2007). They are a little narrow for few users:
the report says so below 30.

In a study every model answers the same examples under every seed: users and seeds are crossed. Both are drawn with
replacement, each apart (the pigeonhole bootstrap of Owen, Annals of Applied Statistics 1 (2007)); the difference of two
models is taken within a seed and an example, so what is common to both cancels out. Of R seeds R - 1 are drawn (Rao and
Wu, JASA 83 (1988)): with R draws of few seeds the variance between them would come out too small by (R - 1) / R. With
one seed the intervals cover the choice of users only.

Shapes: N examples, answers or words, C clusters, U users, S seeds, K summed columns, B draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = (2.5, 97.5)
FEW_USERS = 30
_BLOCK = 4_000_000


@dataclass(frozen=True)
class IntervalEstimate:
    """A number with its 95% interval. All three are None when nothing was measured.

    `low` and `high` alone are None when there is only one cluster: it shows no spread.
    """

    value: float | None
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Estimate(IntervalEstimate):
    """A mean over users' examples, and how many were measured."""

    examples: int
    users: int


class ClusterBootstrap:
    """Draws of clusters with replacement, the same ones for every number asked of it."""

    def __init__(self, cluster_ids: Sequence[str], draws: int, seed: int) -> None:
        """`cluster_ids` (N): the cluster of each example, in the order of all values given later."""
        names, inverse = np.unique(np.asarray(cluster_ids, dtype=object).astype(str), return_inverse=True)
        self.cluster_of_N = inverse.reshape(-1)
        self.clusters = len(names)
        self.draws = draws
        self.seed = seed
        self._kept: np.ndarray | None = None  # all draws, when they fit into one block

    def sums(self, columns_NK: np.ndarray) -> np.ndarray:
        """Sums (C, K) of the columns in each cluster."""
        assert len(columns_NK) == len(self.cluster_of_N), (len(columns_NK), len(self.cluster_of_N))
        return np.stack([np.bincount(self.cluster_of_N, column_N, self.clusters) for column_N in columns_NK.T], axis=1)

    def drawn_totals(self, sums_CK: np.ndarray) -> np.ndarray:
        """Totals (B, K) of the columns in each draw: any statistic of totals can be bootstrapped from them."""
        return np.concatenate([weights_BC @ sums_CK for weights_BC in self._weights()])

    def _weights(self) -> Iterator[np.ndarray]:
        """How often each cluster is drawn, in blocks of draws (the seed makes them the same for every call)."""
        generator = np.random.default_rng(self.seed)
        block = max(1, _BLOCK // self.clusters)
        for start in range(0, self.draws, block):
            if self._kept is not None:
                yield self._kept
                return
            size = min(block, self.draws - start)
            chances_C = np.full(self.clusters, 1 / self.clusters)
            weights_BC = generator.multinomial(self.clusters, chances_C, size).astype(float)
            if size == self.draws:
                self._kept = weights_BC
            yield weights_BC


def percentile_interval(value: float, drawn_B: np.ndarray) -> IntervalEstimate:
    """`value` with the percentiles of its draws; a draw in which it is undefined (NaN) is left out."""
    defined = drawn_B[~np.isnan(drawn_B)]
    if not len(defined):
        return IntervalEstimate(value, None, None)
    low, high = np.percentile(defined, LEVEL)
    return IntervalEstimate(value, float(low), float(high))


class UserBootstrap(ClusterBootstrap):
    """Means over examples, with users as the clusters."""

    def mean(self, values_N: Sequence[float | None] | np.ndarray) -> Estimate:
        """Mean over the measured examples (None and NaN are not measured) and its interval."""
        values = _as_float(values_N)
        measured = ~np.isnan(values)
        examples = int(measured.sum())
        if not examples:
            return Estimate(None, None, None, 0, 0)
        sums_U2 = self.sums(np.stack([np.where(measured, values, 0.0), measured], axis=1))
        users = int((sums_U2[:, 1] > 0).sum())
        value = float(values[measured].mean())
        if users < 2:
            return Estimate(value, None, None, examples, users)
        totals_B, counts_B = self.drawn_totals(sums_U2).T
        counts_B[counts_B == 0] = np.nan  # a draw that holds no measured example
        found = percentile_interval(value, totals_B / counts_B)
        return Estimate(value, found.low, found.high, examples, users)

    def difference(
        self, a_N: Sequence[float | None] | np.ndarray, b_N: Sequence[float | None] | np.ndarray
    ) -> Estimate:
        """Mean of a - b over the examples where both were measured, and its interval."""
        return self.mean(_as_float(a_N) - _as_float(b_N))


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


def win_tie_lose(
    bootstrap: UserBootstrap,
    a_N: Sequence[float | None] | np.ndarray,
    b_N: Sequence[float | None] | np.ndarray,
    tie: float = 1e-6,
) -> WinTieLose:
    """Compare paired scores: higher wins, equal within `tie` ties, an unmeasured score is no comparison."""
    difference_N = _as_float(a_N) - _as_float(b_N)
    sign_N = np.where(np.isnan(difference_N), np.nan, np.sign(np.where(np.abs(difference_N) <= tie, 0, difference_N)))
    net = bootstrap.difference(sign_N, np.zeros_like(sign_N))
    compared = sign_N[~np.isnan(sign_N)]
    if not len(compared):
        return WinTieLose(None, None, None, net)
    return WinTieLose(float((compared > 0).mean()), float((compared == 0).mean()), float((compared < 0).mean()), net)


def _as_float(values: Sequence[float | None] | np.ndarray) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


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

    None (no p-value) stays None and is not counted. statsmodels has it, too, but runs the garbage collector in every
    call (0.15 s, and a study corrects some hundred families).
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


def estimate(row: Mapping[str, Any] | None) -> Estimate:
    """The estimate in a row of metrics.json, which may say more than that; of no row, none."""
    if row is None:
        return Estimate(None, None, None, 0, 0)
    return Estimate(row["value"], row["low"], row["high"], row["examples"], row["users"])
