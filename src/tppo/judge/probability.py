"""How probable the verdict 1 was beside the verdict 0, from the token log probabilities of a reply.

A verdict says which of the two was likelier. Their probabilities say by how much, so that responses can be ordered by
a judge that answers nearly all of them alike (G-Eval: Liu et al., EMNLP 2023, section 2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from tppo.judge.reply import BrokenReply

TOP_LOGPROBS = 20
"""Alternatives asked for at each place: the most that OpenAI's interface takes."""
_SENTENCE = re.compile(r'"sentence"\s*:\s*([01])')
_TOLERANCE = 1e-6


def sentence_probability(content: str, logprobs: Any) -> float:
    """P(1) / (P(0) + P(1)) at the place of the sentence's verdict, in [0, 1].

    A verdict that is not among the listed alternatives has probability 0: at least `TOP_LOGPROBS` others were likelier.

    Args:
        content: a reply that keeps the contract (`tppo.judge.reply`).
        logprobs: of the choice, as the server sent it.

    Raises:
        BrokenReply: the log probabilities are not those of this reply, or neither verdict has one.
    """
    tokens = list(_tokens(logprobs))
    if "".join(text for text, _ in tokens) != content:
        raise BrokenReply("logprobs", "the tokens that have log probabilities do not spell the reply")
    place = _SENTENCE.search(content)
    if place is None:
        raise BrokenReply("logprobs", "the reply writes the key of its verdict with escapes")
    start = 0
    for text, alternatives in tokens:
        offset = place.start(1) - start
        if offset < len(text):
            return _share_of_one(text[:offset], alternatives)
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


def _share_of_one(before: str, alternatives: dict[str, float]) -> float:
    """Of the tokens that say 0 or 1 after `before`, the probability of those that say 1."""
    mass = {"0": 0.0, "1": 0.0}
    for token, logprob in alternatives.items():
        verdict = token[len(before) : len(before) + 1]
        if token.startswith(before) and verdict in mass:
            if not logprob <= _TOLERANCE:  # NaN, too
                raise BrokenReply("logprobs", f"{logprob} is no log probability")
            mass[verdict] += math.exp(logprob)
    if not sum(mass.values()):
        raise BrokenReply("logprobs", "neither verdict has a probability")
    return mass["1"] / sum(mass.values())
