from __future__ import annotations

import shutil
from collections import Counter

import pytest

from tppo.core.common import UserError
from tppo.core.models import load_policy
from tppo.core.parts import SEEN_FILE, train_examples, write_trained_on
from tppo.core.run import RunFolder, run_stage
from tppo.core.tables import RESPONSES, load_examples, read_table
from tppo.generate import sample
from tppo.generate.engine import Generation, decode_response
from tppo.generate.sample import response_rows, summarise


@pytest.fixture
def recipe(prepared_recipe, tiny_policy):
    recipe = prepared_recipe()
    recipe.sft.precision = "fp32"
    recipe.sample.train_examples, recipe.sample.reward_eval_examples = 10, 4
    recipe.sample.samples_per_example = 2
    recipe.task.max_response_tokens, recipe.task.max_prompt_tokens = 8, 300

    def copy_model(recipe, run, folder):
        shutil.copytree(tiny_policy, folder / "model")
        return {}

    run_stage(recipe, "sft", copy_model)
    return recipe


def test_stage_samples_both_splits_and_counts_what_is_unparseable(recipe):
    run_stage(recipe, "sample", sample.run)
    run = RunFolder(recipe)
    rows = read_table(run.path("sample") / "responses.parquet", RESPONSES).to_pylist()
    facts = run.manifest("sample")["facts"]
    assert Counter(row["split"] for row in rows) == {"train": 20, "reward_eval": 8} == facts["by_split"]
    assert all(count == 2 for count in Counter(row["example_id"] for row in rows).values())
    assert {row["sample"] for row in rows} == {0, 1}
    _, tokenizer = load_policy(run.path("sft") / "model")
    for row in rows:
        assert row["finished"] == (row["response_ids"][-1] == tokenizer.eos_token_id)
        assert row["finished"] or row["problem"] == "truncated"
        assert row["response"] == decode_response(tokenizer, row["response_ids"])
    assert facts["unparseable"] == dict(Counter(row["problem"] for row in rows if row["problem"]))
    assert facts["unparseable_share"] == sum(facts["unparseable"].values()) / len(rows) > 0
    pairs = Counter((row["example_id"], row["response"]) for row in rows)
    assert max(pairs.values()) == 1, "the two samples of an example are drawn apart"


def test_stage_is_reproducible(recipe):
    run_stage(recipe, "sample", sample.run)
    path = RunFolder(recipe).path("sample") / "responses.parquet"
    first = read_table(path, RESPONSES)
    RunFolder(recipe).discard_from("sample")
    run_stage(recipe, "sample", sample.run)
    assert read_table(path, RESPONSES) == first


def test_users_whose_answers_are_labelled_are_none_that_sft_saw(prepared_recipe, tiny_policy):
    """The gap is measured on answers to what SFT was trained on, drawn besides and kept apart."""
    recipe = prepared_recipe(train=60)
    recipe.parts.disjoint = True
    recipe.sft.precision = "fp32"
    recipe.sample.train_examples, recipe.sample.reward_eval_examples, recipe.sample.seen_examples = 100, 4, 5
    recipe.task.max_response_tokens, recipe.task.max_prompt_tokens = 8, 300
    run = RunFolder(recipe)
    trained = train_examples(run.path("prepare"), "sft", recipe.parts, recipe.data_seed)

    def copy_model(recipe, run, folder):
        shutil.copytree(tiny_policy, folder / "model")
        write_trained_on(folder, trained)
        return {}

    run_stage(recipe, "sft", copy_model)
    run_stage(recipe, "sample", sample.run)
    users = {e.example_id: e.user_id for e in load_examples(run.path("prepare"))}
    rows = read_table(run.path("sample") / "responses.parquet", RESPONSES).to_pylist()
    answered = {users[row["example_id"]] for row in rows if row["split"] == "train"}
    mine = {e.user_id for e in train_examples(run.path("prepare"), "reward", recipe.parts, recipe.data_seed)}
    assert answered == mine, "all of the part where the setting asks for more"
    assert not answered & {example.user_id for example in trained}
    seen = read_table(run.path("sample") / SEEN_FILE, RESPONSES).to_pylist()
    assert len({row["example_id"] for row in seen}) == len(seen) == 5 == run.facts("sample")["seen_responses"]
    assert {row["example_id"] for row in seen} <= {example.example_id for example in trained}
    # A model from elsewhere that was trained on one of them.
    write_trained_on(run.path("sft"), [*trained, next(e for e in load_examples(run.path("prepare"))
                                                      if e.user_id in answered)])  # fmt: skip
    with pytest.raises(UserError, match=r"trained on 1 of the users whose examples the answers to be labelled"):
        sample.run(recipe, run, run.path("sample"))


def test_without_a_record_of_what_sft_saw_nothing_is_measured_of_it(recipe):
    run_stage(recipe, "sample", sample.run)
    assert not (RunFolder(recipe).path("sample") / SEEN_FILE).exists()
    assert RunFolder(recipe).facts("sample")["seen_responses"] == 0


def test_rows_keep_every_response_with_its_problem(example_factory):
    from tppo.core.config import Task

    examples = example_factory(4)
    generations = [
        Generation([1], [5, 0], "Roses \nsoil", True),
        Generation([1], [0], "", True),
        Generation([1], [5, 5], "roses\nso", False),
        Generation([1], [5, 0], "a\nb\nc\nd", True),
    ]
    rows = response_rows(examples, generations, Task())
    assert [row["problem"] for row in rows] == [None, "empty", "truncated", "too_many_queries"]
    assert rows[0]["response"] == "Roses \nsoil", "the raw text is kept: words are spans into it"
    facts = summarise(rows, Task())
    assert facts["unparseable"] == {"empty": 1, "truncated": 1, "too_many_queries": 1}
    assert facts["unparseable_share"] == 0.75
    assert facts["mean_queries"] == (2 + 0 + 2 + 4) / 4
    assert summarise([], Task())["responses"] == 0
