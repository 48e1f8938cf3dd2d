"""Metrics of one response and of all responses, worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.evaluate.metrics import corpus_metrics, form_metrics, truth_metrics, word_f1
from tppo.text import Event

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
    assert truth_metrics(["red shoes"], targets, True) == {"hit": 1.0, "overlap": 0.5, "token_f1": 0.5}
    assert truth_metrics([], targets, True) == {"hit": 0.0, "overlap": 0.0, "token_f1": 0.0}
    assert truth_metrics(targets, targets, False) == {"hit": 0.0, "overlap": 0.0, "token_f1": 0.0}


@given(st.lists(QUERY, max_size=4), st.lists(QUERY, min_size=1, max_size=3, unique=True))
def test_truth_metrics_are_consistent(queries: list[str], targets: list[str]):
    found = truth_metrics(queries, targets, True)
    assert found["hit"] == (found["overlap"] > 0)
    assert found["overlap"] <= found["token_f1"] + 1e-12 <= 1 + 1e-9


def test_form_metrics_by_hand():
    found = form_metrics(["red shoes", "green shoes", "red shoes"], HISTORY)
    assert found["queries_written"] == 3
    assert found["words_per_query"] == 2
    assert found["copied_queries"] == pytest.approx(2 / 3)  # only searches count as copies, not clicks
    assert found["copied_words"] == pytest.approx(5 / 6)
    assert found["repeated_queries"] == pytest.approx(1 / 3)


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
