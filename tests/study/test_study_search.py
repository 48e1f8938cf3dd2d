"""The search of a study: candidates, the choice by users of no evaluation set, and what is compared by it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.helpers import fake_run
from tests.study.test_study_plan import make_recipe
from tests.study.test_study_report import make_study
from tppo.core.common import UserError
from tppo.core.config import RL, Evaluate, Reading, Recipe, Setting, Study
from tppo.core.files import write_json
from tppo.study.grid import BASE, BEST, Plan, make_plan
from tppo.study.run import planned, run_study
from tppo.study.search import choose, searched

SEARCH = {"rl.gae_lambda": [0.95, 1.0]}
REACHED = {"tppo": {BASE: 0.8, "gae_lambda1.0": 0.7}, "ppo": {BASE: 0.2, "gae_lambda1.0": 0.3}}
"""The headline on the reward_eval users."""


def finish_search(plan: Plan, reached: dict[str, dict[str, float]], but: str = "") -> None:
    """Every job of the search but one, with a seed's luck of 0.01 on the reward_eval users."""
    for (setting, model, seed), job in plan.search_of.items():
        if job.name != but:
            with job.run.stage("evaluate") as (folder, _):
                row = {"scope": "reward_eval", "model": model, "metric": "relevant_targets", "reader": ""}
                value = {"value": reached[model][setting] + 0.01 * seed, "low": None, "high": None}
                numbers = {"examples": 10, "users": 10, "headline": "relevant_targets"}
                found = {**fake_run.JUDGE, "headline": "relevant_targets", "rows": [{**row, **value, **numbers}]}
                write_json(folder / "metrics.json", {**found, "differences": []})


def study_of(root: Path, but: str = "", **changes: Any) -> tuple[Recipe, Plan]:
    recipe, plan = make_study(root, study=Study(seeds=[0, 1], search=SEARCH), **changes)
    finish_search(plan, REACHED, but)
    return replace(recipe, study=replace(recipe.study, action="report")), plan


def test_every_candidate_is_a_setting_that_is_asked_about_other_users(tmp_path: Path):
    recipe = make_recipe(tmp_path, Setting("cold", {"evaluate.temperature": 0.5}))
    study = replace(recipe.study, search={**SEARCH, "rl.kl_coef": [0.2, 0.1], "dpo.beta": [0.1, 0.5]})
    evaluate = Evaluate(readings=[Reading("distance")], baselines=["nearest"])
    recipe = replace(recipe, algorithms=["tppo", "ppo", "dpo"], study=study, evaluate=evaluate)
    plan = make_plan(recipe)
    tried = {"gae_lambda0.95_kl_coef0.1", "gae_lambda1.0_kl_coef0.2", "gae_lambda1.0_kl_coef0.1"}
    assert {(setting, model) for setting, model, seed in plan.search_of if seed == 0} == {
        *((setting, model) for setting in (BASE, *tried) for model in ("tppo", "ppo")),
        *((setting, "dpo") for setting in (BASE, "beta0.5")),
    }
    for (setting, model, seed), job in plan.search_of.items():
        cell = plan.cell_of[setting, model, seed]
        assert (job.name, job.stages) == (f"search/{setting}-{model}-s{seed}", ["evaluate"])
        assert job.recipe.evaluate.splits == ["reward_eval"]
        assert (job.recipe.evaluate.models, job.recipe.evaluate.baselines) == ([model], [])
        assert job.needs(cell)
        assert cell.recipe.evaluate.splits == ["eval1", "eval2"]
        assert all(made.name.startswith("cells/") for made in plan.cells)
    # Candidates are not read again; what is chosen is, and so is what the user set.
    assert {name for name, *_ in plan.reading_of} == {"cold"}
    best = make_plan(recipe, {"tppo": "gae_lambda1.0_kl_coef0.2"})
    assert {name for name, *_ in best.reading_of} == {"cold", BEST}
    read = best.reading_of[BEST, 0, "distance"].recipe.stage_dirs
    assert read["rl_tppo"].endswith("cells/gae_lambda1.0_kl_coef0.2-tppo-s0/rl_tppo")
    assert read["rl_ppo"].endswith("cells/base-ppo-s0/rl_ppo")


def test_algorithms_are_compared_at_their_own_best(tmp_path: Path):
    recipe, _ = study_of(tmp_path / "run")
    run_study(recipe)
    folder = tmp_path / "run/study"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["search"]["chosen"] == {"tppo": BASE, "ppo": "gae_lambda1.0"}
    assert metrics["search"]["headline"]["ppo"] == {BASE: pytest.approx(0.205), "gae_lambda1.0": pytest.approx(0.305)}

    rows = pq.read_table(folder / "results.parquet").to_pylist()

    def mean(model: str, setting: str) -> float:
        found = [r["value"] for r in rows
                 if (r["model"], r["setting"], r["measure"]) == (model, setting, metrics["headline"])]  # fmt: skip
        return sum(found) / len(found)

    shown = next(
        row["value"] for row in metrics["differences"]
        if (row["scope"], row["model"], row["than"], row["metric"]) == ("all", "tppo", "ppo", metrics["headline"])
    )  # fmt: skip
    assert mean("ppo", BASE) != mean("ppo", "gae_lambda1.0")
    assert shown == pytest.approx(mean("tppo", BASE) - mean("ppo", "gae_lambda1.0"))
    html, summary = (folder / "report.html").read_text(), (folder / "summary.md").read_text()
    said = (
        "Each algorithm stands at the best setting of its search (base: the recipe's own): TPPO base, PPO gae_lambda1.0"
    )
    assert said in html.replace("&#39;", "'")
    table = summary.split("## Search\n")[1].split("\n## ")[0]
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith(("| TPPO", "| PPO"))]
    assert {(line[0][2:], line[1]) for line in lines if line[4] == "chosen"} == {
        ("TPPO", BASE),
        ("PPO", "gae_lambda1.0"),
    }
    assert len(lines) == 4
    assert next(line for line in lines if line[0] == "| PPO" and line[4] == "chosen")[5].startswith(
        f"{100 * mean('ppo', 'gae_lambda1.0'):.1f} ["
    )
    assert "| PPO | 2 | base, gae_lambda1.0 |" in summary  # as many trials for one as for the other
    assert "| TPPO | 2 | base, gae_lambda1.0 |" in summary


def test_the_choice_does_not_see_the_evaluation_users(tmp_path: Path):
    """Whatever the evaluation sets say, and whether they have said anything yet."""
    _, plan = study_of(tmp_path / "run")
    found = searched(plan)
    for job in plan.cells:
        for name in ("metrics.json", "answers.parquet", "readings.parquet"):
            (job.run.path("evaluate") / name).unlink()
    assert searched(plan) == found is not None
    assert choose(found) == {"tppo": BASE, "ppo": "gae_lambda1.0"}


def test_an_unfinished_search_chooses_nothing_and_says_so(tmp_path: Path):
    recipe, _ = study_of(tmp_path / "run", but="search/gae_lambda1.0-ppo-s1")
    assert planned(recipe).shown == BASE
    run_study(recipe)
    html = (tmp_path / "run/study/report.html").read_text()
    assert "The search is not finished, so every algorithm stands at the recipe&#39;s own setting." in html
    assert "1 of 8 answers of the search are not finished yet: search/gae_lambda1.0-ppo-s1." in html
    assert "search" not in json.loads((tmp_path / "run/study/metrics.json").read_text())


def test_the_recipes_own_of_equals():
    assert choose({"tppo": {BASE: 0.5, "a": 0.5}, "ppo": {BASE: 0.4, "a": 0.5, "b": 0.5}}) == {"tppo": BASE, "ppo": "a"}


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"evaluate.temperature": [0.5]}, "no setting of `rl` or `dpo`"),
        ({"rl.algorithm": ["ppo"]}, "no setting of `rl` or `dpo`"),
        ({"rl.gae_lambda": []}, "at least one value"),
        ({"rl.gae_lambda": [1.0, 1.0]}, "each once"),
        ({"rl.lambda": [1.0]}, "study.search 'lambda1.0'"),
        ({"rl.gae_lambda": ["high"]}, "study.search 'gae_lambdahigh'"),
        ({"dpo.beta": [0.5]}, r"none of algorithms=\['tppo'\]"),
    ],
)
def test_a_search_that_cannot_be_is_refused(tmp_path: Path, search: dict[str, list[Any]], said: str):
    recipe = Recipe(run_dir=str(tmp_path), algorithms=["tppo"], study=Study(search=search), rl=RL())
    with pytest.raises(UserError, match=said):
        make_plan(recipe)


def test_only_the_recipes_own_value_is_no_search(tmp_path: Path):
    recipe = Recipe(run_dir=str(tmp_path), study=Study(search={"rl.gae_lambda": [0.95]}))
    assert make_plan(recipe).search_of == {}
