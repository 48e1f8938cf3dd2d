"""How differently SFT answers what it was trained on: by hand, and by simulation that the interval covers."""

from datetime import datetime

import numpy as np
import pytest

from tppo.core.tables import Example
from tppo.core.text import Event
from tppo.judge.gap import answer_values, gaps
from tppo.judge.verdict import Verdict, WordVerdict, split_response, verdict_to_row
from tppo.report.headline import seen_gap

EXAMPLE = Example("e", "u", "train", [Event("search", "red shoes")], ["blue hat", "socks"], datetime(2026, 3, 1))


def label(response: str, rubric: str = "history", status: str = "ok", judged: bool = True) -> dict:
    found = [WordVerdict(1.0, word.text in ("blue", "hat")) for word in split_response(response).words]
    verdict = Verdict(found if judged and status == "ok" else None, 1.0, True, status, None)
    return {**verdict_to_row(EXAMPLE, 0, rubric, "rule", response, verdict), "finished": True}


def test_values_count_what_was_asked_for_and_what_was_hit():
    (found,) = answer_values([label("blue hat\nzzz"), label("blue hat\nzzz", "targets")], {"e": EXAMPLE}, 3)
    assert found == {"user_id": "u", "overlap": 0.5, "relevant_history": 1 / 3, "relevant_targets": 1 / 3}
    assert answer_values([label("blue hat", status="abstained")], {"e": EXAMPLE}, 3) == []
    (found,) = answer_values([label("blue hat\nzzz", judged=False)], {"e": EXAMPLE}, 3)
    assert found["relevant_history"] == pytest.approx(2 / 3), "the verdict times the queries that are there"
    (found,) = answer_values([label("a\nb\nc\nblue hat")], {"e": EXAMPLE}, 3)
    assert (found["relevant_history"], found["overlap"]) == (0, 0), "too many queries are unparseable"


def rows(values: list[float], start: int = 0) -> list[dict]:
    return [{"user_id": f"u{start + place}", "overlap": value} for place, value in enumerate(values)]


def test_the_gap_is_a_difference_of_means_over_users():
    seen, unseen = rows([0.5, 1.0]), [*rows([0.25, 0.25], 10), {"user_id": "u10", "overlap": 0.75}]
    (found,) = gaps(seen, unseen).values()
    assert found["value"] == pytest.approx(0.75 - (0.5 + 0.25) / 2)
    assert found["low"] < found["value"] < found["high"]
    assert (found["examples"], found["unseen_examples"], found["users"], found["unseen_users"]) == (2, 3, 2, 2)
    assert gaps([], unseen) == {}
    (one,) = gaps(rows([1.0]), unseen).values()
    assert (one["value"], one["low"], one["high"]) == (0.625, None, None), "one user shows no spread"
    (same,) = gaps(rows([1.0, 1.0]), rows([1.0, 1.0], 10)).values()
    assert (same["value"], same["low"]) == (0.0, None)


def test_the_interval_covers_the_true_gap():
    generator, covered = np.random.default_rng(0), 0
    for _ in range(300):
        seen, unseen = generator.binomial(3, 0.6, 20) / 3, generator.binomial(3, 0.4, 60) / 3
        (found,) = gaps(rows(list(seen)), rows(list(unseen), 100)).values()
        covered += found["low"] <= 0.2 <= found["high"]
    assert 0.91 <= covered / 300 <= 0.99


def test_the_report_says_it_in_one_line():
    (measured,) = gaps(rows([0.5, 1.0, 0.75]), rows([0.25, 0.5, 0.25], 10)).values()
    facts = {"seen_gap": {"disjoint": True, "measures": {"relevant_history": measured, "overlap": measured}}}
    said = seen_gap(facts, "history")
    assert "minus people it never saw: words relevant to the history, of the queries asked for: +41.7 points [" in said
    assert "written exactly: +41.7 points [" in said
    assert said.endswith("Labels and the prompts of RL are of people it never saw.")
    assert "\n" not in said
    older = seen_gap({"labels": 3}, "history")
    assert "was not measured (sample.seen_examples)" in older
    assert older.endswith("(parts.disjoint: false).")
