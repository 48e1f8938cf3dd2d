"""The run folder: one folder per stage, a manifest written last, and which stages are done.

A stage reads only folders to its left (`stage_inputs`). A folder without `manifest.json` is unfinished: it
is resumed or redone. A finished stage whose config or inputs have changed is never silently reused or
overwritten: the error names what changed and the way out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tppo.config import Baseline, Recipe, judge_identity, rl_identity
from tppo.errors import UserError

MANIFEST = "manifest.json"
EVALUATION = "evaluate_"
"""With a model behind it: the name under which `vote` and `rejudge` take that model's evaluation over."""
PRECISION_OF = {
    **{stage: stage for stage in ("sft", "reward", "rl", "dpo")},
    **{"sample": "sft", "evaluate": "rl", "distance": "rl"},
}
"""Section of a stage -> the section whose `precision` its matrix products have. The other stages have no choice."""
_VERSIONED = ("tppo", "torch", "transformers", "trl", "accelerate", "peft", "duckdb", "numpy")


def rl_stage(algorithm: str) -> str:
    """Name of the stage (and its folder) that trains with this algorithm."""
    return f"rl_{algorithm}"


def split_stage(stage: str) -> tuple[str, str]:
    """Section of the recipe and algorithm of a stage: `rl_ppo` -> ("rl", "ppo"), `rl_dpo` -> ("dpo", "dpo"), `sft` ->
    ("sft", "")."""
    if not stage.startswith("rl_"):
        return stage, ""
    algorithm = stage.removeprefix("rl_")
    return ("dpo" if algorithm == "dpo" else "rl"), algorithm


def stage_command(stage: str) -> tuple[str, list[str]]:
    """Subcommand that runs a stage, and the flags it needs."""
    section, algorithm = split_stage(stage)
    return section.replace("_", "-"), ["--rl.algorithm", algorithm] if section == "rl" else []


def taken_models(recipe: Recipe) -> list[str]:
    """Models whose answers `vote` and `rejudge` read: `evaluate_<model>` is taken from elsewhere for each."""
    return [name.removeprefix(EVALUATION) for name in recipe.stage_dirs if name.startswith(EVALUATION)]


def stage_inputs(stage: str, recipe: Recipe) -> list[str]:
    """Folders (all to the left) that a stage reads."""
    synthetic = ["synthetic"] if recipe.prepare.source == ["synthetic"] else []
    rl_stages = [rl_stage(algorithm) for algorithm in recipe.algorithms]
    evaluations = [EVALUATION + model for model in taken_models(recipe)]
    best_of_n_inputs = ["sample", "reward"] if "best_of_n" in evaluated_baselines(recipe) else []
    inputs = {
        "synthetic": [],
        "prepare": synthetic,
        "sft": ["prepare"],
        "sample": ["prepare", "sft"],
        "label": ["prepare", "sample"],
        "reward": ["prepare", "label"],
        "check_reward": ["prepare", "label", "reward"],
        "evaluate": ["prepare", "sft", "label", *best_of_n_inputs, *rl_stages],
        "report": ["prepare", "sft", "label", "reward", "check_reward", *rl_stages, "evaluate"],
        "vote": ["prepare", *evaluations],
        "rejudge": ["prepare", *evaluations],
        "distance": ["prepare", "sft", *rl_stages],
    }
    if split_stage(stage)[0] == "dpo":
        return ["prepare", "sft", "sample", *(["label"] if recipe.dpo.pairs == "judged" else [])]
    return ["prepare", "sft", "sample", "reward"] if split_stage(stage)[0] == "rl" else inputs[stage]


def evaluated_baselines(recipe: Recipe) -> list[Baseline]:
    """The simple baselines that `evaluate` answers with: none beside tuned policies alone."""
    return [] if recipe.evaluate.tuned_only else recipe.evaluate.baselines


def all_stages(recipe: Recipe) -> list[str]:
    """The stages of `tppo run`, left to right."""
    first = stage_inputs("prepare", recipe)
    rl_stages = [rl_stage(algorithm) for algorithm in recipe.algorithms]
    return [*first, "prepare", "sft", "sample", "label", "reward", "check_reward", *rl_stages, "evaluate", "report"]


def shared_stages(recipe: Recipe) -> list[str]:
    """The stages before the tuning of policies, left to right: one set of them serves many tunings."""
    return [stage for stage in all_stages(replace(recipe, algorithms=[])) if stage not in ("evaluate", "report")]


def stage_config(stage: str, recipe: Recipe) -> dict[str, Any]:
    """The settings a stage depends on: its own section, the task and the seed."""
    section, algorithm = split_stage(stage)
    seed = recipe.data_seed if stage in shared_stages(recipe) else recipe.seed
    config: dict[str, Any] = {"seed": seed, "task": asdict(recipe.task)}
    if stage == "evaluate":
        config["shared_seed"] = recipe.shared_seed  # it chooses the examples; `seed` draws the answers
    if hasattr(recipe, section):
        config[section] = asdict(getattr(recipe, section))
    if uses_llm_judge(stage, recipe):
        config["judge"] = judge_identity(recipe.judge)
    if stage == "evaluate":
        del config["evaluate"]["distance_examples"]
        if not recipe.evaluate.vote:
            del config["evaluate"]["vote_examples"]
    if stage == "vote":
        config |= {"rubric": recipe.reward.rubric, "vote_examples": recipe.evaluate.vote_examples}
        config["shared_seed"] = recipe.shared_seed  # it chooses the examples
    if stage == "rejudge":
        evaluate = recipe.evaluate
        config |= {name: getattr(evaluate, name) for name in ("second_judge", "second_judge_examples")}
        config["shared_seed"] = recipe.shared_seed  # it chooses the examples
        if evaluate.second_judge == "embedding":
            config["label"] = asdict(recipe.label)  # how it is calibrated
    if stage == "distance":
        evaluate, config["precision"] = recipe.evaluate, recipe.rl.precision
        config |= {name: getattr(evaluate, name) for name in ("splits", "max_examples", "distance_examples")}
        config["shared_seed"] = recipe.shared_seed  # it chooses the examples; `seed` draws the answers
    if section == "rl":
        config["rl"] = rl_identity(recipe.rl) | {"algorithm": algorithm}
    if section == "check_reward":
        del config[section]["allow_failed"]  # what RL does with the verdict: the check is the same either way
    if stage == "evaluate" and "best_of_n" in evaluated_baselines(recipe):
        # It chooses by TPPO's reward, whatever algorithm the section names.
        config["rl"] = rl_identity(recipe.rl) | {"algorithm": "tppo"}
    if stage == "evaluate" and recipe.evaluate.untuned and not recipe.evaluate.tuned_only:
        config["start_model"] = recipe.sft.model
    return config


def uses_llm_judge(stage: str, recipe: Recipe) -> bool:
    """Whether a stage's results depend on the section `judge`."""
    by_labels = recipe.label.judge == "llm"
    if stage == "label":
        return by_labels
    if stage == "vote":
        return True
    evaluate = recipe.evaluate
    if stage == "rejudge":
        return evaluate.second_judge == "llm"
    return stage == "evaluate" and (
        evaluate.vote or "llm" in (evaluate.judge, evaluate.second_judge) or (evaluate.judge == "label" and by_labels)
    )


def cache_dir() -> Path:
    """Folder for what outlives a run (converted models, the hash key): $TPPO_CACHE, or ~/.cache/tppo."""
    return Path(os.environ.get("TPPO_CACHE") or Path.home() / ".cache" / "tppo")


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as it is, so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON through `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a missing file has none."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number} is not valid JSON ({error}): redo the stage that wrote it"
            ) from None
    return rows


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
            command, flags = stage_command(stage)
            raise UserError(
                f"stage '{stage}' is not finished in {self.root}: "
                f"run `{' '.join(['tppo', command, '--run_dir', str(self.root), *flags])}` first"
            )
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

    def input_hashes(self, stage: str) -> dict[str, str]:
        return {name: sha256_file(self.require(name) / MANIFEST) for name in stage_inputs(stage, self.recipe)}

    def is_done(self, stage: str) -> bool:
        """True when the stage is finished with this very config and these very inputs.

        Raises:
            UserError: it is finished, but with other settings or from other inputs.
        """
        manifest = self.manifest(stage)
        if manifest is None:
            return False
        used = (manifest.get("numerics") or {}).get("precision")
        # A setting that there was not yet: its default does what was done without it.
        old = _with_defaults(manifest["config"], _plain(stage_config(stage, Recipe())))
        changed = _differences(old, stage_config(stage, self.recipe), used=used)
        if changed:
            raise UserError(
                f"{self.path(stage)} was made with other settings ({'; '.join(changed)}). "
                f"Give `--redo {stage}` to make it and what follows anew, or another --run_dir"
            )
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
        section = PRECISION_OF.get(split_stage(stage)[0])
        # A stage that multiplies matrices has imported torch by now; no other is worth the seconds that takes.
        if section is None or "torch" not in sys.modules:
            return None
        from tppo.precision import choose, stage_device

        return asdict(choose(getattr(self.recipe, section).precision, stage_device(stage)))

    def settled_recipe(self, stage: str) -> Recipe:
        """The recipe as a started stage reads it: its precision is the one fixed when it started. Says which it is."""
        started = json.loads((self.path(stage) / "started.json").read_text(encoding="utf-8"))
        if not started["numerics"]:
            return self.recipe
        from tppo.precision import Numerics, warn_of_slow_bf16
        from tppo.progress import console

        numerics, section = Numerics(**started["numerics"]), PRECISION_OF[split_stage(stage)[0]]
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
    return [] if old == _plain(new) else [f"{prefix}: {old!r} -> {new!r}"]
