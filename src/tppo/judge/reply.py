"""The reply contract: what a judge model may answer, checked in full. Nothing is repaired, nothing is defaulted.

A reply is exactly one JSON object with exactly the keys asked for; every score is the integer 0 or 1 (not `"1"`,
`true` or `1.0`); the words come back in order, each with its number and its text as sent. Anything else raises
`BrokenReply`: the caller asks again, and abstains when no reply keeps the contract.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tppo.judge.templates import Question, Template

Score = Annotated[int, Field(strict=True, ge=0, le=1)]
Fault = Literal["not_json", "duplicate_key", "schema", "count", "index", "echo", "truncated", "no_text", "logprobs"]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class WordScore(_Strict):
    """Score of word number `i`, which the judge repeats so that a slip is seen."""

    i: int
    word: str
    score: Score


class TokenReply(_Strict):
    words: list[WordScore]
    sentence: Score


class SentenceReply(_Strict):
    sentence: Score


class PairReply(_Strict):
    winner: Literal["a", "b", "tie"]


Reply = TokenReply | SentenceReply | PairReply
_MODELS: dict[Template, type[Reply]] = {"token": TokenReply, "sentence": SentenceReply, "pair": PairReply}


@dataclass
class BrokenReply(Exception):
    """A reply that does not keep the contract."""

    fault: Fault
    detail: str

    def __str__(self) -> str:
        return f"{self.fault}: {self.detail}"


def check_reply(question: Question, content: str | None, finish_reason: str | None) -> Reply:
    """The reply, when it keeps the contract of its question.

    Args:
        content: text of the reply, as the server sent it.
        finish_reason: why the server stopped; anything but "stop" means that the reply may be cut.

    Raises:
        BrokenReply: with what is wrong.
    """
    if finish_reason != "stop":
        raise BrokenReply("truncated", f"finish_reason is {finish_reason!r}, not 'stop'")
    if not content:
        raise BrokenReply("no_text", "the reply holds no text")
    try:
        reply = _MODELS[question.template].model_validate(_one_object(content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the reply"
        raise BrokenReply("schema", f"{place}: {first['msg']}") from None
    if isinstance(reply, TokenReply):
        _check_words(question.words, reply.words)
    return reply


def _one_object(content: str) -> Any:
    try:
        return json.loads(content, object_pairs_hook=_distinct_keys, parse_int=_plain_int, parse_constant=_no_constant)
    except BrokenReply:
        raise
    except (ValueError, RecursionError) as error:
        # ValueError covers malformed JSON and integers of absurd length.
        raise BrokenReply("not_json", str(error)[:200]) from None


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BrokenReply("duplicate_key", "a key occurs twice in one object")
    return found


def _plain_int(digits: str) -> int:
    if digits == "-0":
        raise BrokenReply("schema", "-0 is no score")
    return int(digits)


def _no_constant(name: str) -> NoReturn:
    raise BrokenReply("not_json", f"{name} is no JSON")


def _check_words(asked: tuple[str, ...], given: list[WordScore]) -> None:
    if len(given) != len(asked):
        raise BrokenReply("count", f"{len(given)} words scored, {len(asked)} asked")
    for number, (word, entry) in enumerate(zip(asked, given, strict=True)):
        if entry.i != number:
            raise BrokenReply("index", f"entry {number} has i={entry.i}")
        if entry.word != word:
            raise BrokenReply("echo", f"entry {number} repeats another word than was sent")
