"""Metrics against their definitions, written out the slow way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.reward.metrics import (
    auc,
    calibration_error,
    f1,
    response_relevance,
    weighted_auc,
    word_relevance,
)

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
    assert weighted_auc(np.array([1, 1]), np.full((2, 3), 1 / 3)) is None


def test_weighted_auc():
    classes = np.array([0, 1, 1, 2])
    probs = np.array([[0.8, 0.1, 0.1], [0.1, 0.7, 0.2], [0.1, 0.2, 0.7], [0.2, 0.3, 0.5]])
    each = [auc(classes == c, probs[:, c]) for c in range(3)]
    assert weighted_auc(classes, probs) == pytest.approx((each[0] + 2 * each[1] + each[2]) / 4)
    assert weighted_auc(np.array([1, 2]), np.eye(3)[[1, 2]]) == 1.0


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
