"""Intervals for what users' answers say: of one run, and of a study with several seeds.

**Means and differences** (`CrossedMeans`). In a study every model answers the same examples under every seed: users and
seeds are crossed. Answers to one user resemble each other, and so do answers of one training, so the sample is neither
the answers nor the users alone. The variance of the mean is taken apart into what differs between seeds and what
differs between users (two-way random layout; Searle, Casella and McCulloch, Variance Components (1992), chapter 4),
each with the t of its own degrees of freedom (Banerjee, Sankhya 22 (1960)):

    half width^2 = t(S - 1)^2 x variance by seeds + t(U - 1)^2 x variance by users

which holds the truth at least as often as it says, whatever the two variances are. Satterthwaite's degrees of freedom
give narrower intervals, but three seeds that are alike by chance pass for hundreds of users there: of studies of four
like models it calls two different in up to 16%, where 5% are promised (`benchmarks/coverage.py`, docs/evaluation.md).
A mean over unequal numbers of
answers is a ratio of sums; its terms are linearised first. The difference of two models is taken within a seed and an
example, so what is common to both (easy users) cancels out; that is right whether or not trainings of the same seed
number have anything in common. One seed leaves the users: the interval covers the choice of users only.

**Shares** (0 to 1) have Wilson's interval (JASA 22 (1927)) with the same width in the middle, as for the number of
independent answers with that variance (Korn and Graubard, Survey Methodology 24 (1998)): it stays within 0 and 1, and
0 of 50 users is not "never".

**Several comparisons.** Intervals and p-values of the m differences of a family are those of Bonferroni: each interval
at 1 - 0.05 / m, each p times m, both of the same t. So an interval leaves 0 out exactly when the corrected p is below
0.05, and all intervals of a family hold their truths together in at least 95 of 100 studies.

**What is no mean** (an AUC, kappa), and the gate: a bootstrap over clusters (users, or responses in the label check).
Percentile intervals after Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; clusters as in
Field and Welsh, JRSS B 69 (2007); expanded for few clusters (Hesterberg, The American Statistician 69 (2015)).

Shapes: N examples, answers or words, C clusters, U users, S seeds, K summed columns, B draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit

ALPHA = 0.05
"""1 - the level of every interval, and what a corrected p-value has to be below."""
FEW_USERS = 30
_BLOCK = 4_000_000
_ROUNDING = 1e-12
"""Spread below this share of the mean is none."""


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
    seeds: int = 1


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference of two models, alone; `simultaneous` gives that of one among several."""

    error_seeds: float | None = None
    """Standard error by what differs between seeds; 0 of one seed, which shows none."""
    error_users: float | None = None
    """The same between users."""
    p_value: float | None = None
    """Two-sided, against 0."""


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


def percentile_interval(value: float, drawn_B: np.ndarray, clusters: int) -> IntervalEstimate:
    """`value` with percentiles of its draws; a draw in which it is undefined (NaN) is left out.

    The draws of few clusters vary too little by (clusters - 1) / clusters, and their tails are normal where those of t
    are due: the percentiles lie so much farther out.
    """
    defined = drawn_B[~np.isnan(drawn_B)]
    if not len(defined):
        return IntervalEstimate(value, None, None)
    reach = math.sqrt(clusters / (clusters - 1)) * stats.t.ppf(1 - ALPHA / 2, clusters - 1)
    tail = 100 * float(stats.norm.sf(reach))
    low, high = np.percentile(defined, (tail, 100 - tail))
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
        found = percentile_interval(value, totals_B / counts_B, users)
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
    means: UserBootstrap | CrossedMeans,
    a_N: Sequence[float | None] | np.ndarray,
    b_N: Sequence[float | None] | np.ndarray,
    tie: float = 1e-6,
) -> WinTieLose:
    """Compare paired scores: higher wins, equal within `tie` ties, an unmeasured score is no comparison."""
    difference_N = _as_float(a_N) - _as_float(b_N)
    sign_N = np.where(np.isnan(difference_N), np.nan, np.sign(np.where(np.abs(difference_N) <= tie, 0, difference_N)))
    net = means.difference(sign_N, np.zeros_like(sign_N))
    compared = sign_N[~np.isnan(sign_N)]
    if not len(compared):
        return WinTieLose(None, None, None, net)
    return WinTieLose(float((compared > 0).mean()), float((compared == 0).mean()), float((compared < 0).mean()), net)


def _as_float(values: Sequence[float | None] | np.ndarray) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


class CrossedMeans:
    """Means over the answers of crossed users and seeds, with t intervals."""

    def __init__(self, user_ids: Sequence[str], seeds: Sequence[int] | None = None) -> None:
        """`user_ids` and `seeds` (N): of each answer, in the order of all values given later; no seeds: one."""
        self.user_of_N = _places(user_ids)
        self.seed_of_N = np.zeros(len(self.user_of_N), dtype=int) if seeds is None else _places(seeds)

    def mean(self, values_N: Sequence[float | None] | np.ndarray, share: bool = False) -> Estimate:
        """Mean over the measured answers (None and NaN are not measured) and its 95% interval.

        Args:
            share: the values lie between 0 and 1, and so does the interval.
        """
        found = self.difference(values_N)
        low, high = _wilson(found) if share else (found.low, found.high)
        return Estimate(found.value, low, high, found.examples, found.users, found.seeds)

    def difference(
        self,
        a_N: Sequence[float | None] | np.ndarray,
        b_N: Sequence[float | None] | np.ndarray | None = None,
    ) -> Difference:
        """Mean of a - b (b: 0 where not given) over the answers where both were measured, its interval and p-value."""
        values_N = _as_float(a_N) if b_N is None else _as_float(a_N) - _as_float(b_N)
        measured_N = ~np.isnan(values_N)
        examples = int(measured_N.sum())
        if not examples:
            return Difference(None, None, None, 0, 0, 0)
        value = float(values_N[measured_N].mean())
        parts_US = self._parts(values_N[measured_N] - value, measured_N)
        users, seeds = parts_US.shape
        if users < 2:
            return Difference(value, None, None, examples, users, seeds)
        errors = crossed_errors(parts_US)
        if max(errors) <= _ROUNDING * abs(value):
            # No spread: two users who agree show little, two hundred much. As if one more user had no difference.
            errors = (0.0, abs(value) / users)
        half = half_width(errors, (seeds, users), ALPHA)
        p_value = p_of(value, errors, (seeds, users))
        return Difference(value, value - half, value + half, examples, users, seeds, *errors, p_value)

    def _parts(self, rest_N: np.ndarray, measured_N: np.ndarray) -> np.ndarray:
        """What each measured user under each measured seed (U, S) adds to the mean's distance from what is measured."""
        users, seeds = _places(self.user_of_N[measured_N]), _places(self.seed_of_N[measured_N])
        parts_US = np.zeros((users.max() + 1, seeds.max() + 1))
        np.add.at(parts_US, (users, seeds), rest_N)
        return parts_US / len(rest_N)


def crossed_errors(parts_US: np.ndarray) -> tuple[float, float]:
    """Standard errors of a sum of parts by what differs between seeds (one or more) and between users.

    Both mean squares hold what differs between single answers, too. It counts once: with the seeds or the users, of
    whichever there are fewer, whose t is the larger.

    Args:
        parts_US: terms of the sum, which add up to 0; at least two users.
    """
    users, seeds = parts_US.shape
    of_users_U, of_seeds_S = parts_US.sum(axis=1), parts_US.sum(axis=0)
    by_users = users / (users - 1) * float(of_users_U @ of_users_U)
    if seeds == 1:
        return 0.0, math.sqrt(by_users)
    by_seeds = seeds / (seeds - 1) * float(of_seeds_S @ of_seeds_S)
    rest_US = parts_US - of_users_U[:, None] / seeds - of_seeds_S / users
    by_rest = users * seeds / ((users - 1) * (seeds - 1)) * float((rest_US**2).sum())
    # By chance the whole may come out below one of its parts (two seeds that agree); it is not taken to be.
    whole = max(by_seeds + by_users - by_rest, by_seeds, by_users, by_rest)
    if seeds <= users:
        by_users = whole - by_seeds
    else:
        by_seeds = whole - by_users
    return math.sqrt(by_seeds), math.sqrt(by_users)


def half_width(errors: Sequence[float], counts: Sequence[int], alpha: float) -> float:
    """Of the interval at 1 - `alpha`, from standard errors by independent parts and how many (2 or more, or an error of
    0) were drawn for each."""
    reach = [error * float(stdtrit(count - 1, alpha / 2)) for error, count in zip(errors, counts, strict=True) if error]
    return math.hypot(*reach)


def p_of(value: float, errors: Sequence[float], counts: Sequence[int]) -> float:
    """Two-sided p-value against 0: the alpha at which the interval at 1 - alpha ends at 0."""
    parts = [(error, count) for error, count in zip(errors, counts, strict=True) if error]
    if not parts or not value:
        return float(value == 0)
    # Each part alone gives a narrower interval, so a smaller p.
    least = max(2 * float(stdtr(count - 1, -abs(value) / error)) for error, count in parts)
    if len(parts) == 1 or least == 0:
        return least

    def beyond(log_alpha: float) -> float:
        return half_width(errors, counts, math.exp(log_alpha)) - abs(value)

    return math.exp(float(brentq(beyond, math.log(least) - 1e-9, 0.0, xtol=1e-12)))


def simultaneous(found: Mapping[str, Any], comparisons: int) -> dict[str, Any]:
    """What a `Difference`, as a dict, is as one of a family of so many (Bonferroni)."""
    none = dict.fromkeys(("low_corrected", "high_corrected", "p_corrected"))
    if found["p_value"] is None:
        return {"comparisons": comparisons, **none}
    errors, counts = (found["error_seeds"], found["error_users"]), (found["seeds"], found["users"])
    half, value = half_width(errors, counts, ALPHA / comparisons), found["value"]
    return {
        "comparisons": comparisons,
        "low_corrected": value - half,
        "high_corrected": value + half,
        "p_corrected": min(1.0, comparisons * found["p_value"]),
    }


def _wilson(found: Difference) -> tuple[float | None, float | None]:
    """Wilson's interval of a share, as wide in the middle as the one by t."""
    share, low = found.value, found.low
    if share is None or low is None:
        return None, None
    assert 0 <= share <= 1, share
    if 0 < share < 1:
        # t^2 / n, with n the number of independent answers that have this variance.
        weight = (share - low) ** 2 / (share * (1 - share))
    else:
        weight = float(stdtrit(found.users - 1, ALPHA / 2)) ** 2 / found.users
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def _places(names: Sequence[Any] | np.ndarray) -> np.ndarray:
    """The place of each name among the distinct ones."""
    return np.unique(np.asarray(names), return_inverse=True)[1].reshape(-1)


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds with its interval by Student's t; the interval is None for fewer than two seeds."""

    value: float
    low: float | None
    high: float | None
    seeds: int


def mean_over_seeds(values_S: Sequence[float], comparisons: int = 1) -> SeedMean | None:
    """Mean of one number per seed and its t interval, at 95% for a family of so many together (Bonferroni); None when
    there is no number."""
    count = len(values_S)
    if not count:
        return None
    value = float(np.mean(values_S))
    if count < 2:
        return SeedMean(value, None, None, count)
    error = float(np.std(values_S, ddof=1)) / math.sqrt(count)
    half = half_width([error], [count], ALPHA / comparisons)
    return SeedMean(value, value - half, value + half, count)


def estimate(row: Mapping[str, Any] | None) -> Estimate:
    """The estimate in a row of metrics.json; of no row, none. That of a difference has the interval of its family: what
    is shown and what verdicts go by."""
    if row is None:
        return Estimate(None, None, None, 0, 0)
    low, high = (row.get(f"{end}_corrected", row[end]) for end in ("low", "high"))
    return Estimate(row["value"], low, high, row["examples"], row["users"], row.get("seeds", 1))
