"""The study's report: results.parquet, curves.parquet, one self-contained page, and its tables as Markdown.

All of them hold numbers only, no text of the log. The one exception is the page of a study on the synthetic log, which
is nobody's: it shows answers and token rewards as `tppo report` does. The training curves are PNG files, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from tppo.core.common import console
from tppo.core.config import Recipe, Setting
from tppo.core.files import write_json, write_text
from tppo.core.show import Table
from tppo.core.stages import DISPLAY, stage_inputs
from tppo.evaluate.answers import records
from tppo.evaluate.compare import Metrics
from tppo.report import words
from tppo.report.charts import DPO_CHARTS, RL_CHARTS, Line, line_chart, reward_charts, rollout_policies, save_line_chart
from tppo.report.page import difference_chart, judge_facts, page_context, render, samples, token_samples, word_labels
from tppo.study.grid import BASE, SFT, Plan
from tppo.study.results import MEASURES, Collected, Curves, collect, study_metrics, write_tables
from tppo.study.tables import (
    Ablation,
    ablation_charts,
    ablation_measures,
    ablation_table,
    agreement_table,
    budget_table,
    claims,
    corrected_table,
    distance_tables,
    equal_kl_table,
    find_ablations,
    point_cost_table,
    reach_table,
    steadiness_table,
    time_table,
)

FOLDER = "study"
TEMPLATE = Path(__file__).with_name("study.html")


def write_report(recipe: Recipe, plan: Plan, failed: Mapping[str, str]) -> Path | None:
    """Collect the finished cells and write everything; None when no cell of the recipe's own settings is finished.

    Args:
        failed: why run folders failed, by name.
    """
    collected = collect(plan, failed)
    names = [BASE, *(setting.name for setting in recipe.study.settings)]
    by_setting = {name: setting_metrics(recipe, plan, collected, name) for name in names}
    base = by_setting[BASE]
    if base is None:
        console.print("no cell with the recipe's own settings is finished: there is nothing to report")
        return None
    folder = Path(recipe.run_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(collected, folder)
    ablations = find_ablations(recipe, plan, collected, ablation_measures(base))
    write_json(folder / "metrics.json", base.data | {"ablations": {found.name: found.rows for found in ablations}})
    context = study_context(recipe, plan, collected, base, failed)
    context |= setting_context(recipe, by_setting, ablations, ablation_measures(base))
    write_text(folder / "summary.md", summary(base, context))
    save_figures(Curves(collected.curves, BASE), folder / "figures")
    write_text(folder / "report.html", render(context, TEMPLATE))
    for sentence in context["lead"]:
        console.print(sentence, markup=False, soft_wrap=True)
    return folder / "report.html"


def setting_metrics(recipe: Recipe, plan: Plan, collected: Collected, setting: str) -> Metrics | None:
    """Metrics of a setting's finished cells; None when there are none, or SFT is not among them."""
    answers, readings = collected.of_setting(plan, setting)
    if SFT not in set(answers["model"]):
        return None
    cell = collected.metrics[answers["job"].iloc[0]]
    draws, rubric = recipe.study.bootstrap_samples, recipe.reward.rubric
    return study_metrics(answers, readings, cell, rubric=rubric, draws=draws, seed=recipe.seed)


def study_context(
    recipe: Recipe, plan: Plan, collected: Collected, metrics: Metrics, failed: Mapping[str, str]
) -> dict[str, Any]:
    """Everything the template shows of the recipe's own setting."""
    scope = metrics.scopes[0]
    curves = Curves(collected.curves, BASE)
    evaluated = next(job for (name, *_), job in plan.cell_of.items() if name == BASE and job.name in collected.metrics)
    context = page_context(recipe, metrics, evaluated.run.manifest("evaluate") or {})
    for shown in context["scopes"]:
        shown["examples"] = metrics.data["distinct_examples"][shown["name"]]
    return {
        **context,
        "run_name": Path(recipe.run_dir).name,
        "lead": [*claims(metrics, scope), *words.lead(metrics, scope)],
        "cautions": [*missing_cells(plan, collected, failed), *words.cautions(metrics, scope, final_kl(curves))],
        "corrected": [corrected_table(metrics, name) for name in metrics.scopes],
        "charts": charts(curves),
        "reward_charts": reward_charts(evaluated.run),
        **answers_shown(recipe, plan, collected, metrics),
        "tables": [
            agreement_table(evaluated.run),
            *distance_tables(metrics),
            equal_kl_table(curves),
            reach_table(curves),
            steadiness_table(curves),
            budget_table(plan),
            point_cost_table(plan, metrics),
            time_table(plan),
        ],
        "seeds": metrics.data["seeds"],
        "cells": {"finished": len(collected.metrics), "all": len(plan.cells)},
        "bootstrap_samples": recipe.study.bootstrap_samples,
        "seed_list": ", ".join(map(str, recipe.study.seeds)),
    }


def answers_shown(recipe: Recipe, plan: Plan, collected: Collected, metrics: Metrics) -> dict[str, Any]:
    """Answers beside each other and tokens by reward, of the first seed that has SFT; none unless the log is synthetic.

    The page of a study is meant to be shared, and texts of a real log are not.
    """
    if "synthetic" not in stage_inputs("prepare", recipe):
        return {"samples": [], "token_samples": []}
    seed = next(seed for seed in recipe.study.seeds if plan.cell_of[BASE, SFT, seed].name in collected.metrics)
    cells = {model: plan.cell_of.get((BASE, model, seed)) for model in metrics.policies}
    runs = {model: job.run for model, job in cells.items() if job and job.name in collected.metrics}
    answers, readings = (frame[frame["seed"] == seed] for frame in collected.of_setting(plan, BASE))
    labels = word_labels(readings, metrics)
    rows = records(answers)
    shown = samples(runs[SFT].require("prepare"), rows, labels, metrics.policies, recipe.seed)
    return {"samples": shown, "token_samples": token_samples(runs)}


def setting_context(
    recipe: Recipe, by_setting: Mapping[str, Metrics | None], ablations: Sequence[Ablation], measures: list[str]
) -> dict[str, Any]:
    """What the template shows of the settings other than the recipe's own."""
    return {
        "settings": [setting_view(setting, by_setting[setting.name]) for setting in recipe.study.settings],
        "ablations": [
            (ablation_table(found, by_setting, measures), ablation_charts(found, measures)) for found in ablations
        ],
    }


def setting_view(setting: Setting, metrics: Metrics | None) -> dict[str, Any]:
    """A setting other than the recipe's own: what it changes, its relevance and its differences."""
    view = {"name": setting.name, "overrides": [(name, str(value)) for name, value in setting.overrides.items()]}
    if metrics is None:
        return {**view, "relevance": None, "chart": None, "wins": None}
    scope = metrics.scopes[0]
    voted = any(row["by"] == "vote" for row in metrics.data["wins"] if row["scope"] == scope)
    return {
        **view,
        "relevance": words.scope_tables(metrics, scope)["relevance"],
        "chart": difference_chart(metrics, scope),
        "wins": words.wins_table(metrics, scope, bars=True) if voted else None,
    }


def missing_cells(plan: Plan, collected: Collected, failed: Mapping[str, str]) -> list[str]:
    """What a reader has to know of jobs that are not in the numbers; whether they failed, not their logs."""
    notes = []
    for what, jobs in {"cells": plan.cells, "readings": plan.readings}.items():
        missing = [job.name for job in jobs if job.name in collected.missing]
        lost = [name for name in missing if name in failed]
        still_open = [name for name in missing if name not in failed]
        if lost:
            notes.append(f"{len(lost)} of {len(jobs)} {what} failed and are not in the numbers: {', '.join(lost)}.")
        if still_open:
            notes.append(f"{len(still_open)} of {len(jobs)} {what} are not finished yet: {', '.join(still_open)}.")
    return notes


def final_kl(curves: Curves) -> dict[str, float | None]:
    """KL of the last update, mean over the seeds, by algorithm."""
    found = {model: curves.get(model, "kl") for model in curves.models("kl")}
    return {model: curve.mean[-1] for model, curve in found.items() if curve and len(curve.updates)}


def summary(metrics: Metrics, context: dict[str, Any]) -> str:
    """The tables in Markdown."""
    facts = [
        ("seeds", str(context["seeds"])),
        ("cells finished", f"{context['cells']['finished']} of {context['cells']['all']}"),
        ("examples", str(context["scopes"][0]["examples"])),
        ("users", str(context["scopes"][0]["users"])),
        *judge_facts(metrics),
        ("intervals", f"95%, bootstrap over users and seeds, {context['bootstrap_samples']} draws"),
    ]
    ablations = [table for table, _ in context["ablations"]]
    tables: list[Table] = [*context["corrected"], *context["tables"], *ablations]
    said = claims(metrics, metrics.scopes[0])
    head = "\n".join(f"{sentence}\n" for sentence in said)
    return "\n".join([head, words.summary_markdown(metrics, facts), *(table.markdown() for table in tables)])


class Chart(NamedTuple):
    """A training chart: what `line_chart` draws on the page and `save_line_chart` into a file."""

    name: str
    """Of the file."""
    lines: list[Line]
    title: str
    x_label: str
    dots: bool = False


def training_charts(curves: Curves) -> dict[str, list[Chart]]:
    """Curves with the seeds as bands: rewards, what all algorithms share, relevance against KL, DPO."""
    own = [
        _band_chart(curves, [model], f"{name}-{model}", name, title.format(DISPLAY[model]))
        for name, title in (("reward_mean", "Reward of {}"), ("reward_std", "Spread of the reward of {} in a rollout"))
        for model in rollout_policies(curves.models(name))
    ]
    shared = [
        _band_chart(curves, rollout_policies(curves.models(name)), name, name, title) for name, title in RL_CHARTS
    ]
    for name, label in MEASURES.items():
        lines = []
        for model in rollout_policies(curves.models(name)):
            kl, values = curves.get(model, "kl"), curves.get(model, name)
            if kl and values and len(kl.updates) == len(values.updates):
                lines.append(Line(model, DISPLAY[model], kl.mean, values.mean))
        title = f"{label[0].upper()}{label[1:]}, against KL"
        shared.append(Chart(f"{name}-kl", lines, title, "KL from SFT, nats per response", dots=True))
    dpo = [_band_chart(curves, ["dpo"], f"dpo-{name}", name, title, "step") for name, title in DPO_CHARTS]
    return {"own": own, "shared": shared, "dpo": dpo}


def charts(curves: Curves) -> dict[str, list[Markup]]:
    """The training charts that have a point, for the page."""
    drawn = {
        group: [line_chart(chart.lines, chart.title, chart.x_label, dots=chart.dots) for chart in found]
        for group, found in training_charts(curves).items()
    }
    return {group: [chart for chart in found if chart] for group, found in drawn.items()}


def save_figures(curves: Curves, folder: Path) -> None:
    """Write the same charts as PNG files, for papers and slides."""
    folder.mkdir(exist_ok=True)
    for chart in itertools.chain.from_iterable(training_charts(curves).values()):
        path = folder / f"{chart.name}.png"
        if not save_line_chart(path, chart.lines, chart.title, chart.x_label, dots=chart.dots):
            path.unlink(missing_ok=True)


def _band_chart(
    curves: Curves, models: Sequence[str], name: str, metric: str, title: str, x_label: str = "update"
) -> Chart:
    found = [(model, curve) for model in models if (curve := curves.get(model, metric)) and len(curve.updates)]
    lines = [Line(m, DISPLAY[m], [int(u) for u in c.updates], c.mean, c.spread) for m, c in found]
    return Chart(name, lines, title, x_label)
