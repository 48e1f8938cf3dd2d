"""check.json in words: the verdict and the tables of the console, of check_reward/README.md and of the run's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from tppo.evaluate.present import NOT_MEASURED, interval, number
from tppo.evaluate.stats import IntervalEstimate
from tppo.judge.probes import PROBES
from tppo.progress import console
from tppo.reward.gate import LABELS, TITLES

MODELS = tuple(TITLES)
TONES = {"passed": "good", "failed": "bad", "cannot be told": "bad", "not required": "none"}
ASIDE = {
    "weighted_auc": "weighted AUC, three classes",
    "token_f1": "F1 of words",
    "sentence_f1": "F1 of responses",
}
LENGTHS = {
    "reward": "reward",
    "labels": "the judge's labels",
    "sum": "summed reward (`base_rate`)",
}
NOTE = (
    "AUC: chance that a relevant word (or response) scores above an irrelevant one. Real above ...: share of examples "
    "in which the user's real next queries score higher for the same history, a tie (within 0.05) counted half. "
    "Brackets: 95%, bootstrap over users. The checkpoint was chosen by AUC on these held-out responses, so the AUCs "
    "lean a little to the good side."
)


@dataclass(frozen=True)
class Cell:
    """A number of one reward model as shown; empty where the model has none."""

    text: str = ""
    detail: str = ""
    status: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table: what is measured, what is asked of it, and a cell per model of `MODELS`."""

    label: str
    asked: str
    cells: list[Cell]


def check_rows(report: dict[str, Any]) -> list[Row]:
    """The requirements with the models' standing."""
    by_name: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in LABELS}
    for model in MODELS:
        for check in report["models"][model]["checks"]:
            by_name[check["name"]][model] = check
    rows = []
    for checks in by_name.values():
        one = next(iter(checks.values()))
        sign = "≥" if one["setting"].startswith("min_") else "≤"
        asked = "-" if one["status"] == "not required" else f"{sign} {one['limit']:g}"
        cells = [_check_cell(checks[model]) if model in checks else Cell() for model in MODELS]
        rows.append(Row(one["label"], asked, cells))
    return rows


def _check_cell(check: dict[str, Any]) -> Cell:
    shown = interval(IntervalEstimate(check["value"], check["low"], check["high"]))
    return Cell(_digits(check["value"]), shown, check["status"])


def aside_rows(report: dict[str, Any]) -> list[Row]:
    """Numbers nothing is required of."""
    found = report["models"]
    rows = [Row(label, "", [_cell(found[model]["metrics"], name) for model in MODELS]) for name, label in ASIDE.items()]
    rows += [
        Row(f"rank correlation with length: {label}", "", [_cell(found[model]["length"], name) for model in MODELS])
        for name, label in LENGTHS.items()
    ]
    return rows


def _cell(values: dict[str, float | None], name: str) -> Cell:
    return Cell(_digits(values[name])) if name in values else Cell()


def probe_rows(report: dict[str, Any]) -> list[Row]:
    """Mean score of each probe."""
    rows = []
    for probe, label in PROBES.items():
        cells = []
        for model in MODELS:
            estimate = report["models"][model]["probes"][probe]
            shown = interval(IntervalEstimate(estimate["value"], estimate["low"], estimate["high"]))
            cells.append(Cell(number(estimate["value"]), shown))
        rows.append(Row(label, "", cells))
    return rows


def verdict_lines(report: dict[str, Any]) -> list[str]:
    """One sentence per model, with the reasons of a failure."""
    lines = []
    for model in MODELS:
        why = report["models"][model]["reasons"]
        lines.append(f"The {TITLES[model]} {'failed: ' + '; '.join(why) if why else 'passed'}.")
    return lines


def caution_lines(report: dict[str, Any]) -> list[str]:
    return [
        f"{TITLES[model].capitalize()}: {caution}."
        for model in MODELS
        for caution in report["models"][model]["cautions"]
    ]


def data_line(report: dict[str, Any]) -> str:
    counts = report["counts"]
    return (
        f"Users held out from reward training; rubric `{report['rubric']}`, judge {report['judge']}. "
        f"{counts['responses']} judged responses ({counts['responses_relevant']} relevant) with {counts['words']} "
        f"words ({counts['words_relevant']} relevant), {counts['abstained']} abstentions left out; "
        f"{counts['examples_probed']} examples of {counts['users_probed']} users probed."
    )


def to_markdown(report: dict[str, Any]) -> str:
    """The check as a page of numbers, without any text of the log."""
    lines = ["# Do the reward models know their job?", "", *[f"- {line}" for line in verdict_lines(report)], ""]
    lines += [data_line(report), ""]
    if found := caution_lines(report):
        lines += ["Cautions:", *[f"- {line}" for line in found], ""]
    lines += [*_table("Requirements", check_rows(report)), *_table("Other numbers", aside_rows(report))]
    lines += [*_table("Mean score of a response", probe_rows(report)), NOTE, ""]
    return "\n".join(lines)


def _table(title: str, rows: list[Row]) -> list[str]:
    lines = [f"## {title}", "", "| | asked | token level | sentence level |", "|---|---|---|---|"]
    for row in rows:
        cells = []
        for cell in row.cells:
            said = f", {cell.status}" if cell.status not in ("", "not required") else ""
            cells.append(f"{cell.text} {cell.detail}".strip() + said)
        lines.append(f"| {row.label} | {row.asked} | {' | '.join(cells)} |")
    return [*lines, ""]


def print_check(report: dict[str, Any]) -> None:
    """The requirements and the verdict on the console."""
    table = Table(title="Do the reward models know their job?", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for head in ("", "asked", "token level", "sentence level"):
        table.add_column(head, justify="left" if not head else "right")
    colours = {"good": "green", "bad": "red", "none": ""}
    for row in check_rows(report):
        shown = []
        for cell in row.cells:
            colour = colours[TONES.get(cell.status, "none")]
            said = cell.status if cell.status in ("failed", "cannot be told") else ""
            text = f"{cell.text} {said}".strip()
            shown.append(f"[{colour}]{text}[/]" if colour else text)
        table.add_row(row.label, row.asked, *shown)
    console.print(table)
    for line in (*verdict_lines(report), *caution_lines(report)):
        console.print(line, markup=False)


def _digits(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.3f}"
