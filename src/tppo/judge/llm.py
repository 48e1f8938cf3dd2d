"""A language model as the judge: questions, the ledger in front of the server, verdicts.

Questions that the ledger knows are answered from it, the rest are put to the server, as many at once as it likes
(`AdaptiveLimit`). One worker carries one question through all its attempts until it has an outcome:
- a reply that keeps the contract: the verdict;
- a reply that does not: asked again, `reply_attempts` times in all, then the judge abstains, and that stays until more
  or longer replies are allowed, or the stage is made anew (`tppo.judge.ledger.Limits`);
- busy (429, 503), other 5xx, 408, 409, time-out, broken connection or body: tried again after Retry-After or an
  exponential pause with jitter, `TRANSPORT_ATTEMPTS` times in all, then listed as failed;
- any other status (400, 401, 403, 404 ...): everybody would get it, so the run stops with the server's words.

Failed questions stop the stage at the end, with everything else kept, so that labels never silently lack rows. A server
that fails `MOST_FAILURES_IN_A_ROW` questions without one success between them ends the run as well.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import openai
import tenacity

from tppo.core.common import UserError, console, progress_bar
from tppo.core.config import JudgeSettings, Rubric, judge_identity
from tppo.core.files import write_json
from tppo.judge.ledger import Attempt, JudgeLedger, Limits, Outcome, ledger_path
from tppo.judge.pace import AdaptiveLimit, Budget, Usage
from tppo.judge.prompts import (
    TEMPLATE_VERSION,
    TOP_LOGPROBS,
    BrokenReply,
    Question,
    Template,
    check_reply,
    judge_question,
    reply_schema,
    verdict_probabilities,
)
from tppo.judge.verdict import JUDGE_FILE, JudgeItem, Verdict, WordVerdict, split_response

MOST_FAILURES_IN_A_ROW = 20
LONGEST_RETRY_AFTER = 600.0
"""Seconds. A server that asks for more gets its question listed as failed: the next run asks again."""
TRANSPORT_ATTEMPTS = 8
"""Tries of one request before it is listed as failed: the next run asks again, and more would hide a dead server."""
RETRY_TEMPERATURE = 0.5
"""Least temperature of a reply after one that broke the contract: at 0 it would be the same again."""
API_KEY_ENV = "TPPO_JUDGE_API_KEY"  # on loopback it may be unset
RETRY_AFTER_JITTER = 0.5
"""A server tells everybody the same whole second: coming back together, most would be refused again."""
_BUSY = (429, 503)
_TRY_AGAIN = (408, 409, 429)
_SECONDS_BETWEEN_LINES = 30.0  # without a terminal
_pause = tenacity.wait_random_exponential(multiplier=0.25, max=8)


class LLMJudge:
    """Implements `tppo.judge.verdict.Judge`. Raises UserError for settings with which nobody may or can be asked.

    Args:
        retry_before: Unix time; abstentions of before are asked again (`tppo.core.run.RunFolder.redone`).
    """

    def __init__(self, settings: JudgeSettings, retry_before: float = 0.0) -> None:
        self.settings = settings
        self.limits = Limits(settings.max_reply_tokens, settings.reply_attempts, retry_before)
        self.api_key = _checked_endpoint(settings)
        self.rubrics = tuple(settings.rubrics)
        self.with_probability = settings.score == "probability"
        self.name = f"llm/{settings.model}/{settings.template}-v{TEMPLATE_VERSION}"
        if self.with_probability:
            self.name += "-probability"

    def judge(self, items: Sequence[JudgeItem], rubric: Rubric, description: str | None = None) -> list[Verdict]:
        """One verdict per item, in order. A response without any word is irrelevant, and nobody is asked.

        UserError when the server refused for good, could not be reached for some items, or the budget is used up.
        """
        verdicts = [Verdict([], 0.0, False, "ok", None)] * len(items)
        asked = [number for number, item in enumerate(items) if split_response(item.response).words]
        template, probability = self.settings.template, self.with_probability
        questions = [judge_question(items[number], rubric, template, probability) for number in asked]
        for number, question, outcome in zip(asked, questions, self.answers(questions, description), strict=True):
            verdicts[number] = _verdict(outcome, question)
        return verdicts

    def answers(self, questions: Sequence[Question], description: str | None = None) -> list[Outcome]:
        """Outcome of every question, in order: from the ledger where it is finished, else from the server.

        The server is asked in the order of the texts: those that begin alike come in a row, so that a server that keeps
        what it computed for a common beginning reads a history once, not once for each answer to it.
        """
        settings, limits = self.settings, self.limits
        temperature, response_format = settings.temperature, settings.response_format
        questions = [replace(q, temperature=temperature, response_format=response_format) for q in questions]
        keys = [question.key(settings.model) for question in questions]
        by_key = dict(zip(keys, questions, strict=True))
        path, description = ledger_path(settings), description or "judging"
        with JudgeLedger(path) as ledger:
            known = self._known(ledger, by_key)
            missing = {key: question for key, question in by_key.items() if key not in known}
            if missing:
                if known:
                    console.print(f"{description}: {len(known)} verdicts from the ledger, {len(missing)} to ask")
                had = ledger.broken_replies(missing, limits)
                asked = sorted(missing.items(), key=lambda pair: (pair[1].system, pair[1].user))
                asker = Asker(settings, ledger, self.api_key)
                asyncio.run(asker.ask([(question, had.get(key, 0)) for key, question in asked], description))
                known = ledger.outcomes(by_key, limits)
        failed = len(by_key) - len(known)
        if failed:
            raise UserError(
                f"{failed} of {len(by_key)} questions could not be brought to {self.settings.base_url} (reasons: "
                f"`tppo ledger --judge.ledger {path}`). The others are kept: the same command asks only for the "
                "missing ones"
            )
        return [known[key] for key in keys]

    def _known(self, ledger: JudgeLedger, questions: Mapping[str, Question]) -> dict[str, Outcome]:
        """Outcomes of those questions, by key, that need not be asked."""
        known = ledger.outcomes(questions, self.limits)
        missing = {key: question for key, question in questions.items() if key not in known}
        settings = self.settings
        # Of a ledger that did not note the temperature only the default may be taken for what it was.
        if not missing or settings.temperature != JudgeSettings.temperature:
            return known
        if adopted := ledger.adopt(missing, settings.model):
            console.print(
                f"judge.ledger {ledger.path}: {adopted} finished requests of an older tppo, which did not note how it "
                f"asked, count as asked with temperature {settings.temperature} and response_format "
                f"{settings.response_format} from now on; another judge.ledger asks anew",
                soft_wrap=True,
                markup=False,
            )
            known = ledger.outcomes(questions, self.limits)
        return known

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
    for name in ("reply_attempts", "max_concurrency", "max_reply_tokens", "timeout"):
        if getattr(settings, name) <= 0:
            raise UserError(f"judge.{name}={getattr(settings, name)} has to be positive")
    if settings.cost_budget and not settings.prompt_price + settings.reply_price:
        raise UserError("judge.cost_budget needs judge.prompt_price and judge.reply_price")
    url = urlsplit(settings.base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UserError(f"judge.base_url={settings.base_url!r} is no http(s) address such as http://127.0.0.1:8000/v1")
    try:
        local = ipaddress.ip_address(url.hostname).is_loopback
    except ValueError:
        local = url.hostname == "localhost"
    if not local and not settings.allow_remote:
        raise UserError(
            f"judge.base_url sends users' log data to {url.hostname}, which is not this machine: give "
            "--judge.allow_remote true if that is allowed"
        )
    key = os.environ.get(API_KEY_ENV, "")
    if not key and not local:
        raise UserError(f"{url.hostname} needs an API key: put it into the environment variable {API_KEY_ENV}")
    return key or "none"  # the client library insists on one


class TryAgain(Exception):
    """A failure of transport that may pass."""

    def __init__(self, outcome: str, problem: str, retry_after: float | None = None) -> None:
        super().__init__(f"{outcome}: {problem}")
        self.outcome = outcome
        self.problem = problem
        self.retry_after = retry_after


class Asker:
    """Asks questions of one judge model and writes every attempt and outcome to the ledger.

    The API key is sent as bearer token; never logged or stored, and blanked out in the server's error messages.
    """

    def __init__(self, settings: JudgeSettings, ledger: JudgeLedger, api_key: str) -> None:
        self.settings = settings
        self.ledger = ledger
        self.api_key = api_key
        self.limit = AdaptiveLimit(settings.max_concurrency)
        self.budget = Budget(settings, ledger.spent(settings.model))
        self.outcomes: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.tokens = self.failures_in_a_row = 0

    async def ask(self, questions: Sequence[tuple[Question, int]], description: str) -> None:
        """Bring every question to an outcome in the ledger; each comes with the number of broken replies it has had.

        UserError: the server refuses, or the budget is spent.
        """
        settings = self.settings
        # A redirect or a proxy from the environment could carry log data to another host.
        http_client = openai.DefaultAsyncHttpxClient(
            timeout=settings.timeout, follow_redirects=False, trust_env=settings.allow_remote
        )
        self.client = openai.AsyncOpenAI(
            base_url=settings.base_url, api_key=self.api_key, max_retries=0, http_client=http_client
        )
        waiting = iter(questions)
        with progress_bar(note=True, lines=False) as self.bar:
            self.bar.add_task(description, total=len(questions), note="")
            self.started = self.last_line = time.monotonic()
            try:
                async with self.client, asyncio.TaskGroup() as workers:
                    for _ in range(settings.max_concurrency):
                        workers.create_task(self._work(waiting))
            except ExceptionGroup as group:
                # One worker's error has cancelled the others; a second one says nothing new.
                raise group.exceptions[0] from None

    async def _work(self, waiting: Iterator[tuple[Question, int]]) -> None:
        for question, broken in waiting:
            async with self.limit.places:
                outcome = await self._outcome(question, broken)
            self.outcomes[outcome.status] += 1
            self._show()
            self.failures_in_a_row = self.failures_in_a_row + 1 if outcome.status == "failed" else 0
            if self.failures_in_a_row >= MOST_FAILURES_IN_A_ROW:
                raise UserError(
                    f"{self.settings.base_url} failed {self.failures_in_a_row} questions in a row, the last one with "
                    f"{outcome.problem}. Is the server up? Finished verdicts are kept: give the same command again"
                )

    async def _outcome(self, question: Question, broken: int) -> Outcome:
        """Ask until the reply keeps the contract, the judge abstains, or transport fails for good."""
        attempts = self.settings.reply_attempts
        for reply_number in range(min(broken + 1, attempts), attempts + 1):
            async for again in tenacity.AsyncRetrying(retry=tenacity.retry_if_exception_type(TryAgain), wait=_wait):
                with again:
                    outcome = await self._attempt(question, reply_number, again.retry_state.attempt_number)
            if outcome:
                return outcome
        raise AssertionError("the last reply attempt has an outcome")

    async def _attempt(self, question: Question, reply_number: int, send_number: int) -> Outcome | None:
        """Send once and record what came of it: an outcome, or None when the reply broke the contract.

        What `_send` raises is raised again, except for the last TryAgain, which is an outcome.
        """
        settings = self.settings
        estimate = self.budget.estimate(question)
        await self.budget.reserve(estimate)
        used, reply, outcome = Usage(0, 0), None, None
        result, problem = "ok", None
        raised: Exception | None = None
        started, clock = time.time(), time.monotonic()
        try:
            completion = read_completion(await self._send(question, reply_number))
            used, reply = completion.usage or estimate, completion.content
            outcome = Outcome("ok", check_completion(question, completion), None)
        except BrokenReply as error:
            result, problem = "broken", str(error)
            if reply_number == settings.reply_attempts:
                outcome = Outcome("abstained", None, problem)
        except TryAgain as error:
            result, problem = error.outcome, error.problem
            if send_number == TRANSPORT_ATTEMPTS or (error.retry_after or 0) > LONGEST_RETRY_AFTER:
                outcome = Outcome("failed", None, str(error))
            else:
                raised = error
        except UserError as error:
            result, problem, raised = "refused", str(error), error
        finally:
            self.budget.settle(estimate, used)
        seconds = time.monotonic() - clock
        attempt = Attempt(started, seconds, result, problem, reply, *used, settings.max_reply_tokens, reply_number)
        self.ledger.record(question.key(settings.model), settings.model, attempt, outcome, question)
        self.tokens += sum(used)
        if result != "ok":
            self.problems[result] += 1
        self._show()
        if raised:
            raise raised
        return outcome

    async def _send(self, question: Question, reply_number: int) -> bytes:
        """One HTTP request; returns the body of the answer. TryAgain: it may work later; UserError: it will not."""
        settings = self.settings
        try:
            answer = await self.client.chat.completions.with_raw_response.create(
                model=settings.model,
                messages=question.messages,  # type: ignore[arg-type]
                temperature=max(settings.temperature, RETRY_TEMPERATURE if reply_number > 1 else 0),
                max_tokens=settings.max_reply_tokens,
                response_format=_response_format(settings.response_format, question.template),
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
        code, words = error.status_code, error.message[:1000].replace(self.api_key, "***")
        if code >= 500 or code in _TRY_AGAIN:
            return TryAgain(f"http_{code}", words[:300], retry_after(error.response.headers.get("retry-after")))
        return UserError(
            f"{self.settings.base_url} refused the judge's request with status {code}: {words}\n"
            f"Check judge.base_url, judge.model ({self.settings.model!r}), the key in ${API_KEY_ENV} and "
            f"judge.response_format ({self.settings.response_format}). Finished verdicts are kept"
        )

    def _show(self) -> None:
        """Rate, abstentions, tokens, problems, time left: on the bar, or without a terminal in a line now and then."""
        (task,) = self.bar.tasks
        now, done = time.monotonic(), self.outcomes.total()
        rate = done / max(now - self.started, 1e-9)
        problems = " ".join(f"{name} {count}" for name, count in sorted(self.problems.items()))
        note = (
            f"{rate:.2f}/s, {self.limit.places.borrowed_tokens} under way, {self.outcomes['abstained']} abstained, "
            f"{self.outcomes['failed']} failed, {self.tokens:,} tokens{f' ({problems})' if problems else ''}"
        )
        self.bar.update(task.id, completed=done, note=note)
        if not console.is_terminal and (now - self.last_line > _SECONDS_BETWEEN_LINES or task.finished):
            self.last_line = now
            left = (task.remaining or 0) / rate if rate else math.inf
            console.print(f"{task.description}: {done}/{task.total}, {note}, {left:.0f} s left", soft_wrap=True)


def _response_format(kind: str, template: Template) -> Any:
    """How the server is held to the reply's schema, by `judge.response_format`."""
    schema = reply_schema(template)
    return {
        "none": openai.omit,
        "json_object": {"type": "json_object"},
        "json_object_schema": {"type": "json_object", "schema": schema},
        "json_schema": {"type": "json_schema", "json_schema": {"name": template, "strict": True, "schema": schema}},
    }[kind]


class Completion(NamedTuple):
    """The parts of a chat completion that are used."""

    content: str | None
    finish_reason: str | None
    usage: Usage | None
    """None when the server does not count, or not in numbers."""
    logprobs: Any = None
    """As the server sent them."""


def read_completion(body: bytes) -> Completion:
    """Read an answer by hand: servers send nearly-completions, and the client library builds them unchecked.

    TryAgain when the body is no chat completion.
    """
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        content, finish_reason = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise TryAgain("bad_body", f"not a chat completion: {error!r}"[:300]) from None
    if not isinstance(content, str | None) or not isinstance(finish_reason, str | None):
        raise TryAgain("bad_body", f"the reply is a {type(content).__name__}, not text")
    counts = answer.get("usage")
    counts = counts if isinstance(counts, dict) else {}
    usage = Usage(counts.get("prompt_tokens"), counts.get("completion_tokens"))  # type: ignore[arg-type]
    counted = all(type(count) is int and 0 <= count < 2**40 for count in usage)
    return Completion(content, finish_reason, usage if counted else None, choice.get("logprobs"))


def check_completion(question: Question, completion: Completion) -> dict[str, Any]:
    """The verdict of a completion that keeps the contract (else BrokenReply), as the ledger stores it.

    UserError when the server gives no log probabilities, though asked.
    """
    if question.with_probability and completion.logprobs is None:
        raise UserError(
            "judge.score=probability needs a server that gives token log probabilities (`logprobs`), and this one "
            "gave none: switch them on there, or take judge.score=verdict"
        )
    verdict = check_reply(question, completion.content, completion.finish_reason).model_dump()
    if question.with_probability:
        found = verdict_probabilities(question.template, completion.content or "", completion.logprobs)
        verdict |= {"probabilities": found} if question.template == "pair" else {"probability": found["1"]}
    return verdict


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
    return None if math.isnan(seconds) else max(seconds, 0.0)


def _wait(state: tenacity.RetryCallState) -> float:
    """Retry-After where the server gave it, else an exponential pause; both with jitter."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, TryAgain) else None
    return _pause(state) if asked is None else asked * (1 + RETRY_AFTER_JITTER * random.random())
