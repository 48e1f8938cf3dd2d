"""Votes of the LLM judge between the models' answers: votes.parquet.

`evaluate` votes on the models of one run folder (`evaluate.vote`). The stage `vote` does the same between evaluations
of different run folders, such as the cells of a study: it takes each over under the name `evaluate_<model>`.

Pairwise votes: which of two responses to one history is better (win-tie-lose by vote).

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from tppo.core.common import UserError
from tppo.core.config import Recipe, Rubric
from tppo.core.run import RunFolder
from tppo.core.stages import EVALUATION, MODEL_ORDER, taken_models
from tppo.core.tables import Example, field, write_table
from tppo.core.text import Event
from tppo.evaluate.answers import Answered, answered_examples, read_answers
from tppo.evaluate.compare import model_pairs, voted_pairs
from tppo.judge.ledger import Outcome
from tppo.judge.llm import LLMJudge
from tppo.judge.prompts import pair_question

VOTES = pa.schema(
    [
        field("example_id", pa.string(), "example answered"),
        field("split", pa.string(), "eval1 or eval2"),
        field("model", pa.string(), "the model that is a"),
        field("than", pa.string(), "the model that is b"),
        field("judge", pa.string(), "judge and version"),
        field("rubric", pa.string(), "targets or history: what relevance is judged against"),
        field("winner", pa.string(), "a, b or tie; null when the judge abstained", True),
        field("flipped", pa.bool_(), "the two orders disagreed; null when not asked or abstained", True),
        field(
            "preference",
            pa.float64(),
            "probability that a is better, half that of a tie added; null unless judge.score is probability, and when "
            "not asked or abstained",
            True,
        ),
    ]
)


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """The stage `vote`: writes votes.parquet.

    Raises:
        UserError: not two models to compare, an evaluation that is not finished or lacks its model, or evaluations of
            different examples.
    """
    models = taken_models(recipe)
    if not model_pairs(models):
        raise UserError(
            f"vote compares two of {list(MODEL_ORDER)}, but stage_dirs names the evaluations of {models}: give "
            f"`{EVALUATION}<model>: folder` for each, and `prepare`"
        )
    answers = read_answers(run, models)
    examples = answered_examples(recipe, run, answers, recipe.evaluate.vote_examples)
    votes = vote_rows(recipe, examples, answers)
    write_table(folder / "votes.parquet", votes, VOTES)
    return {
        "votes": len(votes),
        "examples": len(examples),
        "abstained": sum(row["winner"] is None for row in votes),
        "flipped": sum(row["flipped"] is True for row in votes),
    }


def vote_rows(recipe: Recipe, examples: Sequence[Example], answers: Answered) -> list[dict[str, Any]]:
    """The LLM judge's votes on these examples, under the headline's rubric: rows of votes.parquet."""
    judge = LLMJudge(recipe.judge)
    rubric = recipe.reward.rubric
    own = {"judge": judge.name, "rubric": rubric}
    asked = [
        (example, a, b)
        for a, b in voted_pairs(answers)
        for example in examples
        if all(example.example_id in answers[model] for model in (a, b))
    ]
    contests = [
        Contest(e.history, e.targets, *(_readable(answers[model][e.example_id]) for model in pair))
        for e, *pair in asked
    ]
    votes = vote(judge, contests, rubric, "votes")
    return [
        {"example_id": e.example_id, "split": e.split, "model": a, "than": b, **own, **asdict(found)}
        for (e, a, b), found in zip(asked, votes, strict=True)
    ]


def _readable(row: Mapping[str, Any]) -> str | None:
    return row["response"] if row["problem"] is None else None


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
