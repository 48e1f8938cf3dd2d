"""Pairwise votes: which of two responses to one history is better (win-tie-lose by vote).

A judge model tends to prefer the place an answer stands in. Every pair is therefore asked in both orders; when the
two answers disagree the vote is a tie, and how often that happens (the flip rate) is reported beside the result.

A small judge may prefer one place so much that nearly every vote flips. With `judge.score: probability` the vote goes
by the probabilities of a, b and tie instead, as the geometric mean of both orders: a liking for a place multiplies the
odds of a by some factor in one order and divides them by it in the other, so it cancels, and what is left is the
answers' (balanced position calibration, Wang et al., ACL 2024; in log space as in Zheng et al., ICLR 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tppo.core.config import Rubric
from tppo.core.text import Event
from tppo.judge.ledger import Outcome
from tppo.judge.llm import LLMJudge
from tppo.judge.prompts import pair_question

Winner = Literal["a", "b", "tie"]
_MIRRORED: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}


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
    preference: float | None = None
    """Probability that a is better, half that of a tie added: in [0, 1]. Only of a judge that was asked for it."""


def vote(judge: LLMJudge, contests: Sequence[Contest], rubric: Rubric, description: str | None = None) -> list[Vote]:
    """One vote per contest, in order.

    An unparseable response loses to any other without a question, as it scores 0 everywhere else; two of them tie,
    and so do equal ones.
    """
    asked = [(c, c.a, c.b) for c in contests if _decided(c) is None and c.a is not None and c.b is not None]
    probable = judge.with_probability
    questions = [pair_question(c.history, c.targets, a, b, rubric, probable) for c, a, b in asked]
    questions += [pair_question(c.history, c.targets, b, a, rubric, probable) for c, a, b in asked]
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
    if "probabilities" in forward.verdict:
        shares = _balanced(forward.verdict["probabilities"], backward.verdict["probabilities"])
        best = [winner for winner, share in shares.items() if share == max(shares.values())]
        winner = best[0] if len(best) == 1 else "tie"
        return Vote(winner, first != second, shares["a"] + shares["tie"] / 2)
    return Vote(first, False) if first == second else Vote("tie", True)


def _balanced(forward: Mapping[Winner, float], backward: Mapping[Winner, float]) -> dict[Winner, float]:
    """Shares of a, b and tie: the geometric mean of both orders, normalised."""
    means: dict[Winner, float] = {w: math.sqrt(forward[w] * backward[other]) for w, other in _MIRRORED.items()}
    total = sum(means.values())
    if not total:  # each order rules out what the other one says
        return {"a": 0.0, "b": 0.0, "tie": 1.0}
    return {winner: mean / total for winner, mean in means.items()}
