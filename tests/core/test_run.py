"""The run folder: which stages are done, and what a changed input does."""

from dataclasses import replace
from pathlib import Path

import pytest

from tppo.core.common import UserError
from tppo.core.config import Evaluate, Reading, Recipe
from tppo.core.run import RunFolder
from tppo.core.stages import all_stages, of_variant, stage_command, stage_inputs

VOTED = Evaluate(readings=[Reading("vote", 5), Reading("distance")])


def make_run(root: Path, stages: list[str], **changes) -> Recipe:
    recipe = Recipe(run_dir=str(root), algorithms=["tppo"], **changes)
    for stage in stages:
        with RunFolder(recipe).stage(stage):
            pass
    return recipe


def test_the_report_is_made_anew_when_there_is_more_to_read(tmp_path: Path):
    recipe = make_run(tmp_path, all_stages(Recipe(algorithms=["tppo"])))
    assert RunFolder(recipe).is_done("report")
    read = replace(recipe, evaluate=VOTED)
    assert RunFolder(read).is_done("evaluate"), "a reading changes no evaluation"
    for stage in ("read_vote", "read_distance"):
        assert not RunFolder(read).is_done(stage)
        with RunFolder(read).stage(stage):
            pass
    assert not RunFolder(read).is_done("report")
    with RunFolder(read).stage("report"):
        pass
    assert RunFolder(read).is_done("report")


def test_any_other_stage_with_other_inputs_is_named(tmp_path: Path):
    recipe = make_run(tmp_path, ["synthetic", "prepare", "sft"])
    manifest = tmp_path / "prepare" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(UserError, match=r"sft was made from other inputs .*--redo sft"):
        RunFolder(recipe).is_done("sft")


def test_a_variant_is_in_the_stages_name():
    recipe = Recipe(algorithms=["tppo", "dpo"], evaluate=VOTED)
    assert all_stages(recipe)[-6:] == ["rl_tppo", "rl_dpo", "evaluate", "read_vote", "read_distance", "report"]
    assert stage_command("rl_ppo", recipe) == ("rl", ["--rl.algorithm", "ppo"])
    assert stage_command("read_vote", recipe) == (
        "read", ["--evaluate.readings", '[{"reader": "vote", "examples": 5}]'],
    )  # fmt: skip
    assert of_variant("rl_ppo_sum", recipe).rl.algorithm == "ppo_sum"
    assert stage_inputs("read_vote", recipe) == ["prepare", "evaluate"]
    assert stage_inputs("read_distance", recipe) == ["prepare", "sft", "rl_tppo", "rl_dpo"]
    with pytest.raises(UserError, match=r"has to name the reader llm once"):
        of_variant("read_llm", recipe)
