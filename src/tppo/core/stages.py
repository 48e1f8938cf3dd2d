""""""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from tppo.core.config import Baseline, Recipe, judge_identity, rl_identity

# Each model is compared with those after it, the farthest (SFT) first.
MODEL_ORDER = ("tppo", "ppo_sum", "ppo", "dpo", "sft")
DISPLAY = {
    "sft": "SFT",
    "dpo": "DPO",
    "ppo": "PPO",
    "ppo_sum": "PPO (token sum)",
    "tppo": "TPPO",
    "untuned": "Without SFT",
    "best_of_n": "SFT, best of n",
    "frequent_next": "Most frequent next",
    "repeat_last": "Last query again",
    "repeat_recent": "Last queries again",
    "nearest": "Nearest neighbour",
    "targets": "True next queries",
    "other_user": "Another user's next queries",
}
REFERENCES: tuple[str, str] = ("targets", "other_user")
"""The scale of a judge: queries that are as good as can be, and queries of somebody else."""
BASELINES = ("untuned", "best_of_n", "frequent_next", "repeat_last", "repeat_recent", "nearest")
"""What every policy is compared with, besides the other policies."""
EVALUATION = "evaluate_"
"""With a model behind it: the name under which `vote` and `rejudge` take that model's evaluation over."""
PRECISION_OF = {
    **{stage: stage for stage in ("sft", "reward", "rl", "dpo")},
    **{"sample": "sft", "evaluate": "rl", "distance": "rl"},
}
"""Section of a stage -> the section whose `precision` its matrix products have. The other stages have no choice."""


def rl_stage(algorithm: str) -> str:
    """Name of the stage (and its folder) that trains with this algorithm."""
    return f"rl_{algorithm}"


def split_stage(stage: str) -> tuple[str, str]:
    """Section of the recipe and algorithm of a stage: `rl_ppo` -> ("rl", "ppo"), `rl_dpo` -> ("dpo", "dpo"), `sft` ->
    ("sft", "")."""
    if not stage.startswith("rl_"):
        return stage, ""
    algorithm = stage.removeprefix("rl_")
    return ("dpo" if algorithm == "dpo" else "rl"), algorithm


def stage_command(stage: str) -> tuple[str, list[str]]:
    """Subcommand that runs a stage, and the flags it needs."""
    section, algorithm = split_stage(stage)
    return section.replace("_", "-"), ["--rl.algorithm", algorithm] if section == "rl" else []


def taken_models(recipe: Recipe) -> list[str]:
    """Models whose answers `vote` and `rejudge` read: `evaluate_<model>` is taken from elsewhere for each."""
    return [name.removeprefix(EVALUATION) for name in recipe.stage_dirs if name.startswith(EVALUATION)]


def stage_inputs(stage: str, recipe: Recipe) -> list[str]:
    """Folders (all to the left) that a stage reads."""
    synthetic = ["synthetic"] if recipe.prepare.source == ["synthetic"] else []
    rl_stages = [rl_stage(algorithm) for algorithm in recipe.algorithms]
    evaluations = [EVALUATION + model for model in taken_models(recipe)]
    best_of_n_inputs = ["sample", "reward"] if "best_of_n" in evaluated_baselines(recipe) else []
    inputs = {
        "synthetic": [],
        "prepare": synthetic,
        "sft": ["prepare"],
        "sample": ["prepare", "sft"],
        "label": ["prepare", "sample"],
        "reward": ["prepare", "label"],
        "check_reward": ["prepare", "label", "reward"],
        "evaluate": ["prepare", "sft", "label", *best_of_n_inputs, *rl_stages],
        "report": ["prepare", "sft", "label", "reward", "check_reward", *rl_stages, "evaluate"],
        "vote": ["prepare", *evaluations],
        "rejudge": ["prepare", *evaluations],
        "distance": ["prepare", "sft", *rl_stages],
    }
    if split_stage(stage)[0] == "dpo":
        return ["prepare", "sft", "sample", *(["label"] if recipe.dpo.pairs == "judged" else [])]
    return ["prepare", "sft", "sample", "reward"] if split_stage(stage)[0] == "rl" else inputs[stage]


def evaluated_baselines(recipe: Recipe) -> list[Baseline]:
    """The simple baselines that `evaluate` answers with: none beside tuned policies alone."""
    return [] if recipe.evaluate.tuned_only else recipe.evaluate.baselines


def all_stages(recipe: Recipe) -> list[str]:
    """The stages of `tppo run`, left to right."""
    first = stage_inputs("prepare", recipe)
    rl_stages = [rl_stage(algorithm) for algorithm in recipe.algorithms]
    return [*first, "prepare", "sft", "sample", "label", "reward", "check_reward", *rl_stages, "evaluate", "report"]


def shared_stages(recipe: Recipe) -> list[str]:
    """The stages before the tuning of policies, left to right: one set of them serves many tunings."""
    return [stage for stage in all_stages(replace(recipe, algorithms=[])) if stage not in ("evaluate", "report")]


def stage_config(stage: str, recipe: Recipe) -> dict[str, Any]:
    """The settings a stage depends on: its own section, the task and the seed."""
    section, algorithm = split_stage(stage)
    seed = recipe.data_seed if stage in shared_stages(recipe) else recipe.seed
    config: dict[str, Any] = {"seed": seed, "task": asdict(recipe.task)}
    if stage == "evaluate":
        config["shared_seed"] = recipe.shared_seed  # it chooses the examples; `seed` draws the answers
    if hasattr(recipe, section):
        config[section] = asdict(getattr(recipe, section))
    if uses_llm_judge(stage, recipe):
        config["judge"] = judge_identity(recipe.judge)
    if stage == "evaluate":
        del config["evaluate"]["distance_examples"]
        if not recipe.evaluate.vote:
            del config["evaluate"]["vote_examples"]
    if stage == "vote":
        config |= {"rubric": recipe.reward.rubric, "vote_examples": recipe.evaluate.vote_examples}
        config["shared_seed"] = recipe.shared_seed  # it chooses the examples
    if stage == "rejudge":
        evaluate = recipe.evaluate
        config |= {name: getattr(evaluate, name) for name in ("second_judge", "second_judge_examples")}
        config["shared_seed"] = recipe.shared_seed  # it chooses the examples
        if evaluate.second_judge == "embedding":
            config["label"] = asdict(recipe.label)  # how it is calibrated
    if stage == "distance":
        evaluate, config["precision"] = recipe.evaluate, recipe.rl.precision
        config |= {name: getattr(evaluate, name) for name in ("splits", "max_examples", "distance_examples")}
        config["shared_seed"] = recipe.shared_seed  # it chooses the examples; `seed` draws the answers
    if section == "rl":
        config["rl"] = rl_identity(recipe.rl) | {"algorithm": algorithm}
    if section == "check_reward":
        del config[section]["allow_failed"]  # what RL does with the verdict: the check is the same either way
    if stage == "evaluate" and "best_of_n" in evaluated_baselines(recipe):
        # It chooses by TPPO's reward, whatever algorithm the section names.
        config["rl"] = rl_identity(recipe.rl) | {"algorithm": "tppo"}
    if stage == "evaluate" and recipe.evaluate.untuned and not recipe.evaluate.tuned_only:
        config["start_model"] = recipe.sft.model
    return config


def uses_llm_judge(stage: str, recipe: Recipe) -> bool:
    """Whether a stage's results depend on the section `judge`."""
    by_labels = recipe.label.judge == "llm"
    if stage == "label":
        return by_labels
    if stage == "vote":
        return True
    evaluate = recipe.evaluate
    if stage == "rejudge":
        return evaluate.second_judge == "llm"
    return stage == "evaluate" and (
        evaluate.vote or "llm" in (evaluate.judge, evaluate.second_judge) or (evaluate.judge == "label" and by_labels)
    )


MODULES = {
    "synthetic": "tppo.logs.synthetic",
    "prepare": "tppo.logs.prepare",
    "sft": "tppo.tune.sft",
    "sample": "tppo.generate.sample",
    "label": "tppo.judge.label",
    "reward": "tppo.reward.train",
    "check_reward": "tppo.reward.gate",
    "rl": "tppo.rl.stage",
    "dpo": "tppo.tune.dpo",
    "evaluate": "tppo.evaluate.readings",
    "vote": "tppo.evaluate.votes",
    "rejudge": "tppo.evaluate.second",
    "distance": "tppo.evaluate.distance",
    "report": "tppo.report.page",
}
