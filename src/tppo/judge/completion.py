"""A chat completion as a server sends it, and the verdict it brings."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tppo.errors import UserError
from tppo.judge.probability import verdict_probabilities
from tppo.judge.reply import check_reply
from tppo.judge.templates import Question


class Usage(NamedTuple):
    prompt_tokens: int
    reply_tokens: int


class TryAgain(Exception):
    """A failure of transport that may pass."""

    def __init__(self, outcome: str, problem: str, retry_after: float | None = None) -> None:
        super().__init__(f"{outcome}: {problem}")
        self.outcome = outcome
        self.problem = problem
        self.retry_after = retry_after


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

    Raises:
        TryAgain: the body is no chat completion.
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
    """The verdict of a completion that keeps the contract, as the ledger stores it.

    Raises:
        BrokenReply: it does not.
        UserError: the server gives no log probabilities, though asked.
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
