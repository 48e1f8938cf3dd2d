"""The report stage: one self-contained HTML page, and the tables alone as Markdown.

report.html holds rows of the log (samples) and stays with the run; summary.md holds numbers only. Texts of the log are
untrusted: the template escapes everything except our own charts, and the page runs no script at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import uniplot
import yaml
from markupsafe import Markup
from rich.text import Text

from tppo.core.common import UserError, console, draw
from tppo.core.config import Recipe
from tppo.core.files import read_jsonl, write_json
from tppo.core.run import RunFolder
from tppo.core.show import NOT_MEASURED, Cell, Table, interval, number
from tppo.core.stages import DISPLAY, all_stages, read_stages, rl_stage
from tppo.core.stats import IntervalEstimate
from tppo.core.tables import load_examples, read_table
from tppo.evaluate.answers import ANSWERS, Row, records
from tppo.evaluate.compare import Metrics, build_metrics, cost_table, model_costs
from tppo.evaluate.metrics import BY_NAME
from tppo.evaluate.readings import READINGS, with_asked
from tppo.judge.probes import PROBES
from tppo.report import words
from tppo.report.charts import (
    PAGE,
    REWARD_MODELS,
    Interval,
    interval_chart,
    reward_charts,
    rollout_policies,
    run_charts,
)
from tppo.report.headline import NOT_ASKED, RELEVANT_TO, seen_gap, shares
from tppo.reward import gate
from tppo.rl.loop import shown_tokens

CURVE_WINDOW = 10
"""Updates averaged in the terminal's curve: one rollout is a small sample."""
SAMPLES = 12
TOKEN_SAMPLES = 4
COST_NOTE = (
    "Everything made for a model and not for SFT: its own training and the stages that reads. “No gain shown”: the "
    "interval of the gain holds 0, so there may be nothing to pay for."
)


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Write report.html, summary.md, and metrics.json of everybody who read the answers."""
    answers, readings = load_run(recipe, run)
    metrics = run_metrics(recipe, run, answers, readings)
    write_json(folder / "metrics.json", metrics.data)
    scope, manifest = metrics.scopes[0], run.manifest("evaluate") or {}
    curves = {model: rl_rows(run, model) for model in rollout_policies(metrics.policies)}
    final_kl = {model: rows[-1].get("kl") if rows else None for model, rows in curves.items()}
    spent, point_costs = costs(recipe, run), cost_table(model_costs(recipe, run, metrics, scope), COST_NOTE)
    distance = words.distance_tables(metrics)
    gap = seen_gap(run.facts("label"), metrics.rubric)
    context = {
        **page_context(recipe, metrics, manifest),
        "distance": distance,
        "lead": words.lead(metrics, scope),
        "cautions": [*words.cautions(metrics, scope, final_kl), gap],
        "charts": run_charts(run, metrics.policies),
        "reward_charts": reward_charts(run),
        "reward_check": reward_check_section(run),
        **answers_shown(dict.fromkeys(metrics.policies, run), answers, readings, metrics, recipe.seed),
        "facts": [
            (stage, flatten((run.manifest(stage) or {}).get("facts", {}))) for stage in ("prepare", "label", "reward")
        ],
        "costs": spent_table(spent),
        "point_costs": point_costs,
    }
    (folder / "report.html").write_text(render(context), encoding="utf-8")
    counted = metrics.cell(scope, "sft", metrics.headline)
    facts = [
        ("examples", str(counted.examples)),
        ("users", str(counted.users)),
        *judge_facts(metrics),
        ("seed", f"{recipe.seed}" + (f", shared stages {recipe.data_seed}" if recipe.data_seed != recipe.seed else "")),
        words.intervals_fact(metrics),
        ("seen and unseen", gap),
    ]
    reward_facts = run.facts("reward")
    training = words.training_tables(
        spent,
        {kind: reward_facts[kind]["best"] for kind in ("token", "sentence") if kind in reward_facts},
        curves,
        rl_rows(run, "dpo") if "dpo" in metrics.policies else [],
    )
    tables = (*distance, *training, point_costs)
    parts = [words.summary_markdown(metrics, facts), *(table.markdown() for table in tables)]
    (folder / "summary.md").write_text("\n".join(parts), encoding="utf-8")
    return {"verdict": context["lead"], "cautions": context["cautions"]}


def load_run(recipe: Recipe, run: RunFolder) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The answers of a run, and what everybody read in them; an older version's with the measures of today."""
    folders = [run.require(stage) for stage in ("evaluate", *read_stages(recipe))]
    readings = [read_table(folder / "readings.parquet", READINGS).to_pandas() for folder in folders]
    answers = read_table(folders[0] / "answers.parquet", ANSWERS).to_pandas()
    everything, count = pd.concat(readings, ignore_index=True), recipe.task.num_queries
    return answers, with_asked(answers, everything, run.require("prepare"), count)


def run_metrics(recipe: Recipe, run: RunFolder, answers: pd.DataFrame, readings: pd.DataFrame) -> Metrics:
    """metrics.json of everybody who read the answers."""
    own = load_metrics(run.require("evaluate")).data
    data = build_metrics(answers, readings, judge=own["judge"], rubric=recipe.reward.rubric)
    return Metrics({**data, "judge_labelled_training": own["judge_labelled_training"]})


def page_context(recipe: Recipe, metrics: Metrics, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the page of a run and that of a study show alike.

    Args:
        manifest: of an evaluate stage.
    """
    scope = metrics.scopes[0]
    counts = {name: metrics.cell(name, "sft", metrics.headline) for name in metrics.scopes}
    distinct = metrics.data.get("distinct_examples", {})
    return {
        "verdicts": words.verdicts(metrics, scope),
        "together": words.together(metrics, scope),
        "distance": [],
        "chart_headline": headline_chart(metrics, scope),
        "chart_differences": difference_chart(metrics, scope),
        "scopes": [
            {
                **words.scope_tables(metrics, name),
                "wins": words.wins_table(metrics, name, bars=True),
                "label": words.SCOPES[name],
                "examples": distinct.get(name, count.examples),  # each once, whatever the number of seeds
                "users": count.users,
            }
            for name, count in counts.items()
        ],
        "against": {name: words.AGAINST[metrics.data[name]] for name in ("headline", "check")}
        | {"rubric": RELEVANT_TO[metrics.rubric]},
        "metrics": metrics,
        "manifest": manifest,
        "recipe": recipe,
        "recipe_yaml": yaml.safe_dump(asdict(recipe), sort_keys=False),
        "run_name": Path(recipe.run_dir).name,
        "docs": {metric.label: metric.doc for metric in BY_NAME.values()},
    }


def judge_facts(metrics: Metrics) -> list[tuple[str, str]]:
    """Who judged, for the head of a summary."""
    return [("judge", metrics.data["judge"]), *(("second judge", name) for name in metrics.second_judges)]


def render(context: dict[str, Any], template: Path = PAGE) -> str:
    """The page; another template may extend report.html."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, PAGE.parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(context)


def load_metrics(folder: Path) -> Metrics:
    """metrics.json of a finished evaluate or report stage."""
    return Metrics(_load_json(folder, "metrics.json"))


def _load_json(folder: Path, name: str) -> Any:
    """A file of a finished stage; a damaged one is named."""
    path = folder / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give `--redo {folder.name}` to make it anew") from None


def print_summary(run: RunFolder) -> None:
    """The headline of a finished run on the console: a table, the curve of RL, and what the intervals allow to say."""
    metrics = load_metrics(run.require("report"))
    scope, headline, check = metrics.scopes[0], metrics.headline, metrics.data["check"]
    heads = {headline: "relevant %", check: "check %", "hit": "hit %", "copied_queries": "copied %"}
    with_interval = [headline]
    if metrics.knows_truth:
        heads = {headline: "judged %", metrics.true_words: "true words %", "known_queries": "true queries %"}
        with_interval.append(metrics.true_words)
    heads["unparseable"] = "unparseable %"
    checked = "" if metrics.knows_truth else f"; check: {words.AGAINST[check]}"
    console.print(f"{words.SCOPES[scope]}: {words.AGAINST[headline]}{checked}")
    rows: list[list[Cell | str]] = []
    for model in metrics.data["models"]:
        cells: list[Cell | str] = [DISPLAY[model]]
        for name in heads:
            cell, unit = metrics.cell(scope, model, name), BY_NAME[name].unit
            shown = interval(cell, unit) if name in with_interval and model in metrics.policies else ""
            cells.append(f"{number(cell.value, unit)} {shown}".strip())
        rows.append(cells)
    Table(["", *heads.values()], rows).print()
    if curve := terminal_curve(run, rollout_policies(metrics.policies)):
        console.print(Text.from_ansi(curve))
    for sentence in words.lead(metrics, scope):
        if sentence != shares(metrics, scope)[0]:  # that is the table
            console.print(sentence)
    if not metrics.counts_asked:
        console.print(NOT_ASKED)


def rl_rows(run: RunFolder, model: str) -> list[dict[str, Any]]:
    return read_jsonl(run.path(rl_stage(model)) / "metrics.jsonl")


def terminal_curve(run: RunFolder, policies: Sequence[str]) -> str | None:
    """Relevance of the rollouts over the updates, drawn in characters: the true one where the log knows it, else by the
    token reward model. Without a terminal's colours each policy has a letter."""
    rows = {model: found for model in policies if (found := rl_rows(run, model))}
    name = "known_words" if all("known_words" in found[0] for found in rows.values()) else "token_relevance"
    if not rows or any(len(found) < CURVE_WINDOW for found in rows.values()):
        return None
    smooth = np.full(CURVE_WINDOW, 1 / CURVE_WINDOW)
    ys = [100 * np.convolve([row.get(name) for row in found], smooth, mode="valid") for found in rows.values()]
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
    """The headline of everybody who answered."""
    models = metrics.data["models"]
    intervals = [Interval(name, DISPLAY[name], metrics.cell(scope, name, metrics.headline)) for name in models]
    said = words.AGAINST[metrics.headline]
    return interval_chart(intervals, f"{said[0].upper()}{said[1:]}, % (95% interval)")


def difference_chart(metrics: Metrics, scope: str) -> Markup | None:
    """The headline's difference of every two policies."""
    intervals = [
        Interval(pair[0], words.display(pair), metrics.difference(scope, *pair, metrics.headline))
        for pair in metrics.pairs(scope)
    ]
    return interval_chart(intervals, "Difference of that share, points (95% intervals, together)", zero=True)


def answers_shown(
    runs: Mapping[str, RunFolder], answers: pd.DataFrame, readings: pd.DataFrame, metrics: Metrics, seed: int
) -> dict[str, Any]:
    """Texts of the log: answers beside each other, and tokens by reward.

    Args:
        runs: where each policy was trained; SFT's has the examples.
        answers: rows of answers.parquet; each model answered an example once.
        readings: what the first judge says of them.
    """
    return {
        "samples": samples(runs["sft"].require("prepare"), answers, readings, metrics, seed),
        "token_samples": token_samples(runs),
    }


def samples(
    prepare: Path, answers: pd.DataFrame, readings: pd.DataFrame, metrics: Metrics, seed: int
) -> list[dict[str, Any]]:
    """A seeded draw of examples (never picked by result) with every policy's answer and the words that the first judge
    calls relevant under the headline's rubric."""
    marks = readings[(readings["measure"] == f"words_{metrics.rubric}") & (readings["reader"] == metrics.data["judge"])]
    labels = marks.set_index(["example_id", "model"])["labels"].to_dict()
    rows = {(row["example_id"], row["model"]): row for row in records(answers)}
    wanted = draw(list(dict.fromkeys(example_id for example_id, _ in rows)), SAMPLES, seed, "report samples")
    examples = {e.example_id: e for e in load_examples(prepare).with_ids(wanted)}
    shown = []
    for example_id in wanted:
        columns = [
            {
                "model": model,
                "label": DISPLAY[model],
                "problem": row["problem"],
                "lines": _marked(row, labels.get((example_id, model))),
            }
            for model in metrics.policies
            if (row := rows.get((example_id, model)))
        ]
        example = examples[example_id]
        shown.append({"history": example.history, "targets": example.targets, "columns": columns})
    return shown


def _marked(row: Row, labels: Sequence[int] | None) -> list[list[tuple[str, int]]]:
    """Queries as lists of (word, label); label 0 when the judge abstained."""
    labels = [0] * len(row["words"]) if labels is None else labels
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
    return [
        {"stage": stage, "seconds": manifest["seconds"], "memory": manifest["peak_memory_mib"]}
        for stage in all_stages(recipe)
        if stage != "report" and (manifest := run.manifest(stage))
    ]


def spent_table(costs: Sequence[dict[str, Any]]) -> Table:
    """The same as a table, with the sum."""
    seconds, memory = ([row[name] for row in costs] for name in ("seconds", "memory"))
    total = {"stage": "All", "seconds": sum(seconds), "memory": max(memory)}
    rows = [[row["stage"], f"{row['seconds'] / 60:.1f}", str(row["memory"])] for row in [*costs, total]]
    return Table(["Stage", "Minutes", "Peak memory, MiB"], rows)


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Facts of a manifest as (dotted name, text) rows; floats to 4 digits."""
    if isinstance(value, dict):
        return [pair for key, child in value.items() for pair in flatten(child, f"{prefix}{key}.")]
    if isinstance(value, float):
        return [(prefix.rstrip("."), f"{value:.4g}")]
    return [(prefix.rstrip("."), NOT_MEASURED if value is None else str(value))]


def reward_check_section(run: RunFolder) -> dict[str, Any]:
    """What the template shows of the gate.

    Raises:
        UserError: the stage is not finished, or check.json is damaged.
    """
    report = _load_json(run.require("check_reward"), "check.json")
    intervals = []
    for probe, title in PROBES.items():
        for kind, colour, _ in REWARD_MODELS:
            cell = report["models"][kind]["probes"][probe]
            found = IntervalEstimate(cell["value"], cell["low"], cell["high"])
            intervals.append(Interval(colour, f"{title} ({kind})", found))
    return {
        "passed": report["passed"],
        "verdicts": gate.verdict_lines(report),
        "cautions": gate.caution_lines(report),
        "data": gate.data_line(report),
        "tables": [table(report) for table in (gate.requirement_table, gate.aside_table, gate.probe_table)],
        "chart": interval_chart(intervals, "Mean score of a response, % (95% interval)"),
        "note": gate.NOTE,
    }
