"""What is measured on one response, and on all responses of a model: names, how to read them, and how to compute them.

`None` means "cannot be measured here" and is never replaced by 0. Unparseable responses (see
`tppo.core.text.parse_response`) count as 0 in relevance and in the comparison with the true next queries: an answer
that cannot be shown helps nobody. Form (length, copies, diversity) is measured on whatever text was written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from tppo.core.config import Rubric
from tppo.core.text import Event, normalise_query
from tppo.core.words import split_words


class Metric(NamedTuple):
    """A measure: its name in readings.parquet and metrics.json, and how to read it."""

    name: str
    label: str
    unit: Literal["rate", "number"]
    better: Literal["higher", "lower", "neither"]
    doc: str


NO_JUDGE = TEXT, LOG, DISTANCE = "text", "log", "distance"
"""Readers that are no judge: comparing texts, what a synthetic log knows, the KL from SFT."""
RUBRICS: tuple[Rubric, ...] = ("targets", "history")
_NEXT, _HISTORY = "what the user searched next", "the history"
_BY_RUBRIC: tuple[tuple[Rubric, str, str], ...] = (
    ("targets", _NEXT, "the true next queries"), ("history", _HISTORY, "the user's history"),
)  # fmt: skip


def _by_rubric(*metrics: Metric) -> tuple[Metric, ...]:
    """The measures of each rubric, from texts with {rubric}, {against} and {what}."""
    return tuple(
        metric._replace(**{
            field: getattr(metric, field).format(rubric=rubric, against=against, what=what)
            for field in ("name", "label", "doc")
        })
        for rubric, against, what in _BY_RUBRIC
        for metric in metrics
    )  # fmt: skip


ASKED = _by_rubric(
    Metric("asked_words_{rubric}", "Words relevant to {against} per query asked for", "rate", "higher",
           "share of a query's words judged relevant to {what}, mean over the queries asked for: one that is missing, "
           "copied from the history or repeated is 0, and so is a word's second time in its query"),
    Metric("asked_relevant_{rubric}", "Responses relevant to {against} per query asked for", "rate", "higher",
           "the judge's verdict on the response against {what} (0 or 1) times the share of the queries asked for that "
           "are there and new, mean"),
)  # fmt: skip
"""What counts all that was asked for (`tppo.core.asked`); the first that a judge gives is its headline."""
AS_THE_PAPER = _by_rubric(
    Metric("relevant_{rubric}", "Responses relevant to {against} (as the paper counts)", "rate", "higher",
           "share of responses the judge calls relevant to {what} (sentence template); writing less is free"),
    Metric("words_{rubric}", "Words relevant to {against} (as the paper counts)", "rate", "higher",
           "share of the words written judged relevant to {what} (token template), mean; writing less is free"),
)  # fmt: skip
"""The paper's relevance rates: of what was written."""
RELEVANCE = (*ASKED, *AS_THE_PAPER)
TRUTH = (
    Metric("hit", "Hit", "rate", "higher", "at least one query equals a true next query exactly"),
    Metric("hit_1", "Hit@1", "rate", "higher", "the first query equals a true next query exactly"),
    Metric("hit_3", "Hit@3", "rate", "higher", "one of the first three queries equals a true next query exactly"),
    Metric("overlap", "Overlap", "rate", "higher", "share of the true next queries that were written exactly"),
    Metric("token_f1", "Word F1", "rate", "higher",
           "mean over the true next queries of the best word F1 of any query"),
    Metric("similarity_written", "Similarity, written to true", "number", "higher",
           "mean over the written queries of the largest cosine to a true next query (evaluate.encoder)"),
    Metric("similarity_true", "Similarity, true to written", "number", "higher",
           "mean over the true next queries of the largest cosine to a written query (evaluate.encoder)"),
)  # fmt: skip
KNOWN = (
    Metric("known_queries", "Truly relevant queries", "rate", "higher",
           "share of the queries asked for that are new and that the user of the synthetic log could have searched; no "
           "judge: known from how the log is made"),
    Metric("asked_known_words", "Truly relevant words of the queries asked for", "rate", "higher",
           "as the headline counts, by what the synthetic log knows: share of a query's words that its user could have "
           "searched in a new query, mean over the queries asked for; no judge"),
    Metric("known_words", "Truly relevant words", "rate", "higher",
           "share of the words written that the user of the synthetic log could have searched in a new query; no "
           "judge; writing less is free"),
)  # fmt: skip
"""Only measured where the log is synthetic (`tppo.logs.truth`)."""
FORM = (
    Metric("unparseable", "Unparseable", "rate", "lower", "empty, cut off by the token limit, or too many queries"),
    Metric("response_tokens", "Tokens", "number", "neither", "response length in tokens, end-of-sequence included"),
    Metric("queries_written", "Queries", "number", "neither", "queries in a response"),
    Metric("words_per_query", "Words per query", "number", "neither", "words in a query, mean of the response"),
    Metric("copied_queries", "Copied queries", "rate", "lower", "share of queries equal to a search of the history"),
    Metric("copied_words", "Words from the history", "rate", "neither", "share of words that the history holds"),
    Metric("repeated_queries", "Repeated queries", "rate", "lower",
           "share of queries equal to an earlier one in the response"),
    Metric("repeated_words", "Repeated words", "rate", "neither", "share of words that the response already held"),
)  # fmt: skip
BESIDE = ("copied_words", "repeated_words", "queries_written")
"""What no headline prices, or not in full, and so stands beside each of them."""
CORPUS = (
    Metric("distinct_1", "Distinct words", "rate", "higher", "different words / words, over all responses"),
    Metric("distinct_2", "Distinct word pairs", "rate", "higher", "different neighbouring words / pairs, over all"),
    Metric("distinct_queries", "Distinct queries", "rate", "higher", "different queries / queries, over all"),
)
SCORES = _by_rubric(
    Metric("sentence_score_{rubric}", "Score, against {against}", "number", "higher",
           "the judge's own score of the response against {what}, mean (an LLM judge's: judge.score)"),
)  # fmt: skip
"""Shown of a second judge only."""
KL = Metric(
    "kl_from_sft",
    "KL from SFT, nats",
    "number",
    "neither",
    "log ratio to SFT of a response of its own, sampled anew at this prompt (`tppo read`, distance), mean",
)
PER_RESPONSE = (*RELEVANCE, *KNOWN, *TRUTH, *FORM, KL)
BY_JUDGE = (*RELEVANCE, *SCORES)
"""Measures that every judge gives: a row of theirs says whose they are."""
BY_NAME = {metric.name: metric for metric in (*PER_RESPONSE, *SCORES, *CORPUS)}


def word_f1(query: str, target: str) -> float:
    """Harmonic mean of word precision and recall, words counted with multiplicity. 0 when either is empty."""
    a, b = Counter(split_words(query)), Counter(split_words(target))
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
    words = [word for query in queries for word in split_words(query)]
    searches = {normalise_query(event.text) for event in history if event.kind == "search"}
    known = {word for event in history for word in split_words(normalise_query(event.text))}
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
    words = [split_words(query) for query in queries]
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
