"""How much of what was asked for an answer gives: the value of an answer of which every query asked for counts.

The paper divides by what was written: one good query alone scores 1, and the same query with two bad ones less. Here
the denominator is the task's number of queries, so a query left out is worth as much as an irrelevant one:

    value = 1 / num_queries * sum over the distinct new queries of (relevant words / words of the query)

- A query that was not written is worth 0; an unparseable answer is worth 0 as a whole.
- A query made of the same words as a search of the history is not new and worth 0. Queries of one answer that are made
  of the same words, in whatever order, are one query: the best of them counts.
- A word counts once in its query: from its second time there it is irrelevant. Punctuation at its ends makes no other
  word of it.

Hence no query that is added lowers the value (but one too many makes the answer unparseable), none that is left out
raises it, and neither repeating a word in a query nor repeating a query pays. A word that stands in several queries
counts in each of them, since users refine their queries word by word: counting a word once in an answer would take a
third of the value from the true next queries themselves, and this rule takes less than a hundredth
(docs/evaluation.md). How many words are repeated, and how many stand in the history, is shown beside every headline.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from tppo.core.text import Event, ParsedResponse, normalise_query, parse_response

Key = frozenset[str]
"""What makes two queries one: their words, whatever the order."""
_PART_OF_WORDS = "#@%&*+_"
"""Punctuation that tells words apart at their ends, as in c#; all other is dropped there."""


def asked_share(parsed: ParsedResponse, relevant: Sequence[bool], history: Sequence[Event], num_queries: int) -> float:
    """The value of an answer, in [0, 1], by the verdicts on its words (see above).

    Args:
        parsed: the answer, parsed for this `num_queries`.
        relevant: of each of its words, in order, whether it is relevant.
    """
    assert len(relevant) == len(parsed.words), (len(relevant), len(parsed.words))
    if parsed.problem is not None:
        return 0.0
    verdicts, best = iter(relevant), dict[Key, float]()
    old = _searched(history)
    for words in parsed.query_words:
        first: dict[str, bool] = {}
        for word in words:
            first.setdefault(_word_key(word), next(verdicts))
        if key := frozenset(first) - {""}:
            best[key] = max(best.get(key, 0.0), sum(first.values()) / len(words))
    return sum(share for key, share in best.items() if key not in old) / num_queries


def asked_written(parsed: ParsedResponse, history: Sequence[Event], num_queries: int) -> float:
    """Share of the queries asked for that were written and are new, by the same rules whatever they say: what a verdict
    on the answer as a whole is multiplied with."""
    if parsed.problem is not None:
        return 0.0
    return len(_keys(parsed.query_words) - _searched(history)) / num_queries


def _searched(history: Iterable[Event]) -> set[Key]:
    texts = (event.text for event in history if event.kind == "search")
    return {key for text in texts for key in _keys(parse_response(text, finished=True, num_queries=1).query_words)}


def _keys(queries: Iterable[Sequence[str]]) -> set[Key]:
    return {key for words in queries if (key := frozenset(map(_word_key, words)) - {""})}


def _word_key(word: str) -> str:
    """What makes two words one: their normal form without punctuation at the ends ("hotels," is hotels)."""
    key = normalise_query(word)
    start, end = 0, len(key)
    while start < end and _is_mark(key[start]):
        start += 1
    while end > start and _is_mark(key[end - 1]):
        end -= 1
    return key[start:end] or key


def _is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] == "P" and char not in _PART_OF_WORDS
