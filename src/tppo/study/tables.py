"""Numbers of the study's report: intervals over seeds and users, corrected p-values, comparisons at equal KL."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tppo.config import Recipe
from tppo.evaluate.compare import BASELINES, MODEL_ORDER, REFERENCES, Rows, build_metrics
from tppo.evaluate.present import Metrics
from tppo.evaluate.stats import UserBootstrap
from tppo.seeding import stream_seed
from tppo.study.curves import Reached, Steadiness, common_kl, smooth, steadiness, updates_to_reach, value_at_kl
from tppo.study.stats import SeedMean, SeedUserBootstrap, holm, mean_over_seeds

MEASURES = {
    "token_relevance": "relevance by the token reward model",
    "sentence_reward_mean": "relevance by the sentence reward model",
}
"""Measures of a rollout that are the same for every RL algorithm, unlike the reward it is paid."""


def study_metrics(recipe: Recipe, rows: Rows, judge_labelled_training: bool, votes: Rows | None = None) -> Metrics:
    """metrics.json of all seeds together; differences, and `net` of wins, also hold `p_value` and `p_holm`.

    `p_holm` is corrected for the number of pairs compared in one measure and one scope: pairs of policies, and pairs of
    a policy and a simple baseline, each for itself.

    Args:
        rows: of generations.parquet, with `seed`, `judge` and `second_judge`; the same judges in all.
        votes: of votes.parquet, with `seed`; one judge and one rubric in all.
    """
    judges = {(row["judge"], row["second_judge"]) for row in rows}
    assert len(judges) == 1, f"one table, one judge: {judges}"
    judge, second_judge = next(iter(judges))

    def bootstrap_of(questions: Rows, scope: str) -> UserBootstrap:
        users, seeds = ([row[name] for row in questions] for name in ("user_id", "seed"))
        return SeedUserBootstrap(
            users, seeds, recipe.study.bootstrap_samples, stream_seed(recipe.seed, "study bootstrap", scope)
        )

    data = build_metrics(rows, recipe, votes, bootstrap_of)
    families: dict[tuple[str, str, bool], Rows] = {}
    for row in data["differences"]:
        families.setdefault((row["scope"], row["metric"], row["than"] in BASELINES), []).append(row)
    for row in data["wins"]:
        if row["model"] not in REFERENCES:
            what = f"wins by {row['by']}, {row['rubric']}"
            families.setdefault((row["scope"], what, row["than"] in BASELINES), []).append(row["net"])
    for family in families.values():
        for row, corrected in zip(family, holm([row["p_value"] for row in family]), strict=True):
            row["p_holm"] = corrected
    data |= {
        "seeds": len({row["seed"] for row in rows}),
        "distinct_examples": {
            scope: len({row["example_id"] for row in rows if scope in ("all", row["split"])})
            for scope in data["scopes"]
        },
        "judge": judge,
        "second_judge": second_judge,
        "judge_labelled_training": judge_labelled_training,
    }
    return Metrics(data)


class Curve(NamedTuple):
    """One measure of one algorithm over its training, all seeds."""

    updates: np.ndarray
    """(T)"""
    values: np.ndarray
    """(S, T)"""

    @property
    def mean(self) -> list[float]:
        return [float(value) for value in self.values.mean(axis=0)]

    @property
    def spread(self) -> list[float | None]:
        """Standard deviation between the seeds; None with one seed."""
        if len(self.values) < 2:
            return [None] * len(self.updates)
        return [float(value) for value in self.values.std(axis=0, ddof=1)]


class Curves:
    """Look-ups in the rows of curves.parquet of one setting."""

    def __init__(self, rows: Rows, setting: str) -> None:
        self._found: dict[tuple[str, str], dict[int, dict[int, float]]] = {}
        for row in rows:
            if row["setting"] == setting:
                by_seed = self._found.setdefault((row["model"], row["metric"]), {})
                by_seed.setdefault(row["seed"], {})[row["update"]] = row["value"]

    def models(self, metric: str) -> list[str]:
        """Algorithms that have the measure, in the order of comparison."""
        return [model for model in MODEL_ORDER if (model, metric) in self._found]

    def get(self, model: str, metric: str) -> Curve | None:
        """The updates that all seeds have (a training that `max_kl` halted is shorter than the others)."""
        by_seed = self._found.get((model, metric))
        if not by_seed:
            return None
        updates = sorted(set.intersection(*(set(values) for values in by_seed.values())))
        values = [[by_seed[seed][update] for update in updates] for seed in sorted(by_seed)]
        return Curve(np.array(updates), np.array(values, dtype=float).reshape(len(by_seed), len(updates)))

    def trainings(self, model: str, *metrics: str) -> dict[int, list[np.ndarray]]:
        """Smoothed measures (T) of each training that has all of them, by seed; a value that is none counts as -inf."""
        of = [self._found.get((model, metric), {}) for metric in metrics]
        found = {}
        for seed in sorted(set.intersection(*(set(by_seed) for by_seed in of))):
            updates = sorted(set.intersection(*(set(by_seed[seed]) for by_seed in of)))
            smoothed = [smooth([by_seed[seed][update] for update in updates]) for by_seed in of]
            found[seed] = [np.nan_to_num(values_T, nan=-np.inf) for values_T in smoothed]
        return found


class EqualKL(NamedTuple):
    """Algorithms where their KL is the same."""

    kl: float
    """Nats per response: the largest that every training reaches."""
    values: dict[str, SeedMean]
    """By algorithm."""
    differences: dict[tuple[str, str], SeedMean]
    """First minus second, paired by seed."""


def at_equal_kl(curves: Curves, measure: str) -> EqualKL | None:
    """Compare the algorithms that have a KL and the measure; None when there is no common KL above 0."""
    models = [model for model in curves.models(measure) if model in curves.models("kl")]
    trainings = {model: curves.trainings(model, "kl", measure) for model in models}
    level = common_kl([kl_T for found in trainings.values() for kl_T, _ in found.values()])
    if level is None:
        return None
    values: dict[str, dict[int, float]] = {}
    for model, seeds in trainings.items():
        at_level = {seed: value_at_kl(kl_T, value_T, level) for seed, (kl_T, value_T) in seeds.items()}
        values[model] = {seed: value for seed, value in at_level.items() if value is not None and np.isfinite(value)}
    differences = {
        (a, b): mean
        for number, a in enumerate(models)
        for b in models[number + 1 :]
        if (mean := mean_over_seeds([values[a][seed] - values[b][seed] for seed in values[a] if seed in values[b]]))
    }
    means = {model: mean for model in models if (mean := mean_over_seeds(list(values[model].values())))}
    return EqualKL(level, means, differences)


def reaching(curves: Curves, measure: str, model: str, other: str) -> dict[int, Reached]:
    """When `model` first has the best of `other`, by seed."""
    ours, theirs = curves.trainings(model, measure), curves.trainings(other, measure)
    return {seed: updates_to_reach(ours[seed][0], theirs[seed][0]) for seed in ours if seed in theirs}


def steadiness_of(curves: Curves, measure: str) -> dict[str, Steadiness]:
    """By algorithm, of those with at least one update that all seeds have."""
    found = {model: curves.get(model, measure) for model in curves.models(measure)}
    return {model: steadiness(curve.values) for model, curve in found.items() if curve and len(curve.updates)}
