"""Ablations: which settings lie on one axis, and the numbers on it."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.study.test_study_plan import make_recipe
from tppo.core.config import Recipe, Setting
from tppo.study.grid import BASE, make_plan
from tppo.study.results import Collected
from tppo.study.tables import ablation_charts, find_ablations

MEASURES = ["relevant_history", "queries_written"]


def answers(model: str, *relevant: float | None) -> list[dict[str, Any]]:
    return [
        {"model": model, "reader": reader, "measure": measure, "value": value}
        for found in relevant
        for reader, measure, value in (("judge-v1", "relevant_history", found), ("text", "queries_written", 3.0))
    ]


def collected(rows: dict[str, list[dict[str, Any]]]) -> Collected:
    readings = [{**row, "job": f"cells/{name}"} for name, found in rows.items() for row in found]
    columns = ["job", "model", "reader", "measure", "value"]
    metrics = {f"cells/{name}": {"judge": "judge-v1"} for name in rows}
    return Collected(pd.DataFrame(), pd.DataFrame(readings, columns=columns), [], metrics, [])


def ablation_recipe(root: Path | str = "r") -> Recipe:
    return make_recipe(
        root,
        Setting("w0.9", {"reward.local_weight": 0.9}, ["tppo"]),
        Setting("w0", {"reward.local_weight": 0, "evaluate.readings": [{"reader": "vote"}]}, ["tppo"]),
        Setting("both", {"rl.kl_coef": 0.05, "rl.gamma": 0.9}),
        Setting("words", {"rl.reward_values": "paper"}),
        Setting("switch", {"rl.format_weight": False}),
        Setting("alone", {"rl.gamma": 0.5}),
    )


def test_settings_that_differ_in_one_number_lie_on_its_axis():
    recipe = ablation_recipe()
    plan = make_plan(recipe)
    rows = {
        **{f"base-{model}-s{seed}": answers(model, 0.0, 1.0) for model in ("sft", "tppo", "dpo") for seed in (0, 1)},
        "w0.9-tppo-s0": answers("tppo", 1.0, 1.0, None),
        "w0.9-tppo-s1": answers("tppo", 1.0, 0.0),
        "w0-tppo-s0": answers("tppo", 0.0, 0.0) + answers("nearest", 1.0),
        **{f"{name}-tppo-s0": answers("tppo", 1.0) for name in ("both", "words", "switch")},
    }
    (found,) = find_ablations(recipe, plan, collected(rows), MEASURES)
    # `alone` has no finished cell, the others are no single number; SFT and DPO read no reward model.
    assert (found.name, found.values) == (
        "reward.local_weight", {BASE: recipe.reward.local_weight, "w0.9": 0.9, "w0": 0.0},
    )  # fmt: skip
    assert {row["model"] for row in found.rows} == {"tppo"}
    points = {(row["value"], row["seed"]): row["relevant_history"] for row in found.rows}
    base = recipe.reward.local_weight
    assert points == {(base, 0): 0.5, (base, 1): 0.5, (0.9, 0): 1.0, (0.9, 1): 0.5, (0.0, 0): 0.0}
    relevance, queries = ablation_charts(found, MEASURES)
    assert ", %" in relevance
    assert "var(--tppo)" in relevance
    assert "reward.local_weight" in queries


def test_what_concerns_every_model_shows_every_model():
    recipe = make_recipe("r", Setting("cold", {"evaluate.temperature": 0.5}))
    rows = {
        f"{setting}-{model}-s{seed}": answers(model, float(setting == "cold"))
        for setting in (BASE, "cold")
        for model in ("sft", "tppo", "dpo")
        for seed in (0, 1)
    }
    (found,) = find_ablations(recipe, make_plan(recipe), collected(rows), MEASURES)
    assert {row["model"] for row in found.rows} == {"sft", "tppo", "dpo"}
    assert {(row["value"], row["relevant_history"]) for row in found.rows} == {(1.0, 0.0), (0.5, 1.0)}


@pytest.mark.parametrize("finished", [[], ["base-tppo-s0"], ["w0.9-tppo-s0"]])
def test_one_point_is_no_ablation(finished: list[str]):
    recipe = ablation_recipe()
    rows = {name: answers("tppo", 1.0) for name in finished}
    assert find_ablations(recipe, make_plan(recipe), collected(rows), MEASURES) == []
