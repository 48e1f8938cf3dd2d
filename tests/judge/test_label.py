from __future__ import annotations

from collections import Counter

import pytest

from tests.helpers.rewritten import as_if_written
from tppo.core.common import UserError
from tppo.core.parts import SEEN_FILE
from tppo.core.run import RunFolder, run_stage
from tppo.core.tables import CONSTRUCTED, LABELS, RESPONSES, load_examples, read_table, write_table
from tppo.core.text import render_response
from tppo.judge import label
from tppo.judge.embedding import EmbeddingJudge
from tppo.judge.label import saved_judge
from tppo.judge.verdict import CONSTRUCTED_FILE, JudgeItem, split_response


@pytest.fixture
def recipe(prepared_recipe):
    """A run whose sample stage holds, in turn, the true targets, another topic's queries, and nothing."""
    recipe = prepared_recipe()
    texts = ["used trucks\nnfl scores\nbuy", "", "  "]

    def responses(recipe, run, folder):
        examples = load_examples(run.require("prepare"))
        rows = [
            {
                "example_id": e.example_id, "split": e.split, "sample": 0,
                "response_ids": [1, 0], "finished": True,
                "response": render_response(e.targets) if i % 2 == 0 else texts[i // 2 % 3],
                "problem": None,
            }
            for i, e in enumerate(examples)
        ]  # fmt: skip
        write_table(folder / "responses.parquet", rows, RESPONSES)
        return {}

    run_stage(recipe, "sft", lambda recipe, run, folder: {})
    run_stage(recipe, "sample", responses)
    return recipe


def test_stage_labels_every_response_under_both_rubrics(recipe):
    run_stage(recipe, "label", label.run)
    run = RunFolder(recipe)
    rows = read_table(run.path("label") / "labels.parquet", LABELS).to_pylist()
    assert Counter(row["rubric"] for row in rows) == {"targets": 32, "history": 32}
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        words = split_response(row["response"]).words
        assert [(w["word"], w["start"], w["end"], w["query"]) for w in row["words"]] == [
            (w.text, w.start, w.end, w.query) for w in words
        ]
        assert all(word["label"] in (1, 2) for word in row["words"])
    targets = {e.example_id: render_response(e.targets) for e in load_examples(run.path("prepare"))}
    for row in rows:
        if row["rubric"] == "targets":
            assert row["sentence_label"] == (row["response"] == targets[row["example_id"]])


def test_facts_show_the_scale_of_the_judge(recipe):
    run_stage(recipe, "label", label.run)
    facts = RunFolder(recipe).manifest("label")["facts"]
    assert facts["responses"] == 32
    shares = facts["relevant_share"]
    assert shares["sft_responses"]["targets"]["responses"] == 0.5
    assert shares["sft_responses"]["targets"]["empty_count"] == 10
    assert shares["true_targets"]["history"]["word_count"] > 0
    assert set(shares["other_users_targets"]) == set(shares["random_words"]) == {"targets", "history"}
    assert 0 < facts["thresholds"]["history"]["word"] < 1


def test_evaluate_gets_the_same_judge(recipe):
    run_stage(recipe, "label", label.run)
    folder = RunFolder(recipe).path("label")
    judge = saved_judge(folder, recipe.judge)
    examples = {e.example_id: e for e in load_examples(RunFolder(recipe).path("prepare"))}
    rows = [r for r in read_table(folder / "labels.parquet", LABELS).to_pylist() if r["rubric"] == "history"]
    items = [
        JudgeItem(examples[r["example_id"]].history, examples[r["example_id"]].targets, r["response"]) for r in rows
    ]
    for row, verdict in zip(rows, judge.judge(items, "history"), strict=True):
        assert row["judge"] == judge.name
        assert row["sentence_label"] == verdict.sentence_relevant
        assert [w["label"] == 2 for w in row["words"]] == [w.relevant for w in verdict.words]


def test_responses_to_unknown_examples_are_refused(recipe):
    path = RunFolder(recipe).path("sample") / "responses.parquet"
    rows = read_table(path, RESPONSES).to_pylist()
    rows[3]["example_id"] = "stranger"
    write_table(path, rows, RESPONSES)
    as_if_written(path.parent)
    with pytest.raises(UserError, match=r"1 responses to examples.*stranger"):
        run_stage(recipe, "label", label.run)


def test_no_held_out_users_is_said_not_hidden(prepared_recipe, recipe, example_factory):
    run = RunFolder(recipe)
    examples = [e for e in load_examples(run.path("prepare")) if e.split == "train"]
    judge = EmbeddingJudge("minilm", {})
    judge.calibrate(examples, 0.95, 0)
    assert "fewer than two" in label._scale(judge, examples[:1], 0)["held_out_users"]


def test_answers_to_what_sft_saw_are_labelled_apart_and_the_gap_is_said(recipe):
    """True targets for what SFT saw, half of them nothing for the others."""
    run = RunFolder(recipe)
    rows = read_table(run.path("sample") / "responses.parquet", RESPONSES).to_pylist()
    seen = [row for place, row in enumerate(rows) if place % 2 == 0 and row["split"] == "train"][:5]
    write_table(run.path("sample") / SEEN_FILE, seen, RESPONSES)
    run_stage(recipe, "label", label.run)
    facts = run.facts("label")
    labelled = read_table(run.path("label") / SEEN_FILE, LABELS).to_pylist()
    assert len(labelled) == 2 * len(seen), "under both rubrics"
    assert len(read_table(run.path("label") / "labels.parquet", LABELS)) == 64, "nobody learns from them"
    assert facts["labels"] == 64 + len(labelled)
    assert facts["seen_gap"]["disjoint"] is False
    found = facts["seen_gap"]["measures"]
    assert set(found) == {"relevant_targets", "relevant_history", "overlap"}
    assert (found["overlap"]["seen"], found["overlap"]["unseen"]) == (1.0, 0.5)
    # Without parts only the held-out users are known not to have been trained on.
    assert (found["overlap"]["unseen_examples"], found["overlap"]["users"]) == (8, 5)
    assert found["overlap"]["low"] < 0.5 < found["overlap"]["high"]


def test_an_older_sample_stage_has_no_gap(recipe):
    run_stage(recipe, "label", label.run)
    assert RunFolder(recipe).facts("label")["seen_gap"] == {"disjoint": False, "measures": {}}
    assert not (RunFolder(recipe).path("label") / SEEN_FILE).exists()


def test_constructed_responses_are_labelled_apart_and_for_training_users_only(recipe):
    recipe.label.constructed = {"copied": 3, "repeated": 2, "noise": 0}
    run_stage(recipe, "label", label.run)
    run = RunFolder(recipe)
    rows = read_table(run.path("label") / CONSTRUCTED_FILE, CONSTRUCTED).to_pylist()
    assert Counter((row["kind"], row["rubric"]) for row in rows) == {
        (kind, rubric): count for kind, count in (("copied", 3), ("repeated", 2)) for rubric in ("targets", "history")
    }
    assert {row["split"] for row in rows} == {"train"}
    copied = [word["label"] for row in rows if row["kind"] == "copied" for word in row["words"]]
    assert set(copied) == {1}, "a copy is no new query"
    for row in rows:
        if row["kind"] == "repeated":
            assert len(set(row["response"].split("\n"))) == 1
    sampled = read_table(run.path("label") / "labels.parquet", LABELS).to_pylist()
    assert len(sampled) == 64
    facts = run.facts("label")
    assert facts["labels"] == 64 + len(rows)
    assert facts["constructed"]["copied"]["history"]["words"] == 0
    label.run(recipe, run, run.path("label"))
    assert read_table(run.path("label") / CONSTRUCTED_FILE, CONSTRUCTED).to_pylist() == rows


@pytest.mark.parametrize(
    ("kind", "count", "message"), [("copies", 1, "no kind 'copies'"), ("copied", -1, "at least 0")]
)
def test_constructed_settings_are_checked(recipe, kind, count, message):
    recipe.label.constructed = {kind: count}
    with pytest.raises(UserError, match=message):
        run_stage(recipe, "label", label.run)
