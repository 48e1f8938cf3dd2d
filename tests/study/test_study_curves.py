"""Readings of training curves, by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.study.results import Reached, common_kl, smooth, steadiness, updates_to_reach, value_at_kl


def test_smoothing_keeps_lines_and_shrinks_at_the_ends():
    assert smooth([0, 1, 2, 3]) == pytest.approx([0.5, 1, 2, 2.5])
    assert smooth([5.0]) == pytest.approx([5.0])
    assert smooth([1, 9, 1], window=1) == pytest.approx([1, 9, 1])


def test_value_at_a_kl_is_that_of_the_first_crossing():
    kl, value = np.array([0.0, 1.0, 3.0, 2.0, 4.0]), np.array([0.0, 0.2, 0.6, 0.9, 0.5])
    assert value_at_kl(kl, value, 2.0) == pytest.approx(0.4)
    assert value_at_kl(kl, value, 3.0) == pytest.approx(0.6)
    assert value_at_kl(kl, value, 0.0) == 0.0
    assert value_at_kl(kl, value, 3.5) == pytest.approx(0.6)
    assert value_at_kl(kl, value, 4.1) is None


@given(st.floats(0.01, 5), st.integers(2, 30))
def test_a_line_is_read_exactly(level: float, updates: int):
    kl = np.linspace(0, 5, updates)
    assert value_at_kl(kl, 2 * kl + 1, level) == pytest.approx(2 * level + 1)


def test_common_kl_is_reached_by_all():
    assert common_kl([np.array([0.0, 3.0, 2.0]), np.array([0.0, 1.5])]) == 1.5
    assert common_kl([np.array([0.0, 3.0]), np.array([0.0, 0.0])]) is None
    assert common_kl([np.array([0.0, 3.0]), np.array([])]) is None
    assert common_kl([]) is None


def test_updates_to_reach_the_others_best():
    other = np.array([0.1, 0.5, 0.8, 0.7])
    assert updates_to_reach(np.array([0.2, 0.8, 0.9, 0.9]), other) == Reached(0.8, 3, 2)
    assert updates_to_reach(np.array([0.2, 0.8]), other).share == pytest.approx(2 / 3)
    never = updates_to_reach(np.array([0.2, 0.3]), other)
    assert (never.update, never.share) == (None, None)


def test_steadiness_does_not_count_a_trend():
    generator = np.random.default_rng(0)
    noise = 0.3 * generator.normal(size=(40, 400))
    found = steadiness(np.linspace(0, 50, 400) + noise)
    assert found.over_steps == pytest.approx(0.3, rel=0.05)
    assert found.over_seeds == pytest.approx(0.3, rel=0.05)
    offsets = steadiness(np.array([[0.0, 1, 2, 3], [2.0, 3, 4, 5]]))
    assert offsets == pytest.approx((np.sqrt(2), 0.0))
    assert steadiness(np.array([[1.0, 2.0]])) == (None, None)
