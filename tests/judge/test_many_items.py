from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers import many_items
from tppo.core.recipe import parse_recipe
from tppo.core.run import RunFolder
from tppo.core.tables import RESPONSES, load_examples, read_table
from tppo.judge.verdict import split_response


def test_items_are_distinct_and_as_short_as_said():
    items = [many_items.item(number) for number in range(20_000)]
    assert len({response for _, response in items}) == 20_000
    assert len({example.example_id for example, _ in items}) == 20_000
    for example, response in items[::997]:
        parsed = split_response(response)
        assert [len(query.split()) for query in parsed.queries] == [2, 2, 2]
        assert len(parsed.words) == 6
        assert len(set(example.targets)) == 3
        assert example.history


def test_the_run_is_one_that_the_command_line_takes_up(tmp_path):
    root = tmp_path / "run"
    many_items.make_run(root, 30, first=7)
    recipe, _ = parse_recipe("label", ["--config", str(root / "recipe.yaml")])
    run = RunFolder(recipe)
    # is_done compares settings and inputs: these are finished with the very settings of the written recipe.
    assert [run.is_done(stage) for stage in ("prepare", "sft", "sample", "label")] == [True, True, True, False]
    examples = {example.example_id for example in load_examples(run.require("prepare"))}
    rows = read_table(run.require("sample") / "responses.parquet", RESPONSES).to_pylist()
    assert {row["example_id"] for row in rows} == examples == {f"many-{n}" for n in range(7, 37)}
    assert {row["split"] for row in rows} == {"train", "reward_eval"}


def test_needs_no_torch(tmp_path):
    code = (
        "import sys, pathlib; from tests.helpers import many_items; "
        "many_items.make_run(pathlib.Path(sys.argv[1]), 3); assert 'torch' not in sys.modules"
    )
    folder = str(tmp_path / "run")
    subprocess.run([sys.executable, "-c", code, folder], cwd=Path(__file__).parents[2], check=True)
