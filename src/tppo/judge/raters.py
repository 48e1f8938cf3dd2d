"""Anybody whose labels can be compared: a judge (labels.parquet), or a person (`tppo.judge.sheet`).

Both become the same thing: for every response the answers to its words and to the whole of it. An answer is 1
(relevant), 0 (not), or the reason why there is none. A missing answer is never read as 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tppo.config import Rubric
from tppo.errors import UserError
from tppo.judge.record import IRRELEVANT, RELEVANT, split_response
from tppo.run import sha256_file
from tppo.tables import LABELS, read_table

ResponseKey = tuple[str, int]
"""example_id and sample: which response."""

Missing = Literal["abstained", "not_judged", "unanswered"]
"""A judge abstained; it judges whole responses only (sentence template); a person left the question empty."""

Answer = Literal[0, 1] | Missing

_ANSWERS: Mapping[int, Literal[0, 1]] = {IRRELEVANT: 0, RELEVANT: 1}


@dataclass(frozen=True)
class Judged:
    """Answers about one response. `words` has one entry per word of `response`, in order."""

    response: str
    words: tuple[Answer, ...]
    sentence: Answer


@dataclass(frozen=True)
class Rater:
    """`source` is the file the answers come from, `judged` what it holds of one rubric."""

    name: str
    kind: Literal["judge", "person"]
    source: Path
    sha256: str
    judged: Mapping[ResponseKey, Judged]


def read_judge(path: Path, rubric: Rubric) -> Rater:
    """The labels of one rubric in a labels.parquet.

    Raises:
        UserError: no labels of this rubric; two labels of the same response; a row that contradicts itself.
    """
    rows = read_table(path, LABELS).to_pylist()
    judged: dict[ResponseKey, Judged] = {}
    names = []
    for number, row in enumerate(rows):
        if row["rubric"] != rubric:
            continue
        key = (row["example_id"], row["sample"])
        where = f"{path} row {number} (example {key[0]}, sample {key[1]}, rubric {rubric})"
        if key in judged:
            raise UserError(f"{where} is a second label of this response: keep the labels of one judge in a file")
        judged[key] = _judged(row, where)
        names.append(row["judge"])
    if not judged:
        found = sorted({row["rubric"] for row in rows})
        raise UserError(f"{path} has no labels of rubric '{rubric}' (it has: {found}): set agreement.rubric")
    return Rater(", ".join(sorted(set(names))), "judge", path, sha256_file(path), judged)


def _judged(row: dict[str, Any], where: str) -> Judged:
    words = split_response(row["response"]).words
    if row["status"] == "abstained":
        return Judged(row["response"], _all("abstained", len(words)), "abstained")
    broken = None
    if row["status"] != "ok":
        broken = f"its status is {row['status']!r}, not ok or abstained"
    elif row["sentence_label"] not in (0, 1):
        broken = f"its sentence_label is {row['sentence_label']!r}, not 0 or 1"
    elif row["words"] and [(w["i"], w["word"]) for w in row["words"]] != [(i, w.text) for i, w in enumerate(words)]:
        broken = "its words are not those of its response"
    elif any(word["label"] not in _ANSWERS for word in row["words"] or []):
        broken = f"a word's label is neither {IRRELEVANT} nor {RELEVANT}"
    if broken:
        raise UserError(f"{where} is broken: {broken}. Make the labels anew with `tppo label`")
    # A judge with the sentence template writes no word labels, though the response has words.
    answers: tuple[Answer, ...] = tuple(_ANSWERS[word["label"]] for word in row["words"] or [])
    return Judged(row["response"], answers or _all("not_judged", len(words)), row["sentence_label"])


def _all(answer: Missing, count: int) -> tuple[Answer, ...]:
    return (answer,) * count
