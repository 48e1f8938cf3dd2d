"""How often the intervals of a study hold the truth, and how often a study finds what is not there.

    python benchmarks/coverage.py                          # the tables of docs/evaluation.md
    python benchmarks/coverage.py --replications 200 --seeds 3

Studies of models that do not differ are made up: each training, each user and each answer has an effect of its own, the
same for nobody else (trainings that share a seed's number share nothing). Beside the product's intervals
(`tppo.core.stats`) stand those of Satterthwaite's degrees of freedom and the percentile bootstrap over users and seeds
that the product had before. No file and no model is read.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))

from tppo.core.common import console
from tppo.core.show import Table
from tppo.core.stats import ALPHA, ClusterBootstrap, CrossedMeans, crossed_errors, half_width

DRAWS = 1000
"""Of the bootstrap."""
PER_USER = 2
"""Examples of a user."""


@dataclass(frozen=True)
class Case:
    """How answers come to be: standard deviations of what a training, a user and an answer have for themselves."""

    name: str
    seed: float
    user: float
    answer: float = 1.0
    heavy: bool = False
    """t with 3 degrees of freedom instead of the normal."""
    binary: bool = False
    """An answer is 1 when its sum of effects is above the threshold that `share` of the answers pass, else 0."""
    share: float = 0.5
    missing: float = 0.0
    """Share of the answers that were not measured."""

    def effects(self, generator: np.random.Generator, *shape: int) -> np.ndarray:
        return generator.standard_t(3, shape) / math.sqrt(3) if self.heavy else generator.normal(size=shape)

    def answers(self, generator: np.random.Generator, seeds: int, users: int, user_effects: np.ndarray) -> np.ndarray:
        """Of one model (S, U, examples), with its own liking of each user, half as strong as what all models share."""
        own_liking = 0.5 * self.user * self.effects(generator, 1, users, 1)
        found = self.seed * self.effects(generator, seeds, 1, 1) + self.user * user_effects + own_liking
        found = found + self.answer * self.effects(generator, seeds, users, PER_USER)
        if self.binary:
            spread = math.sqrt(self.seed**2 + 1.25 * self.user**2 + self.answer**2)
            found = (found > spread * stats.norm.isf(self.share)).astype(float)
        found[generator.random(found.shape) < self.missing] = np.nan
        return found


CASES = (
    Case("trainings differ most", seed=1.0, user=0.2, answer=0.5),
    Case("trainings and users alike", seed=0.25, user=2.0, answer=0.5),
    Case("trainings ten times the users' variance", seed=0.5, user=1.3, answer=0.1),
    Case("users differ most", seed=0.0, user=1.0),
    Case("answers alone differ", seed=0.0, user=0.0),
    Case("heavy tails", seed=0.3, user=1.0, heavy=True),
    Case("0 or 1, half of them 1", seed=0.3, user=0.7, binary=True),
    Case("0 or 1, 3% of them 1", seed=0.3, user=0.7, binary=True, share=0.03),
    Case("a fifth not measured", seed=0.3, user=1.0, missing=0.2),
)


class Interval(NamedTuple):
    low: float
    high: float

    def holds(self, truth: float) -> bool:
        return self.low <= truth <= self.high


class Layout:
    """Crossed users and seeds, and three ways to an interval for a mean over them."""

    def __init__(self, seeds: int, users: int) -> None:
        self.seeds, self.users = seeds, users
        names = np.tile(np.repeat(np.arange(users), PER_USER), seeds)
        self.means = CrossedMeans(names.tolist(), np.repeat(np.arange(seeds), users * PER_USER).tolist())
        self.bootstrap = ClusterBootstrap([str(user) for user in range(users)], DRAWS, seed=0)
        generator = np.random.default_rng(1)
        # Of S seeds S - 1 are drawn, or the variance between them would come out too small.
        chances = np.full(seeds, 1 / seeds)
        self.weights_BS = generator.multinomial(max(seeds - 1, 1), chances, DRAWS).astype(float)

    def product(self, values_SUE: np.ndarray) -> Interval:
        found = self.means.difference(values_SUE.reshape(-1))
        assert found.low is not None
        assert found.high is not None
        return Interval(found.low, found.high)

    def share(self, values_SUE: np.ndarray) -> Interval:
        found = self.means.mean(values_SUE.reshape(-1), share=True)
        assert found.low is not None
        assert found.high is not None
        return Interval(found.low, found.high)

    def satterthwaite(self, values_SUE: np.ndarray, alpha: float = ALPHA) -> Interval:
        value = float(np.nanmean(values_SUE))
        parts_US = np.nansum(values_SUE - value, axis=2).T / np.isfinite(values_SUE).sum()
        by_seeds, by_users = (error**2 for error in crossed_errors(parts_US))
        spread = by_seeds**2 / max(self.seeds - 1, 1) + by_users**2 / (self.users - 1)
        df = (by_seeds + by_users) ** 2 / spread if spread else math.inf
        half = float(stats.t.isf(alpha / 2, df)) * math.sqrt(by_seeds + by_users)
        return Interval(value - half, value + half)

    def percentiles(self, values_SUE: np.ndarray) -> Interval:
        """The product's own until it was found to cover 74%: users and seeds drawn with replacement, each apart."""
        totals_BS = self.bootstrap.drawn_totals(np.nansum(values_SUE, axis=2).T)
        counts_BS = self.bootstrap.drawn_totals(np.isfinite(values_SUE).sum(axis=2).T.astype(float))
        weights_BS = self.weights_BS
        with np.errstate(invalid="ignore"):  # a draw that holds no measured answer
            drawn_B = (totals_BS * weights_BS).sum(axis=1) / (counts_BS * weights_BS).sum(axis=1)
        low, high = np.nanpercentile(drawn_B, (100 * ALPHA / 2, 100 * (1 - ALPHA / 2)))
        return Interval(float(low), float(high))


def coverage(case: Case, seeds: int, users: int, replications: int, number: int) -> dict[str, float]:
    """How often, in %, an interval of the difference of two like models holds 0, and for answers of 0 or 1 how often
    one of a model's share holds the truth; one seed is asked about its own training, so trainings do not differ."""
    case = replace(case, seed=0.0) if seeds == 1 else case
    generator, layout = np.random.default_rng([number, seeds, users]), Layout(seeds, users)
    held: Counter[str] = Counter()
    widths = np.zeros(2)
    for _ in range(replications):
        of_users = case.effects(generator, 1, users, 1)
        a, b = (case.answers(generator, seeds, users, of_users) for _ in range(2))
        found = {"product": layout.product(a - b), "satterthwaite": layout.satterthwaite(a - b)}
        found["bootstrap"] = layout.percentiles(a - b)
        held.update(name for name, interval in found.items() if interval.holds(0))
        widths += [found[name].high - found[name].low for name in ("product", "bootstrap")]
        if case.binary:
            found = {"share": layout.share(a), "share, bootstrap": layout.percentiles(a)}
            held.update(name for name, interval in found.items() if interval.holds(case.share))
    return {name: 100 * count / replications for name, count in held.items()} | {"width": float(widths[0] / widths[1])}


def false_claims(case: Case, seeds: int, users: int, models: int, replications: int) -> list[float]:
    """How often, in %, a study of so many like models calls any two of them different: the product (Bonferroni), the
    same family by Satterthwaite's t, and the bootstrap's intervals of single pairs."""
    generator, layout = np.random.default_rng([7, seeds, models]), Layout(seeds, users)
    pairs = list(itertools.combinations(range(models), 2))
    wrong = np.zeros(3)
    for _ in range(replications):
        of_users = case.effects(generator, 1, users, 1)
        answers = [case.answers(generator, seeds, users, of_users) for _ in range(models)]
        differences = [answers[a] - answers[b] for a, b in pairs]
        found = [layout.means.difference(difference.reshape(-1)) for difference in differences]
        errors = [(one.error_seeds or 0.0, one.error_users or 0.0) for one in found]
        halves = [half_width(pair, (seeds, users), ALPHA / len(pairs)) for pair in errors]
        wrong += [
            any(abs(one.value or 0.0) > half for one, half in zip(found, halves, strict=True)),
            any(not layout.satterthwaite(difference, ALPHA / len(pairs)).holds(0) for difference in differences),
            any(not layout.percentiles(difference).holds(0) for difference in differences),
        ]
    return list(100 * wrong / replications)


COLUMNS = {
    "product": "Held, %",
    "satterthwaite": "Satterthwaite",
    "bootstrap": "Bootstrap",
    "width": "Width over the bootstrap's",
    "share": "Share held, %",
    "share, bootstrap": "Bootstrap",
}


def coverage_table(seeds: Sequence[int], users: Sequence[int], replications: int) -> Table:
    """A number for each of `users` in every cell."""
    rows = []
    for (number, case), count in itertools.product(enumerate(CASES), seeds):
        if count == 1 and case.name.startswith("trainings"):
            continue
        found = [coverage(case, count, of, replications, number) for of in users]
        texts = [[f"{one[name]:.{2 if name == 'width' else 1}f}" for one in found if name in one] for name in COLUMNS]
        rows.append([case.name, str(count), *(", ".join(text) for text in texts)])
    title = f"How often a 95% interval holds the truth, with {', '.join(map(str, users))} users"
    return Table(["Answers", "Seeds", *COLUMNS.values()], rows, title)


def claims_table(seeds: Sequence[int], users: int, models: int, replications: int) -> Table:
    rows = [
        [case.name, str(count), *(f"{value:.1f}" for value in false_claims(case, count, users, models, replications))]
        for case in CASES[:5]
        for count in seeds
        if count > 1
    ]
    title = f"Studies of {models} like models, {users} users, that call any two different, %"
    return Table(["Answers", "Seeds", "Product", "Satterthwaite", "Bootstrap, each pair alone"], rows, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 3, 5, 10])
    parser.add_argument("--users", type=int, nargs="+", default=[10, 60], help="each has two examples")
    parser.add_argument("--models", type=int, default=4, help="of the second table")
    parser.add_argument("--replications", type=int, default=2000)
    arguments = parser.parse_args()
    start = time.monotonic()
    for table in (
        coverage_table(arguments.seeds, arguments.users, arguments.replications),
        claims_table(arguments.seeds, max(arguments.users), arguments.models, arguments.replications),
    ):
        print(table.markdown())
    error = 100 * math.sqrt(ALPHA * (1 - ALPHA) / arguments.replications)
    console.print(f"{arguments.replications} replications: Monte-Carlo error of a 95 is {error:.2f} points; "
                  f"{time.monotonic() - start:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
