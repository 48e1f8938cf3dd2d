"""Settings that are gone: what finished runs were made with, and what a recipe that still has one is told."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tppo.core.common import UserError
from tppo.core.config import REPLACED, RETIRED, Recipe
from tppo.core.recipe import check_recipe, parse_recipe, stage_parser
from tppo.core.run import RunFolder, run_stage, without_retired


def finish(folder: Path, stage: str, **of_before: Any) -> RunFolder:
    """A stage finished when its section had these settings as well."""
    run = RunFolder(Recipe(run_dir=str(folder)))
    run_stage(run.recipe, stage, lambda recipe, run, folder: {})
    path = run.path(stage) / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["config"][stage] |= of_before
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return run


def test_what_was_made_with_the_value_of_today_is_not_stale(tmp_path: Path) -> None:
    assert finish(tmp_path, "synthetic", events_per_user=60).is_done("synthetic")


def test_what_was_made_with_another_value_is_stale_and_says_which(tmp_path: Path) -> None:
    run = finish(tmp_path, "synthetic", events_per_user=40)
    with pytest.raises(UserError, match=r"synthetic\.events_per_user: 40 -> None.*--redo synthetic"):
        run.is_done("synthetic")


@pytest.mark.parametrize("value", [60, 40])
def test_an_unfinished_stage_goes_on_with_the_value_of_today_only(tmp_path: Path, value: int) -> None:
    run = RunFolder(Recipe(run_dir=str(tmp_path)))
    folder = run.path("synthetic")

    def stop(*_: object) -> dict[str, Any]:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(run.recipe, "synthetic", stop)
    path = folder / "started.json"
    started = json.loads(path.read_text(encoding="utf-8"))
    started["config"]["synthetic"]["events_per_user"] = value
    path.write_text(json.dumps(started), encoding="utf-8")
    if value == 60:
        with run.stage("synthetic"):
            assert (folder / "half").exists()
    else:
        with pytest.raises(UserError, match=r"unfinished .*events_per_user: 40 -> None.*--redo synthetic"):
            run.is_done("synthetic")
        assert (folder / "half").exists(), "what it had done is lost"


@pytest.mark.parametrize("name", [*RETIRED, *REPLACED])
def test_a_recipe_that_has_it_is_told(name: str, tmp_path: Path) -> None:
    section, key = name.split(".")
    value = RETIRED.get(name, 1)
    told = rf"{name} is no setting any more: " + (
        rf"use {REPLACED[name]}" if name in REPLACED else rf"it is {value!r} for good, so take it out"
    )
    with pytest.raises(UserError, match=told):
        check_recipe({section: {key: value}})
    with pytest.raises(UserError, match=told):
        parse_recipe("run", [f"--{name}", str(value)])
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{section}:\n  {key}: {value}\n", encoding="utf-8")
    with pytest.raises(UserError, match=told):
        parse_recipe("run", [str(path)])


def test_what_takes_its_place_is_a_setting_and_what_is_gone_is_none() -> None:
    known = {action.dest for action in stage_parser("run")._actions}
    assert set(REPLACED.values()) <= known
    assert not known & {*RETIRED, *REPLACED}
    assert without_retired({"seed": 0, "rl": {"attention": "auto", "gamma": 1.0}}) == {"seed": 0, "rl": {"gamma": 1.0}}


def test_commands_that_need_no_model_start_without_torch(tmp_path: Path):
    """Three seconds of every stage's start, and of every cell of a study."""
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from tppo.cli import main\n"
        f"settings = ['--run_dir', {str(tmp_path)!r}, '--synthetic.users', '60']\n"
        "for stage in ('synthetic', 'prepare'): main([stage, *settings])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=environment)
