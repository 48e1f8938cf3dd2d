"""The tables of a page of results, from the numbers that lie beside it.

    python benchmarks/published.py docs/results/demo.md                      # make the page's tables anew
    python benchmarks/published.py docs/results/demo.md \\
      --take demo-run=runs/demo/report/metrics.json demo-study=runs/study3/study/metrics.json

A table stands below a comment that says what it holds, up to the next empty line:

    <!-- table: {numbers: demo-run, scope: eval1, of: [sft, tppo], measures: [hit, token_f1]} -->

`of` names models, or pairs of models for a table of differences. `--take` copies what the page's tables need, and no
more, from metrics.json of a report or a study into docs/results/numbers/. CI compares (tests/test_docs.py).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from tppo.core.files import write_json
from tppo.core.show import Table, number, p_text, with_interval
from tppo.core.stages import DISPLAY
from tppo.core.stats import estimate
from tppo.evaluate.compare import Metrics
from tppo.evaluate.metrics import BY_NAME
from tppo.report import words

NUMBERS = Path(__file__).parents[1] / "docs/results/numbers"
FACTS = ("headline", "check", "judge", "second_judges", "models", "scopes", "seeds", "distinct_examples",
         "judge_labelled_training")  # fmt: skip
BLOCK = re.compile(r"(<!-- table: (\{.*?\}) -->\n)(.*?)(?=\n\n|\Z)", re.DOTALL)


def blocks(page: str) -> list[dict[str, Any]]:
    """What the comments of a page ask for."""
    return [yaml.safe_load(found[2]) for found in BLOCK.finditer(page)]


def made_anew(page: str) -> str:
    """The page with its tables made from the numbers beside it."""

    def table(found: re.Match[str]) -> str:
        asked = yaml.safe_load(found[2])
        metrics = Metrics(json.loads((NUMBERS / f"{asked['numbers']}.json").read_text(encoding="utf-8")))
        return found[1] + make_table(metrics, asked).markdown().strip("\n")

    return BLOCK.sub(table, page)


def make_table(metrics: Metrics, asked: dict[str, Any]) -> Table:
    """Numbers of models, or differences of pairs of them with corrected p-values."""
    scope, measures = asked["scope"], [BY_NAME[name] for name in asked["measures"]]
    rows = []
    for one in asked["of"]:
        if isinstance(one, str):
            found = [(metrics.cell(scope, one, metric.name), metric.unit) for metric in measures]
            rows.append([DISPLAY[one], *(with_interval(cell, unit) for cell, unit in found)])
            continue
        cells = []
        for metric in measures:
            row = metrics.difference_row(scope, *one, metric.name)
            p = p_text(row["p_corrected"])
            text = with_interval(estimate(row), metric.unit, signed=True)
            cells.append(
                f"{text}, p {p if p.startswith('<') else f'= {p}'}" if row["p_corrected"] is not None else text
            )
        rows.append([words.display(one), *cells])
    pairs = not isinstance(asked["of"][0], str)
    heads = [words.head(metric, "points" if pairs else "%") for metric in measures]
    return Table(["Difference" if pairs else "", *heads], rows)


def needed(metrics: dict[str, Any], asked: list[dict[str, Any]]) -> dict[str, Any]:
    """What the tables need of a metrics.json."""

    def wanted(row: dict[str, Any], name: Any) -> bool:
        return not row["reader"] and any(
            row["scope"] == one["scope"] and row["metric"] in one["measures"] and name in one["of"] for one in asked
        )

    return {
        **{name: metrics[name] for name in FACTS if name in metrics},
        "rows": [row for row in metrics["rows"] if wanted(row, row["model"])],
        "differences": [row for row in metrics["differences"] if wanted(row, [row["model"], row["than"]])],
        "wins": [],
        "abstained": [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--take", nargs="+", default=[], metavar="NAME=METRICS.JSON")
    arguments = parser.parse_args()
    page = arguments.page.read_text(encoding="utf-8")
    for taken in arguments.take:
        name, _, path = taken.partition("=")
        asked = [one for one in blocks(page) if one["numbers"] == name]
        metrics = json.loads(Path(path).read_text(encoding="utf-8"))
        NUMBERS.mkdir(exist_ok=True)
        write_json(NUMBERS / f"{name}.json", needed(metrics, asked))
        shown = Metrics(metrics).cell(metrics["scopes"][0], "sft", metrics["headline"])
        print(
            f"{name}: {shown.examples} answers of {shown.users} users, SFT {number(shown.value, 'rate')}% by headline"
        )
    arguments.page.write_text(made_anew(page), encoding="utf-8")


if __name__ == "__main__":
    main()
