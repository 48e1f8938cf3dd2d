"""The study in words and tables. No text of the log comes in.

An ablation is what one number of the recipe does: settings that differ from `base` in nothing else (the paper's Figures
10 and 12) lie on an axis, with the recipe's own value among them. A model is on the chart when the setting makes it, or
its answers, anew; what a setting does not concern (DPO and a setting of `rl`) would be a copy of `base`.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from tppo.core.config import Recipe
from tppo.core.files import sha256_file
from tppo.core.run import RunFolder
from tppo.core.show import NOT_MEASURED, Table, digits, p_text, with_interval
from tppo.core.stages import DISPLAY, MODEL_ORDER
from tppo.core.stats import IntervalEstimate, estimate, mean_over_seeds
from tppo.evaluate.compare import Cost, Metrics, cost_table, model_costs
from tppo.evaluate.metrics import BY_NAME
from tppo.judge.agreement import RESULT
from tppo.report import words
from tppo.report.charts import Chart, curve, drawn, seed_line
from tppo.study.grid import BASE, Plan, all_settings, settings_tried, varied
from tppo.study.results import MEASURES, Collected, at_equal_kl, models_with, reaching, steadiness

FIRST_RIVALS = ("ppo", "ppo_sum", "sft", "dpo")
"""Order in which the first sentences name those the leading model is compared with."""


def claims(metrics: Metrics, scope: str) -> list[str]:
    """What the leading algorithm gains over each rival: "TPPO minus PPO: +2.4 points [+0.3, +4.5], ..."."""
    pairs, headline = metrics.pairs(scope), metrics.headline
    rank = {name: place for place, name in enumerate(FIRST_RIVALS)}
    leading = [pair for pair in pairs if pair[0] == pairs[0][0]]
    sentences = []
    for pair in sorted(leading, key=lambda pair: rank.get(pair[1], len(rank))):
        row = metrics.difference_row(scope, *pair, headline)
        shift = words.shift(estimate(row), BY_NAME[headline])
        seeds = f"{row['seeds']} seed{'s' if row['seeds'] != 1 else ''}"
        count = metrics.data["distinct_examples"][scope]
        p = p_text(row["p_corrected"])
        p = p if p.startswith("<") else f"= {p}"
        sentences.append(f"{words.display(pair)}: {shift}, corrected p {p}; {seeds}, {count} examples.")
    return sentences


def corrected_table(metrics: Metrics, scope: str) -> Table:
    """The pairs of policies with p-values: of the pair alone, and corrected."""
    paper = [f"relevant_{metrics.rubric}"] if metrics.counts_asked else []
    names = [(name, "") for name in (metrics.headline, metrics.data["check"], *paper, "hit", "token_f1", "unparseable")]
    names += words.second_measures(metrics)
    heads = ["Pair"]
    for name, reader in names:
        heads += [words.head(BY_NAME[name], "points", reader), "p", "corrected p"]
    rows = []
    for pair in metrics.pairs(scope):
        cells = [words.display(pair)]
        for name, reader in names:
            row = metrics.difference_row(scope, *pair, name, reader)
            shown = with_interval(estimate(row), BY_NAME[name].unit, signed=True)
            cells += [shown, p_text(row["p_value"]), p_text(row["p_corrected"])]
        rows.append(cells)
    title = f"Corrected for {len(rows)} comparisons, {words.SCOPES[scope]}"
    note = (
        "Two-sided p-values of the same t over users and seeds as the intervals: of the pair alone, and times the "
        "number of pairs in the column (Bonferroni). The intervals go with the corrected one: they leave 0 out when it "
        "is below 0.05."
    )
    return Table(heads, rows, title, note, f"corrected-{scope}")


def equal_kl_table(curves: pd.DataFrame) -> Table:
    rows = []
    for measure, label in MEASURES.items():
        found = at_equal_kl(curves, measure)
        if found is None:
            continue
        level, values = found
        head = f"{label}, at {level:.2f} nats"
        pairs = list(itertools.combinations(values, 2))
        rows += [[head, DISPLAY[model], _mean_text(values[model])] for model in values]
        rows += [[head, words.display((a, b)), _mean_text(values[a] - values[b], "+", len(pairs))] for a, b in pairs]
    note = (
        "On rollouts, by the reward models (not by the judge on the evaluation users), when the KL from SFT first "
        "reaches the largest that every training reaches; curves smoothed over three updates. Intervals by Student's t "
        "over the seeds, 95%; those of differences for all pairs of a measure together (Bonferroni)."
    )
    measured = [row for row in rows if row[-1]]
    return Table(["Measure", "Model", "Mean over seeds"], measured, "At equal KL", note, "equal-kl")


def _mean_text(values: pd.Series, sign: str = "", comparisons: int = 1) -> str:
    """Mean over the seeds that have a value; empty when none has."""
    found = mean_over_seeds(values.dropna().tolist(), comparisons)
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{found.value:{sign}.3f} (one seed)"
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def reach_table(curves: pd.DataFrame) -> Table:
    rows = []
    for measure, label in MEASURES.items():
        for other in ("ppo", "ppo_sum"):
            for seed, found in reaching(curves, measure, "tppo", other).items():
                reached = "never" if found.update is None else str(found.update)
                share = NOT_MEASURED if found.share is None else f"{100 * found.share:.0f}"
                head = f"{DISPLAY[other]}'s best {label}, seed {seed}"
                rows.append([head, f"{found.best:.3f}", str(found.best_update), reached, share])
    note = (
        "When TPPO first has as much as the rival's best, both smoothed over three updates. The share is TPPO's update "
        "in the rival's."
    )
    heads = ["What", "Value", "Rival's update", "TPPO's update", "Share, %"]
    return Table(heads, rows, "Updates to the rivals' best", note, "reach")


def steadiness_table(curves: pd.DataFrame) -> Table:
    rows = []
    for measure, label in {"reward_mean": "reward, in its own coin", **MEASURES}.items():
        for model in models_with(curves, measure):
            values = curve(curves, model, measure)
            if len(values):  # an update that all seeds have
                rows.append([label, DISPLAY[model], *map(digits, steadiness(values.to_numpy().T))])
    note = (
        "Between seeds: standard deviation at the same update, mean over the updates. Between updates: that of the "
        "change from one update to the next, divided by the root of 2, so that a trend does not count, mean over the "
        "seeds."
    )
    return Table(["Measure", "Model", "Std, seeds", "Std, updates"], rows, "Steadiness", note, "steady")


def agreement_table(run: RunFolder) -> Table:
    """What `tppo agreement` measured of the labels (the paper's Table 9); without rows when it did not.

    Args:
        run: whose labels they are. The report stands beside the label stage, in the run folder that made it.
    """
    labels = run.path("label")
    report = labels.parent / "agreement" / RESULT
    shares = ["Relevant by the first, %", "By the second, %"]
    heads = ["Raters", "Questions", "Both answered", "Agree, %", "Kappa", *shares]
    table = Table(heads, [], "Label agreement", id="agreement")
    if not report.exists():
        return replace(table, note="Whether people, or another judge, agree with the labels (tppo agreement).")
    found = json.loads(report.read_text(encoding="utf-8"))
    if sha256_file(labels / "labels.parquet") not in [rater["sha256"] for rater in found["raters"]]:
        return replace(table, note="The agreement report in the run folder is about other labels than this study's.")
    note = (
        f"How far raters agree on the words and on whole responses, rubric {found['rubric']}. Kappa is the agreement "
        "beyond what the two shares of relevant answers give by chance. Intervals by a bootstrap over responses."
    )
    rows = []
    for pair in found["pairs"]:
        for name in ("words", "sentences"):
            asked = pair[name]
            numbers = [(asked["agreement"], "rate"), (asked["kappa"], "number")]
            numbers += [(asked["prevalence"][rater], "rate") for rater in ("a", "b")]
            cells = [with_interval(IntervalEstimate(**row), unit) for row, unit in numbers]
            rows.append([f"{pair['a']}, {pair['b']}", name, f"{asked['compared']} of {asked['questions']}", *cells])
    return replace(table, note=note, rows=rows)


def budget_table(plan: Plan) -> Table:
    rows = [[DISPLAY[model], str(len(names)), ", ".join(names)] for model, names in settings_tried(plan).items()]
    note = "Settings with which each algorithm was tuned in this study. A fair comparison gives each the same number."
    return Table(["Model", "Settings", "Which"], rows, "Search budget", note, "budget")


def time_table(plan: Plan) -> Table:
    """Machine time of the finished stages, cells of one model and setting in one row."""
    costs: dict[str, list[dict[str, Any]]] = {}
    for job in plan.jobs:
        whose = f"{job.setting}, {DISPLAY[job.model] if job.model else 'shared'}"
        for stage in job.stages:
            if manifest := job.run.manifest(stage):
                costs.setdefault(f"{whose}: {stage}", []).append(manifest)
    if costs:
        costs["All"] = list(itertools.chain.from_iterable(costs.values()))
    rows = []
    for name, found in costs.items():
        minutes, peak = sum(one["seconds"] for one in found) / 60, max(one["peak_memory_mib"] for one in found)
        rows.append([name, str(len(found)), f"{minutes:.1f}", str(peak)])
    note = "Of the try that finished each stage: what an interrupted one had spent before is not in it."
    heads = ["Stage", "Times", "Minutes, all", "Peak memory, MiB"]
    return Table(heads, rows, "Machine time", note, "cost")


def point_cost_table(plan: Plan, metrics: Metrics) -> Table:
    """What a point of the headline over SFT costs, by model: of the mean cell, and of the gain over all seeds."""
    scope = metrics.scopes[0]
    by_model: dict[str, list[Cost]] = {model: [] for model in metrics.policies}
    for (setting, model, _), job in plan.cell_of.items():
        if setting == plan.shown and model in by_model and job.run.manifest("evaluate") is not None:
            found = model_costs(job.recipe, job.run, metrics, scope)
            by_model[model] += [cost for cost in found if cost.model == model]

    def mean(values: list[Any]) -> float | None:
        return None if None in values else fmean(values)

    costs = [
        replace(
            found[0],
            seconds=mean([cost.seconds for cost in found]),
            seconds_per_answer=mean([cost.seconds_per_answer for cost in found]),
        )
        for found in by_model.values()
        if found
    ]
    note = (
        "All that was made for a model and not for SFT (its training, and the responses, labels and reward models that "
        "it reads, in full for each), mean of the seeds, for a percentage point of the headline over SFT. Intervals: "
        "those of the gain. Minutes are of the threads that the stages ran with."
    )
    return replace(cost_table(costs, note), title="Cost of a point", id="point-cost")


CHANGE_NO_ANSWER = ("evaluate.readings",)
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
    """The ablations of a study with at least one point beside the recipe's own."""
    values: dict[str, dict[str, float]] = {}
    for setting in all_settings(recipe):
        names = setting.overrides.keys() - CHANGE_NO_ANSWER
        if len(names) == 1:
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
    means = collected.means(measures)
    for (setting, model, seed), job in plan.cell_of.items():
        base = plan.cell_of.get((BASE, model, seed))
        anew = {name for name in values if plan.cell_of.get((name, model, seed)) not in (None, base)}
        if anew and setting in {BASE, *anew} and model in MODEL_ORDER and job.name in means.index:
            own = {"setting": setting, "value": values[setting], "model": model, "seed": seed}
            found = means.loc[job.name].loc[model]
            rows.append({**own, **{name: None if np.isnan(found[name]) else float(found[name]) for name in measures}})
    return rows


def ablation_measures(metrics: Metrics) -> list[str]:
    """Headline, check, and what the setting may trade them for."""
    return [metrics.headline, metrics.data["check"], *FORM_MEASURES]


def ablation_charts(ablation: Ablation, measures: list[str]) -> list[Markup]:
    """Each measure against the setting's value: mean over the seeds, band of one standard deviation between them."""
    rows = pd.DataFrame(ablation.rows)
    models = [model for model in reversed(MODEL_ORDER) if model in set(rows["model"])]
    charts = []
    for name in measures:
        scale = 100 if BY_NAME[name].unit == "rate" else 1
        points = rows.assign(**{name: scale * rows[name].astype(float)})
        lines = [seed_line(model, DISPLAY[model], points[points["model"] == model], "value", name) for model in models]
        lines = [replace(line, marked=True) for line in lines]
        charts.append(Chart(lines, words.head(BY_NAME[name], "%"), ablation.name))
    return drawn(charts)


def ablation_table(ablation: Ablation, by_setting: Mapping[str, Metrics | None], measures: list[str]) -> Table:
    """The same with intervals.

    Args:
        by_setting: metrics of each setting, `BASE` included; None for one without finished cells.
    """
    heads = [ablation.name, "Model", "Seeds", *(words.head(BY_NAME[name], "%") for name in measures)]
    seeds = Counter((row["setting"], row["model"]) for row in ablation.rows)
    rows = []
    for setting, value in sorted(ablation.values.items(), key=lambda pair: pair[1]):
        metrics = by_setting[setting]
        for model in reversed(MODEL_ORDER):
            if metrics is not None and seeds[setting, model]:
                shown = [(metrics.cell(metrics.scopes[0], model, name), BY_NAME[name].unit) for name in measures]
                head = f"{value:g}{' (the recipe)' if setting == BASE else ''}"
                texts = [with_interval(cell, unit) for cell, unit in shown]
                rows.append([head, DISPLAY[model], str(seeds[setting, model]), *texts])
    note = (
        f"Settings that change nothing but {ablation.name}; only models that it concerns. Line: mean over the seeds. "
        "Band: one standard deviation between them. Choosing a value here is a choice made on the evaluation sets."
    )
    return Table(heads, rows, f"Ablation of {ablation.name}", note, f"ablation-{ablation.name}")
