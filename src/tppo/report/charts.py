"""Charts of the report: small inline SVGs by matplotlib whose colours are the page's CSS variables.

matplotlib draws with stand-in colours that are then replaced by `currentColor` and `var(--...)`, so one chart
suits light and dark pages. `save_line_chart` draws the same chart into a PNG, in the page's light colours. Text in a
chart is fixed labels and numbers only, never text of the log.

Training curves of a run folder: RL algorithms, reward models, SFT. A missing file has no chart.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tppo.core.files import read_jsonl
from tppo.core.run import RunFolder
from tppo.core.stages import DISPLAY, rl_stage
from tppo.core.stats import IntervalEstimate

# Any other name (a simple baseline) is drawn in the quiet colour.
SERIES = ("sft", "dpo", "ppo", "ppo_sum", "tppo", "targets", "other_user")
_INK, _QUIET, _LINE = "#010101", "#020202", "#030303"
_COLOURS = {name: f"#0a000{number}" for number, name in enumerate(SERIES)}
_CSS = {
    _INK: "currentColor",
    _QUIET: "var(--quiet)",
    _LINE: "var(--line)",
    **{colour: f"var(--{name})" for name, colour in _COLOURS.items()},
}


def _style(ink: str, quiet: str, line: str) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "tppo",
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.edgecolor": line,
        "axes.labelcolor": quiet,
        "axes.titlecolor": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": line,
        "grid.linewidth": 0.6,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": quiet,
        "ytick.labelcolor": quiet,
        "text.color": ink,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
    }


_STYLE = _style(_INK, _QUIET, _LINE)


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


@dataclass(frozen=True)
class Interval:
    """A point with its interval on one row of an interval chart."""

    name: str
    label: str
    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, name: str, label: str, cell: IntervalEstimate) -> Interval:
        """A measured estimate."""
        assert cell.value is not None, label
        return cls(name, label, cell.value, cell.low, cell.high)


def line_chart(lines: Sequence[Line], title: str, x_label: str, *, dots: bool = False) -> Markup | None:
    """Curves over a common axis; None when no line has a measured point. `dots` marks the last point."""
    drawn = _measured(lines)
    if not drawn:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(4.7, 2.7)
        _draw_lines(axes, drawn, title, x_label, {**_COLOURS, "quiet": _QUIET}, dots)
        return _svg(figure, title)


def save_line_chart(path: Path, lines: Sequence[Line], title: str, x_label: str, *, dots: bool = False) -> bool:
    """The same chart as a PNG on white; False, and no file, when no line has a measured point."""
    drawn = _measured(lines)
    if not drawn:
        return False
    page = resources.files("tppo.report").joinpath("report.html").read_text(encoding="utf-8")
    light = dict(re.findall(r"--(\w+): light-dark\((#\w+),", page))
    with matplotlib.rc_context(_style(light["ink"], light["quiet"], light["line"])):
        figure, axes = _figure(6.4, 3.6)
        _draw_lines(axes, drawn, title, x_label, light, dots)
        figure.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return True


def _measured(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if any(_number(y) is not None for y in line.y)]


def _draw_lines(
    axes: Axes, lines: Sequence[Line], title: str, x_label: str, colours: dict[str, str], dots: bool
) -> None:
    for line in lines:
        colour = line.name if line.name.startswith("#") else colours.get(line.name, colours["quiet"])
        y = [math.nan if (number := _number(value)) is None else number for value in line.y]
        style = (0, (3, 2)) if line.dashed else "-"
        marker = "o" if line.marked or sum(not math.isnan(value) for value in y) == 1 else None
        axes.plot(line.x, y, color=colour, label=line.label, linestyle=style, marker=marker, markersize=4)
        if dots:
            axes.plot(line.x[-1:], y[-1:], color=colour, marker="o", markersize=4.5)
        if line.band is not None:
            half = [math.nan if (number := _number(value)) is None else number for value in line.band]
            low = [a - b for a, b in zip(y, half, strict=True)]
            high = [a + b for a, b in zip(y, half, strict=True)]
            axes.fill_between(line.x, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.set_xlabel(x_label)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    whole = all(float(x).is_integer() for line in lines for x in line.x)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole and not dots))
    # Above the curves, where it hides nothing.
    axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.99), ncols=len(lines), fontsize=8, borderpad=0,
                handlelength=1.4, columnspacing=1.0)  # fmt: skip
    axes.set_title(title, y=1.13, pad=0)


def interval_chart(intervals: Sequence[Interval], title: str, zero: bool = False) -> Markup | None:
    """Points with intervals, in per cent, one row each, first on top; `zero` draws a line at 0."""
    if not intervals:
        return None
    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure, axes = _figure(8.8, 0.65 + 0.36 * len(intervals))
        for row, interval in enumerate(intervals):
            colour, value = _COLOURS.get(interval.name, _QUIET), 100 * interval.value
            if interval.low is not None and interval.high is not None:
                axes.plot([100 * interval.low, 100 * interval.high], [row, row], color=colour, linewidth=2.4,
                          solid_capstyle="round")  # fmt: skip
            axes.plot([value], [row], "o", color=colour, markersize=6.5)
            axes.annotate(f"{value:.1f}", (value, row), (0, 6), textcoords="offset points", ha="center",
                          va="bottom", fontsize=8)  # fmt: skip
        axes.set_yticks(range(len(intervals)), [interval.label for interval in intervals])
        axes.tick_params(axis="y", length=0, labelcolor=_INK, labelsize=9)
        axes.set_ylim(len(intervals) - 0.5, -0.75)
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
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _svg(figure: Figure, label: str) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]+)"[^>]*>',
        r'<svg viewBox="\1" role="img" aria-label="LABEL">',
        svg,
        count=1,
    )
    svg = svg.replace('aria-label="LABEL"', f'aria-label="{escape(label)}"', 1)
    svg = svg.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")  # the fonts of the page
    for stand_in, colour in _CSS.items():
        svg = svg.replace(stand_in, colour)
    return Markup(svg)


def _number(value: Any) -> float | None:
    """A finite float, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


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
