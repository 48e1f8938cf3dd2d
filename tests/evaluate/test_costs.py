"""What a point costs, from manifests written by the run folder itself."""

from pathlib import Path

import pytest

from tests.helpers import fake_run
from tppo.core.stats import Estimate
from tppo.evaluate.compare import closure, cost_table, model_costs, per_point
from tppo.report import page


def gain(value: float, low: float, high: float) -> Estimate:
    return Estimate(value, low, high, 50, 50)


def test_a_point_costs_the_cost_over_the_gain():
    found = per_point(600, gain(0.10, 0.05, 0.20))
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((60, 30, 120))


@pytest.mark.parametrize("nothing", [gain(0.1, 0.0, 0.2), gain(-0.1, -0.2, -0.05), Estimate(0.1, None, None, 1, 1)])
def test_no_gain_shown_has_no_price(nothing: Estimate):
    assert per_point(600, nothing) is None
    assert per_point(None, gain(0.1, 0.05, 0.2)) is None


def test_costs_count_what_was_made_for_a_model_and_not_for_sft(tmp_path: Path):
    recipe, run = fake_run.make_run(tmp_path / "run", ["tppo", "dpo"], users=4)
    assert closure("rl_tppo", recipe) - closure("sft", recipe) == {"sample", "label", "reward", "rl_tppo"}
    costs = {cost.model: cost for cost in model_costs(recipe, run, page.load_metrics(run.path("evaluate")), "all")}
    assert list(costs) == ["dpo", "tppo"]
    assert (costs["tppo"].labels, costs["dpo"].labels) == (2400, 0)  # App. H's pairs need no labels
    seconds = sum(run.manifest(stage)["seconds"] for stage in ("sample", "label", "reward", "rl_tppo"))
    assert costs["tppo"].seconds == pytest.approx(seconds)
    assert costs["tppo"].gain == page.load_metrics(run.path("evaluate")).difference(
        "all", "tppo", "sft", "asked_words_targets"
    )
    (run.path("label") / "manifest.json").unlink()
    costs = {cost.model: cost for cost in model_costs(recipe, run, page.load_metrics(run.path("evaluate")), "all")}
    assert (costs["tppo"].seconds, costs["tppo"].labels) == (None, None)
    assert "| TPPO | not measured | not measured |" in cost_table(list(costs.values())).markdown()
