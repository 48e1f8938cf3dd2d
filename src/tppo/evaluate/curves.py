"""Training curves of a run folder: RL algorithms, reward models, SFT. A missing file has no chart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tppo.evaluate.charts import Line, line_chart
from tppo.evaluate.compare import DISPLAY
from tppo.run import RunFolder, read_jsonl, rl_stage

RL_CHARTS = (
    ("known_words", "Truly relevant words (synthetic log)"),
    ("known_queries", "Truly relevant queries (synthetic log)"),
    ("sentence_reward_mean", "Relevance by the sentence reward model"),
    ("token_relevance", "Relevance by the token reward model"),
    ("kl", "KL from SFT, nats per response"),
    ("response_length", "Response length, tokens"),
    ("queries", "Queries per response"),
    ("unparseable", "Unparseable share"),
    ("entropy", "Entropy, nats per token"),
    ("policy_loss", "Policy loss"),
    ("value_loss", "Value loss"),
    ("clip_fraction", "Clipped share of tokens"),
)
DPO_CHARTS = (
    ("loss", "DPO loss, nats per pair"),
    ("reward_margin", "Reward margin, nats times beta"),
    ("reward_accuracy", "Share of pairs in the right order"),
    ("chosen_reward", "Reward of the chosen response"),
    ("rejected_reward", "Reward of the rejected response"),
)
REWARD_CHARTS = (
    ("auc", "Held-out AUC on its own task"),
    ("sentence_auc", "Held-out AUC on whole responses"),
    ("weighted_auc", "Held-out weighted AUC (3 classes)"),
    ("macro_auc", "Held-out macro AUC (3 classes)"),
    ("token_f1", "Held-out F1 of relevant tokens"),
    ("sentence_f1", "Held-out F1 of relevant responses"),
    ("token_ece", "Held-out calibration error, tokens"),
    ("sentence_ece", "Held-out calibration error, responses"),
    ("sentence_std", "Spread of held-out response scores"),
    ("loss", "Held-out loss"),
    ("local_loss", "Held-out local loss (Eq. 1)"),
    ("global_loss", "Held-out global loss (Eq. 2)"),
)
REWARD_MODELS = (("token", "tppo", "token level"), ("sentence", "ppo", "sentence level"))
"""Kind, colour and label."""


def rl_rows(run: RunFolder, model: str) -> list[dict[str, Any]]:
    return read_jsonl(run.path(rl_stage(model)) / "metrics.jsonl")


def rollout_policies(policies: Sequence[str]) -> list[str]:
    """Policies trained on rollouts, which share the metrics of the `rl` stage; DPO and SFT have their own."""
    return [model for model in policies if model not in ("sft", "dpo")]


def rl_charts(run: RunFolder, policies: Sequence[str]) -> dict[str, Any]:
    """Training curves: the reward of each algorithm on its own scale, then all algorithms overlaid."""
    trained = {model: found for model in policies if model != "sft" and (found := rl_rows(run, model))}
    rows = {model: trained[model] for model in rollout_policies(policies) if model in trained}
    own = []
    for model, found in rows.items():
        line = Line(
            model,
            DISPLAY[model],
            column(found, "update"),
            column(found, "reward_mean"),
            column(found, "reward_std"),
        )
        own.append(line_chart([line], f"Reward of {DISPLAY[model]}, mean ± std", "update"))
    spread = [Line(m, DISPLAY[m], column(f, "update"), column(f, "reward_std")) for m, f in rows.items()]
    own.append(line_chart(spread, "Standard deviation of the reward", "update"))
    shared = []
    for name, title in RL_CHARTS:
        lines = [Line(m, DISPLAY[m], column(f, "update"), column(f, name)) for m, f in rows.items()]
        shared.append(line_chart(lines, title, "update"))
    frontier = [Line(m, DISPLAY[m], column(f, "kl"), column(f, "sentence_reward_mean")) for m, f in rows.items()]
    shared.append(line_chart(frontier, "Relevance bought per nat of KL", "KL from SFT, nats per response", dots=True))
    missing = [DISPLAY[model] for model in policies if model != "sft" and model not in trained]
    return {"own": [c for c in own if c], "shared": [c for c in shared if c], "missing": missing}


def reward_charts(run: RunFolder) -> list[Markup]:
    """Held-out curves of the token-level reward model (TPPO's colour) and its sentence-level rival."""
    rows = [row for row in read_jsonl(run.path("reward") / "metrics.jsonl") if row["split"] == "reward_eval"]
    charts = [line_chart(reward_lines(rows, name), title, "step") for name, title in REWARD_CHARTS]
    return [chart for chart in charts if chart]


def reward_lines(rows: Sequence[dict[str, Any]], name: str) -> list[Line]:
    """A held-out measure of both reward models over the steps; rows of several seeds share a line (`seed_line`)."""
    return [
        seed_line(colour, label, [row for row in rows if row["model"] == kind], "step", name)
        for kind, colour, label in REWARD_MODELS
    ]


def seed_line(colour: str, label: str, rows: Sequence[dict[str, Any]], x: str, y: str) -> Line:
    """Mean of `y` over the rows with the same `x`; rows of several seeds give a band of one standard deviation."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row.get(y) is not None:
            found.setdefault(row[x], []).append(row[y])
    xs = sorted(found)
    band = None
    if any(len(values) > 1 for values in found.values()):
        band = [statistics.stdev(found[at]) if len(found[at]) > 1 else None for at in xs]
    return Line(colour, label, xs, [statistics.fmean(found[at]) for at in xs], band)


def sft_chart(run: RunFolder) -> Markup | None:
    rows = read_jsonl(run.path("sft") / "metrics.jsonl")
    return line_chart(_training_and_held_out("sft", rows, "loss"), "SFT loss, nats per response token", "step")


def dpo_charts(run: RunFolder) -> list[Markup]:
    rows = rl_rows(run, "dpo")
    charts = [line_chart(_training_and_held_out("dpo", rows, name), title, "step") for name, title in DPO_CHARTS]
    return [chart for chart in charts if chart]


def _training_and_held_out(model: str, rows: Sequence[dict[str, Any]], name: str) -> list[Line]:
    """A measure of a trainer of pairs or examples, and the same on held-out users (`eval_<name>`), over the steps."""
    return [
        Line(model, label, column(found, "step"), column(found, key), dashed=key != name)
        for key, label in ((name, "training"), (f"eval_{name}", "held out"))
        if (found := [row for row in rows if row.get(key) is not None and "step" in row])
    ]


def column(rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return [row.get(name) for row in rows]
