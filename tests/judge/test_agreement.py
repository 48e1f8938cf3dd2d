"""Kappa and its intervals against closed forms, another formula, and properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo.judge.agreement import CELLS, cohen_kappa, measure, prevalence, raw_agreement

PAIRS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)


def cells(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array([pairs.count((1, 1)), pairs.count((1, 0)), pairs.count((0, 1)), pairs.count((0, 0))])


def weighted_kappa(pairs: list[tuple[int, int]]) -> float:
    """The formula of sklearn.metrics.cohen_kappa_score: 1 - observed over expected disagreement, from a table."""
    confusion = np.zeros((2, 2))
    for a, b in pairs:
        confusion[a, b] += 1
    expected = np.outer(confusion.sum(1), confusion.sum(0)) / confusion.sum()
    weights = 1 - np.eye(2)
    with np.errstate(invalid="ignore"):
        return float(1 - (weights * confusion).sum() / (weights * expected).sum())


def test_kappa_by_hand():
    """50 grant proposals, two readers: yes/yes 20, yes/no 5, no/yes 10, no/no 15: po 0.7, pe 0.5."""
    table = np.array([20, 5, 10, 15])
    assert raw_agreement(table) == pytest.approx(0.7)
    assert cohen_kappa(table) == pytest.approx(0.4)
    assert (prevalence(table, 0), prevalence(table, 1)) == (pytest.approx(0.5), pytest.approx(0.6))


def test_raw_agreement_flatters_and_kappa_does_not():
    """One word in ten relevant: who always says no agrees in 90%, by chance."""
    table = np.array([0, 10, 0, 90])
    assert raw_agreement(table) == 0.9
    assert cohen_kappa(table) == 0


@pytest.mark.parametrize("table", [[7, 0, 0, 0], [0, 0, 0, 7], [0, 0, 0, 0]])
def test_kappa_is_undefined_when_both_always_say_the_same(table: list[int]):
    assert np.isnan(cohen_kappa(np.array(table)))


def test_kappa_of_constant_but_opposite_raters_is_defined():
    """No agreement, and none to be expected: (0 - 0) / (1 - 0)."""
    assert cohen_kappa(np.array([0, 5, 0, 0])) == 0
    assert raw_agreement(np.array([0, 5, 0, 0])) == 0


@settings(max_examples=300, deadline=None)
@given(PAIRS)
def test_kappa_agrees_with_the_weighted_formula(pairs: list[tuple[int, int]]):
    found, expected = float(cohen_kappa(cells(pairs))), weighted_kappa(pairs)
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


@settings(max_examples=300, deadline=None)
@given(PAIRS, st.randoms())
def test_kappa_is_symmetric_bounded_and_one_only_for_equal_answers(pairs: list[tuple[int, int]], random):
    kappa = float(cohen_kappa(cells(pairs)))
    np.testing.assert_equal(kappa, float(cohen_kappa(cells([(b, a) for a, b in pairs]))))
    np.testing.assert_equal(kappa, float(cohen_kappa(cells([(1 - a, 1 - b) for a, b in pairs]))))
    shuffled = random.sample(pairs, len(pairs))
    np.testing.assert_equal(kappa, float(cohen_kappa(cells(shuffled))))
    equal = all(a == b for a, b in pairs)
    constant = len(set(pairs)) == 1
    assert np.isnan(kappa) == (equal and constant)
    if not np.isnan(kappa):
        assert -1 <= kappa <= 1
        assert (kappa == 1) == equal


def test_statistics_take_many_tables_at_once():
    tables = np.array([[20, 5, 10, 15], [0, 0, 0, 7]])
    np.testing.assert_allclose(cohen_kappa(tables), [0.4, np.nan])
    np.testing.assert_allclose(raw_agreement(tables), [0.7, 1.0])


def test_unanswered_questions_are_counted_and_left_out():
    a = [1, 0, "abstained", "abstained", 1, "not_judged"]
    b = [1, 1, 0, "unanswered", "unanswered", 0]
    found = measure(a, b, list("xyzxyz"), 100, seed=0)
    assert (found.questions, found.compared, found.responses) == (6, 2, 2)
    assert found.missing == {"a": {"abstained": 2, "not_judged": 1}, "b": {"unanswered": 2}}
    assert found.confusion == dict(zip(CELLS, (1, 0, 1, 0), strict=True))
    assert found.agreement.value == 0.5
    assert (found.prevalence["a"].value, found.prevalence["b"].value) == (0.5, 1.0)


def test_nothing_compared_is_none():
    found = measure(["abstained"], [1], ["x"], 100, seed=0)
    assert (found.compared, found.agreement.value, found.kappa.value, found.kappa.low) == (0, None, None, None)
    nothing = measure([], [], [], 100, seed=0)
    assert (nothing.questions, nothing.agreement.value) == (0, None)


def test_undefined_kappa_is_none_and_has_no_interval():
    found = measure([0] * 8, [0] * 8, list("aabbccdd"), 100, seed=0)
    assert found.agreement.value == 1
    assert (found.kappa.value, found.kappa.low, found.kappa.high) == (None, None, None)
    assert found.kappa_undefined_draws == 100


def test_draws_with_undefined_kappa_are_told():
    """Only response `a` ever makes kappa defined: it is missing from (3/4)^4 of the draws, about 0.32."""
    found = measure([1, 0, 0, 0, 0], [1, 0, 0, 0, 0], list("aabcd"), 4000, seed=0)
    assert (found.kappa.value, found.kappa.low, found.kappa.high) == (1, 1, 1)
    assert found.kappa_undefined_draws / 4000 == pytest.approx(0.316, abs=0.03)


def test_one_response_shows_no_spread():
    found = measure([1, 0, 1], [1, 1, 0], ["x"] * 3, 100, seed=0)
    assert found.agreement.value == pytest.approx(1 / 3)
    assert (found.agreement.low, found.kappa.high) == (None, None)


def simulated(generator: np.random.Generator, count: int) -> tuple[list[int], list[int]]:
    a = generator.random(count) < 0.4
    b = np.where(generator.random(count) < 0.8, a, generator.random(count) < 0.4)
    return a.astype(int).tolist(), b.astype(int).tolist()


def test_intervals_agree_with_the_closed_form_for_one_word_per_response():
    """Cohen's (1960) standard error sqrt(po (1 - po) / N) / (1 - pe); the binomial one for raw agreement."""
    a, b = simulated(np.random.default_rng(0), 600)
    found = measure(a, b, [str(i) for i in range(600)], 4000, seed=0)
    po = found.agreement.value
    pa, pb = found.prevalence["a"].value, found.prevalence["b"].value
    pe = pa * pb + (1 - pa) * (1 - pb)
    half = 1.96 * np.sqrt(po * (1 - po) / 600)
    assert found.agreement.low == pytest.approx(po - half, abs=0.01)
    assert found.agreement.high == pytest.approx(po + half, abs=0.01)
    assert found.kappa.value == pytest.approx((po - pe) / (1 - pe))
    assert found.kappa.low == pytest.approx(found.kappa.value - half / (1 - pe), abs=0.02)
    assert found.kappa.high == pytest.approx(found.kappa.value + half / (1 - pe), abs=0.02)


def test_responses_are_the_clusters():
    """Ten copies of every word in its own response tell nothing new; as ten responses they would."""
    a, b = simulated(np.random.default_rng(1), 60)
    names = [str(i) for i in range(60)]
    once = measure(a, b, names, 500, seed=3)
    copies = measure(a * 10, b * 10, names * 10, 500, seed=3)
    assert (copies.agreement, copies.kappa) == (once.agreement, once.kappa)
    apart = measure(a * 10, b * 10, [str(i) for i in range(600)], 500, seed=3)
    assert apart.kappa.high - apart.kappa.low < 0.5 * (once.kappa.high - once.kappa.low)


def test_the_order_of_questions_does_not_matter():
    generator = np.random.default_rng(2)
    a, b = simulated(generator, 80)
    names = [f"r{i // 4}" for i in range(80)]
    order = generator.permutation(80)
    found = measure([a[i] for i in order], [b[i] for i in order], [names[i] for i in order], 300, seed=1)
    assert found == measure(a, b, names, 300, seed=1)
