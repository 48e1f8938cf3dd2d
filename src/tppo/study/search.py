"""The search of a study: each algorithm at its own best setting, chosen by users who are in no evaluation set.

Candidates are the recipe as it stands and all combinations of the values of `study.search`. Every candidate's policies
answer examples of the reward_eval users (nobody's policy was trained on them; reward models were checked on them), the
evaluation's judge reads the answers, and an algorithm's best candidate is the one with the largest headline, mean over
the seeds; the recipe's own of equals. The trainings are the ones that are compared afterwards, so the luck of a
training leans the same way for every algorithm that is searched; the evaluation sets have no part in the choice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import fmean

from tppo.core.config import Recipe
from tppo.core.show import Table, number, with_interval
from tppo.core.stages import DISPLAY
from tppo.evaluate.compare import Metrics
from tppo.evaluate.metrics import BY_NAME
from tppo.report import words
from tppo.report.page import load_metrics
from tppo.study.grid import BASE, Plan, search_settings

Found = Mapping[str, Mapping[str, float]]
"""Headline on the reward_eval users, mean over the seeds: of each algorithm, of each candidate."""


def searched(plan: Plan, left_out: Collection[str] = ()) -> Found | None:
    """What the candidates reached; None when not all of them were asked.

    Args:
        left_out: names of jobs not to read: they failed, or are of other settings.
    """
    seen: dict[str, dict[str, list[float]]] = {}
    for (setting, model, _), job in plan.search_of.items():
        if job.name in left_out or not job.finished():
            return None
        metrics = load_metrics(job.run.require("evaluate"))
        value = metrics.cell("reward_eval", model, metrics.headline).value
        if value is None:  # the judge abstained throughout
            return None
        seen.setdefault(model, {}).setdefault(setting, []).append(value)
    return {model: {name: fmean(values) for name, values in found.items()} for model, found in seen.items()}


def choose(found: Found) -> dict[str, str]:
    """The best candidate of each algorithm."""
    return {model: max(candidates, key=lambda name: candidates[name]) for model, candidates in found.items()}


def search_table(recipe: Recipe, found: Found, by_setting: Mapping[str, Metrics | None]) -> Table:
    """Every candidate, by what the choice was made and on the evaluation sets.

    Args:
        by_setting: metrics of each setting, `BASE` included; None for one without finished cells.
    """
    chosen = choose(found)
    overrides = {setting.name: setting.overrides for setting in search_settings(recipe)}
    rows = []
    for model, candidates in found.items():
        for name, value in candidates.items():
            metrics = by_setting[name]
            said = ", ".join(f"{key}={one}" for key, one in overrides.get(name, {}).items()) or "the recipe's own"
            cell = metrics.cell(metrics.scopes[0], model, metrics.headline) if metrics else None
            shown = with_interval(cell, "rate") if cell else "not measured"
            mark = "chosen" if chosen[model] == name else ""
            rows.append([DISPLAY[model], name, said, number(value, "rate"), mark, shown])
    base = by_setting[BASE]
    head = words.head(BY_NAME[base.headline], "%") if base else "Headline, %"
    heads = ["Model", "Setting", "What it sets", f"{head}, reward_eval users", "Choice", "Evaluation users"]
    note = (
        "Each algorithm is compared at its own best candidate: the one with the largest headline on the reward_eval "
        "users, who are in no evaluation set, mean over the seeds. The trainings are the ones compared above, so the "
        "luck of a training leans the same way for every algorithm that was searched. Intervals are of each number "
        "alone."
    )
    return Table(heads, rows, "Search", note, "search")


def search_said(recipe: Recipe, plan: Plan, found: Found | None) -> list[str]:
    """What a reader has to know of the search before the numbers; nothing without one."""
    if not recipe.study.search:
        return []
    if found is None:
        return ["The search is not finished, so every algorithm stands at the recipe's own setting."]
    best = ", ".join(f"{DISPLAY[model]} {name}" for model, name in choose(found).items())
    return [f"Each algorithm stands at the best setting of its search (base: the recipe's own): {best}."]
