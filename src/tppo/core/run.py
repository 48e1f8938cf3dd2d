"""The run folder: one folder per stage, a manifest written last, and which stages are done.

A stage reads only folders to its left (`stage_inputs`). A folder without `manifest.json` is unfinished: it
is resumed or redone. A finished stage whose config or inputs have changed is never silently reused or
overwritten: the error names what changed and the way out.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import yaml

from tppo.core.common import UserError, console
from tppo.core.config import REPLACED, RETIRED, WITHOUT_EFFECT, Evaluate, Reader, Reading, Recipe
from tppo.core.files import sha256_file, write_json, write_text
from tppo.core.stages import (
    STAGES,
    all_stages,
    precision_section,
    split_stage,
    stage_command,
    stage_config,
    stage_inputs,
)

MANIFEST = "manifest.json"
_VERSIONED = ("tppo", "torch", "transformers", "trl", "accelerate", "peft", "duckdb", "numpy")


class RunFolder:
    """Paths of a run and the state of its stages."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.root = Path(recipe.run_dir)

    def path(self, stage: str) -> Path:
        taken = self.recipe.stage_dirs.get(stage)
        return Path(taken) if taken else self.root / stage

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a finished stage, or None."""
        path = self.path(stage) / MANIFEST
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not valid JSON ({error}): delete it and run the stage again") from None

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
        folders = {name: self.path(name) for name in stage_inputs(stage, self.recipe)}
        if split_stage(stage)[0] == "read" and stage != "read_distance":
            folders |= {f"answers of {model}": folder for model, folder in self.answers().items()}
        return folders

    def missing_inputs(self, stage: str) -> list[str]:
        """What a stage reads and is not finished."""
        return [name for name, folder in self._inputs(stage).items() if not (folder / MANIFEST).exists()]

    def input_hashes(self, stage: str) -> dict[str, str]:
        """Hashes of the manifests of what a stage reads.

        Raises:
            UserError: something of it is not finished.
        """
        folders = self._inputs(stage)
        for name in self.missing_inputs(stage):
            if name.startswith("answers of "):
                raise UserError(f"evaluate.answers: {folders[name]} holds no finished evaluation")
            self.require(name)
        return {name: sha256_file(folder / MANIFEST) for name, folder in folders.items()}

    def is_done(self, stage: str) -> bool:
        """True when the stage is finished with this very config and these very inputs; a derived stage with other
        inputs is not, and is made anew.

        Raises:
            UserError: it is finished, but with other settings or from other inputs.
        """
        manifest = self.manifest(stage)
        if manifest is None:
            return False
        used = (manifest.get("numerics") or {}).get("precision")
        # A setting that there was not yet: its default does what was done without it.
        new = stage_config(stage, self.recipe)
        old = without_retired(_with_defaults(manifest["config"], _plain(_default_config(stage))))
        changed = _differences(old, new, used=used)
        if changed:
            raise UserError(
                f"{self.path(stage)} was made with other settings ({'; '.join(changed)}). "
                f"Give `--redo {stage}` to make it and what follows anew, or another --run_dir"
            )
        if STAGES[split_stage(stage)[0]].derived:
            return manifest["inputs"] == self.input_hashes(stage)
        self.require_current(stage)
        return True

    def require_current(self, stage: str) -> Path:
        """Folder of a finished stage that was made from the inputs the run holds now.

        Raises:
            UserError: not finished, or its inputs have been made anew since.
        """
        manifest = self.manifest(stage)
        if manifest is not None and manifest["inputs"] != self.input_hashes(stage):
            raise UserError(
                f"{self.path(stage)} was made from other inputs than {self.root} now holds. "
                f"Give `--redo {stage}` to make it and what follows anew"
            )
        return self.require(stage)

    def discard_from(self, stage: str) -> None:
        """Delete a stage and every stage that reads it, directly or not; stages taken from elsewhere stay."""
        stale = {stage}
        for name in all_stages(self.recipe):
            if stale & set(stage_inputs(name, self.recipe)):
                stale.add(name)
        for name in stale - self.recipe.stage_dirs.keys():
            shutil.rmtree(self.path(name), ignore_errors=True)

    def _choose_numerics(self, stage: str) -> dict[str, str] | None:
        """Device, precision and reason of a stage that multiplies matrices in a precision of its own; else None."""
        section = precision_section(stage)
        # A stage that multiplies matrices has imported torch by now; no other is worth the seconds that takes.
        if not section or "torch" not in sys.modules:
            return None
        from tppo.core.device import choose, stage_device

        return asdict(choose(getattr(self.recipe, section).precision, stage_device(stage)))

    def settled_recipe(self, stage: str) -> Recipe:
        """The recipe as a started stage reads it: its precision is the one fixed when it started. Says which it is."""
        started = json.loads((self.path(stage) / "started.json").read_text(encoding="utf-8"))
        if not started["numerics"]:
            return self.recipe
        from tppo.core.common import console
        from tppo.core.device import Numerics, warn_of_slow_bf16

        numerics, section = Numerics(**started["numerics"]), precision_section(stage)
        console.print(f"{stage}: {numerics}", soft_wrap=True, markup=False, highlight=False)
        if warning := warn_of_slow_bf16(numerics, f"{section}.precision"):
            console.print(f"[bold red]WARNING[/]: {warning}", soft_wrap=True, highlight=False)
        settings = replace(getattr(self.recipe, section), precision=numerics.precision)
        return replace(self.recipe, **{section: settings})

    @contextmanager
    def stage(self, stage: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Do a stage's work inside: yields its folder and a dict of facts for the manifest.

        On a clean exit the manifest is written, last; on an error the folder stays without one. A folder left
        by an unfinished stage is kept when it was started with the same settings and inputs (the stage may
        resume from it) and emptied otherwise.

        Raises:
            UserError: the stage is taken from another run.
        """
        self.check_own(stage)
        inputs = self.input_hashes(stage)
        folder = self.path(stage)
        started = {"config": stage_config(stage, self.recipe), "inputs": inputs}
        started_path = folder / "started.json"
        before = json.loads(started_path.read_text(encoding="utf-8")) if started_path.exists() else {}
        if "config" in before:
            before["config"] = without_retired(before["config"])
        goes_on = {name: before.get(name) for name in started} == _plain(started)
        if folder.exists() and not goes_on:
            shutil.rmtree(folder)
        # Fixed when the stage starts: one that is resumed on another machine must not change its arithmetic halfway.
        numerics = before["numerics"] if goes_on and "numerics" in before else self._choose_numerics(stage)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(started_path, {**started, "numerics": numerics})
        facts: dict[str, Any] = {}
        start = time.monotonic()
        yield folder, facts
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, "started.json"))
        write_json(
            folder / MANIFEST,
            {
                "stage": stage,
                **started,
                "numerics": numerics,
                "facts": facts,
                "outputs": {str(p.relative_to(folder)): sha256_file(p) for p in files},
                "seconds": round(time.monotonic() - start, 1),
                "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "python": platform.python_version(),
                "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
            },
        )


def run_stage(recipe: Recipe, stage: str, work: Callable[[Recipe, RunFolder, Path], dict[str, Any]]) -> bool:
    """Run one stage unless it is done; `work` returns facts for the manifest. True when work was done."""
    run = RunFolder(recipe)
    if run.is_done(stage):
        return False
    with run.stage(stage) as (folder, facts):
        facts.update(work(run.settled_recipe(stage), run, folder))
    return True


def _default_config(stage: str) -> dict[str, Any]:
    """What a stage depends on when nothing is set."""
    name, variant = split_stage(stage)
    readings = [Reading(cast(Reader, variant))] if name == "read" else []
    return stage_config(stage, Recipe(evaluate=Evaluate(readings=readings)))


def without_retired(config: dict[str, Any]) -> dict[str, Any]:
    """Settings by section, as files of before hold them, without those that are constants today, where they had that
    value, and without those that have no effect."""
    return {
        section: {
            name: value
            for name, value in values.items()
            if (place := f"{section}.{name}") not in WITHOUT_EFFECT
            and (place not in RETIRED or value != RETIRED[place])
        }
        if isinstance(values, dict)
        else values
        for section, values in config.items()
    }


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _with_defaults(old: Any, defaults: Any) -> Any:
    """`old` with what only `defaults` have, section by section."""
    if not isinstance(old, dict) or not isinstance(defaults, dict):
        return old
    return defaults | {name: _with_defaults(value, defaults.get(name)) for name, value in old.items()}


def _differences(old: Any, new: Any, prefix: str = "", *, used: str | None = None) -> list[str]:
    """Settings that differ, as "name: old -> new".

    Args:
        used: the precision that a stage was made in. `auto` agrees with whatever was chosen, on whichever machine.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for key in sorted(old.keys() | new.keys())
            for difference in _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key, used=used)
        ]
    if prefix.rpartition(".")[2] == "precision" and (new == "auto" or (old == "auto" and new == used)):
        return []
    # A stage may note a setting of another section under the name it had in its own.
    return [] if old == _plain(new) else [f"{REPLACED.get(prefix, prefix)}: {old!r} -> {new!r}"]


def write_recipe(run: RunFolder) -> Path:
    """Write the resolved recipe into the run folder: what its stages are called with."""
    path = run.root / "recipe.yaml"
    run.root.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(asdict(run.recipe), sort_keys=False))
    return path


def run_stages(
    recipe: Recipe,
    stages: Sequence[str],
    call: Callable[[list[str]], int] = subprocess.call,
    name: str = "",
) -> None:
    """Run the stages that are not finished, each in a process of its own, so that memory returns to the machine and
    peaks can be told apart.

    Args:
        call: runs a command line and returns its exit status.
        name: shown before each stage.

    Raises:
        UserError: a stage stopped, or was finished with other settings.
    """
    run = RunFolder(recipe)
    path = write_recipe(run)
    for number, stage in enumerate(stages, start=1):
        head = f"{name}[{number}/{len(stages)}] {stage}"
        if run.is_done(stage):
            console.print(f"{head}: done before, skipped", markup=False, soft_wrap=True)
            continue
        console.rule(head.replace("[", "\\["))
        command, flags = stage_command(stage, recipe)
        start = time.monotonic()
        status = call([sys.executable, "-m", "tppo", command, "--config", str(path), *flags])
        if status:
            raise UserError(f"stage {stage} stopped (exit status {status}); mend it and give the same command again")
        console.print(f"{head}: {time.monotonic() - start:.0f} s", markup=False, soft_wrap=True)
