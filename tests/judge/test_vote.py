from __future__ import annotations

import pytest
from fault_server import Settings, running

from tppo.config import LLMJudge as JudgeSettings
from tppo.judge.llm import LLMJudge
from tppo.judge.vote import Contest, Vote, vote
from tppo.text import Event


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
