"""The training curves of a study, on its page and as PNG files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from tppo.evaluate.charts import Line, line_chart, save_line_chart
from tppo.evaluate.compare import DISPLAY
from tppo.evaluate.curves import DPO_CHARTS, RL_CHARTS, rollout_policies
from tppo.study.tables import MEASURES, Curves


class Chart(NamedTuple):
    """A training chart: what `line_chart` draws on the page and `save_line_chart` into a file."""

    name: str
    """Of the file."""
    lines: list[Line]
    title: str
    x_label: str
    dots: bool = False


def training_charts(curves: Curves) -> dict[str, list[Chart]]:
    """Curves with the seeds as bands: rewards, what all algorithms share, relevance against KL, DPO."""
    own = [
        _band_chart(curves, [model], f"{name}-{model}", name, title.format(DISPLAY[model]))
        for name, title in (("reward_mean", "Reward of {}"), ("reward_std", "Spread of the reward of {} in a rollout"))
        for model in rollout_policies(curves.models(name))
    ]
    shared = [
        _band_chart(curves, rollout_policies(curves.models(name)), name, name, title) for name, title in RL_CHARTS
    ]
    for name, label in MEASURES.items():
        lines = []
        for model in rollout_policies(curves.models(name)):
            kl, values = curves.get(model, "kl"), curves.get(model, name)
            if kl and values and len(kl.updates) == len(values.updates):
                lines.append(Line(model, DISPLAY[model], kl.mean, values.mean))
        title = f"{label[0].upper()}{label[1:]}, against KL"
        shared.append(Chart(f"{name}-kl", lines, title, "KL from SFT, nats per response", dots=True))
    dpo = [_band_chart(curves, ["dpo"], f"dpo-{name}", name, title, "step") for name, title in DPO_CHARTS]
    return {"own": own, "shared": shared, "dpo": dpo}


def charts(curves: Curves) -> dict[str, list[Markup]]:
    """The training charts that have a point, for the page."""
    drawn = {
        group: [line_chart(chart.lines, chart.title, chart.x_label, dots=chart.dots) for chart in found]
        for group, found in training_charts(curves).items()
    }
    return {group: [chart for chart in found if chart] for group, found in drawn.items()}


def save_figures(curves: Curves, folder: Path) -> None:
    """Write the same charts as PNG files, for papers and slides."""
    folder.mkdir(exist_ok=True)
    for chart in itertools.chain.from_iterable(training_charts(curves).values()):
        path = folder / f"{chart.name}.png"
        if not save_line_chart(path, chart.lines, chart.title, chart.x_label, dots=chart.dots):
            path.unlink(missing_ok=True)


def _band_chart(
    curves: Curves, models: Sequence[str], name: str, metric: str, title: str, x_label: str = "update"
) -> Chart:
    found = [(model, curve) for model in models if (curve := curves.get(model, metric)) and len(curve.updates)]
    lines = [Line(m, DISPLAY[m], [int(u) for u in c.updates], c.mean, c.spread) for m, c in found]
    return Chart(name, lines, title, x_label)
