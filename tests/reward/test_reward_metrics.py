"""Metrics against their definitions, written out the slow way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tppo.core.stats import ClusterBootstrap
from tppo.reward.metrics import auc, auc_interval, calibration_error, class_auc, f1, response_relevance, word_relevance

scored = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=40)


@given(scored)
def test_auc_counts_pairs_and_halves_ties(rows):
    positive = np.array([p for p, _ in rows])
    scores = np.array([s / 7 for _, s in rows])
    pairs = [float(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert auc(positive, scores) == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_auc_of_one_class_is_unknown():
    assert auc(np.array([True, True]), np.array([0.1, 0.9])) is None
    assert auc(np.array([], dtype=bool), np.array([])) is None
    assert class_auc(np.array([1, 1]), np.full((2, 3), 1 / 3)) == (None, None)


def test_class_auc():
    classes = np.array([0, 1, 1, 2])
    probs = np.array([[0.8, 0.1, 0.1], [0.1, 0.7, 0.2], [0.1, 0.2, 0.7], [0.2, 0.3, 0.5]])
    each = [auc(classes == c, probs[:, c]) for c in range(3)]
    macro, weighted = class_auc(classes, probs)
    assert weighted == pytest.approx((each[0] + 2 * each[1] + each[2]) / 4)
    assert macro == pytest.approx(sum(each) / 3)
    assert macro != pytest.approx(weighted)
    assert class_auc(np.array([1, 2]), np.eye(3)[[1, 2]]) == (1.0, 1.0)


def test_auc_interval_is_that_of_drawn_users():
    """Against the slow way: the rows of drawn users written out, and the AUC of those."""
    generator = np.random.default_rng(0)
    users = [f"u{number}" for number in generator.integers(0, 9, 60)]
    positive = generator.random(60) < 0.4
    scores = np.round(generator.random(60) + 0.4 * positive, 1)  # with ties
    found = auc_interval(positive, scores, users, draws=50, seed=3)
    bootstrap = ClusterBootstrap(users, 50, 3)
    drawn = []
    for weights_C in bootstrap.drawn_totals(np.eye(bootstrap.clusters)):
        rows = np.repeat(np.arange(60), weights_C[bootstrap.cluster_of_N].astype(int))
        drawn.append(auc(positive[rows], scores[rows]))
    assert found.value == auc(positive, scores)
    # Expanded for so few users: the draws' spread is too small by 8/9, and t(8) has longer tails than the normal.
    tail = 100 * stats.norm.sf(np.sqrt(9 / 8) * stats.t.ppf(0.975, 8))
    np.testing.assert_allclose([found.low, found.high], np.percentile(drawn, [tail, 100 - tail]))


def test_auc_interval_of_too_little():
    positive, scores = np.array([True, False]), np.array([0.9, 0.1])
    assert auc_interval(positive, scores, ["a", "a"]).as_dict() == {"value": 1.0, "low": None, "high": None}
    assert auc_interval(np.array([True, True]), scores, ["a", "b"]).value is None


def test_f1():
    assert f1(np.array([True, True, False]), np.array([True, False, True])) == pytest.approx(0.5)
    assert f1(np.array([True]), np.array([False])) == 0
    assert f1(np.array([False]), np.array([False])) is None


def test_calibration_error():
    positive = np.array([True, False, True, True])
    assert calibration_error(positive, np.array([0.75, 0.75, 0.75, 0.75])) == pytest.approx(0)
    assert calibration_error(np.array([True, False]), np.array([0.05, 1.0])) == pytest.approx((0.95 + 1) / 2)
    assert calibration_error(np.array([]), np.array([])) is None


def test_relevance_leaves_separators_out():
    probs = np.array([[1.0, 0.0, 0.0], [0.0, 0.25, 0.75], [0.5, 0.5, 0.0]])
    np.testing.assert_allclose(word_relevance(probs), [0, 0.75, 0])
    assert response_relevance(probs) == pytest.approx(0.75 / 1.5)
    assert response_relevance(np.zeros((0, 3))) == 0
    same = np.array([[0.09, 0.1, 0.81]], dtype=np.float32)
    assert len({response_relevance(np.repeat(same, count, axis=0)) for count in range(1, 40)}) == 1, "no noise to rank"
