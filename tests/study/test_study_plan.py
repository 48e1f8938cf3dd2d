"""Which cells a study has, and what each makes itself."""

from dataclasses import replace
from pathlib import Path

import pytest

from tppo.core.common import UserError
from tppo.core.config import RL, Evaluate, Prepare, Reading, Recipe, Sampling, Setting, Study
from tppo.core.run import RunFolder
from tppo.core.stages import evaluated_models, stage_config, stage_inputs
from tppo.study.grid import Plan, describe, make_plan, settings_tried
from tppo.study.run import check_taken, worker_environments

SHARED = ["prepare", "sft", "sample", "label", "reward"]


def make_recipe(root: Path | str, *settings: Setting, **changes) -> Recipe:
    study = Study(seeds=[0, 1], settings=list(settings))
    recipe = Recipe(
        run_dir=str(root), seed=5, algorithms=["tppo", "dpo"], prepare=Prepare(source=["log.tsv"]), study=study
    )
    return replace(recipe, **changes)


def stages(plan: Plan) -> dict[str, list[str]]:
    return {job.name: job.stages for job in plan.jobs}


def test_the_base_grid():
    plan = make_plan(make_recipe("r"))
    shared = [stage for stage in stages(plan)["shared/base"] if stage in SHARED]
    assert shared == SHARED
    assert [job.name for job in plan.cells] == [
        f"cells/base-{model}-s{seed}" for seed in (0, 1) for model in ("sft", "tppo", "dpo")
    ]
    assert [job.stages for job in plan.cells[:3]] == [["evaluate"], ["rl_tppo", "evaluate"], ["rl_dpo", "evaluate"]]
    cell = plan.cells[4].recipe
    assert (cell.seed, cell.data_seed, cell.algorithms, cell.evaluate.models) == (1, 5, ["tppo"], ["tppo"])
    assert cell.stage_dirs["reward"] == "r/shared/base/reward"
    assert RunFolder(cell).path("sft") == Path("r/shared/base/sft")
    assert RunFolder(cell).path("rl_tppo") == Path("r/cells/base-tppo-s1/rl_tppo")


def test_a_setting_makes_what_it_touches_and_takes_the_rest():
    weight = Setting("w0.9", {"reward.local_weight": 0.9})
    kl = Setting("kl", {"rl.kl_coef": 0.05})
    judge = Setting("judge2", {"evaluate.judge": "embedding"})
    plan = make_plan(make_recipe("r", weight, kl, judge))
    made = stages(plan)
    assert made["shared/w0.9"][0] == "reward"
    assert made["cells/w0.9-tppo-s0"] == made["cells/kl-tppo-s0"] == ["rl_tppo", "evaluate"]
    # DPO reads no reward model and no setting of rl; SFT neither.
    assert not {f"cells/{name}-{model}-s0" for name in ("w0.9", "kl") for model in ("sft", "dpo")} & made.keys()
    assert plan.cell_of["kl", "dpo", 1].name == "cells/base-dpo-s1"
    # Another judge reads the same answers' models again and tunes nothing.
    assert made["cells/judge2-tppo-s0"] == made["cells/judge2-sft-s0"] == ["evaluate"]
    taken = plan.cell_of["judge2", "tppo", 1]
    assert taken.recipe.stage_dirs["rl_tppo"] == "r/cells/base-tppo-s1/rl_tppo"
    assert [job.name for job in plan.jobs if taken.needs(job)] == ["shared/base", "cells/base-tppo-s1"]
    assert settings_tried(plan) == {"tppo": ["base", "w0.9", "kl"], "dpo": ["base"]}


def test_baselines_are_answered_in_the_cells_of_sft():
    baselines = Evaluate(baselines=["nearest", "best_of_n"], untuned=True)
    plan = make_plan(make_recipe("r", Setting("kl", {"rl.kl_coef": 0.05}), evaluate=baselines))
    cells = {job.name: job.recipe for job in plan.cells}
    assert evaluated_models(cells["cells/base-sft-s0"]) == [
        "sft", "untuned", "nearest", "best_of_n", "targets", "other_user",
    ]  # fmt: skip
    assert evaluated_models(cells["cells/base-tppo-s0"]) == ["tppo"]
    # best_of_n chooses by the rewards of `rl`; DPO is none of its business.
    assert "cells/kl-sft-s0" in cells
    assert "cells/kl-dpo-s0" not in cells
    config = stage_config("evaluate", cells["cells/base-tppo-s0"])
    assert not {"rl", "start_model"} & config.keys()
    assert "reward" not in stage_inputs("evaluate", cells["cells/base-tppo-s0"])
    shown = replace(cells["cells/base-sft-s0"], rl=RL(trackers=["tensorboard"]))
    assert stage_config("evaluate", shown) == stage_config("evaluate", cells["cells/base-sft-s0"])
    assert stage_inputs("evaluate", shown) == ["prepare", "sft", "label", "sample", "reward"]


def test_votes_are_between_cells_of_one_setting_and_seed():
    settings = [
        Setting("kl", {"rl.kl_coef": 0.05}),
        Setting("other_voter", {"judge.model": "other"}),
        Setting("no_votes", {"evaluate.readings": [], "rl.kl_coef": 0.01}),
    ]
    plan = make_plan(make_recipe("r", *settings, evaluate=Evaluate(readings=[Reading("vote")])))
    assert [job.name for job in plan.readings if job.seed == 0] == [
        f"vote/{setting}-s0" for setting in ("base", "kl", "other_voter")
    ]
    assert not any(setting == "no_votes" for setting, *_ in plan.reading_of)
    vote = plan.reading_of["kl", 1, "vote"]
    assert vote.recipe.stage_dirs == {"prepare": "r/shared/base/prepare"}
    assert vote.recipe.evaluate.answers == {
        "sft": "r/cells/base-sft-s1/evaluate",
        "tppo": "r/cells/kl-tppo-s1/evaluate",
        "dpo": "r/cells/base-dpo-s1/evaluate",  # DPO reads no setting of rl
        "targets": "r/cells/base-sft-s1/evaluate",
        "other_user": "r/cells/base-sft-s1/evaluate",
    }
    assert stage_inputs("read_vote", vote.recipe) == list(vote.recipe.stage_dirs)
    assert [job.name for job in plan.jobs if vote.needs(job)] == [
        "shared/base", "cells/base-sft-s1", "cells/base-dpo-s1", "cells/kl-tppo-s1",
    ]  # fmt: skip
    # A setting without a cell of its own shares the votes.
    same = make_plan(
        make_recipe("r", Setting("n", {"serve.port": 8001}), evaluate=Evaluate(readings=[Reading("vote")]))
    )
    assert len(same.readings) == 2
    assert same.reading_of["n", 1, "vote"] is same.reading_of["base", 1, "vote"]
    # Votes change no cell: a finished study can be voted on afterwards.
    without = make_plan(make_recipe("r", settings[0]))
    assert [job for job in plan.cells if job.setting in ("base", "kl")] == [
        replace(job, recipe=replace(job.recipe)) for job in without.cells
    ]


def test_every_folder_is_made_once():
    settings = [Setting("a", {"sft.epochs": 2.0}), Setting("b", {"sft.epochs": 2.0, "reward.epochs": 9})]
    plan = make_plan(make_recipe("r", *settings))
    folders = [job.run.path(stage) for job in plan.jobs for stage in job.stages]
    assert len(folders) == len(set(folders))
    for number, job in enumerate(plan.jobs):
        earlier = {str(other.run.path(stage)) for other in plan.jobs[:number] for stage in other.stages}
        assert set(job.recipe.stage_dirs.values()) <= earlier
    assert stages(plan)["shared/b"][0] == "reward"


def test_a_setting_may_be_for_some_algorithms_only():
    setting = Setting("t", {"task.history_events": 4}, ["tppo"])
    plan = make_plan(make_recipe("r", setting))
    assert ("t", "tppo", 0) in plan.cell_of
    assert ("t", "sft", 0) in plan.cell_of
    assert ("t", "dpo", 0) not in plan.cell_of, "the recipe's own DPO answers other prompts"


def test_stages_of_another_run_are_taken_over_when_they_fit(tmp_path: Path):
    recipe = make_recipe(tmp_path / "study", stage_dirs={"prepare": str(tmp_path / "old/prepare")})
    plan = make_plan(recipe)
    assert "prepare" not in stages(plan)["shared/base"]
    assert {job.recipe.stage_dirs["prepare"] for job in plan.jobs} == {str(tmp_path / "old/prepare")}
    with pytest.raises(UserError, match="is taken from"):
        check_taken(recipe)
    with RunFolder(replace(recipe, run_dir=str(tmp_path / "old"), stage_dirs={}, seed=6)).stage("prepare"):
        pass
    with pytest.raises(UserError, match="seed: 6 -> 5"):
        check_taken(recipe)


def test_a_stage_taken_from_elsewhere_is_neither_made_nor_deleted(tmp_path: Path):
    taken = tmp_path / "old/prepare"
    recipe = make_recipe(tmp_path / "new", stage_dirs={"prepare": str(taken)})
    with pytest.raises(UserError, match="is taken from"), RunFolder(recipe).stage("prepare"):
        pass
    with RunFolder(replace(recipe, run_dir=str(tmp_path / "old"), stage_dirs={})).stage("prepare"):
        pass
    with RunFolder(recipe).stage("sft"):
        pass
    assert RunFolder(recipe).is_done("sft")
    RunFolder(recipe).discard_from("prepare")
    assert (taken / "manifest.json").exists()
    assert not (tmp_path / "new/sft").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"study": Study(seeds=[])}, "at least one seed"),
        ({"study": Study(seeds=[1, 1])}, "each once"),
        ({"algorithms": []}, "at least one algorithm"),
        ({"study": Study(settings=[Setting("base")])}, "the recipe as it stands"),
        ({"study": Study(settings=[Setting("a/b")])}, "no name for a setting"),
        ({"study": Study(settings=[Setting("a", {"rl.kl_cof": 1.0})])}, r"settings 'a'.*kl_cof"),
        ({"study": Study(settings=[Setting("a", {"rl.kl_coef": "x"})])}, r"settings 'a'.*kl_coef"),
        ({"study": Study(settings=[Setting("a", {"seed": 3})])}, "cannot be overridden"),
        ({"study": Study(settings=[Setting("a", {"rl.kl_coef": 0.2})])}, "changes nothing"),
        ({"study": Study(settings=[Setting("a", {"rl.kl_coef": 0.1}, ["ppo"])])}, r"\['ppo'\] are none of"),
        ({"study": Study(workers=0)}, "workers=0"),
        ({"evaluate": Evaluate(models=["tppo"])}, "leave them empty"),
        ({"evaluate": Evaluate(readings=[Reading("vote"), Reading("vote", 5)])}, "names a reader twice"),
        ({"evaluate": Evaluate(readings=[Reading("vote", -1)])}, "give 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(changes: dict, words: str):
    with pytest.raises(UserError, match=f"(?s){words}"):
        make_plan(make_recipe("r", **changes))


def test_the_plan_says_what_is_left(tmp_path: Path):
    plan = make_plan(make_recipe(tmp_path, sample=Sampling()))
    with plan.shared[0].run.stage("prepare"):
        pass
    lines = describe(plan)
    assert "1 prepare (0 to make), 1 sft (1 to make)" in lines[-1]
    assert lines[-1].endswith("2 rl_tppo (2 to make), 2 rl_dpo (2 to make)")


def test_workers_have_a_gpu_each_or_share_the_threads(monkeypatch: pytest.MonkeyPatch):
    assert worker_environments(1) == [{}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert worker_environments(2) == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(UserError, match=r"workers=3, but 2 GPUs"):
        worker_environments(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    assert worker_environments(3) == [{"OMP_NUM_THREADS": "2"}] * 3
    with pytest.raises(UserError, match=r"workers=8, but without a GPU there are 7 CPU threads"):
        worker_environments(8)
