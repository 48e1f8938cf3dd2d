"""The answers of an evaluation with everything measured on them: generations.parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tppo.config import Rubric
from tppo.judge.record import IRRELEVANT, RELEVANT, Verdict
from tppo.tables import field, read_table

RUBRICS: tuple[Rubric, ...] = ("targets", "history")


def _rubric_fields(rubric: str, against: str, prefix: str = "") -> list[pa.Field]:
    judge = "second judge's" if prefix else "judge's"
    kinds = (
        ("relevant", pa.float64(), f"1 relevant to {against}, 0 not; unparseable 0"),
        ("words", pa.float64(), f"share of words relevant to {against}; unparseable 0"),
        ("sentence_score", pa.float64(), f"{judge} score of the response as written"),
        ("word_labels", pa.list_(pa.int8()), "1 irrelevant, 2 relevant, per word as written"),
    )
    status = "ok; abstained or not_asked (then the four columns before are null)"
    return [
        *(field(f"{prefix}{name}_{rubric}", kind, doc, True) for name, kind, doc in kinds),
        field(f"{prefix}status_{rubric}", pa.string(), status),
    ]


KNOWN_COLUMNS = ("known_queries", "known_words")
GENERATIONS = pa.schema(
    [
        field("example_id", pa.string(), "example answered"),
        field("user_id", pa.string(), "keyed hash of the user: the cluster of the bootstrap"),
        field("split", pa.string(), "eval1 or eval2"),
        field("model", pa.string(), "sft, an algorithm, untuned, a baseline, or a reference (targets, other_user)"),
        field("response", pa.string(), "text without special tokens"),
        field("queries", pa.list_(pa.string()), "normalised queries, in order"),
        field("words", pa.list_(pa.string()), "words of the response, in order, as judged"),
        field("word_query", pa.list_(pa.int32()), "number of the query each word belongs to"),
        field("finished", pa.bool_(), "the model ended the response itself"),
        field("problem", pa.string(), "why the response is unparseable, else null", True),
        field("unparseable", pa.float64(), "1 when there is a problem"),
        field("response_tokens", pa.float64(), "tokens, end-of-sequence included; null for what no model wrote", True),
        *_rubric_fields("targets", "the true next queries"),
        *_rubric_fields("history", "the history"),
        *_rubric_fields("targets", "the true next queries", "second_"),
        *_rubric_fields("history", "the history", "second_"),
        *[
            field(name, pa.float64(), "see tppo.evaluate.metrics", True)
            for name in (
                "hit",
                "hit_1",
                "hit_3",
                "overlap",
                "token_f1",
                "similarity_written",
                "similarity_true",
                "queries_written",
                "words_per_query",
                "copied_queries",
                "copied_words",
                "repeated_queries",
                "repeated_words",
                *KNOWN_COLUMNS,
            )
        ],
    ]
)
VERDICTS = pa.schema(
    [
        *(GENERATIONS.field(name) for name in ("example_id", "split", "model")),
        field("judge", pa.string(), "the second judge and its version"),
        *(column for column in GENERATIONS if column.name.startswith("second_")),
    ]
)
"""One row for each answer that a second judge read: verdicts.parquet of the stage `rejudge`."""
DISTANCES = pa.schema(
    [
        *(GENERATIONS.field(name) for name in ("example_id", "user_id", "split", "model")),
        field("sampled_tokens", pa.int32(), "tokens of the response, end-of-sequence included"),
        field("kl_from_sft", pa.float64(), "log pi - log pi_sft of the response, in nats; it may be negative"),
    ]
)
"""One row for each response that the stage `distance` samples: distance.parquet."""


def read_generations(folder: Path) -> list[dict[str, Any]]:
    """Rows of a finished evaluate stage.

    Raises:
        UserError: no such file, or no such table.
    """
    path = folder / "generations.parquet"
    if path.exists() and not set(KNOWN_COLUMNS) <= set(pq.read_schema(path).names):
        # An evaluation from before these two were measured: there they are what they are without a known truth.
        old = pa.schema([column for column in GENERATIONS if column.name not in KNOWN_COLUMNS])
        return [{**row, **dict.fromkeys(KNOWN_COLUMNS)} for row in read_table(path, old).to_pylist()]
    return read_table(path, GENERATIONS).to_pylist()


def verdict_columns(verdict: Verdict | None, rubric: str, usable: bool, prefix: str) -> dict[str, Any]:
    """The five columns of a rubric; an abstention, or what the judge was not asked, is null, never a 0."""
    relevant: float | None = None
    share: float | None = None
    labels: list[int] | None = None
    score: float | None = None
    if verdict and verdict.status == "ok":
        relevant = float(usable and verdict.sentence_relevant)
        score = verdict.sentence_score
        if verdict.words is not None:
            labels = [RELEVANT if word.relevant else IRRELEVANT for word in verdict.words]
            share = labels.count(RELEVANT) / len(labels) if usable and labels else 0.0
    return {
        f"{prefix}relevant_{rubric}": relevant,
        f"{prefix}words_{rubric}": share,
        f"{prefix}sentence_score_{rubric}": score,
        f"{prefix}word_labels_{rubric}": labels,
        f"{prefix}status_{rubric}": verdict.status if verdict else "not_asked",
    }
