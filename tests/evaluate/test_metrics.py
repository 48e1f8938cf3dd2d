"""Metrics of one response and of all responses, worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.core.text import Event
from tppo.evaluate.metrics import corpus_metrics, form_metrics, similarity_metrics, truth_metrics, word_f1

WORD = st.sampled_from(["a", "b", "c", "d"])
QUERY = st.lists(WORD, min_size=1, max_size=4).map(" ".join)
HISTORY = [Event("search", "red shoes"), Event("click", "blue shoes sale")]


def test_word_f1_by_hand():
    assert word_f1("red shoes", "red boots") == 0.5
    # Precision 2/3, recall 2/2: the second "red" finds no partner.
    assert word_f1("red red shoes", "red shoes") == pytest.approx(0.8)
    assert word_f1("", "red") == 0.0


@given(QUERY, QUERY)
def test_word_f1_is_symmetric_and_bounded(a: str, b: str):
    assert 0 <= word_f1(a, b) <= 1
    assert word_f1(a, b) == word_f1(b, a)
    assert word_f1(a, a) == 1


def test_truth_metrics_count_missing_queries_and_unusable_answers():
    targets = ["red shoes", "blue hat"]
    found = truth_metrics(["red shoes"], targets, True)
    assert found == {"hit": 1.0, "hit_1": 1.0, "hit_3": 1.0, "overlap": 0.5, "token_f1": 0.5}
    assert set(truth_metrics([], targets, True).values()) == {0.0}
    assert set(truth_metrics(targets, targets, False).values()) == {0.0}


def test_hit_at_k_looks_at_the_first_k_queries_and_at_every_target():
    targets = ["red shoes", "blue hat"]
    for place, expected in ((0, (1, 1, 1)), (2, (0, 1, 1)), (3, (0, 0, 1))):
        queries = ["a", "b", "c", "d"]
        queries[place] = "blue hat"
        found = truth_metrics(queries, targets, True)
        assert (found["hit_1"], found["hit_3"], found["hit"]) == expected


def test_similarity_has_two_directions():
    east, north, between = np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([0.6, 0.8])
    found = similarity_metrics(np.array([east, between]), np.array([east]), True)
    assert found["similarity_written"] == pytest.approx((1 + 0.6) / 2)  # each written query finds its best
    assert found["similarity_true"] == pytest.approx(1)  # the only true one is found
    found = similarity_metrics(np.array([east]), np.array([east, north]), True)
    assert (found["similarity_written"], found["similarity_true"]) == (1.0, 0.5)
    nothing = {"similarity_written": 0.0, "similarity_true": 0.0}
    assert similarity_metrics(np.array([east]), np.array([east]), False) == nothing
    assert similarity_metrics(np.zeros((0, 2)), np.array([east]), True) == nothing


@given(st.lists(QUERY, max_size=4), st.lists(QUERY, min_size=1, max_size=3, unique=True))
def test_truth_metrics_are_consistent(queries: list[str], targets: list[str]):
    found = truth_metrics(queries, targets, True)
    assert found["hit"] == (found["overlap"] > 0)
    assert found["hit_1"] <= found["hit_3"] <= found["hit"]
    assert found["overlap"] <= found["token_f1"] + 1e-12 <= 1 + 1e-9


def test_form_metrics_by_hand():
    found = form_metrics(["red shoes", "green shoes", "red shoes"], HISTORY)
    assert found["queries_written"] == 3
    assert found["words_per_query"] == 2
    assert found["copied_queries"] == pytest.approx(2 / 3)  # only searches count as copies, not clicks
    assert found["copied_words"] == pytest.approx(5 / 6)
    assert found["repeated_queries"] == pytest.approx(1 / 3)
    assert found["repeated_words"] == pytest.approx(1 / 2)  # red, green and shoes are three of six


def test_a_click_text_is_not_a_copied_search():
    assert form_metrics(["blue shoes sale"], HISTORY)["copied_queries"] == 0


def test_an_empty_response_has_no_shares():
    found = form_metrics([], HISTORY)
    assert found.pop("queries_written") == 0
    assert set(found.values()) == {None}


def test_corpus_metrics_by_hand():
    found = corpus_metrics([["a b c", "a b"], ["a b c"], []])
    assert found["distinct_1"] == pytest.approx(3 / 8)
    assert found["distinct_2"] == pytest.approx(2 / 5)  # pairs do not cross queries
    assert found["distinct_queries"] == pytest.approx(2 / 3)
    assert set(corpus_metrics([[]]).values()) == {None}
