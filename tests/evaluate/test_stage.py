"""The evaluate stage with real (tiny) policies and the real judge."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import fake_run
from tppo.core.common import UserError
from tppo.core.config import RL, Recipe, Sampling, Task
from tppo.core.models import load_policy
from tppo.core.run import RunFolder, run_stage
from tppo.core.stages import evaluated_models, stage_config
from tppo.core.tables import EXAMPLES, Example, read_table, write_table
from tppo.evaluate import answers, stage
from tppo.evaluate.answers import ANSWERS
from tppo.evaluate.readings import READINGS, choose_second_judge, first_judges
from tppo.judge.embedding import EmbeddingJudge, Thresholds


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    EmbeddingJudge("minilm", {"targets": Thresholds(0.5, 0.5), "history": Thresholds(0.5, 0.5)}).save(folder)
    return folder / "judge.json"


def make_inputs(root: Path, policy: Path, judge_file: Path, examples: list[Example]) -> tuple[Recipe, RunFolder]:
    """Everything evaluate reads; ppo is the SFT model itself, tppo another one."""
    recipe = replace(
        fake_run.make_recipe(root, ["tppo", "ppo"]),
        sample=Sampling(batch_size=4),
        task=Task(max_prompt_tokens=200, max_response_tokens=12),
        rl=RL(precision="fp32"),
    )
    run = RunFolder(recipe)
    examples = [*examples, *fake_run.make_examples(4, split="train", seed=5)]
    with run.stage("prepare") as (folder, _):
        write_table(folder / "examples.parquet", [fake_run.example_row(e) for e in examples], EXAMPLES)
    for name in ("sft", "sample", "label", "reward", "rl_ppo", "rl_tppo"):
        with run.stage(name) as (folder, facts):
            if name in ("sft", "rl_ppo"):
                shutil.copytree(policy, folder / "model")
            if name == "label":
                shutil.copy(judge_file, folder)
                facts["judge"] = "embedding-v2/minilm"
            if name == "rl_tppo":
                model, tokenizer = load_policy(policy)
                torch.manual_seed(3)
                for weights in model.parameters():
                    weights.data += 0.2 * torch.randn_like(weights)
                model.save_pretrained(folder / "model")
                tokenizer.save_pretrained(folder / "model")
    return recipe, run


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Answers with everything that was read in them, by measure."""
    rows = read_table(folder / "answers.parquet", ANSWERS).to_pylist()
    by_answer = {(row["model"], row["example_id"]): row for row in rows}
    for reading in read_table(folder / "readings.parquet", READINGS).to_pylist():
        row = by_answer[reading["model"], reading["example_id"]]
        row[reading["measure"]] = reading["value"]
        if reading["labels"] is not None:
            row["word_labels_" + reading["measure"].removeprefix("words_")] = reading["labels"]
    return rows


def test_evaluate_writes_rows_and_metrics(tmp_path: Path, tiny_policy: Path, judge_file: Path):
    examples = fake_run.make_examples(5) + fake_run.make_examples(3, split="eval2")
    recipe, run = make_inputs(tmp_path / "run", tiny_policy, judge_file, examples)
    recipe.evaluate.max_examples = 6
    assert run_stage(recipe, "evaluate", stage.run)
    folder = run.require("evaluate")
    rows = read_rows(folder)
    baselines = ["frequent_next", "repeat_last", "nearest"]
    models = ["sft", "tppo", "ppo", *baselines, "targets", "other_user"]
    assert evaluated_models(recipe) == models
    by_model = {model: [row for row in rows if row["model"] == model] for model in models}
    assert [len(found) for found in by_model.values()] == [12] * len(models)
    assert not (folder / "parts").exists()

    # Same weights, same seed, same prompts: the same answers, so a difference of exactly nothing.
    assert [r["response"] for r in by_model["ppo"]] == [r["response"] for r in by_model["sft"]]
    assert [r["response"] for r in by_model["tppo"]] != [r["response"] for r in by_model["sft"]]
    metrics = json.loads((folder / "metrics.json").read_text())
    same = [d for d in metrics["differences"] if (d["model"], d["than"]) == ("ppo", "sft")]
    assert {d["value"] for d in same if d["value"] is not None} == {0.0}
    wins = [row for row in metrics["wins"] if (row["model"], row["than"]) == ("ppo", "sft")]
    assert all(row["win"] == 0 and row["tie"] == 1 for row in wins)

    # The scale of the judge: a user's own next queries are relevant to themselves, and exact hits.
    assert all(row["hit"] == 1 and row["words_targets"] == 1 for row in by_model["targets"])
    assert all(row["similarity_true"] == pytest.approx(1, abs=1e-5) for row in by_model["targets"])
    # Baselines go through the same judging and metrics; nothing is padded.
    assert {row["queries_written"] for row in by_model["repeat_last"]} == {1.0}
    assert {row["copied_queries"] for row in by_model["repeat_last"]} == {1.0}
    train = {query for e in fake_run.make_examples(4, split="train", seed=5) for query in e.targets}
    assert {query for row in by_model["nearest"] for query in row["queries"]} <= train
    own = {row["example_id"]: row for row in by_model["targets"]}
    assert all(row["user_id"] == own[row["example_id"]]["user_id"] for row in by_model["other_user"])
    assert all(len(row["words"]) == len(row["word_labels_targets"]) == len(row["word_query"]) for row in rows)
    facts = run.manifest("evaluate")["facts"]
    assert facts["examples"] == {"eval1": 6, "eval2": 6}
    assert facts["history_events_dropped_to_fit_the_prompt"]["eval1.sft"] >= 0


def test_a_restart_keeps_the_parts_it_finds(
    tmp_path: Path, tiny_policy: Path, judge_file: Path, monkeypatch: pytest.MonkeyPatch
):
    examples = fake_run.make_examples(3) + fake_run.make_examples(3, split="eval2")
    recipe, run = make_inputs(tmp_path / "run", tiny_policy, judge_file, examples)
    asked: list[str] = []
    real = answers.respond

    def counted(*args, **kwargs):
        asked.append(kwargs["description"])
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(answers, "respond", counted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(recipe, "evaluate", stage.run)
    assert run.manifest("evaluate") is None
    assert run_stage(recipe, "evaluate", stage.run)
    answered = [text.removeprefix("evaluate: ") for text in asked]
    # sft on both sets and tppo on eval1 were written before the interruption and are not done again.
    assert answered[3:] == [
        "tppo answers eval2",
        "tppo answers eval2",
        "ppo answers eval1",
        "ppo answers eval2",
    ]
    assert read_table(run.path("evaluate") / "answers.parquet", ANSWERS).num_rows == 2 * 6 * 8


def test_one_user_has_no_other_user(tmp_path: Path, tiny_policy: Path, judge_file: Path):
    examples = fake_run.make_examples(1)
    recipe, run = make_inputs(tmp_path / "run", tiny_policy, judge_file, examples)
    recipe.evaluate.splits = ["eval1"]
    run_stage(recipe, "evaluate", stage.run)
    metrics = json.loads((run.path("evaluate") / "metrics.json").read_text())
    assert metrics["models"] == ["sft", "ppo", "tppo", "frequent_next", "repeat_last", "nearest", "targets"]
    assert {row["low"] for row in metrics["rows"]} == {None}


def test_an_empty_evaluation_set_is_named(tmp_path: Path, tiny_policy: Path, judge_file: Path):
    recipe, _ = make_inputs(tmp_path / "run", tiny_policy, judge_file, fake_run.make_examples(2))
    with pytest.raises(UserError, match=r"eval2.*prepare\.eval2_share"):
        run_stage(recipe, "evaluate", stage.run)


def test_settings_that_cannot_work_are_refused(tmp_path: Path):
    for broken, words in (
        ({"splits": []}, "splits is empty"),
        ({"baselines": ["best_of_n"], "best_of": 1}, "best_of=1"),
        ({"baselines": ["best_of_n"], "temperature": 0.0}, "temperature=0"),
        ({"baselines": ["nearest", "nearest"]}, "names one twice"),
    ):
        recipe = fake_run.make_recipe(tmp_path, **broken)
        with pytest.raises(UserError, match=words):
            stage.run(recipe, RunFolder(recipe), tmp_path)


def test_examples_are_drawn_with_the_seed(tmp_path: Path, tiny_policy: Path, judge_file: Path):
    recipe, run = make_inputs(tmp_path / "run", tiny_policy, judge_file, fake_run.make_examples(20))
    recipe.evaluate.max_examples = 10

    def ids(seed: int) -> list[str]:
        return [e.example_id for e in chosen(replace(recipe, seed=seed))]

    def chosen(recipe: Recipe) -> list[Example]:
        return answers.choose_examples(recipe.evaluate, run.path("prepare"), "eval1", recipe.data_seed)

    assert len(set(ids(0))) == 10
    assert ids(0) == ids(0) != ids(1)
    shared = replace(recipe, seed=9, shared_seed=0)
    assert [e.example_id for e in chosen(shared)] == ids(0)
    recipe.evaluate.max_examples = 0
    assert len(ids(0)) == 40


def test_named_models_leave_the_others_out(tmp_path: Path):
    recipe = fake_run.make_recipe(tmp_path, ["tppo"], models=["tppo"], untuned=True, baselines=["best_of_n"])
    assert evaluated_models(recipe) == ["tppo"]
    with pytest.raises(UserError, match=r"evaluate\.models=\['tppo'\]: this recipe has \['sft', 'untuned'"):
        stage.check_settings(replace(recipe, algorithms=[]))


def test_baselines_that_learn_need_training_examples(tmp_path: Path):
    recipe = fake_run.make_recipe(tmp_path / "run", [])
    run = RunFolder(recipe)
    with run.stage("prepare") as (folder, _):
        rows = [fake_run.example_row(e) for e in fake_run.make_examples(2)]
        write_table(folder / "examples.parquet", rows, EXAMPLES)
    with pytest.raises(UserError, match=r"frequent_next.*training examples"):
        answers.make_answerer("frequent_next", recipe, run, None)


def test_the_second_judge_is_another_one(tmp_path: Path, tiny_policy: Path, judge_file: Path):
    recipe, run = make_inputs(tmp_path / "run", tiny_policy, judge_file, fake_run.make_examples(3))
    run_stage(replace(recipe, evaluate=replace(recipe.evaluate, splits=["eval1"])), "evaluate", stage.run)
    first = first_judges([run.path("evaluate")])
    with pytest.raises(UserError, match=r"embedding is embedding-v2/minilm, the first judge"):
        choose_second_judge(
            "embedding", first, recipe.label, recipe.judge, fake_run.make_examples(4, split="train", seed=5), 0
        )


def test_the_second_judge_reads_the_same_examples_of_every_model():
    examples = fake_run.make_examples(6)
    by_split = {"eval1": examples[:6], "eval2": examples[6:]}
    asked = answers.asked_about(by_split, 4, 0)
    assert [example.example_id in {e.example_id for e in asked} for example in examples].count(True) == 8
    assert asked == [example for example in examples if example in asked]
    assert answers.asked_about(by_split, 0, 0) == examples
    # The cells of a study differ in `seed`, not in what the second judge reads.
    recipe = Recipe()
    seeds = [replace(recipe, seed=seed, shared_seed=0).data_seed for seed in (1, 2, 3)]
    assert [answers.asked_about(by_split, 4, seed) for seed in seeds] == [asked] * 3


def test_another_users_queries_are_the_same_in_every_cell_of_a_study(tmp_path: Path):
    examples = fake_run.make_examples(12)
    recipe = fake_run.make_recipe(tmp_path, [])

    def responses(seed: int, shared_seed: int | None) -> list[str]:
        cell = replace(recipe, seed=seed, shared_seed=shared_seed)
        found = answers.make_answerer("other_user", cell, RunFolder(cell), None)("eval1", examples)
        assert found is not None
        return found.responses

    assert responses(4, 0) == responses(5, 0) == responses(0, None) != responses(1, None)


def test_the_start_model_is_evaluated_without_sft(tmp_path: Path, tiny_policy: Path, judge_file: Path):
    recipe, run = make_inputs(tmp_path / "run", tiny_policy, judge_file, fake_run.make_examples(3))
    recipe.evaluate.splits, recipe.evaluate.baselines, recipe.evaluate.untuned = ["eval1"], [], True
    recipe.sft.model = str(tiny_policy)
    found = {
        name: answers.make_answerer(name, recipe, run, None)("eval1", fake_run.make_examples(3))
        for name in ("untuned", "sft")
    }
    # SFT's folder here is a copy of the start model: the same prompts and draws give the same answers.
    assert found["untuned"] == found["sft"]
    assert "start_model" in stage_config("evaluate", recipe)
