"""Asking many questions of one server: as many at once as it likes, each until it has an outcome.

One worker carries one question through all its attempts. The number of requests under way follows the server's
answers: slow start (it doubles with every round of replies), and once the server has refused (429, 503, or no answer
in time), one more each round and a cut in proportion to the share of refusals (as DCTCP, RFC 8257): a few cost
nothing, a server that refuses everybody is left alone at once. A question that waits out a refusal keeps its place
among those under way, so that waiting throttles the rest, too.

What happens to an attempt:
- a reply that keeps the contract: the verdict;
- a reply that does not: asked again, `reply_attempts` times in all, then the judge abstains;
- busy (429, 503), other 5xx, 408, 409, time-out, broken connection or body: tried again after Retry-After or an
  exponential pause with jitter, `transport_attempts` times in all, then listed as failed;
- any other status (400, 401, 403, 404 ...): everybody would get it, so the run stops with the server's words.

A server that fails `MOST_FAILURES_IN_A_ROW` questions without one success between them ends the run as well.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import openai
import tenacity

from tppo.config import LLMJudge
from tppo.errors import UserError
from tppo.judge.completion import TryAgain, Usage, check_completion, read_completion
from tppo.judge.ledger import Attempt, JudgeLedger, Outcome
from tppo.judge.probability import TOP_LOGPROBS
from tppo.judge.reply import BrokenReply
from tppo.judge.templates import Question, Template, reply_schema

START_CONCURRENCY = 2.0
LONGEST_RETRY_AFTER = 600.0
"""Seconds. A server that asks for more gets its question listed as failed: the next run asks again."""
MOST_FAILURES_IN_A_ROW = 20
CHAT_FORMAT_TOKENS = 64
"""Allowance for the tokens a chat format adds to two messages."""
_BUSY = (429, 503)
_TRY_AGAIN = (408, 409, 429)
_pause = tenacity.wait_random_exponential(multiplier=0.25, max=8)
TOLERATED_REFUSALS = 0.15
"""Share of refusals in a round that is no reason to ask less."""
RETRY_AFTER_JITTER = 0.5
"""A server tells everybody the same whole second: coming back together, most would be refused again."""


class AdaptiveLimit:
    """How many questions may be under way.

    `limit` grows by 1 for every answer until the first refusal (slow start: it doubles each round), then by 1 each
    round; at the end of a round it is multiplied by 1 - excess/2, with excess the share of refusals above
    `TOLERATED_REFUSALS`. A round is `limit` answers.
    """

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.limit = min(START_CONCURRENCY, maximum)
        self.active = 0
        self._slow_start = True
        self._answers = self._refusals = 0
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.active < int(self.limit))
            self.active += 1

    async def __aexit__(self, *_: object) -> None:
        async with self._changed:
            self.active -= 1
            self._changed.notify_all()

    def note(self, refused: bool) -> None:
        """Count an answer of the server."""
        self._answers += 1
        self._refusals += refused
        if not refused:
            self.limit += 1.0 if self._slow_start else 1.0 / self.limit
        elif self._slow_start:
            self._slow_start = False
            self._answers = self._refusals = 1
        if self._answers >= self.limit:
            excess = self._refusals / self._answers - TOLERATED_REFUSALS
            self.limit *= 1 - max(excess, 0.0) / 2
            self._answers = self._refusals = 0
        self.limit = min(max(self.limit, 1.0), float(self.maximum))


class Budget:
    """Tokens and money that may still be spent, enforced before sending.

    What a request can cost at most is set aside before it is sent: a token has at least one byte, so the bytes of
    the messages bound its prompt tokens. When nothing more fits, requests under way are waited for (most cost less
    than was set aside), then `UserError` ends the run.
    """

    def __init__(self, settings: LLMJudge, spent: tuple[int, int]) -> None:
        self.settings = settings
        self.spent = Usage(*spent)
        self.reserved = Usage(0, 0)
        self._changed = asyncio.Condition()

    def estimate(self, question: Question) -> Usage:
        num_bytes = len(question.system.encode()) + len(question.user.encode())
        return Usage(num_bytes + CHAT_FORMAT_TOKENS, self.settings.max_reply_tokens)

    def cost(self, usage: Usage) -> float:
        return (usage.prompt_tokens * self.settings.prompt_price + usage.reply_tokens * self.settings.reply_price) / 1e6

    def _fits(self, estimate: Usage) -> bool:
        total = Usage(*(sum(parts) for parts in zip(self.spent, self.reserved, estimate, strict=True)))
        tokens, money = self.settings.token_budget, self.settings.cost_budget
        return (not tokens or sum(total) <= tokens) and (not money or self.cost(total) <= money)

    async def reserve(self, estimate: Usage) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._fits(estimate) or self.reserved == (0, 0))
            if not self._fits(estimate):
                raise UserError(
                    f"the next request might exceed the budget: {sum(self.spent):,} tokens are spent on "
                    f"{self.settings.model} (cost {self.cost(self.spent):.2f}), judge.token_budget="
                    f"{self.settings.token_budget:,}, judge.cost_budget={self.settings.cost_budget}. Every verdict so "
                    "far is kept: raise the budget and give the same command again"
                )
            self.reserved = Usage(*(a + b for a, b in zip(self.reserved, estimate, strict=True)))

    async def settle(self, estimate: Usage, used: Usage) -> None:
        async with self._changed:
            self.reserved = Usage(*(a - b for a, b in zip(self.reserved, estimate, strict=True)))
            self.spent = Usage(*(a + b for a, b in zip(self.spent, used, strict=True)))
            self._changed.notify_all()


@dataclass
class Tally:
    """Counts for the progress line."""

    done: int = 0
    abstained: int = 0
    failed: int = 0
    attempts: int = 0
    tokens: int = 0
    under_way: int = 0
    problems: dict[str, int] = field(default_factory=dict)


class Asker:
    """Asks questions of one judge model and writes everything to the ledger.

    Args:
        settings: the recipe's `judge` section.
        api_key: sent as bearer token; never logged or stored, and blanked out in the server's error messages.
        on_progress: called after every attempt.
    """

    def __init__(
        self, settings: LLMJudge, ledger: JudgeLedger, api_key: str, on_progress: Callable[[Tally], None]
    ) -> None:
        self.settings = settings
        self.ledger = ledger
        self.api_key = api_key
        self.on_progress = on_progress
        self.tally = Tally()
        self.failures_in_a_row = 0

    async def ask(self, questions: Iterable[tuple[str, Question]]) -> None:
        """Bring every (key, question) to an outcome in the ledger.

        Raises:
            UserError: the server refused for good, or the budget is used up.
        """
        settings = self.settings
        self.limit = AdaptiveLimit(settings.max_concurrency)
        self.budget = Budget(settings, self.ledger.spent(settings.model))
        http_client = openai.DefaultAsyncHttpxClient(
            timeout=settings.timeout,
            # A redirect or a proxy from the environment could carry log data to another host.
            follow_redirects=False,
            trust_env=settings.allow_remote,
        )
        waiting = iter(questions)
        async with openai.AsyncOpenAI(
            base_url=settings.base_url, api_key=self.api_key, max_retries=0, http_client=http_client
        ) as self.client:
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(settings.max_concurrency):
                        workers.create_task(self._work(waiting))
            except ExceptionGroup as group:
                # One worker's error has cancelled the others; a second one says nothing new.
                raise group.exceptions[0] from None

    async def _work(self, waiting: Iterator[tuple[str, Question]]) -> None:
        for key, question in waiting:
            async with self.limit:
                outcome = await self._outcome(key, question)
            self.tally.done += 1
            self.tally.abstained += outcome.status == "abstained"
            self.tally.failed += outcome.status == "failed"
            self.on_progress(self.tally)
            self.failures_in_a_row = self.failures_in_a_row + 1 if outcome.status == "failed" else 0
            if self.failures_in_a_row >= MOST_FAILURES_IN_A_ROW:
                raise UserError(
                    f"{self.settings.base_url} failed {self.failures_in_a_row} questions in a row, the last one with "
                    f"{outcome.problem}. Is the server up? Finished verdicts are kept: give the same command again"
                )

    async def _outcome(self, key: str, question: Question) -> Outcome:
        """Ask until the reply keeps the contract, the judge abstains, or transport fails for good."""
        for number in range(1, self.settings.reply_attempts + 1):
            last = number == self.settings.reply_attempts
            try:
                outcome = await self._reply(key, question, number, last)
            except TryAgain as error:
                return Outcome("failed", None, str(error))
            if outcome:
                return outcome
        raise AssertionError("the last reply attempt has an outcome")

    async def _reply(self, key: str, question: Question, number: int, last: bool) -> Outcome | None:
        """One reply, through as many transport attempts as it takes; None when it broke the contract."""
        retries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TryAgain),
            stop=tenacity.stop_after_attempt(self.settings.transport_attempts),
            wait=_wait,
            reraise=True,
        )
        async for attempt in retries:
            with attempt:
                final_try = attempt.retry_state.attempt_number == self.settings.transport_attempts
                return await self._attempt(key, question, number, last, final_try)
        raise AssertionError("tenacity returns or raises")

    async def _attempt(
        self, key: str, question: Question, number: int, last_reply: bool, final_try: bool
    ) -> Outcome | None:
        """Send once, record the attempt. Returns the outcome, None for a broken reply, or raises `TryAgain`."""
        estimate = self.budget.estimate(question)
        await self.budget.reserve(estimate)
        used = Usage(0, 0)
        started, clock = time.time(), time.monotonic()

        def record(result: str, problem: str | None, reply: str | None, outcome: Outcome | None) -> None:
            attempt = Attempt(started, time.monotonic() - clock, result, problem, reply, *used)
            self.ledger.record(key, self.settings.model, attempt, outcome, question)
            self.tally.attempts += 1
            self.tally.tokens += sum(used)
            self.tally.under_way = self.limit.active
            if result != "ok":
                self.tally.problems[result] = self.tally.problems.get(result, 0) + 1
            self.on_progress(self.tally)

        try:
            completion = read_completion(await self._send(question, number))
            used = completion.usage or estimate
            try:
                verdict = check_completion(question, completion)
            except BrokenReply as error:
                outcome = Outcome("abstained", None, str(error)) if last_reply else None
                record("broken", str(error), completion.content, outcome)
                return outcome
            outcome = Outcome("ok", verdict, None)
            record("ok", None, completion.content, outcome)
            return outcome
        except UserError as error:
            record("refused", str(error), None, None)
            raise
        except TryAgain as error:
            too_long = error.retry_after is not None and error.retry_after > LONGEST_RETRY_AFTER
            outcome = Outcome("failed", None, str(error)) if final_try or too_long else None
            record(error.outcome, error.problem, None, outcome)
            if too_long:
                return outcome
            raise
        finally:
            await self.budget.settle(estimate, used)

    async def _send(self, question: Question, number: int) -> bytes:
        """One HTTP request; returns the body of the answer.

        Raises:
            TryAgain: it may work later.
            UserError: it will not.
        """
        settings = self.settings
        try:
            answer = await self.client.chat.completions.with_raw_response.create(
                model=settings.model,
                messages=question.messages,  # type: ignore[arg-type]
                temperature=settings.temperature if number == 1 else settings.retry_temperature,
                max_tokens=settings.max_reply_tokens,
                response_format=_response_format(settings.response_format, question.template),  # type: ignore[arg-type]
                logprobs=True if question.with_probability else openai.omit,
                top_logprobs=TOP_LOGPROBS if question.with_probability else openai.omit,
            )
        except openai.APITimeoutError:
            self.limit.note(refused=True)  # a queue too long looks like this
            raise TryAgain("timeout", f"no reply within judge.timeout={settings.timeout} s") from None
        except openai.APIStatusError as error:
            if error.status_code in _BUSY:
                self.limit.note(refused=True)
            raise self._status_error(error) from None
        except openai.APIConnectionError as error:
            raise TryAgain("connection", repr(error.__cause__ or error)[:300]) from None
        except openai.APIError as error:
            raise TryAgain("bad_body", str(error)[:300]) from None
        self.limit.note(refused=False)
        return answer.content

    def _status_error(self, error: openai.APIStatusError) -> Exception:
        code = error.status_code
        words = error.message[:1000].replace(self.api_key, "***") if self.api_key else error.message[:1000]
        if code >= 500 or code in _TRY_AGAIN:
            return TryAgain(f"http_{code}", words[:300], retry_after(error.response.headers.get("retry-after")))
        return UserError(
            f"{self.settings.base_url} refused the judge's request with status {code}: {words}\n"
            f"Check judge.base_url, judge.model ({self.settings.model!r}), the key in ${self.settings.api_key_env} and "
            f"judge.response_format ({self.settings.response_format}). Finished verdicts are kept"
        )


def _response_format(kind: str, template: Template) -> dict[str, Any] | openai.Omit:
    if kind == "none":
        return openai.omit
    if kind == "json_object":
        return {"type": "json_object"}
    schema = reply_schema(template)
    if kind == "json_object_schema":
        return {"type": "json_object", "schema": schema}
    return {"type": "json_schema", "json_schema": {"name": template, "strict": True, "schema": schema}}


def retry_after(header: str | None) -> float | None:
    """Seconds to wait by a Retry-After header (a number or an HTTP date); None without one that can be read."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if seconds == seconds else None


def _wait(state: tenacity.RetryCallState) -> float:
    """Retry-After where the server gave it, else an exponential pause; both with jitter."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, TryAgain) else None
    return _pause(state) if asked is None else asked * (1 + RETRY_AFTER_JITTER * random.random())
