"""The record of a judgement: the same for the offline judge and for an LLM judge.

A judge answers with an ordered list of word verdicts, one for each word of the response as
`tppo.core.text.parse_response` splits it, never with a mapping keyed by the word: a repeated word would collapse.
A judge that cannot answer abstains (with a reason); nothing is repaired or set to 0 for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tppo.core.common import UserError, rng
from tppo.core.config import Rubric
from tppo.core.tables import Example
from tppo.core.text import Event, ParsedResponse, parse_response, render_response

Status = Literal["ok", "abstained"]
JUDGE_FILE = "judge.json"
CONSTRUCTED_FILE = "constructed.parquet"
CHUNK = 128
"""Items that the offline judge embeds at a time: it bounds the memory that embeddings take, and what a kill loses."""
IRRELEVANT, RELEVANT = 1, 2
"""Classes of a word. Class 0 (separators, masked tokens) arises only when words are mapped to tokens."""


@dataclass(frozen=True)
class JudgeItem:
    """What a judge sees: the history (oldest first), the user's true next queries, and the response."""

    history: list[Event]
    targets: list[str]
    response: str


@dataclass(frozen=True)
class WordVerdict:
    """`score` in the judge's own unit (a cosine, a probability, 0/1), and its decision."""

    score: float
    relevant: bool


@dataclass(frozen=True)
class Verdict:
    """Verdict on a response. When the judge abstained, `words` is None and the sentence part means nothing.

    A judge that was asked for the response only (`judge.template: sentence`) leaves `words` None too, with status ok.
    """

    words: list[WordVerdict] | None
    sentence_score: float
    sentence_relevant: bool
    status: Status
    problem: str | None


class Judge(Protocol):
    """Anything that fills verdicts."""

    name: str
    """Which judge, and which version of its rule."""
    rubrics: tuple[Rubric, ...]
    """What it can judge against."""

    def judge(self, items: Sequence[JudgeItem], rubric: Rubric, description: str | None = None) -> list[Verdict]:
        """One verdict per item, in order. `rubric`: relevance to the targets, or to the history."""

    def save(self, folder: Path) -> None:
        """Write judge.json, from which `tppo.judge.label.saved_judge` makes the same judge again."""


def split_response(response: str) -> ParsedResponse:
    """Queries and words of a response, whatever the task asked for: a judge reads all of it."""
    return parse_response(response, finished=True, num_queries=len(response) + 1)


def verdict_to_row(
    example: Example, sample: int, rubric: Rubric, judge_name: str, response: str, verdict: Verdict
) -> dict[str, Any]:
    """A row of labels.parquet (`tppo.core.tables.LABELS`); ValueError unless words are judged all or none."""
    words = split_response(response).words
    abstained = verdict.status == "abstained"
    judged = None if abstained else verdict.words
    if judged is not None and len(judged) != len(words):
        raise ValueError(f"{judge_name} gave {len(judged)} word verdicts for a response of {len(words)} words")
    return {
        "example_id": example.example_id,
        "split": example.split,
        "sample": sample,
        "rubric": rubric,
        "judge": judge_name,
        "response": response,
        "words": [
            {
                "i": i,
                "word": word.text,
                "start": word.start,
                "end": word.end,
                "query": word.query,
                "score": found.score,
                "label": RELEVANT if found.relevant else IRRELEVANT,
            }
            for i, (word, found) in enumerate(zip(words, judged or [], strict=False))
        ],
        "sentence_score": None if abstained else verdict.sentence_score,
        "sentence_label": None if abstained else int(verdict.sentence_relevant),
        "status": verdict.status,
        "problem": verdict.problem,
    }


def other_user_items(examples: Sequence[Example], seed: int) -> list[JudgeItem]:
    """Each example with the true next queries of a random example of another user as its response.

    UserError when all examples belong to one user.
    """
    if len({example.user_id for example in examples}) < 2:
        raise UserError(
            "calibrating the judge needs examples of at least two users: prepare a log with more users, or "
            "raise label.calibration_examples"
        )
    generator = rng(seed, "judge", "other_user")
    items = []
    for example in examples:
        other = example
        while other.user_id == example.user_id:
            other = examples[int(generator.integers(len(examples)))]
        items.append(JudgeItem(example.history, example.targets, render_response(other.targets)))
    return items
