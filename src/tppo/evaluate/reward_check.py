"""The report's section on the gate: check_reward/check.json as tables and a chart."""

from __future__ import annotations

import json
from typing import Any

from tppo.errors import UserError
from tppo.evaluate.charts import Interval, interval_chart
from tppo.judge.probes import PROBES
from tppo.reward import check_text
from tppo.run import RunFolder

# Token level in TPPO's colour, its rival in PPO's, as in the curves of the reward models.
COLOURS = {"token": "tppo", "sentence": "ppo"}


def reward_check_section(run: RunFolder) -> dict[str, Any]:
    """What the template shows of the gate.

    Raises:
        UserError: the stage is not finished, or check.json is damaged.
    """
    path = run.require("check_reward") / "check.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give `--redo check_reward` to make it anew") from None
    return {
        "passed": report["passed"],
        "verdicts": check_text.verdict_lines(report),
        "cautions": check_text.caution_lines(report),
        "data": check_text.data_line(report),
        "tables": [
            ("Requirement", check_text.check_rows(report)),
            ("Nothing required", check_text.aside_rows(report)),
            ("Mean score of a response", check_text.probe_rows(report)),
        ],
        "tones": check_text.TONES,
        "chart": interval_chart(_intervals(report), "Mean score of a response, % (95% interval)"),
        "note": check_text.NOTE,
    }


def _intervals(report: dict[str, Any]) -> list[Interval]:
    found = [
        (model, probe, report["models"][model]["probes"][probe]) for probe in PROBES for model in check_text.MODELS
    ]
    return [
        Interval(COLOURS[model], f"{PROBES[probe]} ({model})", cell["value"], cell["low"], cell["high"])
        for model, probe, cell in found
        if cell["value"] is not None
    ]
