"""Means over crossed users and seeds against closed forms and simulation; families of comparisons."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.coverage import CASES, coverage, false_claims
from tppo.core.stats import (
    CrossedMeans,
    Difference,
    crossed_errors,
    estimate,
    half_width,
    mean_over_seeds,
    p_of,
    simultaneous,
    verdict,
)


def crossed(
    generator: np.random.Generator, seeds: int, users: int, *, between_seeds: float, between_users: float
) -> np.ndarray:
    """(S, U) values around 0: a seed's effect + a user's effect + noise of standard deviation 1."""
    return (
        between_seeds * generator.normal(size=(seeds, 1))
        + between_users * generator.normal(size=(1, users))
        + generator.normal(size=(seeds, users))
    )


def means_of(values_SU: np.ndarray) -> CrossedMeans:
    seeds, users = values_SU.shape
    return CrossedMeans([f"u{user}" for user in range(users)] * seeds, np.repeat(np.arange(seeds), users).tolist())


def test_errors_are_those_of_the_two_way_analysis_of_variance():
    """Balanced: MS of the seeds / (S U), and (MS of the users - MS of the rest) / (S U); the rest counts once."""
    values = crossed(np.random.default_rng(1), 4, 30, between_seeds=1.0, between_users=2.0)
    seed_means, user_means = values.mean(axis=1), values.mean(axis=0)
    rest = values - seed_means[:, None] - user_means[None, :] + values.mean()
    of_seeds, of_users = 30 * seed_means.var(ddof=1), 4 * user_means.var(ddof=1)
    of_rest = (rest**2).sum() / (3 * 29)
    found = means_of(values).difference(values.reshape(-1))
    assert found.error_seeds == pytest.approx(np.sqrt(of_seeds / 120))
    assert found.error_users == pytest.approx(np.sqrt((of_users - of_rest) / 120))
    half = np.hypot(stats.t.ppf(0.975, 3) * found.error_seeds, stats.t.ppf(0.975, 29) * found.error_users)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))
    # More seeds than users: the rest goes with the users, whose t is the larger.
    turned = means_of(values.T).difference(values.T.reshape(-1))
    assert turned.error_users == pytest.approx(found.error_seeds)
    assert turned.error_seeds == pytest.approx(found.error_users)


def test_one_answer_of_each_seed_for_many_like_users_is_the_t_of_the_seeds():
    """Where users do not differ, the seeds are the sample: S - 1 degrees of freedom, however many users there are."""
    seeds = np.array([0.1, 0.5, 0.4])
    found = means_of(np.tile(seeds[:, None], 500)).difference(np.repeat(seeds, 500))
    assert found.error_seeds == pytest.approx(seeds.std(ddof=1) / np.sqrt(3))
    assert found.error_users == pytest.approx(0, abs=1e-9)
    assert found.p_value == pytest.approx(stats.ttest_1samp(seeds, 0).pvalue)
    alone = mean_over_seeds(seeds.tolist())
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))


def test_answers_that_are_the_same_under_every_seed_are_one_answer_of_each_user():
    """A simple baseline: three seeds of it are no more than one."""
    answers = np.random.default_rng(1).normal(size=40)
    found = means_of(np.tile(answers, (3, 1))).difference(np.tile(answers, 3))
    assert found.error_seeds == pytest.approx(0, abs=1e-12)
    assert found.error_users == pytest.approx(answers.std(ddof=1) / np.sqrt(40))
    assert found.p_value == pytest.approx(stats.ttest_1samp(answers, 0).pvalue)


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("between", [(1.0, 0.1), (0.05, 1.0), (0.7, 3.0), (0.0, 0.0)])
def test_intervals_hold_the_truth_at_least_93_times_in_100(seeds: int, between: tuple[float, float]):
    """`benchmarks/coverage.py` has more cases, and the percentile bootstrap that held 74 in the first one."""
    generator, trials, held, wrong = np.random.default_rng(seeds), 600, 0, 0
    for _ in range(trials):
        values = crossed(generator, seeds, 40, between_seeds=between[0], between_users=between[1])
        found = means_of(values).difference(values.reshape(-1))
        held += found.low <= 0 <= found.high
        wrong += found.p_value < 0.05
    # The binomial standard error at 0.95 is 0.9 points.
    assert held / trials >= 0.93
    assert wrong == trials - held


def test_the_benchmark_shows_what_the_bootstrap_missed():
    """Its first row and its second table, in small: three seeds whose trainings differ most."""
    found = coverage(CASES[0], 3, 10, 150, 0)
    assert found["bootstrap"] < 88 < 92 < found["product"]
    product, _, single_pairs = false_claims(CASES[0], 3, 10, 3, 50)
    assert product <= 12 < 25 < single_pairs


def test_differences_are_paired_within_seed_and_example():
    values = crossed(np.random.default_rng(2), 3, 20, between_seeds=2.0, between_users=2.0).reshape(-1)
    means = means_of(values.reshape(3, 20))
    found = means.difference(values + 0.1, values)
    # What is common to both is gone: no spread is left, so the interval hangs on the number of users alone.
    assert found.value == pytest.approx(0.1)
    assert 0.08 < found.low < 0.1 < found.high < 0.12
    assert found.p_value < 1e-6
    same = means.difference(values, values)
    assert (same.low, same.high, same.p_value, verdict(same)) == (0, 0, 1, "no difference shown")


def test_independent_trainings_need_no_pairing():
    """Trainings that share a seed's number and nothing else: any other numbering gives an interval as good."""
    generator, trials, held = np.random.default_rng(5), 500, 0
    for _ in range(trials):
        users = generator.normal(size=(1, 40))
        a, b = (users + 0.8 * generator.normal(size=(3, 1)) + generator.normal(size=(3, 40)) for _ in range(2))
        found = means_of(a).difference(a.reshape(-1), b.reshape(-1))
        held += found.low <= 0 <= found.high
    assert held / trials >= 0.92


def test_one_seed_leaves_the_users():
    values = np.random.default_rng(3).normal(size=50)
    users = [f"u{number // 2}" for number in range(50)]
    found = CrossedMeans(users, [7] * 50).difference(values)
    of_users = values.reshape(25, 2).mean(axis=1)
    assert (found.error_seeds, found.error_users) == (0, pytest.approx(of_users.std(ddof=1) / 5))
    assert found.p_value == pytest.approx(stats.ttest_1samp(of_users, 0).pvalue)
    assert (found.seeds, found.users) == (1, 25)
    assert CrossedMeans(users).difference(values) == found


def test_unequal_numbers_of_answers_are_a_ratio():
    """Users with more answers count for more; the error is that of a ratio of sums (the linearised one)."""
    counts, generator = np.array([1, 2, 3, 4, 5]), np.random.default_rng(4)
    users = np.repeat(np.arange(5), counts)
    values = generator.normal(size=15)
    found = CrossedMeans(users.tolist()).difference(values)
    rest = np.bincount(users, values - values.mean())
    assert found.error_users == pytest.approx(np.sqrt(5 / 4 * (rest**2).sum()) / 15)


def test_missing_answers_leave_the_others_and_nothing_measured_is_none():
    means = CrossedMeans(["a", "b"] * 3, [0, 0, 1, 1, 2, 2])
    found = means.mean([1.0, 0.0, None, None, 1.0, 1.0])
    assert (found.value, found.examples, found.users, found.seeds) == (0.75, 4, 2, 2)
    empty = means.difference([None] * 6, [1.0] * 6)
    assert (empty.value, empty.low, empty.p_value, empty.seeds) == (None, None, None, 0)
    one_user = means.difference([1.0, None, 0.0, None, None, None])
    assert (one_user.value, one_user.low, one_user.p_value, one_user.seeds) == (0.5, None, None, 2)
    assert means.mean([None] * 6, share=True).low is None


def test_missing_at_random_keeps_the_coverage():
    generator, trials, held = np.random.default_rng(6), 500, 0
    for _ in range(trials):
        values = crossed(generator, 3, 40, between_seeds=0.5, between_users=1.0)
        values[generator.random(values.shape) < 0.15] = np.nan
        found = means_of(values).difference(values.reshape(-1))
        held += found.low <= 0 <= found.high
    assert held / trials >= 0.92


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda seeds: st.lists(st.lists(st.floats(-3, 3), min_size=seeds, max_size=seeds), min_size=2, max_size=6)
    )
)
def test_errors_do_not_hang_on_the_order_and_are_not_below_what_the_fewer_show(rows: list[list[float]]):
    parts = np.array(rows)
    parts -= parts.mean()
    users, seeds = parts.shape
    by_seeds, by_users = crossed_errors(parts)
    if 1 < seeds <= users:
        assert by_seeds == pytest.approx(np.sqrt(seeds) * parts.sum(axis=0).std(ddof=1))
    else:
        assert by_users == pytest.approx(np.sqrt(users) * parts.sum(axis=1).std(ddof=1))
    # No interval is narrower than that of the users, the seeds or the answers alone.
    of_users, of_seeds = parts.sum(axis=1), parts.sum(axis=0)
    least = [users * of_users.var(ddof=1)]
    if seeds > 1:
        rest = parts - of_users[:, None] / seeds - of_seeds / users
        least += [seeds * of_seeds.var(ddof=1), users * seeds * (rest**2).sum() / ((users - 1) * (seeds - 1))]
    assert by_seeds**2 + by_users**2 >= max(least) * (1 - 1e-9)
    assert crossed_errors(parts[::-1, ::-1]) == pytest.approx((by_seeds, by_users), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 2), st.floats(0, 2), st.integers(2, 12), st.integers(2, 300), st.floats(0.01, 5))
def test_a_p_value_is_the_level_at_which_the_interval_ends_at_0(
    by_seeds: float, by_users: float, seeds: int, users: int, value: float
):
    p = p_of(value, (by_seeds, by_users), (seeds, users))
    assert 0 <= p <= 1
    if p > 1e-200:
        assert half_width((by_seeds, by_users), (seeds, users), p) == pytest.approx(value, rel=1e-6)
    assert p_of(-value, (by_seeds, by_users), (seeds, users)) == p


def test_seeds_and_users_that_agree_by_chance_are_no_certainty():
    """0 and 1 answers of two seeds, every user's mean and every seed's the same: the answers still vary."""
    values = np.array([[0.0, 1.0, 0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]]) - 0.6
    found = means_of(values).difference(values.reshape(-1))
    assert found.error_seeds == pytest.approx(0, abs=1e-12)
    assert found.low < found.value == pytest.approx(-0.1)
    assert found.high > 0
    assert verdict(found) == "no difference shown"


def test_three_trainings_alike_by_chance_prove_little():
    """By Satterthwaite's degrees of freedom this is t with hundreds of them: p < 0.0001."""
    p = p_of(5.0, (0.1, 1.0), (3, 300))
    assert p > stats.ttest_1samp([5.0, 5.0 + 0.1 * np.sqrt(3), 5.0 - 0.1 * np.sqrt(3)], 0).pvalue > 0.0003


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1.5, 1.5), st.integers(1, 12))
def test_interval_corrected_p_and_verdict_never_disagree(seed: int, shift: float, comparisons: int):
    values = crossed(np.random.default_rng(seed), 3, 12, between_seeds=0.3, between_users=0.3) + shift
    found = means_of(values).difference(values.reshape(-1))
    row = found.as_dict() | simultaneous(found.as_dict(), comparisons)
    leaves_out = not row["low_corrected"] <= 0 <= row["high_corrected"]
    assert leaves_out == (row["p_corrected"] < 0.05)
    assert (not row["low"] <= 0 <= row["high"]) == (row["p_value"] < 0.05)
    assert (verdict(estimate(row)) in ("an improvement", "worse")) == leaves_out
    assert row["low_corrected"] <= row["low"] <= found.value <= row["high"] <= row["high_corrected"]
    assert row["p_corrected"] == pytest.approx(min(1, comparisons * found.p_value))


def test_what_was_not_measured_has_no_corrected_p():
    row = simultaneous(Difference(None, None, None, 0, 0).as_dict(), 3)
    assert row == {"comparisons": 3, "p_corrected": None, "low_corrected": None, "high_corrected": None}


def test_a_share_stays_within_0_and_1_and_none_of_fifty_is_not_never():
    means = CrossedMeans([f"u{user}" for user in range(50)])
    none, all_ = means.mean([0.0] * 50, share=True), means.mean([1.0] * 50, share=True)
    t2 = stats.t.ppf(0.975, 49) ** 2
    assert (none.low, none.high) == pytest.approx((0, t2 / (50 + t2)))
    assert (all_.low, all_.high) == pytest.approx((50 / (50 + t2), 1))
    # One answer of each user: Wilson's own interval, with t for the normal and U - 1 for U in the variance.
    some = means.mean([1.0] * 5 + [0.0] * 45, share=True)
    wilson = stats.binomtest(5, 50).proportion_ci(method="wilson")
    assert (some.low, some.high) == pytest.approx(wilson, abs=0.006)
    assert 0 < some.low < 0.1 < some.high
    assert 0.47 < means.mean([0.5] * 50, share=True).low < 0.5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_a_share_lies_in_its_interval(values: list[float]):
    found = CrossedMeans([str(place) for place in range(len(values))]).mean(values, share=True)
    assert 0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1


def test_t_interval_by_hand():
    found = mean_over_seeds([1.0, 2.0, 3.0])
    # Half width: t(0.975, 2) = 4.3027 times 1 / sqrt(3).
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - 2.4841, 2 + 2.4841), abs=1e-3)
    # Three comparisons: t(1 - 0.05 / 6, 2) = 7.6488.
    assert mean_over_seeds([1.0, 2.0, 3.0], comparisons=3).high == pytest.approx(2 + 7.6488 / np.sqrt(3), abs=1e-3)
    assert mean_over_seeds([1.0]).low is None
    assert mean_over_seeds([]) is None


@pytest.mark.parametrize(("users", "shown"), [(2, False), (3, False), (30, True), (200, True)])
def test_a_difference_without_spread_is_as_sure_as_its_users_are_many(users, shown):
    for seeds in ([0] * users, [0, 1] * users):
        names = [f"u{i // (len(seeds) // users)}" for i in range(len(seeds))]
        found = CrossedMeans(names, seeds).difference([0.1] * len(seeds))
        assert found.low < found.value < found.high
        assert (found.low > 0) == (found.p_value < 0.05) == shown
    # Nothing to tell apart: no difference, and no doubt about it.
    assert CrossedMeans(["a", "b"]).difference([0, 0]).p_value == 1
