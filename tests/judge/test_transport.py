"""The judge against a real HTTP server that fails in every way it can (tests/helpers/fault_server.py)."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fault_server import FAULTS, OTHER_SHARE, Settings, read_log, running, truth
from tppo.core.common import UserError
from tppo.core.config import JudgeSettings
from tppo.core.text import Event
from tppo.judge import llm
from tppo.judge.ledger import JudgeLedger
from tppo.judge.llm import AdaptiveLimit, Budget, LLMJudge, Usage, retry_after
from tppo.judge.prompts import judge_question
from tppo.judge.verdict import JudgeItem

MODEL = "judge-model"


def items(count: int, first: int = 0) -> list[JudgeItem]:
    return [
        JudgeItem([Event("search", f"history {i}")], [f"next {i}"], f"first {i}\nsecond query")
        for i in range(first, first + count)
    ]


@pytest.fixture
def ledger_path(tmp_path):
    return tmp_path / "judge.sqlite"


def judge(server, ledger_path, **settings) -> LLMJudge:
    defaults = {"base_url": f"http://127.0.0.1:{server.port}/v1", "model": MODEL, "ledger": str(ledger_path)}
    return LLMJudge(JudgeSettings(**{**defaults, "timeout": 1.0, **settings}))


@pytest.fixture
def short_pauses(monkeypatch):
    """The same retries, sooner."""
    monkeypatch.setattr(llm, "_pause", llm.tenacity.wait_random_exponential(multiplier=0.01, max=0.1))


def right(item: JudgeItem, template: str) -> tuple[list[bool] | None, bool]:
    reply = truth(json.loads(judge_question(item, "targets", template).user))
    words = [word["score"] == 1 for word in reply["words"]] if "words" in reply else None
    return words, reply["sentence"] == 1


@pytest.mark.parametrize("template", ["token", "sentence"])
@pytest.mark.parametrize("response_format", ["json_schema", "none"])
def test_verdicts_are_the_servers_and_are_paid_for_once(ledger_path, template, response_format):
    asked = items(20)
    with running(Settings()) as server:
        first = judge(server, ledger_path, template=template, response_format=response_format)
        verdicts = first.judge([*asked, asked[0]], "targets")
        for item, verdict in zip([*asked, asked[0]], verdicts, strict=True):
            words, sentence = right(item, template)
            assert (verdict.words and [word.relevant for word in verdict.words]) == words
            assert verdict.sentence_relevant == sentence
            assert verdict.status == "ok"
        assert server.stats()["requests"] == 20  # the repeated item was asked once
        again = judge(server, ledger_path, template=template, response_format=response_format)
        assert again.judge([*asked, asked[0]], "targets") == verdicts
        assert server.stats()["requests"] == 20
        judge(server, ledger_path, template=template, model="another").judge(asked[:1], "targets")
        judge(server, ledger_path, template=template, rubrics=["history"]).judge(asked[:1], "history")
        assert server.stats()["requests"] == 22


@pytest.mark.parametrize("template", ["token", "sentence"])
def test_the_score_can_be_the_probability_of_the_verdict(ledger_path, template):
    asked = items(20)
    with running(Settings()) as server:
        first = judge(server, ledger_path, template=template, score="probability")
        assert first.name == f"llm/{MODEL}/{template}-v1-probability"
        verdicts = first.judge(asked, "targets")
        for item, verdict in zip(asked, verdicts, strict=True):
            words, sentence = right(item, template)
            assert (verdict.words and [word.relevant for word in verdict.words]) == words
            assert verdict.sentence_relevant == sentence
            share = OTHER_SHARE / (1 - 10 * 0.01)  # beside the tokens that are no verdict
            assert verdict.sentence_score == pytest.approx(1 - share if sentence else share)
        assert first.judge(asked, "targets") == verdicts
        assert server.stats()["requests"] == 20
        # Verdicts without their probability are other verdicts: neither stands for the other in the ledger.
        plain = judge(server, ledger_path, template=template).judge(asked, "targets")
        assert [verdict.sentence_score for verdict in plain] == [float(v.sentence_relevant) for v in verdicts]
        assert server.stats()["requests"] == 40


def test_a_server_without_log_probabilities_is_said_to_be_one(ledger_path):
    with running(Settings(logprobs=False)) as server:
        with pytest.raises(UserError, match=r"judge\.score=probability needs a server that gives token log prob"):
            judge(server, ledger_path, score="probability").judge(items(2), "targets")
        assert server.stats()["requests"] <= 2


def test_an_empty_response_needs_no_question(ledger_path):
    with running(Settings()) as server:
        (verdict,) = judge(server, ledger_path).judge([JudgeItem([], ["x"], " \n ")], "targets")
        assert (verdict.words, verdict.sentence_relevant, verdict.status) == ([], False, "ok")
        assert server.stats()["requests"] == 0


def test_every_fault_is_outlived(ledger_path, short_pauses, monkeypatch):
    monkeypatch.setattr(llm, "TRANSPORT_ATTEMPTS", 30)
    asked = items(120)
    with running(Settings(fault_rate=0.5, seed=1)) as server:
        verdicts = judge(server, ledger_path, timeout=0.3, reply_attempts=30).judge(asked, "targets")
        assert set(server.stats()["decisions"]) == {*FAULTS, "ok"}
    for item, verdict in zip(asked, verdicts, strict=True):
        assert ([word.relevant for word in verdict.words], verdict.sentence_relevant) == right(item, "token")
    with JudgeLedger(ledger_path) as ledger:
        assert {row["outcome"] for row in ledger.attempts()} == {
            *("ok", "broken", "timeout", "connection", "http_429", "http_500", "http_503"),
        }


def test_broken_replies_are_abstained_on_with_the_raw_reply_kept(ledger_path):
    with running(Settings(fault_rate=1, faults="truncated")) as server:
        verdicts = judge(server, ledger_path, reply_attempts=2).judge(items(5), "targets")
        assert {(v.status, v.words, v.problem.split(":")[0]) for v in verdicts} == {("abstained", None, "truncated")}
        assert server.stats()["requests"] == 10
        judge(server, ledger_path, reply_attempts=2).judge(items(5), "targets")
        assert server.stats()["requests"] == 10  # an abstention is a verdict
    with JudgeLedger(ledger_path) as ledger:
        assert all(row["reply"].startswith("{") for row in ledger.attempts())


def test_what_cannot_be_brought_to_the_server_is_listed_and_asked_again(ledger_path, short_pauses, monkeypatch):
    monkeypatch.setattr(llm, "TRANSPORT_ATTEMPTS", 2)
    with running(Settings(fault_rate=1, faults="500")) as server:
        broken = judge(server, ledger_path)
        with pytest.raises(UserError, match=r"5 of 5 questions .*same command asks only"):
            broken.judge(items(5), "targets")
        assert server.stats()["requests"] == 10
    with JudgeLedger(ledger_path) as ledger:
        assert ledger.totals()[0]["failed"] == 5
    with running(Settings()) as server:
        assert len(judge(server, ledger_path).judge(items(5), "targets")) == 5


def test_a_dead_server_ends_the_run(ledger_path, short_pauses, monkeypatch):
    monkeypatch.setattr(llm, "TRANSPORT_ATTEMPTS", 2)
    with running(Settings()) as server:
        dead = server.port
    settings = JudgeSettings(f"http://127.0.0.1:{dead}/v1", MODEL, ledger=str(ledger_path))
    with pytest.raises(UserError, match="in a row"):
        LLMJudge(settings).judge(items(1000), "targets")


@pytest.mark.parametrize(("path", "status"), [("/nowhere", 404)])
def test_a_refusal_for_good_stops_at_once_with_the_servers_words(ledger_path, path, status, monkeypatch):
    monkeypatch.setenv("TPPO_JUDGE_API_KEY", "secret-key")
    with running(Settings()) as server:
        lost = judge(server, ledger_path, base_url=f"http://127.0.0.1:{server.port}{path}")
        with pytest.raises(UserError, match=f"status {status}") as error:
            lost.judge(items(500), "targets")
        assert "secret-key" not in str(error.value)
        assert server.stats()["requests"] <= 16
    with JudgeLedger(ledger_path) as ledger:
        assert {row["outcome"] for row in ledger.attempts()} == {"refused"}
        assert "secret-key" not in str(ledger.attempts())


def test_tokens_are_never_overspent(ledger_path):
    with running(Settings()) as server:
        estimate = sum(Budget(JudgeSettings(), (0, 0)).estimate(judge_question(items(1)[0], "targets", "token")))
        poor = judge(server, ledger_path, token_budget=10 * estimate, max_reply_tokens=1024)
        with pytest.raises(UserError, match=r"budget.*judge\.token_budget"):
            poor.judge(items(500), "targets")
        with JudgeLedger(ledger_path) as ledger:
            spent, finished = sum(ledger.spent(MODEL)), ledger.totals()[0]["ok"]
        assert 0 < spent <= 10 * estimate
        assert finished > 10  # what was set aside and not used is used later
        with pytest.raises(UserError, match="budget"):
            poor.judge(items(500), "targets")
        with JudgeLedger(ledger_path) as ledger:
            assert sum(ledger.spent(MODEL)) <= 10 * estimate
        richer = judge(server, ledger_path, cost_budget=1e9, prompt_price=1.0, reply_price=2.0)
        assert len(richer.judge(items(50), "targets")) == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_url": "https://api.example.com/v1"}, "allow_remote"),
        ({"base_url": "http://127.0.0.1.example.com/v1"}, "allow_remote"),
        ({"base_url": "http://10.0.0.7:8000/v1"}, "allow_remote"),
        ({"base_url": "127.0.0.1:8000"}, "no http"),
        ({"base_url": "https://api.example.com/v1", "allow_remote": True}, "API key"),
        ({"model": ""}, r"judge\.model"),
        ({"rubrics": []}, "rubrics"),
        ({"max_concurrency": 0}, "positive"),
        ({"cost_budget": 1.0}, "price"),
    ],
)
def test_settings_that_do_not_do(change, message, monkeypatch):
    monkeypatch.delenv("TPPO_JUDGE_API_KEY", raising=False)
    with pytest.raises(UserError, match=message):
        LLMJudge(JudgeSettings(**{"base_url": "http://localhost:1/v1", "model": "m", **change}))


class TestAdaptiveLimit:
    def test_slow_start_doubles_each_round(self):
        limit = AdaptiveLimit(64)
        for expected in (4, 8, 16, 32, 64, 64):
            for _ in range(int(limit.limit)):
                limit.note(refused=False)
            assert limit.limit == expected

    def test_a_server_that_refuses_everybody_is_left_alone(self):
        limit = AdaptiveLimit(64)
        limit.limit = 64.0
        for _ in range(400):
            limit.note(refused=True)
        assert limit.limit == 1

    def test_a_single_refusal_costs_little(self):
        limit = AdaptiveLimit(64)
        limit.limit, limit._slow_start = 20.0, False
        limit.note(refused=True)
        for _ in range(20):
            limit.note(refused=False)
        assert 20 < limit.limit < 21

    @given(st.integers(1, 50), st.lists(st.booleans(), max_size=300))
    def test_it_stays_within_its_bounds(self, maximum, answers):
        limit = AdaptiveLimit(maximum)
        for refused in answers:
            limit.note(refused)
            assert 1 <= limit.limit <= maximum

    def test_no_more_are_under_way_than_it_says(self):
        async def run() -> int:
            limit, most = AdaptiveLimit(8), 0

            async def work() -> None:
                nonlocal most
                async with limit.places:
                    most = max(most, limit.places.borrowed_tokens)
                    await asyncio.sleep(0.001)

            await asyncio.gather(*(work() for _ in range(50)))
            return most

        assert asyncio.run(run()) == 2


@given(
    st.lists(st.tuples(st.integers(0, 900), st.integers(0, 100)), min_size=1, max_size=40), st.integers(1000, 20_000)
)
def test_a_budget_holds_whatever_the_replies_cost(costs, limit):
    """Concurrent requests that cost at most their estimate never exceed the budget."""
    budget = Budget(JudgeSettings(token_budget=limit), (0, 0))

    async def spend(used: Usage) -> None:
        estimate = Usage(900, 100)
        await budget.reserve(estimate)
        await asyncio.sleep(0)
        budget.settle(estimate, used)
        assert sum(budget.spent) <= limit

    async def run() -> list[BaseException | None]:
        return await asyncio.gather(*(spend(Usage(*cost)) for cost in costs), return_exceptions=True)

    results = asyncio.run(run())
    refused = [result for result in results if isinstance(result, UserError)]
    assert all(result is None or isinstance(result, UserError) for result in results)
    assert not refused or sum(budget.spent) + 1000 > limit
    assert budget.reserved == (0, 0)


def test_retry_after():
    assert retry_after(None) is None
    assert retry_after("soon") is None
    assert retry_after("nan") is None
    assert retry_after("3") == 3
    assert retry_after("-3") == 0
    assert 8 < retry_after(formatdate(formatted_now() + 10, usegmt=True)) <= 10


def formatted_now() -> float:
    import time

    return time.time()


def test_retry_after_is_waited_for(ledger_path, monkeypatch):
    """Requests of the same item never come back before the time that the server asked for."""
    monkeypatch.setattr(llm, "TRANSPORT_ATTEMPTS", 20)
    log = ledger_path.with_suffix(".jsonl")
    with running(Settings(fault_rate=0.6, faults="429_retry_after", seed=3, log=str(log))) as server:
        judge(server, ledger_path).judge(items(6), "targets")
    last: dict[str, float] = {}
    waits = Counter()
    for request in sorted(read_log(log), key=lambda request: request.arrived):
        if request.sha256 in last:
            waits[request.arrived - last[request.sha256] >= 0.95] += 1
        if request.decision == "429_retry_after":
            last[request.sha256] = request.ended
    assert waits[True] > 0
    assert waits[False] == 0
