"""Pairwise votes: which of two responses to one history is better (win-tie-lose by vote).

A judge model tends to prefer the place an answer stands in. Every pair is therefore asked in both orders; when the
two answers disagree the vote is a tie, and how often that happens (the flip rate) is reported beside the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tppo.config import Rubric
from tppo.judge.ledger import Outcome
from tppo.judge.llm import LLMJudge
from tppo.judge.templates import pair_question
from tppo.text import Event

Winner = Literal["a", "b", "tie"]
_MIRRORED: dict[str, Winner] = {"a": "b", "b": "a", "tie": "tie"}


@dataclass(frozen=True)
class Contest:
    """Two responses to one history; None in the place of one that is unparseable."""

    history: list[Event]
    targets: list[str]
    a: str | None
    b: str | None


@dataclass(frozen=True)
class Vote:
    """`winner` is None when the judge abstained in either order; `flipped` None when it was not asked or abstained."""

    winner: Winner | None
    flipped: bool | None


def vote(judge: LLMJudge, contests: Sequence[Contest], rubric: Rubric, description: str | None = None) -> list[Vote]:
    """One vote per contest, in order.

    An unparseable response loses to any other without a question, as it scores 0 everywhere else; two of them tie,
    and so do equal ones.
    """
    asked = [(c, c.a, c.b) for c in contests if _decided(c) is None and c.a is not None and c.b is not None]
    questions = [pair_question(c.history, c.targets, a, b, rubric) for c, a, b in asked]
    questions += [pair_question(c.history, c.targets, b, a, rubric) for c, a, b in asked]
    outcomes = judge.answers(questions, description)
    votes = iter(_count(*both) for both in zip(outcomes[: len(asked)], outcomes[len(asked) :], strict=True))
    return [_decided(contest) or next(votes) for contest in contests]


def _decided(contest: Contest) -> Vote | None:
    """The vote that needs no question."""
    if contest.a == contest.b:
        return Vote("tie", None)
    if contest.a is None or contest.b is None:
        return Vote("b" if contest.a is None else "a", None)
    return None


def _count(forward: Outcome, backward: Outcome) -> Vote:
    if forward.verdict is None or backward.verdict is None:
        return Vote(None, None)
    first: Winner = forward.verdict["winner"]
    second = _MIRRORED[backward.verdict["winner"]]
    return Vote(first, False) if first == second else Vote("tie", True)
