"""The cells of a study and where each of their stages is made.

A cell is a model (SFT, or an algorithm), a setting and a seed; it is a run folder of its own. Two stages are the same
when their settings and those of all stages to their left are: such a stage is made once, in the run folder
that asks for it first, and taken over by the others (`Recipe.stage_dirs`). So a setting that changes `reward.*` has its
own reward models and the common labels, one that changes `evaluate.*` tunes nothing anew, and a setting that does
not concern an algorithm adds no cell of it. Readings of the cells' answers (another judge, votes, the KL from SFT)
stand to the right of the cells that they read, each in a run folder of its own.

With `study.search` each algorithm is compared at its own best setting: every candidate is a setting, `search/` has its
policies answer the reward_eval users, and `BEST` are the cells that `tppo.study.search` chooses by that.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tppo.core.common import UserError
from tppo.core.config import Reader, Reading, Recipe, Setting, Study, TuningAlgorithm
from tppo.core.recipe import check_readings, check_recipe, check_samples
from tppo.core.run import RunFolder
from tppo.core.stages import REFERENCES, rl_stage, shared_stages, split_stage, stage_config, stage_inputs

BASE = "base"
BEST = "best"
"""Each algorithm at the setting that the search chose."""
SFT = "sft"
_FIXED = ("run_dir", "seed", "shared_seed", "algorithms", "stage_dirs", "study", "evaluate.models", "evaluate.answers")
"""What no setting can override: the study sets it."""


@dataclass(frozen=True)
class Job:
    """A run folder of the study and the stages that are made in it."""

    name: str
    """Its folder below the study's: `shared/base`, `cells/base-tppo-s0`."""
    setting: str
    recipe: Recipe
    stages: list[str]
    model: str = ""
    """The cell's model; empty for a run folder of shared stages."""

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.recipe)

    @property
    def seed(self) -> int:
        return self.recipe.seed

    def finished(self) -> bool:
        """Whether all its stages are done, with these settings and inputs (UserError: with others)."""
        return all(self.run.is_done(stage) for stage in self.stages)

    def needs(self, other: Job) -> bool:
        """Whether it takes over a stage that the other job makes."""
        taken = {*self.recipe.stage_dirs.values(), *self.recipe.evaluate.answers.values()}
        return not {str(other.run.path(stage)) for stage in other.stages}.isdisjoint(taken)


@dataclass
class Plan:
    """What a study makes, in the order in which it does so."""

    shared: list[Job] = field(default_factory=list)
    cells: list[Job] = field(default_factory=list)
    cell_of: dict[tuple[str, str, int], Job] = field(default_factory=dict)
    """The cell that evaluates a (setting, model, seed); settings that differ in nothing share it."""
    reading_of: dict[tuple[str, int, Reader], Job] = field(default_factory=dict)
    """Who reads the answers of all cells of a (setting, seed); settings may share it."""
    search_of: dict[tuple[str, str, int], Job] = field(default_factory=dict)
    """Who asks a candidate (setting, model, seed) of the search about the reward_eval users."""
    shown: str = BASE
    """The setting whose cells the report compares: `BEST` once the search has chosen."""

    @property
    def readings(self) -> list[Job]:
        """Jobs that read several cells, each once."""
        return list({job.name: job for job in self.reading_of.values()}.values())

    @property
    def jobs(self) -> list[Job]:
        return [*self.shared, *self.cells, *self.search_of.values(), *self.readings]

    def stage_counts(self) -> Counter[str]:
        return Counter(stage for job in self.jobs for stage in job.stages)


def make_plan(recipe: Recipe, chosen: Mapping[str, str] | None = None) -> Plan:
    """The shared run folders, the cells and the readings of a study; touches no file.

    Args:
        chosen: of each algorithm, the setting that the search chose; None before it has.

    Raises:
        UserError: a seed, a setting or an override that cannot be.
    """
    check_study(recipe)
    settings = all_settings(recipe)
    variants = {BASE: recipe, **{setting.name: varied(recipe, setting) for setting in settings}}
    algorithms = {setting.name: setting.algorithms or recipe.algorithms for setting in settings}
    made = {stage_key(name, recipe): Path(folder) for name, folder in recipe.stage_dirs.items()}
    plan = Plan()
    for name, variant in variants.items():
        check_readings(variant.evaluate)
        job = _job(made, f"shared/{name}", name, variant, shared_stages(variant))
        if job.stages:
            plan.shared.append(job)
    cells: dict[str, Job] = {}
    for seed, name, model in itertools.product(recipe.study.seeds, variants, (SFT, *recipe.algorithms)):
        cell = cell_recipe(variants[name], model, seed)
        evaluation = stage_key("evaluate", cell)
        if evaluation not in cells and model in (SFT, *algorithms.get(name, recipe.algorithms)):
            stages = [*shared_stages(cell), *([] if model == SFT else [rl_stage(model)]), "evaluate"]
            cells[evaluation] = _job(made, f"cells/{name}-{model}-s{seed}", name, cell, stages, model)
        if evaluation in cells:
            plan.cell_of[name, model, seed] = cells[evaluation]
    plan.cells = list(cells.values())
    _plan_search(plan, made, variants)
    if chosen is not None:
        plan.shown = BEST
        for seed, model in itertools.product(recipe.study.seeds, (SFT, *recipe.algorithms)):
            plan.cell_of[BEST, model, seed] = plan.cell_of[chosen.get(model, BASE), model, seed]
    _plan_readings(plan, read_settings(recipe, plan, variants), recipe.study.seeds)
    return plan


def all_settings(recipe: Recipe) -> list[Setting]:
    """What a study tries beside the recipe as it stands: its settings, and the candidates of its search.

    Raises:
        UserError: a search that cannot be.
    """
    return [*recipe.study.settings, *search_settings(recipe)]


def search_settings(recipe: Recipe) -> list[Setting]:
    """The candidates of the search but for the recipe's own values, one section (`rl`, `dpo`) apart from the other.

    Raises:
        UserError: values that are none, or of a setting that only the study can set.
    """
    found = []
    search = recipe.study.search
    for name, values in search.items():
        if name.partition(".")[0] not in ("rl", "dpo") or name == "rl.algorithm":
            raise UserError(
                f"study.search: {name} is no setting of `rl` or `dpo`; those are searched, as rl.gae_lambda"
            )
        if not values or _repeats([str(value) for value in values]):
            raise UserError(f"study.search: {name}={values}: give at least one value, each once")
    for section in ("rl", "dpo"):
        names = [name for name in search if name.startswith(f"{section}.")]
        algorithms = [model for model in recipe.algorithms if (model == "dpo") == (section == "dpo")]
        if names and not algorithms:
            raise UserError(f"study.search: none of algorithms={recipe.algorithms} has {names}")
        for combination in itertools.product(*(search[name] for name in names)) if names else ():
            overrides = dict(zip(names, combination, strict=True))
            if any(value != _own_value(recipe, name) for name, value in overrides.items()):
                label = "_".join(f"{name.rpartition('.')[2]}{value}" for name, value in overrides.items())
                found.append(Setting(label, overrides, algorithms))
    return found


def _own_value(recipe: Recipe, name: str) -> Any:
    """The recipe's `section.field`; itself where there is none of that name, which `overridden` refuses."""
    section, _, field_name = name.partition(".")
    return getattr(getattr(recipe, section), field_name, name)


def _plan_search(plan: Plan, made: dict[str, Path], variants: Mapping[str, Recipe]) -> None:
    """Add the jobs that ask every candidate, and the recipe as it stands, about the reward_eval users."""
    candidates = search_settings(variants[BASE])
    searched = [model for model in variants[BASE].algorithms if any(model in one.algorithms for one in candidates)]
    for setting in (Setting(BASE, algorithms=searched), *candidates):
        for name, model, seed in list(plan.cell_of):
            if name == setting.name and model in setting.algorithms:
                cell = cell_recipe(variants[name], model, seed)
                asked = replace(cell.evaluate, splits=["reward_eval"], baselines=[], untuned=False)
                stages = [*shared_stages(cell), rl_stage(model), "evaluate"]
                job = _job(made, f"search/{name}-{model}-s{seed}", name, replace(cell, evaluate=asked), stages)
                plan.search_of[name, model, seed] = job


def read_settings(recipe: Recipe, plan: Plan, variants: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The settings whose cells are read afterwards: not the candidates of a search, but what it chose."""
    candidates = {setting.name for setting in search_settings(recipe)}
    if not candidates:
        return dict(variants)
    own = {name: variant for name, variant in variants.items() if name not in candidates | {BASE}}
    return own if plan.shown == BASE else {BEST: recipe, **own}


def _job(made: dict[str, Path], name: str, setting: str, recipe: Recipe, stages: Sequence[str], model: str = "") -> Job:
    """Makes those of `stages` that no job makes yet, and takes over the others.

    Args:
        made: where each stage is made, by key; those of this job are added.
    """
    root = Path(recipe.run_dir) / name
    keys = {stage: stage_key(stage, recipe) for stage in stages}
    taken = {stage: str(made[key]) for stage, key in keys.items() if key in made}
    own = [stage for stage in stages if stage not in taken]
    made |= {keys[stage]: root / stage for stage in own}
    return Job(name, setting, replace(recipe, run_dir=str(root), stage_dirs=taken), own, model)


def _plan_readings(plan: Plan, variants: Mapping[str, Recipe], seeds: Sequence[int]) -> None:
    """Add the job of every reading that a setting's recipe asks for, of all cells of the setting and a seed.

    Settings with the same cells and the same questions share the job.
    """
    made: dict[tuple[str, ...], Job] = {}
    for seed, (setting, variant) in itertools.product(seeds, variants.items()):
        cells = {model: job for (name, model, of), job in plan.cell_of.items() if (name, of) == (setting, seed)}
        for reading in variant.evaluate.readings:
            # Votes and distances are between models.
            if SFT not in cells or (reading.reader in ("vote", "distance") and len(cells) < 2):
                continue
            name, stage = f"{reading.reader}/{setting}-s{seed}", f"read_{reading.reader}"
            recipe = reading_recipe(reading, variant, cells, name)
            asked = json.dumps(stage_config(stage, recipe), default=str)
            key = (stage, asked, *(job.name for job in cells.values()))
            plan.reading_of[setting, seed, reading.reader] = made.setdefault(key, Job(name, setting, recipe, [stage]))


def reading_recipe(reading: Reading, variant: Recipe, cells: Mapping[str, Job], name: str) -> Recipe:
    """The recipe of a stage that reads what these cells, by model, made; its folder has this name.

    A judge reads the policies and the two references; simple baselines are left to the first judge, since every answer
    may cost a request.
    """
    sft = cells[SFT]
    tuned = {model: job for model, job in cells.items() if model != SFT}
    taken = {"prepare": sft.run.path("prepare")}
    answers = {}
    if reading.reader == "distance":
        taken |= {"sft": sft.run.path("sft")} | {rl_stage(m): job.run.path(rl_stage(m)) for m, job in tuned.items()}
    else:
        read = {**cells, **dict.fromkeys(REFERENCES, sft)}
        answers = {model: str(job.run.path("evaluate")) for model, job in read.items()}
    return replace(
        cell_recipe(variant, SFT, sft.seed),
        run_dir=str(Path(variant.run_dir) / name),
        algorithms=[name for name in variant.algorithms if name in tuned],
        stage_dirs={key: str(path) for key, path in taken.items()},
        evaluate=replace(variant.evaluate, readings=[reading], answers=answers),
    )


def cell_recipe(variant: Recipe, model: str, seed: int) -> Recipe:
    """The recipe of one cell, before its folders are known: its seed, its one algorithm, the study's examples."""
    algorithms: list[TuningAlgorithm] = [name for name in variant.algorithms if name == model]
    return replace(
        variant,
        seed=seed,
        shared_seed=variant.data_seed,
        algorithms=algorithms,
        # Whoever reads the answers afterwards reads all answers to a history in a row: jobs of their own.
        evaluate=replace(variant.evaluate, models=[] if model == SFT else [model], readings=[]),
        study=Study(),
    )


def stage_key(stage: str, recipe: Recipe) -> str:
    """A hash of all settings that a stage's result depends on: its own and those of everything to its left."""
    inputs = [stage_key(name, recipe) for name in stage_inputs(stage, recipe)]
    text = json.dumps([stage, stage_config(stage, recipe), inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def varied(recipe: Recipe, setting: Setting) -> Recipe:
    """The recipe with a setting's overrides.

    Raises:
        UserError: an override that does not exist, does not fit, or changes nothing.
    """
    label = f"study.{'search' if setting in search_settings(recipe) else 'settings'} '{setting.name}'"
    values: dict[str, Any] = asdict(recipe)
    for name, value in setting.overrides.items():
        *sections, last = name.split(".")
        if not {name, sections[0] if sections else name}.isdisjoint(_FIXED):
            raise UserError(f"{label}: {name} is the study's own and cannot be overridden")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    try:
        found = check_recipe(values)
    except UserError as error:
        raise UserError(f"{label}: {error}") from None
    if found == recipe:
        raise UserError(f"{label} changes nothing: its overrides are the recipe's own values")
    return found


def check_study(recipe: Recipe) -> None:
    """Refuse, before anything runs, a study that could not be made.

    Raises:
        UserError: names the setting.
    """
    study, names = recipe.study, [setting.name for setting in all_settings(recipe)]
    if not study.seeds or _repeats(study.seeds):
        raise UserError(f"study.seeds={study.seeds}: give at least one seed, each once")
    if not recipe.algorithms or _repeats(recipe.algorithms):
        raise UserError(f"algorithms={recipe.algorithms}: a study needs at least one algorithm, each once")
    for setting in all_settings(recipe):
        name = setting.name
        if name in (BASE, BEST) or names.count(name) > 1 or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(
                f"study.settings: {name!r} is no name for a setting: letters, digits, `.`, `_`, `-`; each once; not "
                f"`{BASE}`, which is the recipe as it stands, or `{BEST}`, which is what a search chooses"
            )
        if unknown := set(setting.algorithms) - set(recipe.algorithms):
            raise UserError(f"study.settings '{name}': {sorted(unknown)} are none of {recipe.algorithms}")
    if study.workers < 1:
        raise UserError(f"study.workers={study.workers}: give at least 1")
    if recipe.evaluate.models or recipe.evaluate.answers:
        raise UserError("evaluate.models and evaluate.answers are set by the study: leave them empty")
    check_samples(recipe)


def _repeats(values: Sequence[Any]) -> bool:
    return len(set(values)) < len(values)


def describe(plan: Plan) -> list[str]:
    """Lines for the console: every job, its stages and whether it is finished; then how often each stage is made."""
    lines, left = [], Counter[str]()
    for job in plan.jobs:
        missing = [stage for stage in job.stages if job.run.manifest(stage) is None]
        left.update(missing)
        lines.append(f"{job.name}: {', '.join(job.stages)}{'' if missing else ' (finished)'}")
    counts = ", ".join(f"{count} {stage} ({left[stage]} to make)" for stage, count in plan.stage_counts().items())
    read = f", {len(plan.search_of)} of the search" if plan.search_of else ""
    read += f", {len(plan.readings)} readings" if plan.readings else ""
    return [*lines, f"{len(plan.cells)} cells{read}; stages: {counts}"]


def settings_tried(plan: Plan) -> dict[str, list[str]]:
    """The search budget: settings with which each algorithm was tuned, by algorithm."""
    tried: dict[str, list[str]] = {}
    for job in plan.cells:
        tuned = any(split_stage(stage)[0] in ("rl", "dpo") for stage in job.stages)
        if tuned and job.setting not in tried.setdefault(job.model, []):
            tried[job.model].append(job.setting)
    return tried
