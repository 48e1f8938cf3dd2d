"""What a point of the headline costs: seconds of training and labelled responses, from the manifests.

A model's cost over SFT is everything the run made for it and not for SFT: its own stage and the stages that stage
reads (`tppo.run.stage_inputs`), without those that SFT itself needs. Stages shared by several models count in full
for each of them: it is the price of having that model alone. The gain is the headline's difference from SFT.

Labels are rows of the label stage (a response under one rubric). Manifests hold a stage's last attempt: a stage
resumed after a kill is cheaper on paper than it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tppo.config import Recipe
from tppo.evaluate.compare import DISPLAY
from tppo.evaluate.present import NOT_MEASURED, Metrics, number
from tppo.evaluate.stats import Estimate, IntervalEstimate
from tppo.run import RunFolder, rl_stage, stage_inputs


@dataclass(frozen=True)
class Cost:
    """What a model cost over SFT, and what it gained."""

    model: str
    seconds: float | None
    """Of training; None when a manifest is missing."""
    labels: int | None
    gain: Estimate
    """Headline minus SFT's, a share."""
    seconds_per_answer: float | None
    """Answering the evaluation set, loading included; None when the evaluation was resumed."""

    @property
    def seconds_per_point(self) -> IntervalEstimate | None:
        return per_point(self.seconds, self.gain)

    @property
    def labels_per_point(self) -> IntervalEstimate | None:
        return per_point(self.labels, self.gain)


def per_point(cost: float | None, gain: Estimate) -> IntervalEstimate | None:
    """Cost of a percentage point; None unless the gain's whole interval is above 0 (else there may be no gain).

    The cost is a fixed number, so the ends of the gain's interval give those of the quotient.
    """
    if cost is None or gain.value is None or gain.low is None or gain.high is None or gain.low <= 0:
        return None
    return IntervalEstimate(cost / (100 * gain.value), cost / (100 * gain.high), cost / (100 * gain.low))


def closure(stage: str, recipe: Recipe) -> set[str]:
    """A stage and all that it reads, directly or not."""
    return {stage}.union(*(closure(name, recipe) for name in stage_inputs(stage, recipe)))


def model_costs(recipe: Recipe, run: RunFolder, metrics: Metrics, scope: str) -> list[Cost]:
    """Every tuned policy, and best_of_n (reward models, no tuning), against SFT."""
    facts = (run.manifest("evaluate") or {}).get("facts", {})
    count = sum(facts.get("examples", {}).values())
    answering = facts.get("seconds_answering", {})
    costs = []
    for model in [
        name for name in metrics.data["models"] if name in (*metrics.policies, "best_of_n") and name != "sft"
    ]:
        last = "reward" if model == "best_of_n" else rl_stage(model)
        stages = closure(last, recipe) - closure("sft", recipe)
        manifests: dict[str, dict[str, Any] | None] = {stage: run.manifest(stage) for stage in stages}
        known = [manifest for manifest in manifests.values() if manifest is not None]
        label = manifests.get("label")
        labels: int | None = 0
        if "label" in stages:
            labels = label["facts"].get("labels") if label else None
        costs.append(
            Cost(
                model,
                sum(manifest["seconds"] for manifest in known) if len(known) == len(stages) else None,
                labels,
                gain_over_sft(metrics, scope, model),
                answering[model] / count if count and model in answering else None,
            )
        )
    return costs


def gain_over_sft(metrics: Metrics, scope: str, model: str) -> Estimate:
    """The headline minus SFT's. Baselines are on the other side of their pair with SFT."""
    headline = metrics.data["headline"]
    if model in metrics.policies:
        return metrics.difference(scope, model, "sft", headline)
    loss = metrics.difference(scope, "sft", model, headline)
    value, low, high = (None if end is None else -end for end in (loss.value, loss.high, loss.low))
    return Estimate(value, low, high, loss.examples, loss.users)


def cost_rows(costs: list[Cost]) -> list[dict[str, str]]:
    """The costs in words, for the report's tables."""
    return [
        {
            "model": cost.model,
            "label": DISPLAY[cost.model],
            "minutes": NOT_MEASURED if cost.seconds is None else number(cost.seconds / 60),
            "labels": NOT_MEASURED if cost.labels is None else str(cost.labels),
            "seconds_per_point": _said(cost.seconds_per_point),
            "labels_per_point": _said(cost.labels_per_point),
            "seconds_per_answer": number(cost.seconds_per_answer),
        }
        for cost in costs
    ]


def _said(estimate: IntervalEstimate | None) -> str:
    if estimate is None:
        return "no gain shown"
    return f"{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"


def cost_markdown(costs: list[Cost]) -> str:
    """The cost table of summary.md."""
    lines = ["## Cost of a point of the headline over SFT", ""]
    lines += ["| | training minutes | labels | seconds a point | labels a point | seconds an answer |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in cost_rows(costs):
        cells = ("minutes", "labels", "seconds_per_point", "labels_per_point", "seconds_per_answer")
        lines.append(f"| {row['label']} | {' | '.join(row[cell] for cell in cells)} |")
    return "\n".join([*lines, ""])
