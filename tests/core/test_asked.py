"""The value of an answer of which every query asked for counts: by hand, and that writing less never pays."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.core.asked import asked_share, asked_written
from tppo.core.text import Event, parse_response

HISTORY = [Event("search", "red shoes"), Event("click", "blue hat shop")]
RELEVANT = {"blue", "hat", "shoes", "red", "socks"}
WORDS = st.sampled_from(["blue", "hat", "shoes", "red", "socks", "zzz", "yyy", "Blue"])
QUERY = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)
ASKED = 4


def value(queries: list[str], asked: int = ASKED, finished: bool = True) -> float:
    """With a judge that knows the relevant words by heart, as they are, in whichever query."""
    parsed = parse_response("\n".join(queries), finished, asked)
    return asked_share(parsed, [word.text.lower() in RELEVANT for word in parsed.words], HISTORY, asked)


def written(queries: list[str], asked: int = ASKED) -> float:
    return asked_written(parse_response("\n".join(queries), True, asked), HISTORY, asked)


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        (["blue hat"], 1 / 3),  # one good query of three: two are missing
        (["blue hat", "zzz", "yyy"], 1 / 3),  # two bad ones are worth as much as two missing ones
        (["blue hat", "zzz socks"], 0.5),
        (["blue hat", "blue hat"], 1 / 3),
        (["blue hat", "hat blue"], 1 / 3),  # the same words in another order are the same query
        (["blue hat", "Blue  HAT"], 1 / 3),
        (["red shoes"], 0.0),  # a search of the history
        (["shoes red"], 0.0),
        (["blue hat shop"], 2 / 9),  # a click is no search: only `shop` is no relevant word
        (["hat hat hat hat"], 1 / 12),  # a word counts once in its query
        (["blue", "blue hat", "blue hat socks"], 1.0),  # refining a query is what users do
        (["blue hat", "socks", "hat", "blue"], 0.0),  # one more than asked for: unparseable
        ([], 0.0),
    ],
)
def test_the_value_by_hand(queries: list[str], expected: float):
    assert value(queries, asked=3) == pytest.approx(expected)


def test_an_answer_that_was_cut_off_is_worth_nothing():
    assert value(["blue hat"], finished=False) == 0
    assert asked_written(parse_response("blue hat", False, 3), HISTORY, 3) == 0


def test_the_verdict_on_an_answer_is_weighed_by_the_new_queries_that_are_there():
    assert written(["blue hat"], 3) == pytest.approx(1 / 3)
    assert written(["blue hat", "zzz", "hat blue"], 3) == pytest.approx(2 / 3)
    assert written(["red shoes", "zzz"], 3) == pytest.approx(1 / 3)
    assert written(["a", "b", "c", "d"], 3) == 0


@given(st.lists(QUERY, max_size=ASKED - 1), QUERY)
def test_a_query_more_never_lowers_the_value(queries: list[str], more: str):
    assert value([*queries, more]) >= value(queries) - 1e-12
    assert written([*queries, more]) >= written(queries)


@given(st.lists(QUERY, min_size=1, max_size=ASKED), st.data())
def test_leaving_queries_out_or_in_another_order_never_raises_it(queries: list[str], data: st.DataObject):
    left = data.draw(st.lists(st.sampled_from(range(len(queries))), unique=True))
    assert value([queries[place] for place in left]) <= value(queries) + 1e-12
    assert value(random.Random(0).sample(queries, len(queries))) == pytest.approx(value(queries))


@given(st.lists(QUERY, min_size=1, max_size=ASKED - 1), st.data())
def test_repeating_a_query_or_a_word_in_it_never_raises_it(queries: list[str], data: st.DataObject):
    place = data.draw(st.integers(0, len(queries) - 1))
    assert value([*queries, queries[place]]) == pytest.approx(value(queries))
    longer = list(queries)
    longer[place] += " " + data.draw(st.sampled_from(queries[place].split()))
    assert value(longer) <= value(queries) + 1e-12


@given(st.lists(QUERY, min_size=1, max_size=ASKED), st.integers(0, ASKED - 1))
def test_a_relevant_new_query_in_place_of_an_irrelevant_one_never_lowers_it(queries: list[str], place: int):
    place %= len(queries)
    worse, better = list(queries), list(queries)
    worse[place], better[place] = "zzz yyy zzz", "socks hat blue red"
    assert value(better) >= value(worse) - 1e-12


def test_bounds_and_the_best_answer():
    best = ["blue hat", "blue socks", "hat", "blue"]
    assert value(best) == 1.0
    assert all(0 <= value(list(part)) < 1 for n in range(4) for part in itertools.combinations(best, n))


@pytest.mark.parametrize(
    ("response", "history", "value"),
    [
        ("rome hotels\nrome hotels,\nrome, hotels", [], 1 / 3),
        ("rome hotels.", [Event("search", "rome hotels")], 0),
        ("rome hotels", [Event("search", "rome hotels?")], 0),
        ("hotels, hotels", [], 1 / 6),
        ("東京ホテル\n東京ホテル。", [], 1 / 3),
        ("c tutorial\nc# tutorial\nc++ tutorial", [], 1),
        ("...", [], 1 / 3),
    ],
)
def test_punctuation_makes_no_other_query(response, history, value):
    parsed = parse_response(response, True, 3)
    assert asked_share(parsed, [True] * len(parsed.words), history, 3) == pytest.approx(value)
