"""What can change outside or inside a run folder, times the commands that may come next.

After a change a command either refuses, says why, and leaves every file as it was; or it ends with exactly what a new
run folder gets now. Whatever no stage has made is never touched. `test_the_count` prints how many combinations that is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tppo import cli
from tppo.core.common import UserError
from tppo.core.config import Recipe
from tppo.core.outside import MODEL_FILES, key_digest
from tppo.core.processes import FOLDER, Children, locked
from tppo.core.run import RunFolder, run_stage
from tppo.core.stages import STAGES, rl_stage

MADE = ["prepare", "sft", "sample"]
MAIN = {"prepare": "examples.parquet", "sft": "model/weights.json", "sample": "responses.parquet"}
COUNT: Counter[str] = Counter()
NAMED: dict[str, Any] = {}
"""The settings that a change gives, `section.name`: they are applied to the recipe of the command that follows."""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prepare(recipe: Recipe, run: RunFolder, folder: Path) -> Any:
    logs = sorted(path for source in recipe.prepare.source for path in Path("/").glob(source[1:]))
    return {
        "log": {path.name: digest(path) for path in logs},
        "key": key_digest(),
        "settings": asdict(recipe.prepare) | asdict(recipe.task),
        "seed": recipe.seed,
    }


def sft(recipe: Recipe, run: RunFolder, folder: Path) -> Any:
    model = {p.name: digest(p) for pattern in MODEL_FILES for p in Path(recipe.sft.model).glob(pattern)}
    rate = recipe.sft.learning_rate
    return {"examples": read(run, "prepare"), "model": model, "rate": rate, "seed": recipe.seed}


def sample(recipe: Recipe, run: RunFolder, folder: Path) -> Any:
    return {"examples": read(run, "prepare"), "policy": read(run, "sft"), "count": recipe.sample.train_examples}


def read(run: RunFolder, stage: str) -> Any:
    return json.loads((run.require(stage) / MAIN[stage]).read_text())


def as_module(work: Callable[[Recipe, RunFolder, Path], Any]) -> types.ModuleType:
    """A stage that writes what it has read, so that two results are equal when all that went into them is."""

    def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
        path = folder / MAIN[work.__name__]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(work(recipe, run, folder)))
        return {}

    module = types.ModuleType(f"tiny_{work.__name__}")
    module.run = run  # type: ignore[attr-defined]
    return module


class World:
    """A log, a model and a finished run of three stages that read them, with a stranger's files around."""

    def __init__(self, root: Path) -> None:
        self.root, self.log, self.model, self.run_dir = root, root / "log", root / "model", root / "run"

    def recipe(self, run_dir: Path | None = None) -> Recipe:
        recipe = Recipe(run_dir=str(run_dir or self.run_dir))
        recipe.prepare.source = [str(self.log / "*.tsv")]
        recipe.sft.model = str(self.model)
        for name, value in NAMED.items():
            section, _, key = name.rpartition(".")
            setattr(getattr(recipe, section) if section else recipe, key, value)
        return recipe

    def path(self, stage: str) -> Path:
        return self.run_dir / stage / MAIN[stage]

    def files(self) -> dict[str, bytes | None]:
        """All that is there but locks; None for a folder."""
        return {
            str(path.relative_to(self.root)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.root.rglob("*"))
            if FOLDER not in path.parts
        }


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    NAMED.clear()
    monkeypatch.setenv("TPPO_HASH_KEY", "k" * 16)
    for work in (prepare, sft, sample):
        module = as_module(work)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(STAGES, work.__name__, replace(STAGES[work.__name__], module=module.__name__))
    # The stages of a run, in this process: a real one starts Python for each (tests/core/test_processes.py).
    monkeypatch.setattr(Children, "call", in_this_process)
    world = World(tmp_path / "world")
    for folder in (world.log, world.model, world.run_dir):
        folder.mkdir(parents=True)
    for name in ("a", "b"):
        (world.log / f"{name}.tsv").write_text(f"rows of {name}\n")
    for name in ("model.safetensors", "config.json", "README.md"):
        (world.model / name).write_text(name)
    (world.run_dir / "notes.txt").write_text("a stranger's")
    IN_USE[:] = [world.recipe()]
    cli.run(world.recipe(), MADE)
    yield world
    NAMED.clear()


def in_this_process(self: Children, command: list[str], **settings: Any) -> int:
    recipe = IN_USE[-1]
    return 0 if cli.run_one(recipe, {"sft": "sft", "prepare": "prepare", "sample": "sample"}[command[3]]) else 1


IN_USE: list[Recipe] = []


def command(world: World, name: str) -> None:
    """`run`, a stage's own command, or `redo STAGE`: `tppo run --redo STAGE`."""
    recipe = world.recipe()
    IN_USE[:] = [recipe]
    if name == "run":
        cli.run(recipe, MADE)
    elif name.startswith("redo "):
        cli.run(recipe, MADE, redo=[name.removeprefix("redo ")])
    else:
        cli._run_stages_of(name, recipe, [])


def edit(path: Path, keep_times: bool = False) -> None:
    """Another content of the same size."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    if keep_times:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def unfinished(world: World, stage: str) -> None:
    """Stopped at its end, and all that follows from it not begun."""
    RunFolder(world.recipe()).discard_from(stage)

    def stop(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "half").write_text("half")
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        run_stage(world.recipe(), stage, stop)


def put(path: Path, text: str = "a stranger's") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def change(path: Path, **changed: Any) -> None:
    """Other values in a JSON file; `...`: none."""
    changed = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not ...}))


def replaced_by(world: World, stage: str, make: Callable[[Path], None]) -> None:
    folder = world.run_dir / stage
    RunFolder(world.recipe()).discard_from(stage)
    make(folder)


def setting(name: str, value: Any) -> Callable[[World], None]:
    return lambda world: NAMED.__setitem__(name, value)


def after(first: Callable[[World], None], second: Callable[[World], None]) -> Callable[[World], None]:
    return lambda world: (first(world), second(world))[0]


def linked(world: World) -> None:
    """The stage's folder is a link to a larger disk."""
    folder, elsewhere = world.run_dir / "sample", world.root / "disk"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere, target_is_directory=True)


def only(stage: str) -> tuple[str, ...]:
    return "run", stage, f"redo {stage}"


CHANGES: dict[str, tuple[Callable[[World], None], tuple[str, ...], str]] = {
    # change: (what happens, the commands tried, what the refusal of all but the redo names; "": not refused)
    "nothing": (lambda w: None, ("run", *MADE, "redo sft"), ""),
    "log: content": (lambda w: edit(w.log / "a.tsv"), ("run", *MADE, "redo prepare"), "prepare.source.*a.tsv has ch"),
    "log: content, times kept": (lambda w: edit(w.log / "a.tsv", True), only("prepare"), "a.tsv has changed"),
    "log: longer": (lambda w: put(w.log / "a.tsv", "rows of a\nmore\n"), only("prepare"), "a.tsv has changed"),
    "log: empty": (lambda w: put(w.log / "b.tsv", ""), only("prepare"), "b.tsv has changed"),
    "log: mtime only": (lambda w: os.utime(w.log / "a.tsv", (1, 1)), ("run", *MADE), ""),
    "log: written again": (lambda w: put(w.log / "a.tsv", "rows of a\n"), ("run", *MADE), ""),
    "log: one more": (lambda w: put(w.log / "c.tsv"), ("run", *MADE, "redo prepare"), "c.tsv is new"),
    "log: one less": (lambda w: (w.log / "b.tsv").unlink(), only("prepare"), "b.tsv is gone"),
    "log: another beside": (lambda w: put(w.log / "c.csv"), ("run", *MADE), ""),
    "model: weights": (lambda w: edit(w.model / "model.safetensors"), ("run", "sft", "sample", "redo sft"),
                       "sft.model.*model.safetensors has changed"),
    "model: weights, times kept": (lambda w: edit(w.model / "model.safetensors", True), only("sft"), "has changed"),
    "model: config": (lambda w: edit(w.model / "config.json"), only("sft"), "config.json has changed"),
    "model: tokenizer added": (lambda w: put(w.model / "tokenizer.json"), only("sft"), "tokenizer.json is new"),
    "model: a file less": (lambda w: (w.model / "model.safetensors").unlink(), only("sft"), "safetensors is gone"),
    "model: card": (lambda w: edit(w.model / "README.md"), ("run", "sft"), ""),
    "key": (lambda w: os.environ.__setitem__("TPPO_HASH_KEY", "x" * 16), ("run", *MADE, "redo prepare"),
            "TPPO_HASH_KEY"),
    "setting: prepare": (setting("prepare.min_history", 4), ("run", *MADE, "redo prepare"), "prepare.min_history"),
    "setting: task": (setting("task.num_queries", 4), ("run", *MADE, "redo prepare"), "task.num_queries: 3 -> 4"),
    "setting: sft": (setting("sft.learning_rate", 0.5), ("run", "sft", "sample", "redo sft"), "sft.learning_rate"),
    "setting: sample": (setting("sample.train_examples", 7), only("sample"), "sample.train_examples: 1000 -> 7"),
    "setting: seed": (setting("seed", 1), ("run", *MADE, "redo prepare"), "seed: 0 -> 1"),
    "setting: shared seed": (setting("shared_seed", 1), only("prepare"), "seed: 0 -> 1"),
    "setting: not read here": (setting("rl.updates", 7), ("run", *MADE), ""),
    "setting: out of range": (setting("task.num_queries", 0), ("run", "redo prepare", "redo sample"), "num_queries"),
    "setting: no such log": (setting("prepare.source", ["/none.tsv"]), ("redo prepare",), "none.tsv does not exist"),
    "setting: no such model": (setting("sft.model", "/none"), ("redo sft", "redo prepare"), "none is neither"),
    "output: edited": (lambda w: edit(w.path("prepare")), ("run", *MADE, "redo prepare"), "examples.parquet has chan"),
    "output: edited, times kept": (lambda w: edit(w.path("sft"), True), only("sft"), "weights.json has changed"),
    "output: cut": (lambda w: put(w.path("sample"), ""), only("sample"), "responses.parquet has changed"),
    "output: gone": (lambda w: w.path("prepare").unlink(), ("run", *MADE, "redo prepare"), "examples.parquet is gone"),
    "output: folder gone": (lambda w: shutil.rmtree(w.run_dir / "sft" / "model"), ("run", "sample", "redo sft"),
                            "weights.json is gone"),
    "manifest: touched up": (lambda w: change(w.run_dir / "sft/manifest.json", seconds=1), only("sample"),
                             "from other inputs"),
    "manifest: damaged": (lambda w: put(w.run_dir / "sft/manifest.json", "{"), only("sft"), "manifest.json is damaged"),
    "manifest: a list": (lambda w: put(w.run_dir / "sft/manifest.json", "[]"), only("sft"), "manifest.json is damaged"),
    **{f"manifest: {named}": (lambda w, changed=changed: change(w.run_dir / "prepare/manifest.json", **changed),
                              ("sft", "redo prepare"), refusal)
       for named, changed, refusal in (
           ("config a number", {"config": 5}, "config is not what"),
           ("config empty", {"config": {}}, "config is empty"),
           ("outside a text", {"outside": "x"}, "outside is not what"),
           ("a note without key", {"outside": {"prepare.source": {"files": {}}}}, "noted of it is damaged"),
           ("a note of a text", {"outside": {"prepare.source": "x"}}, "outside is not what"),
           ("a mark without hash", {"outside": {"prepare.source": {"files": {"x": {}}, "key": "x"}}}, "outside is no"),
           ("outputs a list", {"outputs": []}, "outputs is not what"),
           ("stamps a list", {"stamps": []}, "stamps is not what"),
           ("stamps of texts", {"stamps": {"examples.parquet": "x"}}, "stamps is not what"),
           ("numerics a text", {"numerics": "x"}, "numerics is not what"),
           ("inputs a list", {"inputs": []}, "inputs is not what"),
           ("without config", {"config": ...}, "no manifest of a tppo stage"),
           ("without facts", {"facts": ...}, "no manifest of a tppo stage"),
           ("without inputs", {"inputs": ...}, "no manifest of a tppo stage"),
           ("facts null", {"facts": None}, "facts is not what"),
           ("foreign a text", {"foreign": 5}, "foreign is not what"),
       )},
    "manifest: empty object": (lambda w: put(w.run_dir / "prepare/manifest.json", "{}"),
                               (*only("prepare"), "sft"), "no manifest of a tppo stage"),
    "manifest: too deep": (lambda w: put(w.run_dir / "prepare/manifest.json", "[" * 200_000), ("run", "redo prepare"),
                           "manifest.json is damaged"),
    "manifest: newer": (lambda w: change(w.run_dir / "sft/manifest.json", format=99), ("run", "sft", "sample"),
                        "format 99.*newer version"),
    "stage: deleted": (lambda w: shutil.rmtree(w.run_dir / "prepare"), ("run", "sft", "redo prepare"),
                       "other inputs|'prepare' is not finished"),
    "stage: made anew elsewhere": (lambda w: (RunFolder(w.recipe()).discard_from("sft"), command(w, "sft")), ("run",),
                                   ""),
    "stage: on another disk": (linked, ("run", "sample", "redo sample"), ""),
    "stranger: in a finished stage": (lambda w: put(w.run_dir / "sft/notes.txt"), ("run", "sft", "sample"), ""),
    "stranger: there, redo": (lambda w: put(w.run_dir / "sft/notes.txt"), ("redo sft", "redo prepare"),
                              "sft/notes.txt.*move it"),
    "stranger: deep, redo": (lambda w: put(w.run_dir / "sft/model/notes.txt"), ("redo sft", "redo prepare"),
                             "model/notes.txt.*move it"),
    "stranger: where a stage writes": (
        lambda w: replaced_by(w, "sample", lambda folder: put(folder / "notes.txt")), ("run", "sample", "redo sample"),
        "no stage has made what is there"),
    "stranger: a file where a stage writes": (
        lambda w: replaced_by(w, "sample", put), ("run", "sample", "redo sample"), "no stage has made what is there"),
    "stranger: JSON called manifest": (
        lambda w: replaced_by(w, "sample", lambda folder: put(folder / "manifest.json", '{"name": "app"}')),
        ("run", "sample", "redo sample"), "no manifest of a tppo stage|no stage has made"),
    "stranger: an empty folder": (
        lambda w: replaced_by(w, "sample", lambda folder: folder.mkdir()), ("run", "sample"), ""),
    "unfinished": (lambda w: unfinished(w, "sft"), ("run", "sft"), ""),
    "unfinished, other setting": (
        after(lambda w: unfinished(w, "sft"), setting("sft.learning_rate", 0.5)), only("sft"), "sft.learning_rate"),
    "unfinished, other log": (
        after(lambda w: unfinished(w, "prepare"), lambda w: edit(w.log / "a.tsv")), only("prepare"), "a.tsv has ch"),
    "unfinished, other model": (
        after(lambda w: unfinished(w, "sft"), lambda w: edit(w.model / "config.json")), only("sft"), "config.json"),
    "unfinished, other inputs": (
        after(lambda w: unfinished(w, "sft"), lambda w: change(w.run_dir / "prepare/manifest.json", seconds=1)),
        only("sft"), "have been made anew"),
    "unfinished, damaged": (
        after(lambda w: unfinished(w, "sft"), lambda w: put(w.run_dir / "sft/started.json", "")), only("sft"),
        "started.json is damaged"),
    "unfinished, a stranger in it": (
        after(lambda w: unfinished(w, "sft"), lambda w: put(w.run_dir / "sft/notes.txt")), ("run", "sft"), ""),
    "unfinished, a stranger, redo": (
        after(lambda w: unfinished(w, "sft"), lambda w: put(w.run_dir / "sft/notes.txt")), ("redo sft",),
        "sft/notes.txt.*move it"),
    "resumed with a stranger, redo": (
        after(lambda w: unfinished(w, "sft"), lambda w: (put(w.run_dir / "sft/notes.txt"), command(w, "run"))),
        ("redo sft",), "sft/notes.txt.*move it"),
}  # fmt: skip
CASES = [(change, command) for change, (_, commands, _) in CHANGES.items() for command in commands]


@pytest.mark.parametrize(("name", "asked"), CASES, ids=[f"{change} | {command}" for change, command in CASES])
def test_after_a_change(name: str, asked: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    happens, _, refusal = CHANGES[name]
    IN_USE[:] = [world.recipe()]
    happens(world)
    before = world.files()
    strangers = {path: text for path, text in before.items() if text is not None and b"a stranger's" in text}
    COUNT["combinations"] += 1
    # A redo of what has changed mends it, unless the change is one that no redo may mend.
    mends = asked.startswith("redo") and not re.search(
        r"move it|no stage has made|num_queries$|does not exist|is neither", refusal
    )
    refused = ""
    try:
        command(world, asked)
    except UserError as error:
        refused = str(error)
    if refused:
        COUNT["refused"] += 1
        assert refusal, f"refused: {refused}"
        assert not mends, f"refused: {refused}"
        assert re.search(refusal, refused), refused
        assert world.files() == before, "a refused command changed something"
    else:
        COUNT["made or reused"] += 1
        made = [asked] if asked in MADE else MADE
        reused = not as_new(world, made)
        COUNT["silent reuses"] += reused
        assert not reused
        assert mends or not refusal
    touched = [path for path, text in strangers.items() if world.files().get(path) != text]
    COUNT["foreign files touched"] += len(touched)
    assert not touched


def as_new(world: World, stages: list[str]) -> bool:
    """Whether stages hold what they would in a new run folder."""
    new = world.root.parent / "new"
    IN_USE[:] = [world.recipe(new)]
    cli.run(IN_USE[0], MADE)
    return all((new / stage / MAIN[stage]).read_bytes() == world.path(stage).read_bytes() for stage in stages)


@pytest.mark.parametrize("gone", ["log", "model"])
@pytest.mark.parametrize("asked", ["run", "sft", "sample"])
def test_what_is_gone_altogether_is_said_and_the_stage_stays(
    world: World, gone: str, asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log may be deleted once it is read, and a run folder moved."""
    before = {stage: world.path(stage).read_bytes() for stage in MADE}
    shutil.rmtree(getattr(world, gone))
    COUNT["combinations"] += 1
    command(world, asked)
    assert {stage: world.path(stage).read_bytes() for stage in MADE} == before
    said = " ".join(capsys.readouterr().err.split())
    assert {"log": "prepare.source", "model": "sft.model"}[gone] + " names is not here any more" in said


@pytest.mark.parametrize("held", ["run", *MADE])
@pytest.mark.parametrize("asked", ["run", "redo prepare", "redo sample", *MADE])
def test_two_at_once(world: World, held: str, asked: str) -> None:
    """While somebody holds the run folder, or a stage, nobody else writes what they hold."""
    RunFolder(world.recipe()).discard_from("sample")
    if held in ("prepare", "sft") and not asked.startswith("redo"):
        pytest.skip("finished: nobody writes it")
    before = world.files()
    COUNT["combinations"] += 1
    touches = (held == "run" and asked not in MADE) or (held == "sample" and asked in ("run", "sample")) or (
        asked == "redo prepare" and held != "run"
    ) or (asked == "redo sample" and held == "sample")  # fmt: skip
    with locked(world.run_dir, held):
        if touches:
            with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*wait until it has ended"):
                command(world, asked)
            assert world.files() == before
        else:
            command(world, asked)
    command(world, asked)


def test_a_recipe_of_the_users_in_the_run_folder_is_kept(world: World) -> None:
    path = world.run_dir / "recipe.yaml"
    path.write_text("# my notes\nseed: 0\n")
    command(world, "run")
    assert path.read_text().startswith("# Every setting")
    assert (world.run_dir / "recipe.1.yaml").read_text() == "# my notes\nseed: 0\n"
    NAMED["rl.updates"] = 7
    command(world, "run")
    assert "updates: 7" in path.read_text()
    assert not (world.run_dir / "recipe.2.yaml").exists()


def test_a_redo_of_no_stage_deletes_nothing(world: World) -> None:
    before = world.files()
    for name in ("notes.txt", "../model", rl_stage("ppo_sum"), "sftt"):
        for asked in ("sft", "run"):
            with pytest.raises(UserError, match="this recipe's stages are"):
                cli.run(world.recipe(), MADE, redo=[name]) if asked == "run" else cli._run_stages_of(
                    asked, world.recipe(), [name]
                )
    for asked, stage in (("sft", "prepare"), ("prepare", "sft"), ("prepare", "sample")):
        with pytest.raises(UserError, match=f"does not make it anew, `tppo run --redo {stage}` does"):
            cli._run_stages_of(asked, world.recipe(), [stage])
    with pytest.raises(UserError, match=r"--redo.*'sample'.*not among"):
        cli.run(world.recipe(), ["prepare", "sft"], redo=["sample"])
    with pytest.raises(UserError, match="this recipe's stages are") as told:
        cli._run_stages_of("prepare", world.recipe(), ["none"])
    assert str(told.value).count("'prepare'") == 1
    assert world.files() == before


def test_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nmatrix: {dict(COUNT)}")
    assert COUNT["silent reuses"] == COUNT["foreign files touched"] == 0
