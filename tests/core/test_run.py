"""The run folder: which stages are done, and what a changed input does."""

import json
import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tppo import cli
from tppo.core.common import UserError
from tppo.core.config import Evaluate, Reading, Recipe
from tppo.core.files import peak_memory_mib
from tppo.core.recipe import parse_recipe
from tppo.core.run import RunFolder, run_stage
from tppo.core.stages import STAGES, all_stages, of_variant, shared_stages, stage_command, stage_inputs

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


def test_a_stranger_in_the_report_is_named_before_anything_is_made(tmp_path: Path):
    stages = all_stages(Recipe(algorithms=["tppo"]))
    recipe = make_run(tmp_path, stages)
    (tmp_path / "report" / "mine.html").write_text("mine")
    assert RunFolder(recipe).check(stages) == []
    read = replace(recipe, evaluate=VOTED)
    with pytest.raises(UserError, match=r"report/mine\.html.*move it"):
        RunFolder(read).check(all_stages(read))
    assert (tmp_path / "report" / "mine.html").read_text() == "mine"


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


def test_the_manifest_says_the_seed_that_was_used(tmp_path: Path):
    """Of every stage, also when the stages before tuning have a seed of their own."""
    recipe = Recipe(run_dir=str(tmp_path), algorithms=["tppo", "dpo"], seed=1, shared_seed=0, evaluate=VOTED)
    used = {}

    def work(recipe: Recipe, run: RunFolder, folder: Path):
        used[folder.name] = recipe.seed
        return {}

    stages = all_stages(recipe)
    for stage in stages:
        run_stage(recipe, stage, work)
    assert used == {stage: RunFolder(recipe).manifest(stage)["config"]["seed"] for stage in stages}
    assert {stage for stage, seed in used.items() if seed == 0} == set(shared_stages(recipe))
    assert {stage for stage, seed in used.items() if seed == 1} == set(stages) - set(shared_stages(recipe))


def test_a_run_of_before_stays_done(tmp_path: Path):
    """Its manifests have no format, no notes of what is outside and no times of outputs; hashes they have."""

    def work(recipe: Recipe, run: RunFolder, folder: Path):
        (folder / STAGES[folder.name].writes[0]).write_text("made")
        return {}

    recipe = Recipe(run_dir=str(tmp_path))
    for stage in ("synthetic", "prepare"):
        run_stage(recipe, stage, work)
        for name in ("manifest.json", "started.json"):
            path = tmp_path / stage / name
            record = json.loads(path.read_text())
            for new in ("format", "outside", "stamps", "foreign"):
                record.pop(new, None)
            path.write_text(json.dumps(record))
        assert RunFolder(recipe).is_done(stage)
    (tmp_path / "synthetic" / "log.tsv").write_text("edit")
    with pytest.raises(UserError, match=r"log.tsv has changed since stage 'synthetic' wrote it: put .*--redo synth"):
        RunFolder(recipe).is_done("synthetic")


@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("name", ["notes.txt", "notes.tmp", "sub/notes.tmp", "sub/deep/notes.txt", "empty/"])
def test_a_redo_deletes_nothing_that_was_put_there(tmp_path: Path, when: str, name: str):
    """Whenever it was, and whatever it is called; half a file of the stage's own is no more than that."""

    def put():
        path = tmp_path / "synthetic" / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text("mine")

    def work(recipe: Recipe, run: RunFolder, folder: Path):
        (folder / "log.tsv").write_text("made")
        if when == "during":
            put()
        if when == "before" and not path.exists():
            put()
            raise KeyboardInterrupt
        return {}

    path = tmp_path / "synthetic" / name
    recipe = Recipe(run_dir=str(tmp_path))
    with suppress(KeyboardInterrupt):
        run_stage(recipe, "synthetic", work)
    run_stage(recipe, "synthetic", work)
    if when == "after":
        put()
    for half in ("log.tmp", "log.tsv.tmp", "manifest.json.tmp"):
        (tmp_path / "synthetic" / half).write_text("half")
    run = RunFolder(recipe)
    with pytest.raises(UserError, match=rf"has not made .*{name.split('/')[0]}.*move it"):
        run.discard_from("synthetic")
    assert path.exists()
    assert (tmp_path / "synthetic" / "log.tsv").exists()
    shutil.move(path if "/" not in name else path.parent if path.is_file() else path, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "synthetic" / "sub", ignore_errors=True)
    run.discard_from("synthetic")
    assert not (tmp_path / "synthetic").exists()


def test_a_stage_from_elsewhere_has_the_same_task(tmp_path: Path):
    """`tppo sft` on the examples of another run: those were cut for another number of queries."""
    make_run(tmp_path / "old", ["synthetic", "prepare"])
    here = Recipe(run_dir=str(tmp_path / "new"), stage_dirs={"prepare": str(tmp_path / "old" / "prepare")})
    RunFolder(here).check_left(["sft"])
    here.seed = 1
    RunFolder(here).check_left(["sft"])
    here.task.num_queries = 2
    with pytest.raises(UserError, match=r"stage_dirs: .*old/prepare was made .*task\.num_queries: 3 -> 2.*anew there"):
        RunFolder(here).check_left(["sft"])
    (tmp_path / "old" / "prepare" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="holds no manifest of a tppo stage"):
        RunFolder(here).check_left(["sft"])


def test_stage_dirs_name_stages():
    for name in ("prepar", "rl", "read", "dpo"):
        with pytest.raises(UserError, match=rf"stage_dirs: \['{name}'\] are no stages; there are .*'rl_tppo'"):
            parse_recipe("sft", ["--stage_dirs", f"{{{name}: x}}"])
    assert parse_recipe("sft", ["--stage_dirs", "{rl_dpo: x, read_vote: y}"])[0].stage_dirs.keys() == {
        "rl_dpo", "read_vote",
    }  # fmt: skip


@pytest.mark.parametrize("change", ["setting", "log", "nothing"])
def test_a_prepare_that_kept_nothing_begins_anew(tmp_path: Path, change: str):
    """What an unfinished one left is of use to itself alone; of a log that has changed it is never used."""
    log = tmp_path / "log.tsv"
    log.write_text("one")
    recipe = Recipe(run_dir=str(tmp_path / "run"))
    recipe.prepare.source = [str(log)]
    folder, left = tmp_path / "run" / "prepare", []

    def work(recipe: Recipe, run: RunFolder, folder: Path):
        left.append((folder / "scratch").exists())
        (folder / "scratch").mkdir(exist_ok=True)
        (folder / "scratch" / "plan.json").write_text("{}")
        (folder / "rejects.parquet").write_text("x")
        if len(left) == 1:
            raise UserError("no row could be kept")
        return {}

    with pytest.raises(UserError, match="no row"):
        run_stage(recipe, "prepare", work)
    if change == "setting":
        recipe.prepare.min_history += 1
    elif change == "log":
        stat = log.stat()
        log.write_text("two")
        os.utime(log, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert RunFolder(recipe).check(["prepare"]) == ["prepare"]
    assert run_stage(recipe, "prepare", work)
    assert left == [False, change == "nothing"]
    assert RunFolder(recipe).is_done("prepare")
    assert folder.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"synthetic": "x"}'])
def test_a_damaged_note_of_redos_is_said_before_anything_is_deleted(tmp_path: Path, text: str):
    recipe = make_run(tmp_path, ["synthetic", "prepare"])
    (tmp_path / "redone.json").write_text(text)
    for redo in ([], ["synthetic"]):
        with pytest.raises(UserError, match=r"redone\.json is damaged.*delete it"):
            RunFolder(recipe).check(["synthetic"], redo)
    with pytest.raises(UserError, match=r"redone\.json is damaged.*delete it"):
        RunFolder(recipe).discard_from("synthetic")
    assert RunFolder(recipe).is_done("prepare")


def test_peak_memory_is_in_mib_everywhere(monkeypatch: pytest.MonkeyPatch):
    peak = peak_memory_mib()
    assert 10 < peak < 100_000
    usage = type("Usage", (), {"ru_maxrss": 300 * 2**20})
    monkeypatch.setattr("resource.getrusage", lambda who: usage)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory_mib() == 300
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_memory_mib() == 300 * 2**10


def test_nothing_imports_what_only_posix_has_at_its_top():
    """Windows has no fcntl and no resource."""
    import tppo

    for path in Path(tppo.__file__).parent.rglob("*.py"):
        assert not re.search(r"^(import|from) (fcntl|resource|pwd|grp|termios)\b", path.read_text(), re.M), path


@pytest.mark.parametrize("command", ["run", "sft", "plan", "study"])
def test_every_command_checks_the_settings_of_all_it_makes_first(tmp_path: Path, command: str, capsys):
    """The same check; nothing is written."""
    run_dir = tmp_path / "run"
    flags = ["--run_dir", str(run_dir), "--sft.batch_size", "10", "--sft.micro_batch_size", "4"]
    if command == "sft":
        make_run(run_dir, ["synthetic", "prepare"])
    before = {path for path in tmp_path.rglob("*") if ".tppo" not in path.parts}
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *flags, *(["--redo", "prepare"] if command == "run" else [])])
    assert stopped.value.code == 2
    assert "sft.batch_size=10 has to be a multiple of sft.micro_batch_size=4" in capsys.readouterr().err
    assert {path for path in tmp_path.rglob("*") if ".tppo" not in path.parts} == before


def test_all_settings_that_are_gone_are_named_at_once(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("rl:\n  attention: auto\nlabel:\n  batch_size: 64\nevaluate:\n  vote: true\n")
    with pytest.raises(UserError) as told:
        parse_recipe("run", [str(path), "--synthetic.events_per_user", "60"])
    for name in ("rl.attention", "label.batch_size", "evaluate.vote", "synthetic.events_per_user"):
        assert f"{name} is no setting any more" in str(told.value)
