"""A run whose labels come from a rule one can work out by hand, with responses that are hard on a sheet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tppo.core.config import Recipe
from tppo.core.run import RunFolder, run_stage
from tppo.core.tables import LABELS, load_examples, write_table
from tppo.judge.verdict import Verdict, WordVerdict, split_response, verdict_to_row

RESPONSES = [
    "=HYPERLINK(\"http://evil.example\",\"x\") +1\n-2 @SUM(A1)",
    "007 1/2 1e5 TRUE",
    "<img src=x onerror=alert(1)> </script><script>alert(2)</script>",
    'she said "hi, there" a,b;c',
    "the cat the cat\nthe",
    "[x] 'quoted' | pipe \\n",
    "שלום עולם\nnaïve café 東京",
    "",
    "one",
    "\t=tab  \n\n  spaced   out  ",
]  # fmt: skip


def rule(word: str, i: int) -> bool:
    """The judge of these tests: every third word is relevant, and words with an `a` are."""
    return i % 3 == 0 or "a" in word


def verdict_by(decide: Callable[[str, int], bool], response: str) -> Verdict:
    words = [decide(word.text, i) for i, word in enumerate(split_response(response).words)]
    return Verdict([WordVerdict(float(w), w) for w in words], 0.5, sum(words) * 2 > len(words), "ok", None)


def label_rows(
    recipe: Recipe, decide: Callable[[str, int], bool] = rule, name: str = "rule-v1"
) -> list[dict[str, Any]]:
    examples = load_examples(RunFolder(recipe).path("prepare"))
    return [
        verdict_to_row(
            example, 0, rubric, name, RESPONSES[n % len(RESPONSES)], verdict_by(decide, RESPONSES[n % len(RESPONSES)])
        )
        for rubric in ("targets", "history")
        for n, example in enumerate(examples)
    ]  # fmt: skip


def write_labels(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, rows, LABELS)
    return path


def labelled(recipe: Recipe) -> Recipe:
    """Adds the stages up to `label`; only what the sheet reads is in them."""

    def label(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
        write_labels(folder / "labels.parquet", label_rows(recipe))
        return {}

    for stage in ("sft", "sample"):
        run_stage(recipe, stage, lambda recipe, run, folder: {})
    run_stage(recipe, "label", label)
    return replace(recipe)


def fill(folder: Path, answer: Callable[[str, str, int | None], str], target: Path | None = None) -> Path:
    """What a person with a script does: write `answer(example_id, word or response, i)` into the column label."""
    key = json.loads((folder / "sheet.json").read_text(encoding="utf-8"))
    with (folder / "sheet.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    for row in rows[1:]:
        example_id = key["items"][int(row[0]) - 1]["example_id"]
        row[4] = answer(example_id, row[3][1:-1], int(row[2]) if row[1] == "word" else None)
    target = target or folder / "sheet.csv"
    with target.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return target
