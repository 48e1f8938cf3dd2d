"""The bootstrap on data whose truth is known, and in closed form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo.core.stats import Estimate, UserBootstrap, verdict, win_tie_lose


def clustered(generator: np.random.Generator, users: int = 60, per_user: int = 5) -> tuple[list[str], np.ndarray]:
    """0/1 answers whose chance differs between users: Beta(2, 2), so the true rate is 0.5."""
    chances = generator.beta(2, 2, users)
    values = generator.random((users, per_user)) < chances[:, None]
    return [f"u{user}" for user in range(users) for _ in range(per_user)], values.astype(float).reshape(-1)


def test_intervals_cover_the_truth_95_times_in_100_and_naive_ones_do_not():
    generator = np.random.default_rng(0)
    covered = naive = 0
    trials = 400
    for trial in range(trials):
        users, values = clustered(generator)
        found = UserBootstrap(users, 400, seed=trial).mean(values)
        covered += found.low <= 0.5 <= found.high
        alone = UserBootstrap([str(i) for i in range(len(values))], 400, seed=trial).mean(values)
        naive += alone.low <= 0.5 <= alone.high
    # Binomial standard error of 400 trials at 0.95 is 1.1 points.
    assert 0.915 <= covered / trials <= 0.985
    assert naive / trials < 0.90


def test_interval_agrees_with_the_closed_form_for_one_example_per_user():
    generator = np.random.default_rng(1)
    values = generator.normal(3.0, 2.0, 400)
    found = UserBootstrap([str(i) for i in range(400)], 4000, seed=0).mean(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_differences_are_paired():
    """What both models share cancels: the paired interval of a constant gain has no width."""
    users, values = clustered(np.random.default_rng(2))
    bootstrap = UserBootstrap(users, 500, seed=0)
    found = bootstrap.difference(values + 0.1, values)
    assert found.value == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)
    assert bootstrap.mean(values).high - bootstrap.mean(values).low > 0.05


def test_draws_are_the_same_for_every_question_and_whatever_the_block(monkeypatch: pytest.MonkeyPatch):
    users, values = clustered(np.random.default_rng(3))
    bootstrap = UserBootstrap(users, 300, seed=5)
    assert bootstrap.mean(values) == bootstrap.mean(values)
    monkeypatch.setattr("tppo.core.stats._BLOCK", 60 * 7)
    assert UserBootstrap(users, 300, seed=5).mean(values) == bootstrap.mean(values)


def test_nothing_measured_is_none_never_zero():
    bootstrap = UserBootstrap(["a", "b"], 100, seed=0)
    assert bootstrap.mean([None, float("nan")]) == Estimate(None, None, None, 0, 0)
    one = bootstrap.mean([0.5, None])
    assert (one.value, one.low, one.high, one.examples, one.users) == (0.5, None, None, 1, 1)
    assert verdict(bootstrap.mean([None, None])) == "not measured"
    assert verdict(one) == "not measured"


def test_missing_values_leave_the_mean_of_the_others():
    bootstrap = UserBootstrap(["a", "a", "b", "c"], 100, seed=0)
    found = bootstrap.mean([1.0, None, 0.0, None])
    assert (found.value, found.examples, found.users) == (0.5, 2, 2)


@pytest.mark.parametrize(
    ("low", "high", "better", "said"),
    [
        (0.01, 0.2, "higher", "an improvement"),
        (0.01, 0.2, "lower", "worse"),
        (-0.2, -0.01, "higher", "worse"),
        (-0.2, -0.01, "lower", "an improvement"),
        (-0.1, 0.1, "higher", "no difference shown"),
        (0.0, 0.0, "higher", "no difference shown"),
        (0.0, 0.2, "higher", "no difference shown"),
        (0.1, 0.2, "neither", "higher"),
        (-0.2, -0.1, "neither", "lower"),
    ],
)
def test_verdict(low: float, high: float, better: str, said: str):
    assert verdict(Estimate((low + high) / 2, low, high, 10, 10), better) == said


def test_win_tie_lose_by_hand():
    bootstrap = UserBootstrap(["a", "b", "c", "d", "e"], 200, seed=0)
    found = win_tie_lose(bootstrap, [2, 1, 0, 1 + 1e-9, None], [1, 1, 1, 1, 0])
    assert (found.win, found.tie, found.lose) == (0.25, 0.5, 0.25)
    assert found.net.value == 0
    assert found.net.examples == 4
    wide = win_tie_lose(bootstrap, [0.9, 0.04, 0.05, 0.1, None], [0.5, 0.01, 0.11, 0.2, 0.1], tie=0.05)
    assert (wide.win, wide.tie, wide.lose) == (0.25, 0.25, 0.5)
    empty = win_tie_lose(bootstrap, [None] * 5, [1.0] * 5)
    assert (empty.win, empty.tie, empty.lose, empty.net.value) == (None, None, None, None)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2), st.integers(0, 4)), min_size=1, max_size=20))
def test_swapping_the_models_swaps_wins_and_losses(rows: list[tuple[float, float, int]]):
    bootstrap = UserBootstrap([str(user) for *_, user in rows], 50, seed=0)
    a, b = [row[0] for row in rows], [row[1] for row in rows]
    one, other = win_tie_lose(bootstrap, a, b), win_tie_lose(bootstrap, b, a)
    assert (one.win, one.tie, one.lose) == (other.lose, other.tie, other.win)
    assert one.win + one.tie + one.lose == pytest.approx(1)
    assert bootstrap.difference(a, b).value == pytest.approx(-bootstrap.difference(b, a).value)
