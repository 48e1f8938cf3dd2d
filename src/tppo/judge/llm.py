"""A language model as the judge: questions, the ledger in front of the server, verdicts.

`LLMJudge.judge` fills the same record as the offline judge. Requests that the ledger knows are answered from it;
the rest are asked (`tppo.judge.llm`). An abstention stays one; a question whose transport failed stops the
stage at the end, with everything else kept, so that labels never silently lack rows.

Asking many questions of one server: as many at once as it likes, each until it has an outcome.

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
import ipaddress
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import tenacity

from tppo.core.common import UserError, console, progress_bar
from tppo.core.config import JudgeSettings, Rubric, judge_identity
from tppo.core.files import write_json
from tppo.judge.ledger import Attempt, JudgeLedger, Outcome, ledger_path
from tppo.judge.prompts import (
    TEMPLATE_VERSION,
    TOP_LOGPROBS,
    BrokenReply,
    Question,
    Template,
    TryAgain,
    Usage,
    check_completion,
    judge_question,
    read_completion,
    reply_schema,
)
from tppo.judge.verdict import JUDGE_FILE, JudgeItem, Verdict, WordVerdict, split_response

_SECONDS_BETWEEN_LINES = 30.0  # without a terminal


class LLMJudge:
    """Implements `tppo.judge.verdict.Judge`.

    Raises:
        UserError: a setting is missing, or the endpoint is not on this machine and `allow_remote` is false.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.api_key = _checked_endpoint(settings)
        self.rubrics = tuple(settings.rubrics)
        self.name = f"llm/{settings.model}/{settings.template}-v{TEMPLATE_VERSION}"
        self.with_probability = settings.score == "probability"
        if self.with_probability:
            self.name += "-probability"
        self.ledger_path = ledger_path(settings)

    def judge(self, items: Sequence[JudgeItem], rubric: Rubric, description: str | None = None) -> list[Verdict]:
        """One verdict per item, in order. A response without any word is irrelevant, and nobody is asked.

        Raises:
            UserError: the server refused for good, could not be reached for some items, or the budget is used up.
        """
        questions = [judge_question(item, rubric, self.settings.template, self.with_probability) for item in items]
        asked = [bool(split_response(item.response).words) for item in items]
        outcomes = self.answers([q for q, ask in zip(questions, asked, strict=True) if ask], description)
        waiting = iter(outcomes)
        return [
            _verdict(next(waiting), question) if ask else Verdict([], 0.0, False, "ok", None)
            for question, ask in zip(questions, asked, strict=True)
        ]

    def answers(self, questions: Sequence[Question], description: str | None = None) -> list[Outcome]:
        """Outcome of every question, in order: from the ledger where it is finished, else from the server.

        The server is asked in the order of the texts: those that begin alike come in a row, so that a server that keeps
        what it computed for a common beginning reads a history once, not once for each answer to it.
        """
        by_key = {question.key(self.settings.model): question for question in questions}
        with JudgeLedger(self.ledger_path) as ledger:
            known = ledger.outcomes(by_key)
            missing = [(key, question) for key, question in by_key.items() if key not in known]
            missing.sort(key=lambda entry: (entry[1].system, entry[1].user))
            if missing:
                with _progress(description or "judging", len(missing), len(known)) as show:
                    asyncio.run(Asker(self.settings, ledger, self.api_key, show).ask(missing))
                known |= ledger.outcomes(key for key, _ in missing)
        failed = len(by_key.keys() - known.keys())
        if failed:
            raise UserError(
                f"{failed} of {len(by_key)} questions could not be brought to {self.settings.base_url} (reasons: "
                f"`tppo ledger --judge.ledger {self.ledger_path}`). The others are kept: the same command asks only "
                "for the missing ones"
            )
        return [known[question.key(self.settings.model)] for question in questions]

    def save(self, folder: Path) -> None:
        """Write judge.json: the settings that the verdicts depend on, not where the server is."""
        write_json(folder / JUDGE_FILE, {"kind": "llm", "judge": self.name, "settings": judge_identity(self.settings)})


def _verdict(outcome: Outcome, question: Question) -> Verdict:
    if outcome.verdict is None:
        return Verdict(None, 0.0, False, "abstained", outcome.problem)
    sentence = outcome.verdict["sentence"]
    score = outcome.verdict["probability"] if question.with_probability else sentence
    words = None
    if question.template == "token":
        words = [WordVerdict(float(word["score"]), word["score"] == 1) for word in outcome.verdict["words"]]
    return Verdict(words, float(score), sentence == 1, "ok", None)


def _checked_endpoint(settings: JudgeSettings) -> str:
    """The API key to use, after every setting of the endpoint has been checked."""
    if not settings.model:
        raise UserError("judge.model is empty: name the model as the server at judge.base_url knows it")
    if not settings.rubrics:
        raise UserError("judge.rubrics is empty: name targets, history or both")
    for name in ("reply_attempts", "transport_attempts", "max_concurrency", "max_reply_tokens", "timeout"):
        if getattr(settings, name) <= 0:
            raise UserError(f"judge.{name}={getattr(settings, name)} has to be positive")
    if settings.cost_budget and not settings.prompt_price + settings.reply_price:
        raise UserError("judge.cost_budget needs judge.prompt_price and judge.reply_price")
    url = urlsplit(settings.base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UserError(f"judge.base_url={settings.base_url!r} is no http(s) address such as http://127.0.0.1:8000/v1")
    local = _is_loopback(url.hostname)
    if not local and not settings.allow_remote:
        raise UserError(
            f"judge.base_url sends users' log data to {url.hostname}, which is not this machine: give "
            "--judge.allow_remote true if that is allowed"
        )
    key = os.environ.get(settings.api_key_env, "")
    if not key and not local:
        raise UserError(f"{url.hostname} needs an API key: put it into the environment variable {settings.api_key_env}")
    return key or "none"  # the client library insists on one


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _progress(description: str, total: int, known: int) -> Iterator[Any]:
    """Progress of the questions: rate, abstentions, tokens, problems, time left."""
    if known:
        console.print(f"{description}: {known} verdicts from the ledger, {total} to ask")
    start = last_line = time.monotonic()
    with progress_bar(note=True) as bar:
        task = bar.add_task(description, total=total, note="")

        def show(tally: Tally) -> None:
            nonlocal last_line
            now = time.monotonic()
            rate = tally.done / max(now - start, 1e-9)
            problems = " ".join(f"{name} {count}" for name, count in sorted(tally.problems.items()))
            note = (
                f"{rate:.2f}/s, {tally.under_way} under way, {tally.abstained} abstained, {tally.failed} failed, "
                f"{tally.tokens:,} tokens{f' ({problems})' if problems else ''}"
            )
            bar.update(task, completed=tally.done, note=note)
            if not console.is_terminal and (now - last_line > _SECONDS_BETWEEN_LINES or tally.done == total):
                last_line = now
                left = (total - tally.done) / rate if rate else float("inf")
                console.print(f"{description}: {tally.done}/{total}, {note}, {left:.0f} s left", soft_wrap=True)

        yield show


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

    def __init__(self, settings: JudgeSettings, spent: tuple[int, int]) -> None:
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
        self, settings: JudgeSettings, ledger: JudgeLedger, api_key: str, on_progress: Callable[[Tally], None]
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
