"""The report stage: one self-contained HTML page, and the tables alone as Markdown.

report.html holds rows of the log (samples) and stays with the run; summary.md holds numbers only. Texts of
the log are untrusted: the template escapes everything except our own charts, and the page runs no
script at all.

The report's section on the gate: check_reward/check.json as tables and a chart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import uniplot
import yaml
from markupsafe import Markup
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from tppo.core import show, stats
from tppo.core.common import UserError, console, draw
from tppo.core.config import Recipe
from tppo.core.files import read_jsonl
from tppo.core.run import RunFolder
from tppo.core.stages import DISPLAY, all_stages, rl_stage
from tppo.core.stats import verdict
from tppo.core.tables import load_examples
from tppo.evaluate.compare import Metrics, cost_markdown, cost_rows, model_costs
from tppo.evaluate.metrics import BY_NAME, CORPUS, FORM, KNOWN, RELEVANCE, SECOND, TRUTH, Metric, read_generations
from tppo.judge.probes import PROBES
from tppo.report import words
from tppo.report.charts import (
    Interval,
    column,
    dpo_charts,
    interval_chart,
    reward_charts,
    rl_charts,
    rl_rows,
    rollout_policies,
    sft_chart,
)
from tppo.reward import gate
from tppo.rl.loop import shown_tokens

CURVE_WINDOW = 10
"""Updates averaged in the terminal's curve: one rollout is a small sample."""
SAMPLES = 12
TOKEN_SAMPLES = 4


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Write report.html and summary.md."""
    metrics = load_metrics(run)
    scope = metrics.scopes[0]
    final_kl = {model: _last(rl_rows(run, model), "kl") for model in rollout_policies(metrics.policies)}
    point_costs = model_costs(recipe, run, metrics, scope)
    context = {
        "lead": words.lead(metrics, scope),
        "scope_label": words.SCOPES[scope],
        "verdicts": words.verdicts(metrics, scope),
        "cautions": words.cautions(metrics, scope, final_kl),
        "chart_headline": headline_chart(metrics, scope),
        "chart_differences": difference_chart(metrics, scope),
        "scopes": [scope_tables(metrics, name) for name in metrics.scopes],
        "against": {name: words.AGAINST[metrics.data[name]] for name in ("headline", "check")},
        "judge": metrics.data["judge"],
        "second_judge": metrics.data.get("second_judge"),
        "models": [(model, DISPLAY[model]) for model in metrics.policies],
        "rl_charts": rl_charts(run, metrics.policies),
        "dpo_charts": dpo_charts(run) if "dpo" in metrics.policies else [],
        "reward_charts": reward_charts(run),
        "reward_check": reward_check_section(run),
        "sft_chart": sft_chart(run),
        "samples": samples(recipe, run, read_generations(run.require("evaluate")), metrics),
        "token_samples": token_samples(dict.fromkeys(metrics.policies, run)),
        "facts": [
            (stage, flatten((run.manifest(stage) or {}).get("facts", {}))) for stage in ("prepare", "label", "reward")
        ],
        "costs": costs(recipe, run),
        "point_costs": cost_rows(point_costs),
        "recipe": yaml.safe_dump(asdict(recipe), sort_keys=False),
        "seed": recipe.seed,
        "run_name": run.root.name,
        "versions": (run.manifest("evaluate") or {}).get("versions", {}),
        "python": (run.manifest("evaluate") or {}).get("python"),
        "finished": (run.manifest("evaluate") or {}).get("finished"),
        "counts": (run.manifest("evaluate") or {}).get("facts", {}),
        "bootstrap_samples": recipe.evaluate.bootstrap_samples,
        "temperature": recipe.evaluate.temperature,
        "docs": {metric.label: metric.doc for metric in (*RELEVANCE, *SECOND, *KNOWN, *TRUTH, *FORM, *CORPUS)},
    }
    (folder / "report.html").write_text(render(context), encoding="utf-8")
    facts = [
        ("examples", str(metrics.cell(scope, "sft", metrics.data["headline"]).examples)),
        ("users", str(metrics.cell(scope, "sft", metrics.data["headline"]).users)),
        ("judge", metrics.data["judge"]),
        *([("second judge", metrics.data["second_judge"])] if metrics.data.get("second_judge") else []),
        ("seed", str(recipe.seed)),
        ("intervals", f"95%, bootstrap over users, {recipe.evaluate.bootstrap_samples} draws"),
    ]
    reward_facts = run.facts("reward")
    training = words.training_markdown(
        costs(recipe, run),
        {kind: reward_facts[kind]["best"] for kind in ("token", "sentence") if kind in reward_facts},
        {model: rl_rows(run, model) for model in rollout_policies(metrics.policies)},
        rl_rows(run, "dpo") if "dpo" in metrics.policies else [],
    )
    summary = f"{words.summary_markdown(metrics, facts)}\n{training}\n{cost_markdown(point_costs)}"
    (folder / "summary.md").write_text(summary, encoding="utf-8")
    return {"verdict": context["lead"], "cautions": context["cautions"]}


def render(context: dict[str, Any], template: Path = Path(__file__).parent / "report.html") -> str:
    """The page; another template may extend report.html."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(context)


def load_metrics(run: RunFolder) -> Metrics:
    path = run.require("evaluate") / "metrics.json"
    try:
        return Metrics(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give `--redo evaluate` to make it anew") from None


def print_summary(run: RunFolder) -> None:
    """The headline of a finished run on the console: a table, the curve of RL, and what the intervals allow to say."""
    metrics = load_metrics(run)
    scope = metrics.scopes[0]
    headline, check = metrics.data["headline"], metrics.data["check"]
    heads = {headline: "relevant %", check: "check %", "hit": "hit %", "copied_queries": "copied %",
             "unparseable": "unparseable %"}  # fmt: skip
    with_interval = [headline]
    if metrics.knows_truth:
        heads = {headline: "judged %", "known_words": "true words %", "known_queries": "true queries %",
                 "unparseable": "unparseable %"}  # fmt: skip
        with_interval.append("known_words")
    checked = "" if metrics.knows_truth else f"; check: {words.AGAINST[check]}"
    console.print(f"{words.SCOPES[scope]}: {words.AGAINST[headline]}{checked}")
    table = Table(box=SIMPLE, padding=0, show_edge=False)
    table.add_column("", min_width=15)
    for name in heads:
        table.add_column(heads[name], justify="right", no_wrap=True)
    for model in metrics.data["models"]:
        texts = []
        for name in heads:
            cell, unit = metrics.cell(scope, model, name), BY_NAME[name].unit
            shown = show.interval(cell, unit) if name in with_interval and model in metrics.policies else ""
            texts.append(f"{show.number(cell.value, unit)} {shown}".strip().replace("[", "\\["))
        table.add_row(DISPLAY[model], *texts)
    console.print(table)
    if curve := terminal_curve(run, rollout_policies(metrics.policies)):
        console.print(Text.from_ansi(curve))
    for sentence in words.lead(metrics, scope)[:-1]:
        console.print(sentence)


def terminal_curve(run: RunFolder, policies: Sequence[str]) -> str | None:
    """Relevance of the rollouts over the updates, drawn in characters: the true one where the log knows it, else by the
    token reward model. Without a terminal's colours each policy has a letter."""
    rows = {model: found for model in policies if (found := rl_rows(run, model))}
    name = "known_words" if all("known_words" in found[0] for found in rows.values()) else "token_relevance"
    if not rows or any(len(found) < CURVE_WINDOW for found in rows.values()):
        return None
    smooth = np.full(CURVE_WINDOW, 1 / CURVE_WINDOW)
    ys = [100 * np.convolve(column(found, name), smooth, mode="valid") for found in rows.values()]
    what = "Truly relevant words, %" if name == "known_words" else "Relevance by the token reward model, %"
    lines = uniplot.plot_to_string(
        xs=[np.arange(CURVE_WINDOW, CURVE_WINDOW + len(y)) for y in ys],
        ys=ys,
        lines=True,
        width=64,
        height=10,
        title=f"{what}, of rollouts (mean of {CURVE_WINDOW} updates)",
        legend_labels=[DISPLAY[model] for model in rows],
        color=console.is_terminal,
        character_set="block" if console.is_terminal else "ascii",
        force_ascii_characters=[DISPLAY[model][0] if model != "ppo_sum" else "S" for model in rows],
    )
    return "\n".join(lines) if isinstance(lines, list) else lines


def headline_chart(metrics: Metrics, scope: str) -> Markup | None:
    headline = metrics.data["headline"]
    cells = [(model, metrics.cell(scope, model, headline)) for model in metrics.data["models"]]
    intervals = [
        Interval(model, DISPLAY[model], cell.value, cell.low, cell.high)
        for model, cell in cells
        if cell.value is not None
    ]
    return interval_chart(intervals, f"Answers {words.AGAINST[headline]}, % (95% interval)")


def difference_chart(metrics: Metrics, scope: str) -> Markup | None:
    intervals = []
    for model, than in metrics.pairs(scope):
        cell = metrics.difference(scope, model, than, metrics.data["headline"])
        if cell.value is not None:
            label = f"{DISPLAY[model]} minus {DISPLAY[than]}"
            intervals.append(Interval(model, label, cell.value, cell.low, cell.high))
    return interval_chart(intervals, "Difference of that share, points (95% interval)", zero=True)


def scope_tables(metrics: Metrics, scope: str) -> dict[str, Any]:
    """Everything the template shows of one evaluation set."""
    count = metrics.cell(scope, "sft", metrics.data["headline"])
    return {
        "name": scope,
        "label": words.SCOPES[scope],
        "examples": count.examples,
        "users": count.users,
        "relevance": table(metrics, scope, _headline_first(metrics)),
        "second": table(metrics, scope, SECOND) if metrics.data.get("second_judge") else None,
        "known": table(metrics, scope, KNOWN) if metrics.knows_truth else None,
        "truth": table(metrics, scope, TRUTH),
        "form": table(metrics, scope, FORM[:4]),
        "variety": table(metrics, scope, (*FORM[4:], *CORPUS)),
        "differences": differences(metrics, scope),
        "wins": [
            {**row, "title": f"{DISPLAY[row['model']]} against {DISPLAY[row['than']]}",
             "net_value": show.signed_number(row["net"]["value"], "rate"),
             "net_interval": show.interval(stats.estimate(row["net"]), "rate", signed=True),
             "against": {"targets": "next queries", "history": "history"}[row["rubric"]],
             "votes": words.votes_note(row) if row["by"] == "vote" else None}
            for row in words.shown_wins(metrics, scope)
        ],
    }  # fmt: skip


def _headline_first(metrics: Metrics) -> list[Metric]:
    rubric = metrics.data["headline"].removeprefix("relevant_")
    return sorted(RELEVANCE, key=lambda metric: not metric.name.endswith(rubric))


def table(metrics: Metrics, scope: str, group: Sequence[Metric]) -> dict[str, Any]:
    """Heads and rows of a table: (label, value, interval) cells."""
    rows = []
    for model in metrics.data["models"]:
        cells = []
        for metric in group:
            cell = metrics.cell(scope, model, metric.name)
            cells.append((show.number(cell.value, metric.unit), show.interval(cell, metric.unit)))
        rows.append({"model": model, "label": DISPLAY[model], "cells": cells})
    heads = [(metric.label + (", %" if metric.unit == "rate" else ""), metric.doc) for metric in group]
    return {"heads": heads, "rows": rows}


def differences(metrics: Metrics, scope: str) -> dict[str, Any]:
    names = (
        metrics.data["headline"],
        metrics.data["check"],
        "hit",
        "token_f1",
        "copied_words",
        "queries_written",
    )
    rows = []
    for model, than in [*metrics.pairs(scope), *metrics.baseline_pairs(scope)]:
        cells = []
        for name in names:
            cell, metric = metrics.difference(scope, model, than, name), BY_NAME[name]
            outcome = verdict(cell, metric.better)
            value = show.signed_number(cell.value, metric.unit)
            said = words.SHORT.get(outcome, "")
            cells.append((value, show.interval(cell, metric.unit, signed=True), said, words.TONES[outcome]))
        rows.append({"model": model, "label": f"{DISPLAY[model]} minus {DISPLAY[than]}", "cells": cells})
    heads = [BY_NAME[name].label + (", points" if BY_NAME[name].unit == "rate" else "") for name in names]
    return {"heads": heads, "rows": rows}


def samples(recipe: Recipe, run: RunFolder, rows: Sequence[dict[str, Any]], metrics: Metrics) -> list[dict[str, Any]]:
    """A seeded draw of examples (never picked by result) with every model's answer and the judge's marks.

    Args:
        run: holds the prepare stage with the examples.
        rows: of generations.parquet; each model answered an example once.
    """
    rubric = metrics.data["headline"].removeprefix("relevant_")
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        answers.setdefault(row["example_id"], {})[row["model"]] = row
    wanted = draw(list(answers), SAMPLES, recipe.seed, "report samples")
    examples = {e.example_id: e for e in load_examples(run.require("prepare")) if e.example_id in set(wanted)}
    shown = []
    for example_id in wanted:
        by_model = answers[example_id]
        columns = [
            {
                "model": m,
                "label": DISPLAY[m],
                "problem": by_model[m]["problem"],
                "lines": _marked(by_model[m], rubric),
            }
            for m in metrics.policies
            if m in by_model
        ]
        shown.append(
            {
                "history": examples[example_id].history,
                "targets": examples[example_id].targets,
                "columns": columns,
            }
        )
    return shown


def _marked(row: dict[str, Any], rubric: str) -> list[list[tuple[str, int]]]:
    """Queries as lists of (word, label); label 0 when the judge abstained."""
    labels = row[f"word_labels_{rubric}"] or [0] * len(row["words"])
    lines: list[list[tuple[str, int]]] = [[] for _ in row["queries"]]
    for word, query, label in zip(row["words"], row["word_query"], labels, strict=True):
        lines[query].append((word, label))
    return lines


def token_samples(runs: Mapping[str, RunFolder]) -> list[dict[str, Any]]:
    """Responses of the last rollout of each algorithm, tokens with their rewards (shade: size, 0 to 1).

    Args:
        runs: where each model was trained.
    """
    shown = []
    for model, run in runs.items():
        rows = read_jsonl(run.path(rl_stage(model)) / "samples.jsonl") if model != "sft" else []
        last = [row for row in rows if row["update"] == rows[-1]["update"]][:TOKEN_SAMPLES]
        responses = [
            {"reward": row["reward"], "tokens": tokens} for row, tokens in zip(last, shown_tokens(last), strict=True)
        ]
        if responses:
            shown.append({"model": model, "label": DISPLAY[model], "update": last[0]["update"], "responses": responses})
    return shown


def costs(recipe: Recipe, run: RunFolder) -> list[dict[str, Any]]:
    """Seconds and peak memory of each finished stage."""
    found = [(stage, run.manifest(stage)) for stage in all_stages(recipe) if stage != "report"]
    return [
        {"stage": stage, "seconds": manifest["seconds"], "memory": manifest["peak_memory_mib"]}
        for stage, manifest in found
        if manifest is not None
    ]


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Facts of a manifest as (dotted name, text) rows; floats to 4 digits."""
    if isinstance(value, dict):
        return [pair for key, child in value.items() for pair in flatten(child, f"{prefix}{key}.")]
    if isinstance(value, float):
        return [(prefix.rstrip("."), f"{value:.4g}")]
    return [(prefix.rstrip("."), show.NOT_MEASURED if value is None else str(value))]


def _last(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    return rows[-1].get(name) if rows else None


# Token level in TPPO's colour, its rival in PPO's, as in the curves of the reward models.
COLOURS = {"token": "tppo", "sentence": "ppo"}


def reward_check_section(run: RunFolder) -> dict[str, Any]:
    """What the template shows of the gate.

    Raises:
        UserError: the stage is not finished, or check.json is damaged.
    """
    path = run.require("check_reward") / "check.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give `--redo check_reward` to make it anew") from None
    return {
        "passed": report["passed"],
        "verdicts": gate.verdict_lines(report),
        "cautions": gate.caution_lines(report),
        "data": gate.data_line(report),
        "tables": [table(report) for table in (gate.requirement_table, gate.aside_table, gate.probe_table)],
        "chart": interval_chart(_intervals(report), "Mean score of a response, % (95% interval)"),
        "note": gate.NOTE,
    }


def _intervals(report: dict[str, Any]) -> list[Interval]:
    found = [(model, probe, report["models"][model]["probes"][probe]) for probe in PROBES for model in gate.TITLES]
    return [
        Interval(COLOURS[model], f"{PROBES[probe]} ({model})", cell["value"], cell["low"], cell["high"])
        for model, probe, cell in found
        if cell["value"] is not None
    ]
