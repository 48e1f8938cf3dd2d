"""What is measured on one response, and on all responses of a model.

Every number of one response lands in a column of generations.parquet, so that any table of the report can
be computed again from that file. `None` means "cannot be measured here" and is never replaced by 0.

Unparseable responses (see `tppo.core.text.parse_response`) count as 0 in relevance and in the comparison with the
true next queries: an answer that cannot be shown helps nobody. Form (length, copies, diversity) is measured
on whatever text was written.

The answers of an evaluation with everything measured on them: generations.parquet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tppo.core.config import Rubric
from tppo.core.tables import field, read_table
from tppo.core.text import Event, normalise_query
from tppo.judge.verdict import IRRELEVANT, RELEVANT, Verdict


@dataclass(frozen=True)
class Metric:
    """A column of the tables: its name in generations.parquet and metrics.json, and how to read it."""

    name: str
    label: str
    unit: Literal["rate", "number"]
    better: Literal["higher", "lower", "neither"]
    doc: str


RELEVANCE = (
    Metric(
        "relevant_targets",
        "Relevant to what the user really searched next",
        "rate",
        "higher",
        "share of responses the judge calls relevant to the true next queries (sentence template)",
    ),
    Metric(
        "words_targets",
        "Relevant words, against what the user searched next",
        "rate",
        "higher",
        "share of a response's words judged relevant to the true next queries (token template), mean",
    ),
    Metric(
        "relevant_history",
        "Relevant to the history",
        "rate",
        "higher",
        "share of responses the judge calls relevant to the user's history (sentence template)",
    ),
    Metric(
        "words_history",
        "Relevant words, against the history",
        "rate",
        "higher",
        "share of a response's words judged relevant to the history (token template), mean",
    ),
)
TRUTH = (
    Metric("hit", "Hit", "rate", "higher", "at least one query equals a true next query exactly"),
    Metric("hit_1", "Hit@1", "rate", "higher", "the first query equals a true next query exactly"),
    Metric("hit_3", "Hit@3", "rate", "higher", "one of the first three queries equals a true next query exactly"),
    Metric("overlap", "Overlap", "rate", "higher", "share of the true next queries that were written exactly"),
    Metric(
        "token_f1",
        "Word F1",
        "rate",
        "higher",
        "mean over the true next queries of the best word F1 of any query",
    ),
    Metric(
        "similarity_written",
        "Similarity, written to true",
        "number",
        "higher",
        "mean over the written queries of the largest cosine to a true next query (evaluate.encoder)",
    ),
    Metric(
        "similarity_true",
        "Similarity, true to written",
        "number",
        "higher",
        "mean over the true next queries of the largest cosine to a written query (evaluate.encoder)",
    ),
)
KNOWN = (
    Metric(
        "known_queries",
        "Truly relevant queries",
        "rate",
        "higher",
        "share of the queries asked for that are new and that the user of the synthetic log could have searched; no "
        "judge: known from how the log is made",
    ),
    Metric(
        "known_words",
        "Truly relevant words",
        "rate",
        "higher",
        "share of the words written that the user of the synthetic log could have searched in a new query; no judge",
    ),
)
"""Only measured where the log is synthetic (`tppo.logs.truth`)."""
FORM = (
    Metric(
        "unparseable",
        "Unparseable",
        "rate",
        "lower",
        "empty, cut off by the token limit, or too many queries",
    ),
    Metric(
        "response_tokens",
        "Tokens",
        "number",
        "neither",
        "response length in tokens, end-of-sequence included",
    ),
    Metric("queries_written", "Queries", "number", "neither", "queries in a response"),
    Metric("words_per_query", "Words per query", "number", "neither", "words in a query, mean of the response"),
    Metric(
        "copied_queries",
        "Copied queries",
        "rate",
        "lower",
        "share of queries equal to a search of the history",
    ),
    Metric("copied_words", "Words from the history", "rate", "neither", "share of words that the history holds"),
    Metric(
        "repeated_queries",
        "Repeated queries",
        "rate",
        "lower",
        "share of queries equal to an earlier one in the response",
    ),
    Metric(
        "repeated_words",
        "Repeated words",
        "rate",
        "neither",
        "share of words that the response already held",
    ),
)
CORPUS = (
    Metric("distinct_1", "Distinct words", "rate", "higher", "different words / words, over all responses"),
    Metric(
        "distinct_2",
        "Distinct word pairs",
        "rate",
        "higher",
        "different neighbouring words / pairs, over all",
    ),
    Metric("distinct_queries", "Distinct queries", "rate", "higher", "different queries / queries, over all"),
)
SCORES = (
    Metric(
        "sentence_score_targets",
        "Score, against what the user searched next",
        "number",
        "higher",
        "the judge's own score of the response against the true next queries, mean (an LLM judge's: judge.score)",
    ),
    Metric(
        "sentence_score_history",
        "Score, against the history",
        "number",
        "higher",
        "the judge's own score of the response against the history, mean (an LLM judge's: judge.score)",
    ),
)
SECOND = tuple(
    replace(metric, name=f"second_{metric.name}", label=f"{metric.label} (second judge)")
    for metric in (*RELEVANCE, *SCORES)
)
"""The same by `evaluate.second_judge`."""
KL = Metric(
    "kl_from_sft",
    "KL from SFT, nats",
    "number",
    "neither",
    "log ratio to SFT of a response of its own, sampled anew at this prompt (`tppo distance`), mean",
)
PER_RESPONSE = (*RELEVANCE, *SECOND, *KNOWN, *TRUTH, *FORM, KL)
BY_NAME = {metric.name: metric for metric in (*PER_RESPONSE, *CORPUS)}


def word_f1(query: str, target: str) -> float:
    """Harmonic mean of word precision and recall, words counted with multiplicity. 0 when either is empty."""
    a, b = Counter(query.split()), Counter(target.split())
    common = sum((a & b).values())
    return 2 * common / (sum(a.values()) + sum(b.values())) if common else 0.0


def truth_metrics(queries: Sequence[str], targets: Sequence[str], usable: bool) -> dict[str, float]:
    """hit (of all queries, the first, the first three), overlap and token_f1 against the true next queries.

    Both are already normalised (`tppo.core.text.normalise_query`). `usable` False (unparseable) gives 0 for all.
    """
    assert targets, "an example without targets is no example"
    shown = list(queries) if usable else []
    found = [target in shown for target in targets]
    best = [max((word_f1(query, target) for query in shown), default=0.0) for target in targets]
    return {
        "hit": float(any(found)),
        "hit_1": float(not set(shown[:1]).isdisjoint(targets)),
        "hit_3": float(not set(shown[:3]).isdisjoint(targets)),
        "overlap": sum(found) / len(found),
        "token_f1": sum(best) / len(best),
    }


def similarity_metrics(written_QD: np.ndarray, targets_TD: np.ndarray, usable: bool) -> dict[str, float]:
    """similarity_written and similarity_true from unit embeddings of the queries and of the true next queries.

    The two directions are BERTScore's precision and recall (Zhang et al., ICLR 2020) with whole queries for tokens. 0
    when `usable` is False or nothing was written.
    """
    if not usable or not len(written_QD):
        return {"similarity_written": 0.0, "similarity_true": 0.0}
    cosine_QT = written_QD @ targets_TD.T
    return {
        "similarity_written": float(cosine_QT.max(axis=1).mean()),
        "similarity_true": float(cosine_QT.max(axis=0).mean()),
    }


def form_metrics(queries: Sequence[str], history: Sequence[Event]) -> dict[str, float | None]:
    """Copy and repetition shares, queries and words per query; None where there is nothing to divide by."""
    words = [word for query in queries for word in query.split()]
    searches = {normalise_query(event.text) for event in history if event.kind == "search"}
    known = {word for event in history for word in normalise_query(event.text).split()}
    return {
        "queries_written": float(len(queries)),
        "words_per_query": len(words) / len(queries) if queries else None,
        "copied_queries": _share(query in searches for query in queries),
        "copied_words": _share(word in known for word in words),
        "repeated_queries": _share(query in queries[:number] for number, query in enumerate(queries)),
        "repeated_words": 1 - len(set(words)) / len(words) if words else None,
    }


def corpus_metrics(responses: Iterable[Sequence[str]]) -> dict[str, float | None]:
    """distinct_1, distinct_2 (pairs within a query) and distinct_queries over all responses of a model."""
    queries = [query for response in responses for query in response]
    words = [query.split() for query in queries]
    singles = [word for query in words for word in query]
    pairs = [pair for query in words for pair in pairwise(query)]
    return {
        "distinct_1": len(set(singles)) / len(singles) if singles else None,
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else None,
        "distinct_queries": len(set(queries)) / len(queries) if queries else None,
    }


def _share(flags: Iterable[bool]) -> float | None:
    values = list(flags)
    return sum(values) / len(values) if values else None


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
