from __future__ import annotations

import shutil
from collections import Counter

import pytest

from tppo.core.models import load_policy
from tppo.core.run import RunFolder, run_stage
from tppo.core.tables import RESPONSES, read_table
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
