"""Baselines on examples small enough to count by hand."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tppo.core.tables import Example
from tppo.core.text import Event
from tppo.generate.simple import FrequentNext, NearestNeighbour, best_sample, last_query, repeat_recent


def example(user: str, history: Sequence[str], targets: Sequence[str]) -> Example:
    events = [Event("search", query) for query in history]
    return Example(f"{user}-{'-'.join(history)}", user, "train", events, list(targets), datetime(2020, 1, 1))


def events(*queries: str) -> list[Event]:
    return [Event("search", query) for query in queries]


TRAIN = [
    example("u1", ["a", "b"], ["c", "d"]),
    example("u1", ["b", "c"], ["d", "e"]),  # the same user again: counted once
    example("u2", ["b"], ["c", "z"]),
    example("u3", ["x"], ["z", "c"]),
]


def test_followers_are_ranked_by_users_then_by_the_alphabet():
    model = FrequentNext(TRAIN, 2)
    # After b, within two queries: c by u1 and u2; d by u1; z by u2.
    assert model.after["b"] == ["c", "d", "z"]
    assert model([*events("b")]) == ["c", "d"]


def test_an_unknown_query_backs_off_to_the_most_frequent_overall():
    # Users overall: c 3, b 2, z 2, a 1, d 1, e 1, x 1.
    assert FrequentNext(TRAIN, 3)(events("never seen")) == ["c", "b", "z"]
    assert FrequentNext(TRAIN, 3)([]) == ["c", "b", "z"]


def test_too_few_followers_are_filled_from_the_overall_ranking():
    assert FrequentNext(TRAIN, 3)(events("x")) == ["c", "z", "b"]


def test_queries_of_the_history_are_not_suggested():
    assert FrequentNext(TRAIN, 2)(events("c", "b")) == ["d", "z"]


def test_a_small_world_gives_fewer_queries_than_asked():
    assert FrequentNext([example("u1", ["a"], ["b"])], 5)(events("a")) == ["b"]
    assert FrequentNext([], 5)(events("a")) == []


@given(
    st.lists(st.tuples(st.sampled_from("uvw"), st.lists(st.sampled_from("abcd"), min_size=1, max_size=4)), max_size=6),
    st.lists(st.sampled_from("abcd"), max_size=3),
    st.integers(1, 4),
)
def test_frequent_next_is_new_distinct_and_blind_to_the_order_of_the_examples(
    rows: list[tuple[str, list[str]]], history: list[str], count: int
):
    train = [example(user, queries[:-1], queries[-1:]) for user, queries in rows]
    found = FrequentNext(train, count)(events(*history))
    assert len(found) == len(set(found)) <= count
    assert not set(found) & set(history)
    assert found == FrequentNext(train[::-1], count)(events(*history))


def test_the_last_query_is_a_search_if_there_is_one():
    history = [*events("first", "second"), Event("click", "a page")]
    assert last_query(history) == "second"
    assert last_query([Event("click", "A  Page")]) == "a page"
    assert last_query([]) is None


def test_repeats_are_distinct_newest_first_and_never_padded():
    assert repeat_recent(events("a", "b", "a"), 3) == ["a", "b"]
    assert repeat_recent(events("a", "b", "c"), 2) == ["c", "b"]
    assert repeat_recent([Event("click", "page")], 2) == []


def letter_vectors(texts: Sequence[str]) -> np.ndarray:
    """Unit vectors of letter counts: texts that share letters are near."""
    counts = np.array([[text.count(letter) for letter in "abcdefxyz"] for text in texts], dtype=float)
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def test_the_nearest_last_query_gives_its_next_queries():
    train = [example("u1", ["xyz"], ["c", "d"]), example("u2", ["aab"], ["e", "f"]), example("u3", ["aab"], ["z"])]
    nearest = NearestNeighbour(train, 2, letter_vectors)
    assert nearest(events("xyz", "abb")) == ["e", "f"]  # of two equal neighbours the first in file order
    assert nearest(events("xy")) == ["c", "d"]
    assert NearestNeighbour(train, 1, letter_vectors)(events("xy")) == ["c"]
    assert nearest([]) == []
    assert NearestNeighbour([], 2, letter_vectors)(events("a")) == []


def test_the_best_sample_is_the_first_of_equals():
    assert best_sample([0.1, 0.7, -2.0, 0.7]) == 1
