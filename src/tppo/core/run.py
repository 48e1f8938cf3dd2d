"""The run folder: one folder per stage, a manifest written last, and which stages are done.

A stage reads only folders to its left (`stage_inputs`). A folder without `manifest.json` is unfinished: it is resumed.
A stage, finished or not, whose settings, inputs, or what it read outside the run folder (`tppo.core.outside`) have
changed is never silently reused or overwritten, nor is one whose files are not as it wrote them: the error names what
changed and the way out. Everything is checked before anything is written, and nothing is deleted that no stage has made
(`tppo.core.folders`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from tppo.core import folders, outside
from tppo.core.changes import changed_settings, without_retired
from tppo.core.common import UserError, console
from tppo.core.config import Recipe
from tppo.core.files import UNFINISHED, peak_memory_mib, sha256_file, write_json
from tppo.core.folders import MANIFEST, STARTED, read_record
from tppo.core.processes import check_free, locked
from tppo.core.stages import (
    STAGES,
    all_stages,
    precision_section,
    split_stage,
    stage_command,
    stage_config,
    stage_inputs,
    stage_outside,
    stage_seed,
)

__all__ = ["MANIFEST", "RunFolder", "run_stage", "without_retired"]
REDONE = "redone.json"
"""Of a run folder: when stages were last asked to be made anew."""
_VERSIONED = ("tppo", "torch", "transformers", "trl", "accelerate", "peft", "duckdb", "numpy", "icu4py")


class RunFolder:
    """Paths of a run and the state of its stages."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.root = Path(recipe.run_dir)

    def path(self, stage: str) -> Path:
        taken = self.recipe.stage_dirs.get(stage)
        return Path(taken) if taken else self.root / stage

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a finished stage, or None.

        Raises:
            UserError: it is damaged, or of a newer version.
        """
        return read_record(self.path(stage) / MANIFEST)

    def require(self, stage: str) -> Path:
        """Folder of a finished stage.

        Raises:
            UserError: the stage has not been run (names the command that does).
        """
        if self.manifest(stage) is None:
            self.check_own(stage)
            command, flags = stage_command(stage, self.recipe)
            recipe = self.root / "recipe.yaml"
            own = ["--config", str(recipe)] if recipe.exists() else ["--run_dir", str(self.root)]
            way_out = shlex.join(["tppo", command, *own, *flags])
            raise UserError(f"stage '{stage}' is not finished in {self.root}: run `{way_out}` first")
        return self.path(stage)

    def check_own(self, stage: str) -> None:
        """Raise UserError for a stage taken from another run: it is neither made nor deleted from here."""
        if taken := self.recipe.stage_dirs.get(stage):
            raise UserError(
                f"stage '{stage}' of {self.root} is taken from {taken} (stage_dirs): make it, or make it anew, there"
            )

    def facts(self, stage: str) -> dict[str, Any]:
        """What a finished stage said of itself (counts, means)."""
        manifest = self.manifest(stage)
        if manifest is None:
            self.require(stage)
        assert manifest is not None
        return manifest["facts"]

    def answers(self) -> dict[str, Path]:
        """Folders of the finished evaluations whose answers are read instead of this run's own, by model."""
        return {model: Path(folder) for model, folder in self.recipe.evaluate.answers.items()}

    def _inputs(self, stage: str) -> dict[str, Path]:
        """Folders that a stage reads, finished or not: its stages to the left, and the evaluations it is given."""
        found = {name: self.path(name) for name in stage_inputs(stage, self.recipe)}
        if split_stage(stage)[0] == "read" and stage != "read_distance":
            found |= {f"answers of {model}": folder for model, folder in self.answers().items()}
        return found

    def missing_inputs(self, stage: str) -> list[str]:
        """What a stage reads and is not finished."""
        return [name for name, folder in self._inputs(stage).items() if not (folder / MANIFEST).exists()]

    def input_hashes(self, stage: str) -> dict[str, str]:
        """Hashes of the manifests of what a stage reads.

        Raises:
            UserError: something of it is not finished, or not as its stage wrote it any more.
        """
        found = self._inputs(stage)
        for name in self.missing_inputs(stage):
            if name.startswith("answers of "):
                raise UserError(f"evaluate.answers: {found[name]} holds no finished evaluation")
            self.require(name)
        # A derived stage says itself what it does not find; commands look at all that it reads first.
        for name, folder in found.items() if not STAGES[split_stage(stage)[0]].derived else ():
            folders.check_outputs(folder, name, self._way_out(name))
        return {name: sha256_file(folder / MANIFEST) for name, folder in found.items()}

    def _way_out(self, stage: str) -> str:
        own = stage not in self.recipe.stage_dirs and not stage.startswith("answers of ")
        return f"give `--redo {stage}` to make it and what follows anew" if own else "make that stage anew there"

    def is_done(self, stage: str) -> bool:
        """True when the stage is finished with this very config, these very inputs and outputs; a derived stage with
        other inputs is not, and is made anew.

        Raises:
            UserError: it is finished or unfinished, but with other settings, from other inputs or from other things
                outside, or its files have changed; or its folder holds what no stage has made.
        """
        manifest = self.manifest(stage)
        if manifest is None:
            self._check_unfinished(stage)
            return False
        self._check_made(stage, manifest)
        if STAGES[split_stage(stage)[0]].derived:
            return not self.missing_inputs(stage) and manifest["inputs"] == self.input_hashes(stage)
        self.require_current(stage)
        return True

    def _check_made(self, stage: str, manifest: dict[str, Any]) -> None:
        """Refuse a finished stage that would not be made so now, or whose files have changed."""
        self._check_names_in(stage, manifest, "config", "inputs", "facts")
        if changed := self._changes(stage, manifest):
            raise UserError(
                f"{self.path(stage)} was made with other settings ({'; '.join(changed)}). "
                f"Give `--redo {stage}` to make it and what follows anew, or another --run_dir"
            )
        folders.check_outputs(self.path(stage), stage, self._way_out(stage))

    def require_current(self, stage: str) -> Path:
        """Folder of a finished stage that was made from the inputs the run holds now.

        Raises:
            UserError: not finished, or its inputs have been made anew since.
        """
        manifest = self.manifest(stage)
        if manifest is not None and not self._same_inputs(stage, manifest):
            raise UserError(
                f"{self.path(stage)} was made from other inputs than {self.root} now holds. "
                f"Give `--redo {stage}` to make it and what follows anew"
            )
        return self.require(stage)

    def require_for_task(self, stage: str) -> Path:
        """Folder of a finished stage that is as the stage wrote it, and was made for the task of this recipe: what
        stages taken from elsewhere, and commands that are no stages, may be used by.

        Raises:
            UserError: not finished, changed since, or made for another task.
        """
        folder = self.require(stage)
        folders.check_outputs(folder, stage, self._way_out(stage))
        manifest = self.manifest(stage) or {}
        self._check_names_in(stage, manifest, "config")
        changed = changed_settings(stage, manifest["config"], self.recipe)
        if task := [words for words in changed if words.startswith("task")]:
            taken = stage in self.recipe.stage_dirs
            raise UserError(
                f"{'stage_dirs: ' if taken else ''}{folder} was made with other settings ({'; '.join(task)}): give the "
                f"same task here, or {'make that stage anew there' if taken else 'the recipe of the run'}"
            )
        return folder

    def _same_inputs(self, stage: str, record: dict[str, Any]) -> bool:
        """An input that is to be made yet will be another one than that which was read."""
        return not self.missing_inputs(stage) and record.get("inputs") == self.input_hashes(stage)

    def _changes(self, stage: str, record: dict[str, Any]) -> list[str]:
        """Settings, and things outside, that are not as in the stage's manifest or started.json, in words."""
        self._check_names_in(stage, record, "config", "inputs")
        used = (record.get("numerics") or {}).get("precision")
        read, noted = stage_outside(stage, self.recipe), record.get("outside", {})
        for setting in outside.not_here(read, noted):
            console.print(
                f"{stage}: what {setting} names is not here any more; taken as it was when the stage was made",
                soft_wrap=True,
                markup=False,
            )
        return changed_settings(stage, record["config"], self.recipe, used) + outside.changes(read, noted)

    def _check_names_in(self, stage: str, record: dict[str, Any], *names: str) -> None:
        """Refuse a manifest or started.json that lacks what every version wrote."""
        if missing := [name for name in names if name not in record]:
            raise UserError(
                f"{self.path(stage)} holds no manifest of a tppo stage (it has no {missing[0]}): put the file back, "
                f"{self._way_out(stage)}, or give another --run_dir"
            )

    def _check_unfinished(self, stage: str) -> None:
        """Refuse to go on in a folder that is somebody else's, or that holds work begun otherwise than it would be now.

        A derived stage, and one that stopped before it wrote anything, have nothing to lose: they are begun anew.
        """
        folder = self.path(stage)
        folders.check_ours(folder, stage)
        started = read_record(folder / STARTED)
        if started is None or STAGES[split_stage(stage)[0]].derived:
            return
        if _wrote_nothing(folder, stage):
            return
        if changed := self._begun_otherwise(stage, started):
            raise UserError(
                f"{self.path(stage)} is unfinished and was started with other settings ({'; '.join(changed)}). "
                f"Give `--redo {stage}` to start it anew, without what it has done so far, or another --run_dir"
            )

    def _begun_otherwise(self, stage: str, started: dict[str, Any]) -> list[str]:
        """How an unfinished stage was begun otherwise than it would be now, in words."""
        same = self._same_inputs(stage, started)
        return self._changes(stage, started) + ([] if same else ["the stages that it reads have been made anew"])

    def check(self, stages: Sequence[str], redo: Collection[str] = (), *, wait: bool = False) -> list[str]:
        """Those of `stages` that are to be made, once all that is in the way has been looked for; writes nothing. Their
        settings are checked by `check_sections`.

        Args:
            redo: stages to make anew, with what follows from them.
            wait: for a process that works on one of the stages, instead of refusing.

        Raises:
            UserError: names what stands in the way.
        """
        self._all_redone()
        for stage in redo:
            self.check_own(stage)
        doomed = self.followers(redo)
        for stage in doomed:
            folders.check_removable(self.path(stage), stage)
        to_make = [stage for stage in stages if stage in doomed or not self.is_done(stage)]
        for stage in to_make:
            self.check_own(stage)
            if STAGES[split_stage(stage)[0]].derived:  # it will delete what it made before
                folders.check_removable(self.path(stage), stage)
            check_free(self.root, stage, wait=wait)
            missing = [f"{setting}: {words}" for setting, thing in stage_outside(stage, self.recipe).items()
                       if (words := thing.missing())]  # fmt: skip
            if missing:
                raise UserError(missing[0])
        return to_make

    def check_left(self, stages: Sequence[str], redo: Collection[str] = ()) -> None:
        """What `stages` read is finished, and so is what the recipe says of all stages to their left that are this
        run's own. Of those farther left a folder that is gone is no matter.

        Args:
            redo: of `stages`; no other is made anew.

        Raises:
            UserError: names the stage and the setting.
        """
        for stage in redo:
            self.check_own(stage)
            if stage not in stages:  # it would be deleted, and left at that
                told = f"this command does not make it anew, `tppo run --redo {stage}` does"
                raise UserError(f"--redo {stage}: {told}, with all that follows")
        left = list(stages)
        for stage in left:  # grows as it goes
            own = stage in stages or stage not in self.recipe.stage_dirs
            left += [name for name in stage_inputs(stage, self.recipe) if own and name not in left]
        direct = {name for stage in stages for name in stage_inputs(stage, self.recipe)}
        for stage in stages:
            if set(self.missing_inputs(stage)) - set(stages):
                self.input_hashes(stage)  # says what is missing
        for stage in (name for name in all_stages(self.recipe) if name in left and name not in stages):
            if stage in self.recipe.stage_dirs:
                if self.manifest(stage) is not None:
                    self.require_for_task(stage)
            elif (manifest := self.manifest(stage)) is not None:
                self._check_made(stage, manifest)
                if stage in direct and not self.missing_inputs(stage):
                    self.require_current(stage)

    def followers(self, stages: Collection[str]) -> list[str]:
        """Stages, and those that read them, directly or not, left to right; stages taken from elsewhere are none."""
        stale = set(stages)
        known = all_stages(self.recipe)
        for name in known:
            if stale & set(stage_inputs(name, self.recipe)):
                stale.add(name)
        ordered = [*known, *(name for name in stages if name not in known)]
        return [name for name in ordered if name in stale and name not in self.recipe.stage_dirs]

    def discard_from(self, *stages: str) -> None:
        """Delete stages and every stage that reads them, directly or not; stages taken from elsewhere stay. That they
        are to be made anew is noted (`redone`).

        Raises:
            UserError: a folder of theirs holds what no stage has made, or somebody is at work in it; nothing is
                deleted then.
        """
        doomed = [name for name in self.followers(stages) if self.path(name).exists()]
        for name in doomed:
            folders.check_removable(self.path(name), name)
        with ExitStack() as held:
            for name in doomed:
                held.enter_context(locked(self.root, name))
            if stages and self.root.exists():
                write_json(self.root / REDONE, {**self._all_redone(), **dict.fromkeys(stages, time.time())})
            # From the right: what is left after a stop on the way has all that it reads.
            for name in reversed(doomed):
                folders.remove(self.path(name), name)

    def redone(self, stage: str) -> float:
        """Unix time of the last `--redo` of this very stage in this run folder; 0: none. What a judge abstained on
        before is asked again."""
        return self._all_redone().get(stage, 0.0)

    def _all_redone(self) -> dict[str, float]:
        path = self.root / REDONE
        if not path.exists():
            return {}
        with suppress(ValueError, RecursionError):  # no JSON, or no UTF-8
            times = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(times, dict) and all(isinstance(time, int | float) for time in times.values()):
                return times
        raise UserError(
            f"{path} is damaged: put the file back, or delete it (what a judge abstained on before is not asked again "
            "then until the next --redo)"
        )

    def _choose_numerics(self, stage: str) -> dict[str, str] | None:
        """Device, precision and reason of a stage that multiplies matrices in a precision of its own; else None."""
        section = precision_section(stage)
        # A stage that multiplies matrices has imported torch by now; no other is worth the seconds that takes.
        if not section or "torch" not in sys.modules:
            return None
        from tppo.core.device import choose, stage_device

        return asdict(choose(getattr(self.recipe, section).precision, stage_device(stage)))

    def settled_recipe(self, stage: str) -> Recipe:
        """The recipe as a started stage reads it: with the seed and the precision that its manifest says. Says which
        precision it is."""
        recipe = replace(self.recipe, seed=stage_seed(stage, self.recipe))
        started = json.loads((self.path(stage) / STARTED).read_text(encoding="utf-8"))
        if not started["numerics"]:
            return recipe
        from tppo.core.device import Numerics, warn_of_slow_bf16

        numerics, section = Numerics(**started["numerics"]), precision_section(stage)
        console.print(f"{stage}: {numerics}", soft_wrap=True, markup=False, highlight=False)
        if warning := warn_of_slow_bf16(numerics, f"{section}.precision"):
            console.print(f"[bold red]WARNING[/]: {warning}", soft_wrap=True, highlight=False)
        settings = replace(getattr(recipe, section), precision=numerics.precision)
        return replace(recipe, **{section: settings})

    @contextmanager
    def stage(self, stage: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Do a stage's work inside: yields its folder and a dict of facts for the manifest.

        On a clean exit the manifest is written, last; on an error the folder stays without one. A folder left by an
        unfinished stage is kept: the stage may resume from it.

        Raises:
            UserError: the stage is taken from another run, another process is at work on it, or it was started with
                other settings or inputs.
        """
        self.check_own(stage)
        self.input_hashes(stage)  # an input that is missing is said before anything is written
        with locked(self.root, stage):
            folder, started = self._start(stage)
            facts: dict[str, Any] = {}
            start = time.monotonic()
            yield folder, facts
            self._finish(stage, started, facts, time.monotonic() - start)

    def _start(self, stage: str) -> tuple[Path, dict[str, Any]]:
        """Fix what the stage is made with, and make its folder."""
        folder, derived = self.path(stage), STAGES[split_stage(stage)[0]].derived
        if derived:
            folders.remove(folder, stage)
        else:
            self.is_done(stage)
            (folder / MANIFEST).unlink(missing_ok=True)
        before = self._to_go_on_from(stage)
        read = stage_outside(stage, self.recipe)
        started = {
            "format": folders.FORMAT,
            "stage": stage,
            "config": stage_config(stage, self.recipe),
            "inputs": self.input_hashes(stage),
            "outside": before.get("outside") or outside.notes_at_start(read),
            # One that is resumed on another machine must not change its arithmetic halfway.
            "numerics": before["numerics"] if "numerics" in before else self._choose_numerics(stage),
            "foreign": folders.unknown_names(folder, stage) if folder.exists() else [],
            # Of work that was done when the stage was stopped.
            **({"facts": before["facts"]} if "facts" in before else {}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STARTED, started)
        return folder, started

    def _to_go_on_from(self, stage: str) -> dict[str, Any]:
        """The started.json of work that is gone on with; empty where a stage begins anew, and what it then has no use
        for is deleted."""
        folder, started = self.path(stage), read_record(self.path(stage) / STARTED) or {}
        if not _wrote_nothing(folder, stage):
            return started
        left = [path for name in STAGES[split_stage(stage)[0]].restarts if (path := folder / name).exists()]
        if left and started and not self._begun_otherwise(stage, started):
            return started
        for path in left:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        return {}

    def _finish(self, stage: str, started: dict[str, Any], facts: dict[str, Any], seconds: float) -> None:
        """Write the manifest."""
        folder, foreign = self.path(stage), started.pop("foreign")
        # What was put here while the stage was at work is no more its own than what was here before.
        made = folders.outputs(folder, [*foreign, *folders.unknown_names(folder, stage)])
        # Which commit of a hub's model was read is known by now.
        started["outside"] = outside.notes_at_end(stage_outside(stage, self.recipe), started["outside"])
        write_json(
            folder / MANIFEST,
            {
                **started,
                "facts": facts,
                "outputs": {name: mark.pop("sha256") for name, mark in made.items()},
                "stamps": made,
                "seconds": round(seconds, 1),
                "peak_memory_mib": peak_memory_mib(),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "python": platform.python_version(),
                "versions": _versions(),
            },
        )


def _wrote_nothing(folder: Path, stage: str) -> bool:
    """Whether a stage stopped before it had anything to lose."""
    nothing = (STARTED, *STAGES[split_stage(stage)[0]].restarts)
    return all(path.relative_to(folder).parts[0] in nothing for path in folders.files_of(folder))


@cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _VERSIONED}


def run_stage(recipe: Recipe, stage: str, work: Callable[[Recipe, RunFolder, Path], dict[str, Any]]) -> bool:
    """Run one stage unless it is done; `work` returns facts for the manifest. True when work was done."""
    run = RunFolder(recipe)
    if run.is_done(stage):
        return False
    with run.stage(stage) as (folder, facts):
        facts.update(_finished(folder, lambda: work(run.settled_recipe(stage), run, folder)))
    started = json.loads((folder / STARTED).read_text(encoding="utf-8"))
    write_json(folder / STARTED, {name: value for name, value in started.items() if name != "facts"})
    return True


def _finished(folder: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The facts of a stage's work, which is not done again once started.json holds them: hashing a large model takes a
    while, and a kill in that time must not cost the training. What the work kept to go on from is deleted then."""
    path = folder / STARTED
    started = json.loads(path.read_text(encoding="utf-8"))
    if "facts" not in started:
        started["facts"] = work()
        write_json(path, started)
    for pattern in UNFINISHED:
        for leftover in folder.glob(pattern):
            if leftover.name not in started["foreign"]:
                shutil.rmtree(leftover, ignore_errors=True)
    return started["facts"]
