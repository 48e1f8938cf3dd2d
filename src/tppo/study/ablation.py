"""What one number of the recipe does: settings that differ from `base` in nothing else (the paper's Figures 10 and 12).

Such settings lie on an axis, with the recipe's own value among them. A model is on the chart when the setting makes
it, or its answers, anew; what a setting does not concern (DPO and a setting of `rl`) would be a copy of `base`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from markupsafe import Markup

from tppo.config import Recipe
from tppo.evaluate.charts import line_chart
from tppo.evaluate.compare import DISPLAY, MODEL_ORDER
from tppo.evaluate.curves import seed_line
from tppo.evaluate.metrics import BY_NAME
from tppo.evaluate.present import Metrics
from tppo.study.collect import Collected
from tppo.study.plan import BASE, Plan, varied
from tppo.study.present import PlainTable, with_interval

CHANGE_NO_ANSWER = (
    "evaluate.vote",
    "evaluate.vote_examples",
    "evaluate.distance_examples",
    "evaluate.second_judge",
    "evaluate.second_judge_examples",
)
FORM_MEASURES = ("queries_written", "response_tokens")
"""Shown beside the relevance: what a setting may trade it for."""


@dataclass(frozen=True)
class Ablation:
    """Settings that differ from the recipe in one number."""

    name: str
    """What they set, as `section.field`."""
    values: dict[str, float]
    """Its value by setting, `BASE` first."""
    rows: list[dict[str, Any]]
    """`setting`, `value`, `model`, `seed`, and the mean over the examples of each measure of `measures`."""


def find_ablations(recipe: Recipe, plan: Plan, collected: Collected, measures: list[str]) -> list[Ablation]:
    """The ablations of a study with at least one point beside the recipe's own.

    Args:
        measures: columns of generations.parquet.
    """
    values: dict[str, dict[str, float]] = {}
    for setting in recipe.study.settings:
        names = [name for name in setting.overrides if name not in CHANGE_NO_ANSWER]
        if len(names) != 1:
            continue
        (name,) = names
        own, base = (_number(one, name) for one in (varied(recipe, setting), recipe))
        if own is not None and base is not None:
            values.setdefault(name, {BASE: base})[setting.name] = own
    found = [Ablation(name, of, _rows(plan, collected, of, measures)) for name, of in values.items()]
    return [ablation for ablation in found if len({row["value"] for row in ablation.rows}) > 1]


def _number(recipe: Recipe, name: str) -> float | None:
    """The value of `section.field`; None when it is not a number."""
    value: Any = recipe
    for part in name.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _rows(plan: Plan, collected: Collected, values: Mapping[str, float], measures: list[str]) -> list[dict[str, Any]]:
    rows = []
    for (setting, model, seed), job in plan.cell_of.items():
        if setting not in values or model not in MODEL_ORDER or job.name not in collected.rows:
            continue
        base = plan.cell_of.get((BASE, model, seed))
        anew = {name for name in values if plan.cell_of.get((name, model, seed)) not in (None, base)}
        if not anew or setting not in {BASE, *anew}:
            continue
        answers = [row for row in collected.rows[job.name] if row["model"] == model]
        means = {name: _mean([row[name] for row in answers]) for name in measures}
        rows.append({"setting": setting, "value": values[setting], "model": model, "seed": seed, **means})
    return rows


def _mean(values: list[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return float(np.mean(measured)) if measured else None


def ablation_measures(metrics: Metrics) -> list[str]:
    """Headline, check, and what the setting may trade them for."""
    return [metrics.data["headline"], metrics.data["check"], *FORM_MEASURES]


def ablation_charts(ablation: Ablation, measures: list[str]) -> list[Markup]:
    """Each measure against the setting's value: mean over the seeds, band of one standard deviation between them."""
    charts = []
    models = [model for model in reversed(MODEL_ORDER) if any(row["model"] == model for row in ablation.rows)]
    for name in measures:
        unit = BY_NAME[name].unit
        shown = [
            {**row, name: 100 * row[name] if unit == "rate" else row[name]}
            for row in ablation.rows
            if row[name] is not None
        ]
        lines = [
            seed_line(model, DISPLAY[model], [row for row in shown if row["model"] == model], "value", name)
            for model in models
        ]
        title = BY_NAME[name].label + (", %" if unit == "rate" else "")
        charts.append(line_chart([replace(line, marked=True) for line in lines], title, ablation.name))
    return [chart for chart in charts if chart]


def ablation_table(ablation: Ablation, by_setting: Mapping[str, Metrics | None], measures: list[str]) -> PlainTable:
    """The same with intervals.

    Args:
        by_setting: metrics of each setting, `BASE` included; None for one without finished cells.
    """
    heads = [ablation.name, "Model", "Seeds"]
    heads += [BY_NAME[name].label + (", %" if BY_NAME[name].unit == "rate" else "") for name in measures]
    rows = []
    for setting, value in sorted(ablation.values.items(), key=lambda pair: pair[1]):
        metrics = by_setting[setting]
        for model in reversed(MODEL_ORDER):
            seeds = sum(row["setting"] == setting and row["model"] == model for row in ablation.rows)
            if metrics is None or not seeds:
                continue
            texts = [
                with_interval(metrics.cell(metrics.scopes[0], model, name), BY_NAME[name].unit) for name in measures
            ]
            rows.append([f"{value:g}{' (the recipe)' if setting == BASE else ''}", DISPLAY[model], str(seeds), *texts])
    note = (
        f"Settings that change nothing but {ablation.name}; only models that it concerns. Line: mean over the seeds. "
        "Band: one standard deviation between them. Choosing a value here is a choice made on the evaluation sets."
    )
    return PlainTable(f"ablation-{ablation.name}", f"Ablation of {ablation.name}", note, heads, rows)
