"""Charts of the reports: training curves, and points with intervals.

Small inline SVGs by matplotlib, drawn in the light colours of report.html; each colour is then replaced by the CSS
variable that it is the value of, so one chart suits light and dark pages. `save_line_chart` draws the same chart into
a PNG. Text in a chart is fixed labels and numbers only, never text of the log.

A run is a study with one seed: the curves of both are one frame of `CURVE_COLUMNS`, a row for each number of a
training's metrics.jsonl. A training without that file has no curve.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tppo.core.common import UserError
from tppo.core.files import read_jsonl
from tppo.core.run import RunFolder
from tppo.core.stages import DISPLAY, rl_stage
from tppo.core.stats import IntervalEstimate

PAGE = Path(__file__).with_name("report.html")
# Any other name (a simple baseline) is drawn in the quiet colour.
SERIES = ("sft", "dpo", "ppo", "ppo_sum", "tppo", "targets", "other_user")
_LIGHT = dict(re.findall(r"--(\w+): light-dark\((#\w+),", PAGE.read_text(encoding="utf-8")))
_INK, _QUIET, _LINE = (_LIGHT[name] for name in ("ink", "quiet", "line"))
_COLOURS = {name: _LIGHT[name] for name in SERIES}
_CSS = {_INK: "currentColor", **{_LIGHT[name]: f"var(--{name})" for name in ("quiet", "line", *SERIES)}}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tppo",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    **dict.fromkeys(("text.color", "axes.titlecolor"), _INK),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _QUIET),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _LINE),
}

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
CURVE_COLUMNS = ("model", "seed", "update", "metric", "value")
_COUNTERS = ("update", "step")


@dataclass(frozen=True)
class Line:
    """A curve: name of a series (its colour) or a `#rrggbb` of its own, legend label, points, and optionally half the
    height of its band."""

    name: str
    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    band: Sequence[float | None] | None = None
    dashed: bool = False
    marked: bool = False
    """A dot at every point: few values, and nothing is known between them."""


class Chart(NamedTuple):
    """What `line_chart` draws on a page and `save_line_chart` into a file."""

    lines: Sequence[Line]
    title: str
    x_label: str = "update"
    dots: bool = False
    """Mark the last point of each line."""


class Interval(NamedTuple):
    """A row of an interval chart; drawn when it was measured."""

    name: str
    label: str
    estimate: IntervalEstimate


def line_chart(lines: Sequence[Line], title: str, x_label: str, dots: bool = False) -> Markup | None:
    """Curves over a common axis; None when no line has a measured point. `dots` marks the last point."""
    with matplotlib.rc_context(_STYLE):
        figure = _line_figure(lines, title, x_label, dots, (4.7, 2.7))
        return _svg(figure, title) if figure else None


def save_line_chart(path: Path, lines: Sequence[Line], title: str, x_label: str, dots: bool = False) -> bool:
    """The same chart as a PNG on white; False, and no file, when no line has a measured point."""
    with matplotlib.rc_context(_STYLE):
        figure = _line_figure(lines, title, x_label, dots, (6.4, 3.6))
        if figure:
            figure.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return figure is not None


def drawn(charts: Iterable[Chart]) -> list[Markup]:
    """The charts that have a point."""
    return [svg for chart in charts if (svg := line_chart(*chart))]


def _line_figure(
    lines: Sequence[Line], title: str, x_label: str, dots: bool, size: tuple[float, float]
) -> Figure | None:
    """`size` in inches."""
    lines = [line for line in lines if np.isfinite(_floats(line.y)).any()]
    if not lines:
        return None
    figure, axes = _figure(*size)
    for line in lines:
        colour = line.name if line.name.startswith("#") else _COLOURS.get(line.name, _QUIET)
        y = _floats(line.y)
        style = (0, (3, 2)) if line.dashed else "-"
        marker = "o" if line.marked or np.isfinite(y).sum() == 1 else None
        axes.plot(line.x, y, color=colour, label=line.label, linestyle=style, marker=marker, markersize=4)
        if dots:
            axes.plot(line.x[-1:], y[-1:], color=colour, marker="o", markersize=4.5)
        if line.band is not None:
            half = _floats(line.band)
            axes.fill_between(line.x, y - half, y + half, color=colour, alpha=0.16, linewidth=0)
    axes.set_xlabel(x_label)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    whole = all(float(x).is_integer() for line in lines for x in line.x)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole and not dots))
    # Above the curves, where it hides nothing.
    axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.99), ncols=len(lines), fontsize=8, borderpad=0,
                handlelength=1.4, columnspacing=1.0)  # fmt: skip
    axes.set_title(title, y=1.13, pad=0)
    return figure


def _floats(values: Sequence[float | None]) -> np.ndarray:
    """NaN for what was not measured: a gap in a line."""
    return np.asarray(values, dtype=float)


def interval_chart(intervals: Sequence[Interval], title: str, zero: bool = False) -> Markup | None:
    """Points with intervals, in per cent, one row each, first on top; `zero` draws a line at 0."""
    rows = [(name, label, found.value, found) for name, label, found in intervals if found.value is not None]
    if not rows:
        return None
    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure, axes = _figure(8.8, 0.65 + 0.36 * len(rows))
        for row, (name, _, value, found) in enumerate(rows):
            colour, point = _COLOURS.get(name, _QUIET), 100 * value
            if found.low is not None and found.high is not None:
                axes.plot([100 * found.low, 100 * found.high], [row, row], color=colour, linewidth=2.4,
                          solid_capstyle="round")  # fmt: skip
            axes.plot([point], [row], "o", color=colour, markersize=6.5)
            axes.annotate(f"{point:.1f}", (point, row), (0, 6), textcoords="offset points", ha="center",
                          va="bottom", fontsize=8)  # fmt: skip
        axes.set_yticks(range(len(rows)), [label for _, label, *_ in rows])
        axes.tick_params(axis="y", length=0, labelcolor=_INK, labelsize=9)
        axes.set_ylim(len(rows) - 0.5, -0.75)
        axes.spines["left"].set_visible(False)
        if zero:
            axes.axvline(0, color=_QUIET, linewidth=1)
        else:
            axes.set_xlim(left=0, right=max(axes.get_xlim()[1], 1))
        axes.set_xlabel(title)
        return _svg(figure, title)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, label: str) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head = rf'<svg viewBox="\1" role="img" aria-label="{escape(label)}">'
    svg = re.sub(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', head, svg, count=1)
    svg = svg.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")  # the fonts of the page
    for colour, variable in _CSS.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)


def training_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows (`update`, `metric`, `value`) of a training's metrics.jsonl.

    Raises:
        UserError: a row that says neither update nor step.
    """
    path = folder / "metrics.jsonl"
    rows = []
    for line in read_jsonl(path):
        counter = next((name for name in _COUNTERS if name in line), None)
        if counter is None:
            raise UserError(f"{path}: a row without {' or '.join(_COUNTERS)}")
        rows += [
            {"update": int(line[counter]), "metric": name, "value": float(value)}
            for name, value in line.items()
            if name not in _COUNTERS and isinstance(value, int | float)
        ]
    return rows


def curve(curves: pd.DataFrame, model: str, metric: str) -> pd.DataFrame:
    """A measure (updates, seeds) at the updates that all seeds have (a training that `max_kl` halted is shorter than
    the others); NaN where a rollout had nothing to measure."""
    found = curves[(curves["model"] == model) & (curves["metric"] == metric)]
    everywhere = found.groupby("update")["seed"].transform("size") == found["seed"].nunique()
    return found[everywhere].pivot(index="update", columns="seed", values="value")


def curve_line(curves: pd.DataFrame, model: str, metric: str) -> Line:
    """Mean over the seeds; several seeds have a band of one standard deviation."""
    values = curve(curves, model, metric)
    mean, std = values.mean(axis=1, skipna=False), values.std(axis=1, skipna=False)
    band = std.tolist() if values.shape[1] > 1 else None
    return Line(model, DISPLAY[model], values.index.tolist(), mean.tolist(), band)


def curve_chart(curves: pd.DataFrame, models: Iterable[str], metric: str, title: str, x_label: str = "update") -> Chart:
    """A measure of several models over their training."""
    return Chart([curve_line(curves, model, metric) for model in models], title, x_label)


def kl_chart(curves: pd.DataFrame, models: Iterable[str], metric: str, title: str) -> Chart:
    """A measure of several models against how far they are from SFT."""
    lines = []
    for model in models:
        kl, values = (curve(curves, model, name).mean(axis=1, skipna=False) for name in ("kl", metric))
        updates = kl.index.intersection(values.index)
        lines.append(Line(model, DISPLAY[model], kl[updates].tolist(), values[updates].tolist()))
    return Chart(lines, title, "KL from SFT, nats per response", dots=True)


def rollout_policies(policies: Sequence[str]) -> list[str]:
    """Policies trained on rollouts, which share the metrics of the `rl` stage; DPO and SFT have their own."""
    return [model for model in policies if model not in ("sft", "dpo")]


def run_charts(run: RunFolder, policies: Sequence[str]) -> dict[str, Any]:
    """Training curves of a run: the reward of each algorithm on its own scale, all algorithms overlaid, SFT, DPO."""
    folders = {model: run.path("sft" if model == "sft" else rl_stage(model)) for model in ("sft", *policies)}
    rows = [
        {"model": model, "seed": run.recipe.seed, **row}
        for model, folder in folders.items()
        for row in training_rows(folder)
    ]
    curves = pd.DataFrame(rows, columns=list(CURVE_COLUMNS))
    models = rollout_policies(policies)
    own = []
    for model in models:
        reward, spread = (curve_line(curves, model, name) for name in ("reward_mean", "reward_std"))
        own.append(Chart([replace(reward, band=spread.y)], f"Reward of {DISPLAY[model]}, mean ± std"))
    own.append(curve_chart(curves, models, "reward_std", "Standard deviation of the reward"))
    shared = [curve_chart(curves, models, name, title) for name, title in RL_CHARTS]
    shared.append(kl_chart(curves, models, "sentence_reward_mean", "Relevance bought per nat of KL"))
    trained = set(curves["model"])
    return {
        "own": drawn(own),
        "shared": drawn(shared),
        "missing": [DISPLAY[model] for model in policies if model not in ("sft", *trained)],
        "sft": drawn([_held_out_chart(curves, "sft", "loss", "SFT loss, nats per response token")]),
        "dpo": drawn(_held_out_chart(curves, "dpo", name, title) for name, title in DPO_CHARTS),
    }


def _held_out_chart(curves: pd.DataFrame, model: str, metric: str, title: str) -> Chart:
    """A measure of a trainer of pairs or examples, and the same on held-out users, over the steps."""
    training, held_out = (curve_line(curves, model, name) for name in (metric, f"eval_{metric}"))
    lines = [replace(training, label="training"), replace(held_out, label="held out", dashed=True)]
    return Chart(lines, title, "step")


def reward_charts(run: RunFolder) -> list[Markup]:
    """Held-out curves of the token-level reward model (TPPO's colour) and its sentence-level rival."""
    rows = [row for row in read_jsonl(run.path("reward") / "metrics.jsonl") if row["split"] == "reward_eval"]
    return drawn(Chart(reward_lines(rows, name), title, "step") for name, title in REWARD_CHARTS)


def reward_lines(rows: Sequence[dict[str, Any]], name: str) -> list[Line]:
    """A held-out measure of both reward models over the steps; rows of several seeds share a line (`seed_line`)."""
    return [
        seed_line(colour, label, [row for row in rows if row["model"] == kind], "step", name)
        for kind, colour, label in REWARD_MODELS
    ]


def seed_line(colour: str, label: str, rows: Iterable[dict[str, Any]] | pd.DataFrame, x: str, y: str) -> Line:
    """Mean of `y` over the rows with the same `x`; rows of several seeds give a band of one standard deviation."""
    found = pd.DataFrame(rows, columns=[x, y], dtype=float).dropna().groupby(x)[y]
    mean, band = found.mean(), found.std() if (found.size() > 1).any() else None
    return Line(colour, label, mean.index.tolist(), mean.tolist(), None if band is None else band.tolist())
