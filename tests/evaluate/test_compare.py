"""The tables of metrics.json from rows that can be counted by hand."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import fake_run
from tppo.core.config import Reward
from tppo.core.tables import Example
from tppo.core.text import Event
from tppo.evaluate.answers import Answers
from tppo.evaluate.compare import Metrics, build_metrics, paired_scores
from tppo.evaluate.readings import Readers, response_rows
from tppo.judge.verdict import Verdict
from tppo.report import words

EXAMPLES = [
    Example(f"e{i}", f"u{i}", "eval1", [Event("search", "red shoes")], ["blue shoes", "blue hat"], None)
    for i in range(4)
]
GOOD, HALF, BAD = "blue shoes\nblue hat", "blue shoes\nyellow socks", "yellow socks"


def answers(model: str, texts: list[str], finished: list[bool] | None = None) -> list[dict[str, Any]]:
    found = Answers(texts, finished or [True] * 4, [5] * 4)
    return response_rows(Readers(fake_run.WordOverlapJudge()), EXAMPLES, found, model=model, num_queries=2)


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    rows = answers("sft", [BAD, BAD, HALF, GOOD], [True, True, True, False])
    rows += answers("tppo", [GOOD, GOOD, GOOD, ""])
    return Metrics({**build_metrics(rows, fake_run.make_recipe(tmp_path, ["tppo"])), **fake_run.JUDGE})


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


def test_paired_scores_are_label_plus_word_share():
    rows = answers("sft", [GOOD, HALF, BAD, GOOD], [True, True, True, False])
    assert paired_scores(rows, "targets") == [2.0, 1.5, 0.0, 0.0]
    assert paired_scores([{"relevant_targets": None, "words_targets": None}], "targets") == [None]


def test_abstentions_are_counted_and_left_out(tmp_path: Path):
    rows = answers("sft", [GOOD] * 4) + answers("tppo", [GOOD] * 4)
    rows[0] |= {"relevant_targets": None, "words_targets": None, "status_targets": "abstained"}
    found = Metrics({**build_metrics(rows, fake_run.make_recipe(tmp_path, ["tppo"])), **fake_run.JUDGE})
    assert found.cell("eval1", "sft", "relevant_targets").examples == 3
    assert found.difference("eval1", "tppo", "sft", "relevant_targets").examples == 3
    assert any("abstained 1 times" in note for note in words.cautions(found, "eval1", {}))


def test_headline_is_the_rubric_the_reward_model_learnt(tmp_path: Path):
    recipe = fake_run.make_recipe(tmp_path, ["tppo"])
    recipe.reward = Reward(rubric="history")
    found = build_metrics(answers("sft", [GOOD] * 4), recipe)
    assert (found["headline"], found["check"]) == ("relevant_history", "relevant_targets")


def test_splits_are_pooled_only_when_there_are_several(tmp_path: Path):
    examples = fake_run.make_examples(4) + fake_run.make_examples(4, split="eval2")
    rows = []
    for split in ("eval1", "eval2"):
        rows += fake_run.generation_rows([e for e in examples if e.split == split], "sft")
    found = Metrics(build_metrics(rows, fake_run.make_recipe(tmp_path)))
    assert found.scopes == ["all", "eval1", "eval2"]
    sizes = [found.cell(scope, "sft", "hit").examples for scope in found.scopes]
    assert sizes == [16, 8, 8]
    assert found.pairs("all") == []


class AgainstEverything:
    """A second judge that calls nothing relevant."""

    name = "against-everything"
    rubrics = ("targets",)

    def judge(self, items: list[Any], rubric: str, description: str | None = None) -> list[Verdict]:
        return [Verdict(None, 0.0, False, "ok", None) for _ in items]


def test_a_second_judge_has_columns_of_its_own(tmp_path: Path):
    readers = Readers(fake_run.WordOverlapJudge(), AgainstEverything(), [True, False, True, False])
    found = Answers([GOOD] * 4, [True] * 4, [5] * 4)
    rows = response_rows(readers, EXAMPLES, found, model="sft", num_queries=2)
    assert [row["second_relevant_targets"] for row in rows] == [0.0, None, 0.0, None]
    assert [row["second_status_targets"] for row in rows] == ["ok", "not_asked", "ok", "not_asked"]
    assert {row["second_status_history"] for row in rows} == {"not_asked"}
    assert {row["second_words_targets"] for row in rows} == {None}  # it judged responses only
    metrics = Metrics({**build_metrics(rows, fake_run.make_recipe(tmp_path, [])), **fake_run.JUDGE})
    assert metrics.cell("eval1", "sft", "relevant_targets").value == 1.0
    cell = metrics.cell("eval1", "sft", "second_relevant_targets")
    assert (cell.value, cell.examples) == (0.0, 2)


def test_a_model_that_loses_to_a_baseline_is_said_to_lose(tmp_path: Path):
    rows = answers("sft", [BAD] * 4) + answers("tppo", [GOOD] * 4)
    rows += answers("nearest", [GOOD] * 4) + answers("repeat_last", [BAD] * 4)
    metrics = Metrics({**build_metrics(rows, fake_run.make_recipe(tmp_path, ["tppo"])), **fake_run.JUDGE})
    assert metrics.policies == ["sft", "tppo"]
    assert metrics.pairs("eval1") == [("tppo", "sft")]
    assert metrics.baseline_pairs("eval1") == [(m, b) for m in ("tppo", "sft") for b in ("repeat_last", "nearest")]
    headline = "Relevant to what the user really searched next"
    lost = f"SFT loses to a simple baseline: Nearest neighbour ({headline}, Hit, Word F1)."
    assert words.baseline_verdicts(metrics, "eval1") == [lost]
    assert lost in words.lead(metrics, "eval1")

    won = [row for row in rows if row["model"] != "sft"] + answers("sft", [GOOD] * 4)
    metrics = Metrics({**build_metrics(won, fake_run.make_recipe(tmp_path, ["tppo"])), **fake_run.JUDGE})
    assert words.baseline_verdicts(metrics, "eval1")[0].startswith("No model is shown to lose")
