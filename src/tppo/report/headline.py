"""The headline in words: what it is a share of, what it is, what stands beside it, and what SFT had seen of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tppo.core.show import NOT_MEASURED, interval, number, signed_number
from tppo.core.stages import DISPLAY
from tppo.core.stats import estimate
from tppo.evaluate.compare import Metrics
from tppo.evaluate.metrics import BY_NAME, Metric

RELEVANT_TO = {"targets": "what the user really searched next", "history": "the history"}
AGAINST = {
    f"{kind}_{rubric}": text.format(against)
    for kind, text in (
        ("asked_words", "words relevant to {}, of the queries asked for"),
        ("asked_relevant", "answers relevant to {}, times the share of the queries asked for"),
        ("relevant", "answers relevant to {}, as the paper counts (writing less is free)"),
    )
    for rubric, against in RELEVANT_TO.items()
}
"""Shares of what, in words."""
NOT_ASKED = (
    "The headline is the paper's count, by which a missing query costs nothing: these answers were read before the "
    "measures that count all that was asked for (asked_words_targets and the like), which are not measured here. "
    "`--redo report` works them out from the verdicts that there are."
)
"""Of what an older version evaluated."""


def shares(metrics: Metrics, scope: str) -> list[str]:
    """The headline itself, and in a second sentence what stands beside it; both of every policy."""

    def said(metric: Metric) -> str:
        found = [(DISPLAY[name], metrics.cell(scope, name, metric.name)) for name in metrics.policies[::-1]]
        percent = "%" if metric.unit == "rate" else ""
        values = [(name, cell, number(cell.value, metric.unit)) for name, cell in found]
        texts = [value if value == NOT_MEASURED else f"{value}{percent}" for _, _, value in values]
        spans = [interval(cell, metric.unit) if metric.name == metrics.headline else "" for _, cell, _ in values]
        return ", ".join(f"{name} {t} {s}".strip() for (name, _, _), t, s in zip(values, texts, spans, strict=True))

    first = AGAINST[metrics.headline]
    beside = "; ".join(f"{metric.label.lower()}: {said(metric)}" for metric in metrics.beside)
    return [f"{first[0].upper()}{first[1:]}: {said(BY_NAME[metrics.headline])}.", f"Beside the headline: {beside}."]


def seen_gap(label_facts: Mapping[str, Any], rubric: str) -> str:
    """How much better SFT answers what it was trained on (`tppo.judge.gap`), and whether labels and prompts are of it.

    Args:
        label_facts: of the label stage.
    """
    found = label_facts.get("seen_gap", {"disjoint": False, "measures": {}})
    said = []
    for name, what in ((f"relevant_{rubric}", AGAINST[f"asked_words_{rubric}"]), ("overlap", BY_NAME["overlap"].doc)):
        if row := found["measures"].get(name):
            gap = estimate(row)
            points = f"{signed_number(gap.value, 'rate')} points {interval(gap, 'rate', signed=True)}".strip()
            said.append(f"{what}: {points} ({row['examples']} and {row['unseen_examples']} answers)")
    first = "On examples that SFT was trained on, minus people it never saw: " + "; ".join(said)
    if not said:
        first = "How much better SFT answers what it was trained on was not measured (sample.seen_examples)"
    if found["disjoint"]:
        return f"{first}. Labels and the prompts of RL are of people it never saw."
    return f"{first}. Labels and the prompts of RL are of users that SFT was trained on (parts.disjoint: false)."
