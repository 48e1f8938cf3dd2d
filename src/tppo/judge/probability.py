"""How probable every verdict was that a reply could have brought, from its token log probabilities.

A verdict says which one was likeliest. Their probabilities say by how much, so that responses can be ordered by
a judge that answers nearly all of them alike (G-Eval: Liu et al., EMNLP 2023, section 2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tppo.judge.reply import BrokenReply
from tppo.judge.templates import Template

TOP_LOGPROBS = 20
"""Alternatives asked for at each place: the most that OpenAI's interface takes."""
_SENTENCE = (re.compile(r'"sentence"\s*:\s*([01])'), ("0", "1"))
_VERDICTS: dict[Template, tuple[re.Pattern[str], tuple[str, ...]]] = {
    "token": _SENTENCE,
    "sentence": _SENTENCE,
    "pair": (re.compile(r'"winner"\s*:\s*"(a|b|tie)"'), ("a", "b", "tie")),
}
"""Where the verdict on the whole stands in a reply, and all that could stand there."""
_TOLERANCE = 1e-6


def verdict_probabilities(template: Template, content: str, logprobs: Any) -> dict[str, float]:
    """Of every verdict on the whole (sentence: 0 and 1; pair: a, b and tie) its probability; they add up to 1.

    A verdict that is not among the listed alternatives has probability 0: at least `TOP_LOGPROBS` others were likelier.

    Args:
        content: a reply that keeps the contract of the template (`tppo.judge.reply`).
        logprobs: of the choice, as the server sent it.

    Raises:
        BrokenReply: the log probabilities are not those of this reply, or no verdict has one.
    """
    pattern, verdicts = _VERDICTS[template]
    tokens = list(_tokens(logprobs))
    if "".join(text for text, _ in tokens) != content:
        raise BrokenReply("logprobs", "the tokens that have log probabilities do not spell the reply")
    place = pattern.search(content)
    if place is None:
        raise BrokenReply("logprobs", "the reply writes its verdict, or the verdict's key, with escapes")
    start = 0
    for text, alternatives in tokens:
        offset = place.start(1) - start
        if offset < len(text):
            return _shares(verdicts, text[:offset], alternatives)
        start += len(text)
    raise AssertionError("the tokens spell the reply, and the verdict stands in it")


def _tokens(logprobs: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """Each token of the reply with the log probabilities of what might have stood there, itself included."""
    try:
        for entry in logprobs["content"]:
            listed = {str(other["token"]): float(other["logprob"]) for other in entry["top_logprobs"]}
            yield entry["token"], listed | {entry["token"]: float(entry["logprob"])}
    except (LookupError, TypeError, ValueError) as error:
        raise BrokenReply("logprobs", f"not the log probabilities of a chat completion: {error!r}"[:300]) from None


def _shares(verdicts: Sequence[str], before: str, alternatives: dict[str, float]) -> dict[str, float]:
    """Of the tokens that begin a verdict after `before`, the share in probability of each verdict."""
    mass = dict.fromkeys(verdicts, 0.0)
    for token, logprob in alternatives.items():
        for verdict in verdicts:
            if token.startswith(before) and _begins(verdict, token[len(before) :]):
                if not logprob <= _TOLERANCE:  # NaN, too
                    raise BrokenReply("logprobs", f"{logprob} is no log probability")
                mass[verdict] += math.exp(logprob)
    total = sum(mass.values())
    if not total:
        raise BrokenReply("logprobs", "no verdict has a probability")
    return {verdict: part / total for verdict, part in mass.items()}


def _begins(verdict: str, text: str) -> bool:
    """Whether `text` is the verdict, its beginning, or the verdict with what may follow it (`tie`, `t`, `tie"}`)."""
    if len(text) <= len(verdict):
        return bool(text) and verdict.startswith(text)
    return text.startswith(verdict) and not text[len(verdict)].isalnum()
