"""The bootstrap over seeds and users against closed forms and simulation; Holm and t by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo.core.stats import SeedUserBootstrap, UserBootstrap, bootstrap_p_value, holm, mean_over_seeds


def crossed(
    generator: np.random.Generator, seeds: int, users: int, *, between_seeds: float, between_users: float
) -> np.ndarray:
    """(S, U) values around 0: a seed's effect + a user's effect + noise of standard deviation 1."""
    return (
        between_seeds * generator.normal(size=(seeds, 1))
        + between_users * generator.normal(size=(1, users))
        + generator.normal(size=(seeds, users))
    )


def bootstrap_for(values_SU: np.ndarray, draws: int = 2000, seed: int = 0) -> SeedUserBootstrap:
    seeds, users = values_SU.shape
    ids = [f"u{user}" for user in range(users)] * seeds
    return SeedUserBootstrap(ids, np.repeat(np.arange(seeds), users).tolist(), draws, seed)


def test_variance_of_the_draws_is_that_of_the_closed_form():
    """Hoeffding: Var = seeds' variance / (S-1) + users' / U + interaction / ((S-1) U), each the plug-in variance."""
    values = crossed(np.random.default_rng(0), 4, 30, between_seeds=0.5, between_users=1.0)
    seed_means, user_means = values.mean(axis=1), values.mean(axis=0)
    rest = values - seed_means[:, None] - user_means[None, :] + values.mean()
    expected = seed_means.var() / 3 + user_means.var() / 30 + rest.var() / (3 * 30)
    _, drawn = bootstrap_for(values, draws=40_000)._estimate(values.reshape(-1))
    # The variance of 40,000 draws has a standard error of 0.7%.
    assert drawn.var() == pytest.approx(expected, rel=0.03)
    assert drawn.mean() == pytest.approx(values.mean(), abs=4 * np.sqrt(expected / 40_000))


def test_intervals_cover_the_truth_where_those_over_users_alone_do_not():
    generator = np.random.default_rng(1)
    trials, both, users_only = 300, 0, 0
    for trial in range(trials):
        values = crossed(generator, 6, 40, between_seeds=0.4, between_users=0.8)
        found = bootstrap_for(values, 400, trial).mean(values.reshape(-1))
        both += found.low <= 0 <= found.high
        alone = UserBootstrap([f"u{user}" for user in range(40)] * 6, 400, trial).mean(values.reshape(-1))
        users_only += alone.low <= 0 <= alone.high
    # The binomial standard error at 0.95 is 1.3 points; six seeds still give slightly narrow intervals.
    assert both / trials >= 0.90
    assert users_only / trials < 0.85


def test_differences_are_paired_within_seed_and_example():
    values = crossed(np.random.default_rng(2), 3, 20, between_seeds=2.0, between_users=2.0).reshape(-1)
    bootstrap = bootstrap_for(values.reshape(3, 20))
    found = bootstrap.difference(values + 0.1, values)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.p_value == pytest.approx(2 / 2001)
    assert bootstrap.difference(values, values).p_value == 1.0
    assert bootstrap.mean(values).p_value is None


def test_one_seed_is_the_bootstrap_over_users():
    values = np.random.default_rng(3).normal(size=50)
    users = [f"u{number // 2}" for number in range(50)]
    found = SeedUserBootstrap(users, [7] * 50, 500, 0).mean(values)
    alone = UserBootstrap(users, 500, 0).mean(values)
    assert (found.value, found.low, found.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert found.seeds == 1


def test_a_missing_seed_is_left_out_and_nothing_measured_is_none():
    bootstrap = SeedUserBootstrap(["a", "b"] * 3, [0, 0, 1, 1, 2, 2], 200, 0)
    found = bootstrap.mean([1.0, 0.0, None, None, 1.0, 1.0])
    assert (found.value, found.examples, found.users, found.seeds) == (0.75, 4, 2, 2)
    empty = bootstrap.difference([None] * 6, [1.0] * 6)
    assert (empty.value, empty.low, empty.p_value, empty.seeds) == (None, None, None, 0)
    one_user = bootstrap.mean([1.0, None, 0.0, None, None, None])
    assert (one_user.value, one_user.low, one_user.seeds) == (0.5, None, 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1, 1))
def test_p_value_and_interval_agree(seed: int, shift: float):
    values = crossed(np.random.default_rng(seed), 3, 12, between_seeds=0.3, between_users=0.3) + shift
    found = bootstrap_for(values, 400).difference(values.reshape(-1), np.zeros(36))
    if found.low <= 0 <= found.high:
        assert found.p_value >= 0.04
    else:
        assert found.p_value <= 0.06


def test_p_value_by_hand():
    assert bootstrap_p_value(np.array([1.0] * 19)) == pytest.approx(2 / 20)
    assert bootstrap_p_value(np.array([1.0] * 17 + [-1.0] * 2)) == pytest.approx(2 * 3 / 20)
    assert bootstrap_p_value(np.array([1.0, -1.0, 0.0])) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2, None, 0.9]) == pytest.approx([0.4, None, 0.9])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_order_and_lies_between_raw_and_bonferroni(p_values: list[float]):
    corrected = holm(p_values)
    for p, found in zip(p_values, corrected, strict=True):
        assert p <= found <= min(1.0, len(p_values) * p) + 1e-12
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(corrected)[order]) >= 0).all()


def test_t_interval_by_hand():
    found = mean_over_seeds([1.0, 2.0, 3.0])
    # Half width: t(0.975, 2) = 4.3027 times 1 / sqrt(3).
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert mean_over_seeds([1.0]).low is None
    assert mean_over_seeds([]) is None
