"""The truth of a synthetic log: what its users could have searched, and which examples it is known of."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest

from tppo.core.config import Recipe, Synthetic
from tppo.core.run import RunFolder, run_stage
from tppo.core.tables import Example, load_examples
from tppo.core.text import Event, render_response
from tppo.logs import prepare, synthetic
from tppo.logs.truth import Truth, known_truth


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = Recipe(run_dir=str(tmp_path_factory.mktemp("run")), synthetic=Synthetic(users=60, topics=3))
    run_stage(recipe, "synthetic", synthetic.run)
    run_stage(recipe, "prepare", prepare.run)
    return RunFolder(recipe)


def test_the_users_own_next_queries_are_relevant_and_anothers_are_not(run):
    truth, examples = known_truth(run), load_examples(run.require("prepare"))
    assert truth is not None
    own = [truth.shares(example, render_response(example.targets), 3) for example in examples]
    other = [
        truth.shares(a, render_response(b.targets), 3)
        for a, b in zip(examples, [*examples[40:], *examples[:40]], strict=True)
        if a.user_id != b.user_id
    ]
    for part, least in ((0, 0.9), (1, 0.95)):
        mean_own, mean_other = (sum(shares[part] for shares in found) / len(found) for found in (own, other))
        assert mean_own > least > 0.6 > mean_other  # the noise of the log is not among what can be searched


@pytest.fixture
def known():
    """The truth about a single user, an example of theirs, and all they can search."""
    truth = Truth(Synthetic(users=1), seed=0)
    (user,) = truth.users
    queries = [" ".join(words) for words in truth.possible(user)]
    history = [Event("search", queries[0]), Event("click", queries[1])]
    return truth, Example("e", user, "train", history, [queries[2]], datetime(2026, 1, 5)), queries


def test_missing_queries_count_and_further_ones_do_not(known):
    truth, example, queries = known
    assert truth.shares(example, queries[2], 2) == (0.5, 1.0)
    assert truth.shares(example, "", 2) == (0.0, 0.0)
    assert truth.shares(example, "\n".join(queries[2:5]), 2) == (1.0, 1.0)


def test_what_was_searched_is_not_new_and_what_was_clicked_is(known):
    truth, example, queries = known
    assert truth.shares(example, queries[0], 1) == (0.0, 0.0)
    assert truth.shares(example, queries[1], 1) == (1.0, 1.0)
    assert truth.shares(example, f"{queries[2]}\n{queries[2]}", 2)[0] == 0.5


def test_the_words_of_a_query_are_not_the_query(known):
    """Known words in another order, or half of them, are words the user knows and no query of theirs."""
    truth, example, queries = known
    longest = max(queries[2:], key=len).split()
    for words in (longest[::-1], longest[:-1]):
        query = " ".join(words)
        if query not in queries:
            assert truth.shares(example, query, 1)[0] == 0.0
            assert truth.shares(example, query, 1)[1] > 0.5


def test_without_its_synthetic_log_nothing_is_known(run, tmp_path):
    assert known_truth(RunFolder(Recipe(run_dir=str(tmp_path)))) is None
    taken = replace(run.recipe, run_dir=str(tmp_path), stage_dirs={"prepare": str(run.path("prepare"))})
    assert known_truth(RunFolder(taken)) is None
    both = replace(taken, stage_dirs={name: str(run.path(name)) for name in ("synthetic", "prepare")})
    assert known_truth(RunFolder(both)) is not None
    other = replace(both, synthetic=Synthetic(users=7))  # what the log was made with counts
    assert len(known_truth(RunFolder(other)).users) == 60  # type: ignore[union-attr]
    made = RunFolder(replace(run.recipe, run_dir=str(tmp_path / "b"), synthetic=Synthetic(users=9)))
    run_stage(made.recipe, "synthetic", synthetic.run)
    mixed = replace(taken, stage_dirs={"prepare": str(run.path("prepare")), "synthetic": str(made.path("synthetic"))})
    assert known_truth(RunFolder(mixed)) is None
