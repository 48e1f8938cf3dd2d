"""The synthetic log: seeded, streaming, noisy, and with something to learn."""

import random
from itertools import islice
from statistics import mean

import pytest

from tppo.core.common import UserError
from tppo.core.config import Recipe, Synthetic
from tppo.core.run import RunFolder, run_stage
from tppo.core.tables import Example, load_examples
from tppo.core.text import EVENT_KINDS
from tppo.logs import prepare, synthetic


def test_seeded_and_a_longer_log_begins_with_the_shorter() -> None:
    short = list(synthetic.generate_rows(Synthetic(users=5), seed=1))
    assert short == list(islice(synthetic.generate_rows(Synthetic(users=9), seed=1), len(short)))
    assert short != list(synthetic.generate_rows(Synthetic(users=5), seed=2))[: len(short)]


def test_generator_streams() -> None:
    assert len(list(islice(synthetic.generate_rows(Synthetic(users=10**9), seed=0), 100))) == 100


def test_events_per_user_kinds_and_times() -> None:
    rows = list(synthetic.generate_rows(Synthetic(users=300), seed=0))
    assert 50 < len(rows) / 300 < 70
    kinds = [row[2] for row in rows]
    assert all(kinds.count(kind) > 100 for kind in EVENT_KINDS)
    user = [prepare.parse_time(row[1]) for row in rows if row[0] == "user000007"]
    times = [time for time in user if time is not None]
    assert times == sorted(times)
    assert {len(row) for row in rows} == {3, 4}


@pytest.mark.parametrize("user", range(12))
def test_true_interests_hold_what_the_user_searches_but_for_the_noise(user: int) -> None:
    possible = synthetic.user_queries(user, Synthetic(), seed=0)
    queries = [
        row[3].split() for row in synthetic.user_rows(user, Synthetic(), seed=0) if row[2] == "search" and len(row) == 4
    ]
    known = [all(synthetic.relevant_words(query, possible)) for query in queries if query]
    # Noise may be a part of what the user could search ("weather"), so a word can be known where the query is not.
    assert all(known[i] for i, query in enumerate(filter(None, queries)) if tuple(query) in possible)
    assert mean(tuple(query) in possible for query in queries if query) > 0.75
    # One to three interests of three to five things; six questions, each as it is or refined in four ways.
    assert 3 * 6 * 5 <= len(possible) <= 3 * 5 * 6 * 5
    assert len(set(possible)) == len(possible)
    assert mean(known) > 0.75


def test_words_of_another_interest_or_thing_are_irrelevant() -> None:
    possible = [("cheap", "flights", "to", "rome"), ("flights", "to", "rome"), ("yoga", "shoes")]
    marks = synthetic.relevant_words(["cheap", "flights", "to", "paris", "yoga"], possible)
    assert marks == [True, True, True, False, False]
    assert synthetic.relevant_words(["paris"], possible) == [False]
    assert synthetic.relevant_words([], possible) == []
    assert synthetic.relevant_words(["rome"], []) == [False]


def test_a_word_pays_as_often_as_the_query_holds_it() -> None:
    """What a policy paid for a set of words learnt to write: "do in do in do"."""
    possible = [("things", "to", "do", "in", "rome"), ("best", "best", "laptop")]
    assert synthetic.relevant_words(["do", "in", "do", "in", "do"], possible) == [True, True, False, False, False]
    assert synthetic.relevant_words(["best", "best", "best", "laptop"], possible) == [True, True, False, True]


def test_written_file_equals_generated_rows(tmp_path) -> None:
    config = Synthetic(users=4)
    count = synthetic.write_log(config, 0, tmp_path / "log.tsv")
    lines = (tmp_path / "log.tsv").read_text().splitlines()
    assert lines[0].split("\t") == list(synthetic.HEADER)
    assert [tuple(line.split("\t")) for line in lines[1:]] == list(synthetic.generate_rows(config, 0))
    assert count == len(lines) - 1


def test_fewer_topics_make_a_smaller_world() -> None:
    first = sorted(synthetic.TOPICS)[:3]
    words = {word for name in first for thing in synthetic.TOPICS[name].things for word in thing.split()}
    config = Synthetic(users=30, topics=3)
    for user in range(config.users):
        possible = synthetic.user_queries(user, config, seed=0)
        assert all(words & set(query) for query in possible)
    # All twelve are the log there always was.
    assert list(synthetic.generate_rows(Synthetic(users=3), 0)) == list(
        synthetic.generate_rows(Synthetic(users=3, topics=12), 0)
    )


def test_settings() -> None:
    for topics in (0, 13):
        with pytest.raises(UserError, match=f"synthetic.topics={topics} must be between 1 and 12"):
            next(synthetic.generate_rows(Synthetic(topics=topics), seed=0))
    with pytest.raises(UserError, match="at least 1"):
        next(synthetic.generate_rows(Synthetic(users=0), seed=0))


def test_next_queries_follow_from_the_history_but_are_not_in_it(tmp_path) -> None:
    recipe = Recipe(run_dir=str(tmp_path), synthetic=Synthetic(users=200))
    run_stage(recipe, "synthetic", synthetic.run)
    run_stage(recipe, "prepare", prepare.run)
    examples = load_examples(RunFolder(recipe).require("prepare"))

    def overlap(example: Example, other: Example) -> float:
        words = set(" ".join(example.targets).split())
        return len(words & set(" ".join(event.text for event in other.history).split())) / len(words)

    others = random.Random(0).sample(examples, len(examples))
    own, other = (mean(map(overlap, examples, group)) for group in (examples, others))
    assert own > 0.4 > 0.2 > other
    assert own < 0.8
    assert len({query for example in examples for query in example.targets}) > 500
