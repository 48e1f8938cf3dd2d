from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fault_server import OTHER_SHARE, Settings, running
from tppo.core.config import JudgeSettings
from tppo.core.text import Event
from tppo.evaluate.votes import Contest, Vote, vote
from tppo.judge.ledger import Outcome
from tppo.judge.llm import LLMJudge


@pytest.fixture
def judge(tmp_path):
    def make(server, **settings):
        url = f"http://127.0.0.1:{server.port}/v1"
        return LLMJudge(JudgeSettings(url, "m", ledger=str(tmp_path / "judge.sqlite"), **settings))

    return make


def contest(number: int, a: str | None = "x", b: str | None = "y") -> Contest:
    history = [Event("search", f"h {number}")]
    return Contest(history, ["t"], a and f"{a} {number}", b and f"{b} {number}")


def test_both_orders_are_asked_and_a_preferred_place_makes_a_tie(judge):
    contests = [contest(number) for number in range(60)]
    with running(Settings()) as server:
        votes = vote(judge(server), contests, "targets")
        mirrored = vote(judge(server), [Contest(c.history, c.targets, c.b, c.a) for c in contests], "targets")
        assert server.stats()["requests"] == 120  # the mirrored contests are the same questions
    flipped = [v for v in votes if v.flipped]
    assert 0 < len(flipped) < 60
    assert all(v.winner == "tie" for v in flipped)
    assert {v.winner for v in votes if not v.flipped} == {"a", "b"}
    for one, other in zip(votes, mirrored, strict=True):
        assert other == Vote({"a": "b", "b": "a", "tie": "tie"}[one.winner], one.flipped)


def test_what_needs_no_question(judge):
    with running(Settings()) as server:
        contests = [contest(0, None), contest(1, "x", None), contest(2, None, None), contest(3, "z", "z")]
        votes = vote(judge(server), contests, "history")
        assert [v.winner for v in votes] == ["b", "a", "tie", "tie"]
        assert {v.flipped for v in votes} == {None}
        assert server.stats()["requests"] == 0


def test_an_abstention_is_no_vote(judge):
    with running(Settings(fault_rate=1, faults="truncated")) as server:
        assert vote(judge(server, reply_attempts=1), [contest(0)], "targets") == [Vote(None, None)]


def test_a_vote_can_go_by_the_probabilities(judge):
    contests = [contest(number) for number in range(40)]
    with running(Settings()) as server:
        by_verdict = vote(judge(server), contests, "targets")
        votes = vote(judge(server, score="probability"), contests, "targets")
        assert server.stats()["requests"] == 160  # questions of their own
    share = OTHER_SHARE / (1 - 10 * 0.01)
    for graded, plain in zip(votes, by_verdict, strict=True):
        assert (graded.winner, graded.flipped, plain.preference) == (plain.winner, plain.flipped, None)
        assert graded.preference == pytest.approx({"a": 1 - share, "b": share, "tie": 0.5}[graded.winner])


class BiasedJudge:
    """Prefers b to a by so many log-odds, and the first place by so many more."""

    with_probability = True

    def __init__(self, log_odds: float, bias: float, tie: float) -> None:
        self.log_odds, self.bias, self.tie = log_odds, bias, tie

    def answers(self, questions, description=None):
        return [self._answer(log_odds) for log_odds in (self.log_odds, -self.log_odds)]

    def _answer(self, log_odds: float) -> Outcome:
        """Of the place that was called a."""
        logits = {"a": self.bias - log_odds / 2, "b": log_odds / 2 - self.bias, "tie": self.tie}
        total = sum(math.exp(value) for value in logits.values())
        shares = {name: math.exp(value) / total for name, value in logits.items()}
        return Outcome("ok", {"winner": max(shares, key=shares.__getitem__), "probabilities": shares}, None)


@given(log_odds=st.floats(-4, 4), bias=st.floats(-8, 8), tie=st.floats(-6, 2))
def test_a_preferred_place_cancels(log_odds, bias, tie):
    (found,) = vote(BiasedJudge(log_odds, bias, tie), [contest(0)], "targets")
    (unbiased,) = vote(BiasedJudge(log_odds, 0.0, tie), [contest(0)], "targets")
    assert found.preference == pytest.approx(unbiased.preference, rel=1e-6)
    (mirrored,) = vote(BiasedJudge(-log_odds, bias, tie), [contest(0)], "targets")
    assert found.preference + mirrored.preference == pytest.approx(1)
    if abs(log_odds) / 2 > tie + 1e-3 and abs(log_odds) > 1e-3:
        assert found.winner == ("b" if log_odds > 0 else "a")
    if abs(log_odds) / 2 < tie - 1e-3:
        assert found.winner == "tie"


def test_orders_that_exclude_each_other_tie():
    never = {"a": 1.0, "b": 0.0, "tie": 0.0}
    sure = SimpleNamespace(
        with_probability=True,
        answers=lambda questions, _: [Outcome("ok", {"winner": "a", "probabilities": never}, None)] * 2,
    )
    assert vote(sure, [contest(0)], "targets") == [Vote("tie", True, 0.5)]
