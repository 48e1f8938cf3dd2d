"""The tables of metrics.json from rows that can be counted by hand."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.helpers import fake_run
from tppo.core import stats
from tppo.core.config import Reward
from tppo.core.stages import DISPLAY
from tppo.core.tables import Example
from tppo.core.text import Event
from tppo.evaluate.answers import ANSWERS, Answers, answer_rows
from tppo.evaluate.compare import Metrics, _Scope
from tppo.evaluate.readings import READINGS, judge_readings
from tppo.judge.verdict import Verdict
from tppo.report import words

EXAMPLES = [
    Example(f"e{i}", f"u{i}", "eval1", [Event("search", "red shoes")], ["blue shoes", "blue hat"], None)
    for i in range(4)
]
GOOD, HALF, BAD = "blue shoes\nblue hat", "blue shoes\nyellow socks", "yellow socks"


Part = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Answers, and what the judge and the texts say of them."""


def answers(model: str, texts: list[str], finished: list[bool] | None = None) -> Part:
    found = Answers(texts, finished or [True] * 4, [5] * 4)
    rows = answer_rows(found, EXAMPLES, model=model, seed=0, num_queries=2)
    return rows, fake_run.read(EXAMPLES, rows, num_queries=2)


def joined(*parts: Part) -> Part:
    return [row for part in parts for row in part[0]], [row for part in parts for row in part[1]]


def metrics_of(tmp_path: Path, *parts: Part) -> Metrics:
    return fake_run.metrics_of(*joined(*parts), fake_run.make_recipe(tmp_path, ["tppo"]))


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    sft = answers("sft", [BAD, BAD, HALF, GOOD], [True, True, True, False])
    return metrics_of(tmp_path, sft, answers("tppo", [GOOD, GOOD, GOOD, ""]))


def test_rates_count_unparseable_answers_as_irrelevant(metrics: Metrics):
    assert metrics.scopes == ["eval1"]
    assert metrics.cell("eval1", "sft", "relevant_targets").value == 0.25  # the relevant one was cut off
    assert metrics.cell("eval1", "tppo", "relevant_targets").value == 0.75
    assert metrics.cell("eval1", "tppo", "relevant_targets").examples == 4
    assert metrics.cell("eval1", "sft", "words_targets").value == pytest.approx(0.125)
    assert metrics.cell("eval1", "sft", "unparseable").value == 0.25
    assert metrics.cell("eval1", "sft", "hit").value == 0.25
    assert metrics.cell("eval1", "tppo", "overlap").value == 0.75
    assert metrics.difference("eval1", "tppo", "sft", "relevant_targets").value == 0.5
    assert metrics.difference("eval1", "tppo", "sft", "hit").users == 4


def test_an_empty_answer_is_left_out_of_shares_it_cannot_have(metrics: Metrics):
    assert metrics.cell("eval1", "tppo", "copied_queries").examples == 3
    assert metrics.cell("eval1", "tppo", "queries_written").value == 1.5


def test_wins_follow_the_documented_score(metrics: Metrics):
    row = metrics.wins("eval1", "tppo", "sft", "targets")
    assert (row["win"], row["tie"], row["lose"]) == (0.75, 0.25, 0.0)  # empty against cut off: both 0


def test_scores_are_label_plus_word_share(tmp_path: Path):
    rows, readings = joined(
        answers("sft", [GOOD, HALF, BAD, GOOD], [True, True, True, False]), answers("tppo", [GOOD] * 4)
    )
    frames = (pa.Table.from_pylist(part, schema=s).to_pandas() for part, s in ((rows, ANSWERS), (readings, READINGS)))
    scope = _Scope("eval1", *frames, "word-overlap-v1")
    assert scope.scores("sft", "targets").tolist() == [2.0, 1.5, 0.0, 0.0]
    assert np.isnan(scope.scores("ppo", "targets")).all(), "nobody of that name was read"


def test_abstentions_are_counted_and_left_out(tmp_path: Path):
    rows, readings = joined(answers("sft", [GOOD] * 4), answers("tppo", [GOOD] * 4))
    first = ("sft", "e0", "word-overlap-v1")
    kept = [
        row
        for row in readings
        if (row["model"], row["example_id"], row["reader"]) != first or not row["measure"].endswith("_targets")
    ]
    gone = next(row for row in readings if row["measure"] == "relevant_targets")
    found = metrics_of(tmp_path, (rows, [*kept, {**gone, "value": None}]))
    assert found.cell("eval1", "sft", "relevant_targets").examples == 3
    assert found.difference("eval1", "tppo", "sft", "relevant_targets").examples == 3
    assert found.wins("eval1", "tppo", "sft", "targets")["net"]["examples"] == 3
    assert any("abstained 1 times" in note for note in words.cautions(found, "eval1", {}))


def test_headline_is_the_rubric_the_reward_model_learnt(tmp_path: Path):
    recipe = fake_run.make_recipe(tmp_path, ["tppo"])
    recipe.reward = Reward(rubric="history")
    found = fake_run.metrics_of(*answers("sft", [GOOD] * 4), recipe).data
    assert (found["headline"], found["check"]) == ("asked_words_history", "asked_words_targets")


def test_the_headline_counts_missing_queries_and_the_paper_does_not(tmp_path: Path):
    """The case of the issue: one good query alone against the same with two bad ones."""
    few, more = "blue shoes", "blue shoes\nyellow socks"
    found = metrics_of(tmp_path, answers("sft", [few] * 4), answers("tppo", [more] * 4))
    headline = found.headline
    assert headline == "asked_words_targets"
    assert [found.cell("eval1", model, headline).value for model in ("sft", "tppo")] == [0.5, 0.5]
    assert found.difference("eval1", "tppo", "sft", headline).value == 0
    assert [found.cell("eval1", model, "words_targets").value for model in ("sft", "tppo")] == [1.0, 0.5]
    assert found.wins("eval1", "tppo", "sft", "targets")["tie"] == 1.0
    paper = next(row for row in found.data["wins"] if row["by"] == "scores" and row["rubric"] == "targets")
    assert paper["lose"] == 1.0, "the paper's score prefers the shorter answer"
    tables = words.scope_tables(found, "eval1")
    for table in (tables["relevance"], tables["paper"]):
        assert {"Words from the history, %", "Repeated words, %", "Queries"} <= set(table.heads)
    assert any(head.startswith("Responses relevant to") for head in tables["paper"].heads)
    beside = words.lead(found, "eval1")[-1]
    assert beside.startswith("Beside the headline: responses relevant to")
    assert "(as the paper counts): TPPO 100.0%, SFT 100.0%" in beside
    assert "words from the history: TPPO 25.0%, SFT 50.0%; repeated words: TPPO 0.0%, SFT 0.0%" in beside


def test_what_was_read_before_the_measure_keeps_its_own_headline_and_says_so(tmp_path: Path):
    rows, readings = joined(answers("sft", [GOOD] * 4), answers("tppo", [BAD] * 4))
    old = metrics_of(tmp_path, (rows, [row for row in readings if not row["measure"].startswith("asked")]))
    assert (old.headline, old.counts_asked) == ("relevant_targets", False)
    assert old.cell("eval1", "sft", "asked_words_targets").value is None
    assert words.NOT_ASKED in words.cautions(old, "eval1", {})
    assert words.scope_tables(old, "eval1")["paper"] is None
    assert old.wins("eval1", "tppo", "sft", "targets")["lose"] == 1.0
    # One answer that lacks it is enough: a mean over the others would go by the same name.
    gone = next(row for row in readings if row["measure"] == "asked_words_targets")
    mixed = metrics_of(tmp_path, (rows, [row for row in readings if row is not gone]))
    assert mixed.headline == "asked_relevant_targets"


def test_a_judge_of_whole_answers_has_a_headline_that_counts_missing_queries(tmp_path: Path):
    rows, readings = answers("sft", ["blue shoes", GOOD, BAD, GOOD])
    words_of = ("words_", "asked_words_", "relevant_words_")
    found = metrics_of(tmp_path, (rows, [row for row in readings if not row["measure"].startswith(words_of)]))
    assert found.headline == "asked_relevant_targets"
    assert found.cell("eval1", "sft", found.headline).value == (0.5 + 1 + 0 + 1) / 4


def test_splits_are_pooled_only_when_there_are_several(tmp_path: Path):
    examples = fake_run.make_examples(4) + fake_run.make_examples(4, split="eval2")
    parts = [fake_run.made_up_rows([e for e in examples if e.split == split], "sft") for split in ("eval1", "eval2")]
    found = fake_run.metrics_of(*joined(*parts), fake_run.make_recipe(tmp_path))
    assert found.scopes == ["all", "eval1", "eval2"]
    sizes = [found.cell(scope, "sft", "hit").examples for scope in found.scopes]
    assert sizes == [16, 8, 8]
    assert found.pairs("all") == []


def test_a_verdict_its_interval_and_its_corrected_p_go_by_one_rule(tmp_path: Path):
    """The first sentences claimed by intervals of single pairs what the corrected p-values beside them took back."""
    examples, models = fake_run.make_examples(40), ("sft", "dpo", "ppo", "ppo_sum", "tppo", "nearest", "frequent_next")
    parts = [fake_run.made_up_rows(examples, model, seed) for seed, model in enumerate(models)]
    metrics = fake_run.metrics_of(*joined(*parts), fake_run.make_recipe(tmp_path))
    found, borderline = metrics.data, 0
    for row in [*found["differences"], *(row["net"] | {"than": row["than"]} for row in found["wins"])]:
        if row["p_value"] is not None:
            assert row["comparisons"] == 10  # of five policies, and of each with two baselines
            assert row["p_corrected"] == pytest.approx(min(1, 10 * row["p_value"]))
            assert (row["p_corrected"] < 0.05) == (not row["low_corrected"] <= 0 <= row["high_corrected"])
            assert (row["p_value"] < 0.05) == (not row["low"] <= 0 <= row["high"])
            borderline += row["p_value"] < 0.05 <= row["p_corrected"]
    assert borderline, "some pairs that would be called different alone"
    better = {
        (row["model"], row["than"])
        for row in found["differences"]
        if row["metric"] == metrics.headline and row["p_corrected"] < 0.05 and row["value"] > 0
    }
    said = words.lead(metrics, "eval1")
    for model, than in metrics.pairs("eval1"):
        sentence = next((text for text in said if text.startswith(f"{DISPLAY[model]} is better than")), "")
        named = re.split(", | and ", sentence.partition(" than ")[2].rstrip("."))
        assert (DISPLAY[than] in named) == ((model, than) in better)
    assert 0 < len(better) < 10


class AgainstEverything:
    """A second judge that calls nothing relevant."""

    name = "against-everything"
    rubrics = ("targets",)

    def judge(self, items: list[Any], rubric: str, description: str | None = None) -> list[Verdict]:
        return [Verdict(None, 0.0, False, "ok", None) for _ in items]


def test_a_second_judge_has_rows_of_its_own(tmp_path: Path):
    rows, readings = answers("sft", [GOOD] * 4)
    second = judge_readings(AgainstEverything(), {e.example_id: e for e in EXAMPLES}, [rows[0], rows[2]], "again", 2)
    assert {(row["example_id"], row["measure"], row["value"]) for row in second} == {
        (name, measure, 0.0)  # it judged responses only, against the targets only
        for name in ("e0", "e2")
        for measure in ("relevant_targets", "asked_relevant_targets", "sentence_score_targets")
    }
    metrics = metrics_of(tmp_path, (rows, readings + second))
    assert metrics.second_judges == ["against-everything"]
    assert metrics.cell("eval1", "sft", "relevant_targets").value == 1.0
    cell = metrics.cell("eval1", "sft", "relevant_targets", "against-everything")
    assert (cell.value, cell.examples) == (0.0, 2)
    assert metrics.cell("eval1", "sft", "words_targets", "against-everything").value is None


def test_a_model_that_loses_to_a_baseline_is_said_to_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stats, "_ROUNDING", -1.0)  # else four users who agree would be too few to say so
    others = [answers("tppo", [GOOD] * 4), answers("nearest", [GOOD] * 4), answers("repeat_last", [BAD] * 4)]
    metrics = metrics_of(tmp_path, answers("sft", [BAD] * 4), *others)
    assert metrics.policies == ["sft", "tppo"]
    assert metrics.pairs("eval1") == [("tppo", "sft")]
    assert metrics.baseline_pairs("eval1") == [(m, b) for m in ("tppo", "sft") for b in ("repeat_last", "nearest")]
    headline = "Words relevant to what the user searched next per query asked for"
    lost = f"SFT loses to a simple baseline: Nearest neighbour ({headline}, Hit, Word F1)."
    assert words.baseline_verdicts(metrics, "eval1") == [lost]
    assert lost in words.lead(metrics, "eval1")

    metrics = metrics_of(tmp_path, answers("sft", [GOOD] * 4), *others)
    assert words.baseline_verdicts(metrics, "eval1")[0].startswith("No model is shown to lose")
