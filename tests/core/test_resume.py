"""Work that is stopped goes on: what comes out is the same, to the last byte, however often it was stopped."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluate.test_stage import judge_file, make_inputs  # noqa: F401  (a fixture)
from tests.generate.test_sample import recipe as sample_recipe  # noqa: F401  (a fixture)
from tests.helpers import fake_run
from tests.helpers.encoders import make_tiny_encoder
from tests.helpers.killed import SMALL_CHUNK, run_with_kills
from tests.helpers.labelled_run import make_run
from tppo.cli import run_one
from tppo.core import resume
from tppo.core.config import Reading, Recipe
from tppo.core.resume import make_rows
from tppo.core.run import RunFolder, run_stage

SCHEMA = pa.schema([("unit", pa.int64()), ("text", pa.string())])


class Stopped(Exception):
    pass


def rows_of(unit: int) -> list[dict]:
    return [{"unit": unit, "text": f"{unit}.{number}"} for number in range(unit % 3)]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=6), st.integers(0, 8))
def test_rows_are_the_same_however_often_they_are_stopped(count, stops, damaged):
    made: list[int] = []
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "SECONDS_BETWEEN_WRITES", -1.0)
        folder = Path(name) / "parts"

        def attempt(stop: int | None) -> pa.Table:
            def make(unit: int) -> list[dict]:
                if unit == stop:
                    raise Stopped
                made.append(unit)
                return rows_of(unit)

            return make_rows(folder, SCHEMA, range(count), make, made_with={"seed": 1})

        for stop in stops:
            with suppress(Stopped):
                attempt(stop)
            if (path := folder / f"{damaged:09}.parquet").exists():
                path.write_bytes(path.read_bytes()[:-7])
        table = attempt(None)
        assert table.to_pylist() == [row for unit in range(count) for row in rows_of(unit)]
        made.clear()
        assert attempt(None) == table
        assert made == []
        # Of what was made with something else nothing is used.
        make_rows(folder, SCHEMA, range(count), lambda unit: made.append(unit) or rows_of(unit), made_with={"seed": 2})
        assert made == list(range(count))


def test_nothing_is_kept_without_a_folder():
    assert make_rows(None, SCHEMA, range(4), rows_of, made_with={}).num_rows == 3


def files_of(folder: Path) -> dict[str, bytes]:
    """What a finished stage holds, without what says when and how long."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    assert not [name for name in found if name.startswith(("parts", "checkpoints"))]
    # Of started.json a kill after the manifest was written may leave half a successor.
    notes = ("manifest.json", "started.json", "started.json.tmp")
    return {name: path.read_bytes() for name, path in found.items() if name not in notes}


def facts_of(run: RunFolder, stage: str) -> dict:
    facts = json.dumps(run.facts(stage))
    return json.loads(facts, object_hook=lambda d: {k: v for k, v in d.items() if not k.startswith("seconds")})


def killed_as_straight(recipe: Recipe, stage: str, files: int, at_least: int) -> None:
    """Compare a stage that ran through with one that was killed again and again."""
    broken = replace(recipe, run_dir=f"{recipe.run_dir}-killed")
    shutil.copytree(recipe.run_dir, broken.run_dir)
    run_one(recipe, stage)
    assert run_with_kills(broken, stage, files) >= at_least
    straight, killed = RunFolder(recipe), RunFolder(broken)
    assert files_of(killed.path(stage)) == files_of(straight.path(stage))
    assert facts_of(killed, stage) == facts_of(straight, stage)


def test_sample(sample_recipe):  # noqa: F811
    sample_recipe.sample.batch_size = 6
    killed_as_straight(sample_recipe, "sample", files=5, at_least=2)


def test_distance(tmp_path, tiny_policy, judge_file):  # noqa: F811
    examples = fake_run.make_examples(6) + fake_run.make_examples(4, split="eval2")
    recipe, _ = make_inputs(tmp_path / "run", tiny_policy, judge_file, examples)
    recipe.evaluate.readings = [Reading("distance", 4)]
    killed_as_straight(recipe, "read_distance", files=5, at_least=2)


def test_reward_training(tmp_path):
    recipe = make_run(tmp_path, make_tiny_encoder(tmp_path / "encoder"), rows=48, held_out=16)
    recipe.reward.epochs, recipe.reward.evals_per_epoch = 2, 2
    # A checkpoint is three files that appear: state.json, checksums.json, and the folder itself.
    killed_as_straight(recipe, "reward", files=8, at_least=4)


def test_labels_of_the_embedding_judge(sample_recipe, monkeypatch):  # noqa: F811
    run_one(sample_recipe, "sample")
    sample_recipe.label.calibration_examples = 10
    monkeypatch.setattr("tppo.judge.label.CHUNK", SMALL_CHUNK)
    killed_as_straight(sample_recipe, "label", files=7, at_least=2)


def test_a_kill_while_outputs_are_hashed_costs_nothing(tmp_path, monkeypatch):
    """The manifest of a large model takes a while; the training is not made again for it."""
    recipe, calls = Recipe(run_dir=str(tmp_path)), []

    def work(recipe: Recipe, run: RunFolder, folder: Path) -> dict:
        calls.append(folder)
        (folder / "log.tsv").write_text("rows")
        return {"loss": 1.5}

    with monkeypatch.context() as patch:
        patch.setattr("tppo.core.folders.file_mark", lambda path: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            run_stage(recipe, "synthetic", work)
    assert run_stage(recipe, "synthetic", work)
    assert len(calls) == 1
    manifest = RunFolder(recipe).manifest("synthetic")
    assert manifest is not None
    assert manifest["facts"] == {"loss": 1.5}
    assert list(manifest["outputs"]) == ["log.tsv"]
