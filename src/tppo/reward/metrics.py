"""How good a reward model is: ranking (AUC), decisions (F1), calibration (ECE). NumPy and SciPy only.

A number that the data cannot give (an AUC over a single class, the F1 of no positives) is None, never 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from tppo.evaluate.stats import ClusterBootstrap, IntervalEstimate, percentile_interval
from tppo.reward.align import IRRELEVANT, RELEVANT


def auc(positive: np.ndarray, scores: np.ndarray) -> float | None:
    """Chance that a random positive scores above a random negative; a tie counts half (Mann-Whitney U).

    Args:
        positive: (N,) bool.
        scores: (N,) any real numbers; only their order matters.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    rank_sum = rankdata(scores)[positive].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


class ClassAUC(NamedTuple):
    """Mean of the classes' one-versus-rest AUCs; both None when fewer than two classes are present."""

    macro: float | None
    """Every class present counts alike."""
    weighted: float | None
    """A class counts by its share (the paper's Figures 6 and 10)."""


def class_auc(classes: np.ndarray, probs: np.ndarray) -> ClassAUC:
    """One-versus-rest AUC of each class present, averaged both ways.

    Args:
        classes: (N,) gold classes.
        probs: (N, C).
    """
    present, counts = np.unique(classes, return_counts=True)
    if len(present) < 2:
        return ClassAUC(None, None)
    each = np.array([auc(classes == c, probs[:, c]) for c in present], dtype=float)
    return ClassAUC(float(each.mean()), float(np.average(each, weights=counts)))


def auc_interval(
    positive: np.ndarray, scores: np.ndarray, users: Sequence[str], draws: int = 1000, seed: int = 0
) -> IntervalEstimate:
    """AUC with its 95% bootstrap interval; users are drawn, since responses to one user resemble each other.

    With w the number of times a user is drawn, a draw's AUC is w'Mw / (w'p)(w'n): M holds the pairs won (ties half)
    by a user's positives against another's negatives, p and n the numbers of positives and negatives.

    Args:
        positive: (N,) bool.
        scores: (N,).
        users: (N,) whose responses they are.
    """
    value = auc(positive, scores)
    if value is None:
        return IntervalEstimate(None, None, None)
    bootstrap = ClusterBootstrap(users, draws, seed)
    if bootstrap.clusters < 2:
        return IntervalEstimate(value, None, None)
    member_NC = np.eye(bootstrap.clusters)[bootstrap.cluster_of_N]
    ahead = scores[positive][:, None] - scores[~positive]
    won_CC = member_NC[positive].T @ ((np.sign(ahead) + 1) / 2) @ member_NC[~positive]
    weights_BC = bootstrap.drawn_totals(np.eye(bootstrap.clusters))
    won_B = np.einsum("bc,cd,bd->b", weights_BC, won_CC, weights_BC, optimize=True)
    pairs_B = (weights_BC @ member_NC[positive].sum(0)) * (weights_BC @ member_NC[~positive].sum(0))
    return percentile_interval(value, won_B / np.where(pairs_B > 0, pairs_B, np.nan))


def f1(positive: np.ndarray, predicted: np.ndarray) -> float | None:
    """Harmonic mean of precision and recall; None when there is nothing to find and nothing was found."""
    found = int(positive.sum()) + int(predicted.sum())
    return float(2 * (positive & predicted).sum() / found) if found else None


def calibration_error(positive: np.ndarray, probs: np.ndarray, bins: int = 10) -> float | None:
    """Expected calibration error: |predicted - observed| share of positives, mean over equal-width bins."""
    if not len(probs):
        return None
    which = np.minimum((probs * bins).astype(int), bins - 1)
    gap = np.bincount(which, weights=probs - positive, minlength=bins)
    return float(np.abs(gap).sum() / len(probs))


def word_relevance(probs: np.ndarray) -> np.ndarray:
    """(N,3) class probabilities -> (N,) chance of class 2 among classes 1 and 2, in [0, 1]."""
    words = probs[:, IRRELEVANT] + probs[:, RELEVANT]
    return np.where(words > 0, probs[:, RELEVANT] / np.where(words > 0, words, 1), 0.0)


def response_relevance(probs: np.ndarray) -> float:
    """One number for a response from its tokens' class probabilities (T,3), in [0, 1].

    The token model's answer to the sentence-level question: the mean relevance of its tokens, each counted by
    how likely it is a word token at all. A response without words is irrelevant: 0.
    """
    _, irrelevant, relevant = probs.sum(axis=0, dtype=np.float64)
    words = irrelevant + relevant
    # Rounded: of a model that says the same of every token, sums over more or fewer tokens would differ in their last
    # digits, and an AUC would rank that noise.
    return round(float(relevant / words), 6) if words > 0 else 0.0
