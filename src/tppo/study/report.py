"""The study's report: results.parquet, curves.parquet, one self-contained page, and its tables as Markdown.

All of them hold numbers only, no text of the log. The one exception is the page of a study on the synthetic log, which
is nobody's: it shows answers and token rewards as `tppo report` does. The training curves are PNG files, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from tppo.core.common import console
from tppo.core.config import Recipe, Setting
from tppo.core.files import write_json, write_text
from tppo.core.show import Table
from tppo.core.stages import DISPLAY, stage_inputs
from tppo.evaluate.compare import Metrics
from tppo.report import words
from tppo.report.charts import (
    DPO_CHARTS,
    RL_CHARTS,
    Chart,
    curve,
    curve_chart,
    drawn,
    kl_chart,
    reward_charts,
    rollout_policies,
    save_line_chart,
)
from tppo.report.headline import seen_gap
from tppo.report.page import answers_shown, difference_chart, judge_facts, page_context, render
from tppo.study.grid import BASE, SFT, Plan, all_settings
from tppo.study.results import MEASURES, Collected, collect, models_with, study_metrics, write_tables
from tppo.study.search import choose, search_said, search_table, searched
from tppo.study.tables import (
    ablation_charts,
    ablation_measures,
    ablation_table,
    agreement_table,
    budget_table,
    claims,
    corrected_table,
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
    collected, settings = collect(plan, failed), all_settings(recipe)
    names = {BASE, plan.shown, *(setting.name for setting in settings)}
    by_setting = {name: setting_metrics(recipe, plan, collected, name) for name in names}
    found = searched(plan, failed) if plan.search_of else None
    shown = by_setting[plan.shown]
    if shown is None:
        console.print("no cell with the recipe's own settings is finished: there is nothing to report")
        return None
    folder = Path(recipe.run_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(collected, folder)
    measures = ablation_measures(shown)
    ablations = find_ablations(recipe, plan, collected, measures)
    extra: dict[str, Any] = {"ablations": {ablation.name: ablation.rows for ablation in ablations}}
    if found is not None:
        extra["search"] = {"headline": found, "chosen": choose(found)}
    write_json(folder / "metrics.json", shown.data | extra)
    charts = training_charts(collected.curves_of(plan, plan.shown))
    context = {
        **study_context(recipe, plan, collected, shown, failed),
        "charts": {"missing": [], **{group: drawn(found.values()) for group, found in charts.items()}},
        "settings": [setting_view(setting, by_setting[setting.name]) for setting in settings],
        "ablations": [
            (ablation_table(ablation, by_setting, measures), ablation_charts(ablation, measures))
            for ablation in ablations
        ],
    }
    context["cautions"] = [*search_said(recipe, plan, found), *context["cautions"]]
    if found is not None:
        context["tables"] = [search_table(recipe, found, by_setting), *context["tables"]]
    write_text(folder / "summary.md", summary(shown, context))
    for group in charts.values():
        save_figures(group, folder / "figures")
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
    return study_metrics(answers, readings, cell, recipe.reward.rubric)


def study_context(
    recipe: Recipe, plan: Plan, collected: Collected, metrics: Metrics, failed: Mapping[str, str]
) -> dict[str, Any]:
    """Everything the template shows of the setting that is compared."""
    scope = metrics.scopes[0]
    curves = collected.curves_of(plan, plan.shown)
    cells = [job for (name, *_), job in plan.cell_of.items() if name == plan.shown]
    evaluated = next(job for job in cells if job.name in collected.metrics)
    gap = seen_gap((evaluated.run.manifest("label") or {}).get("facts", {}), metrics.rubric)
    return {
        **page_context(recipe, metrics, evaluated.run.manifest("evaluate") or {}),
        "lead": [*claims(metrics, scope), *words.lead(metrics, scope)],
        "cautions": [
            *missing_cells(plan, collected, failed),
            *words.cautions(metrics, scope, final_kl(curves)),
            gap,
        ],
        "corrected": [corrected_table(metrics, name) for name in metrics.scopes],
        "reward_charts": reward_charts(evaluated.run),
        **synthetic_answers(recipe, plan, collected, metrics),
        "tables": [
            agreement_table(evaluated.run),
            *words.distance_tables(metrics),
            equal_kl_table(curves),
            reach_table(curves),
            steadiness_table(curves),
            budget_table(plan),
            point_cost_table(plan, metrics),
            time_table(plan),
        ],
        "cells": {"finished": len(collected.metrics), "all": len(plan.cells)},
    }


def synthetic_answers(recipe: Recipe, plan: Plan, collected: Collected, metrics: Metrics) -> dict[str, Any]:
    """Answers beside each other and tokens by reward, of the first seed that has SFT; none unless the log is synthetic.

    The page of a study is meant to be shared, and texts of a real log are not.
    """
    if "synthetic" not in stage_inputs("prepare", recipe):
        return {"samples": [], "token_samples": []}
    shown = plan.shown
    seed = next(seed for seed in recipe.study.seeds if plan.cell_of[shown, SFT, seed].name in collected.metrics)
    cells = {model: plan.cell_of.get((shown, model, seed)) for model in metrics.policies}
    runs = {model: job.run for model, job in cells.items() if job and job.name in collected.metrics}
    answers, readings = (frame[frame["seed"] == seed] for frame in collected.of_setting(plan, shown))
    return answers_shown(runs, answers, readings, metrics, recipe.seed)


def setting_view(setting: Setting, metrics: Metrics | None) -> dict[str, Any]:
    """A setting other than the recipe's own: what it changes, its relevance and its differences."""
    shown: list[Markup] = []
    if metrics is not None:
        scope = metrics.scopes[0]
        shown.append(words.scope_tables(metrics, scope)["relevance"].html())
        if chart := difference_chart(metrics, scope):
            shown.append(Markup("<figure>{}</figure>").format(chart))
        if any(row["by"] == "vote" for row in metrics.data["wins"] if row["scope"] == scope):
            shown.append(words.wins_table(metrics, scope, bars=True).html())
    return {"name": setting.name, "overrides": setting.overrides.items(), "shown": shown}


def missing_cells(plan: Plan, collected: Collected, failed: Mapping[str, str]) -> list[str]:
    """What a reader has to know of jobs that are not in the numbers; whether they failed, not their logs."""
    notes = []
    for what, jobs in {
        "cells": plan.cells,
        "readings": plan.readings,
        "answers of the search": list(plan.search_of.values()),
    }.items():
        missing = [job.name for job in jobs if job.name in collected.missing]
        for said, names in (
            ("failed and are not in the numbers", [name for name in missing if name in failed]),
            ("are not finished yet", [name for name in missing if name not in failed]),
        ):
            if names:
                notes.append(f"{len(names)} of {len(jobs)} {what} {said}: {', '.join(names)}.")
    return notes


def final_kl(curves: pd.DataFrame) -> dict[str, float | None]:
    """KL of the last update that all seeds have, mean over the seeds, by algorithm."""
    found = {model: curve(curves, model, "kl").mean(axis=1) for model in models_with(curves, "kl")}
    return {model: float(kl.iloc[-1]) for model, kl in found.items() if len(kl)}


def summary(metrics: Metrics, context: dict[str, Any]) -> str:
    """The tables in Markdown."""
    facts = [
        ("seeds", str(metrics.data["seeds"])),
        ("cells finished", f"{context['cells']['finished']} of {context['cells']['all']}"),
        ("examples", str(context["scopes"][0]["examples"])),
        ("users", str(context["scopes"][0]["users"])),
        *judge_facts(metrics),
        words.intervals_fact(metrics),
    ]
    facts.append(("seen and unseen", context["cautions"][-1]))
    tables: list[Table] = [*context["corrected"], *context["tables"], *(table for table, _ in context["ablations"])]
    said = "".join(f"{sentence}\n\n" for sentence in claims(metrics, metrics.scopes[0]))
    return said + "\n".join([words.summary_markdown(metrics, facts), *(table.markdown() for table in tables)])


def training_charts(curves: pd.DataFrame) -> dict[str, dict[str, Chart]]:
    """Curves with the seeds as bands, by name of their file: rewards, what all RL algorithms share, relevance against
    KL, DPO."""

    def policies(metric: str) -> list[str]:
        return rollout_policies(models_with(curves, metric))

    own = {
        f"{name}-{model}": curve_chart(curves, [model], name, title.format(DISPLAY[model]))
        for name, title in (("reward_mean", "Reward of {}"), ("reward_std", "Spread of the reward of {} in a rollout"))
        for model in policies(name)
    }
    shared = {name: curve_chart(curves, policies(name), name, title) for name, title in RL_CHARTS}
    for name, label in MEASURES.items():
        title = f"{label[0].upper()}{label[1:]}, against KL"
        shared[f"{name}-kl"] = kl_chart(curves, policies(name), name, title)
    dpo = {f"dpo-{name}": curve_chart(curves, ["dpo"], name, title, "step") for name, title in DPO_CHARTS}
    return {"own": own, "shared": shared, "dpo": dpo}


def save_figures(charts: Mapping[str, Chart], folder: Path) -> None:
    """Write the charts as PNG files, for papers and slides; one without a point has none."""
    folder.mkdir(exist_ok=True)
    for name, chart in charts.items():
        path = folder / f"{name}.png"
        if not save_line_chart(path, *chart):
            path.unlink(missing_ok=True)
