"""The stages of a run: what each is called, where its code is, which folders it reads and which settings it depends on.

One folder per stage; a stage reads only folders to its left. A stage that is made several times in a run has its
variant in its name: `rl_tppo`, `rl_dpo` (the algorithm), `read_vote` (the reader).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast, get_args

from tppo.core.common import UserError
from tppo.core.config import WITHOUT_EFFECT, Algorithm, Reader, Recipe, TuningAlgorithm, judge_identity, rl_identity
from tppo.core.files import UNFINISHED
from tppo.core.outside import Log, Model, Outside

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


@dataclass(frozen=True)
class Stage:
    """A stage, or a kind of stage that has variants."""

    name: str
    """Also the section of the recipe that it depends on, where there is one, and, with `-` for `_`, its command."""
    module: str
    """Its code: `run(recipe, run, folder)`, which returns facts for the manifest."""
    help: str
    inputs: Callable[[Recipe], Sequence[str]] = lambda recipe: ()
    """Stages that it reads, all to the left."""
    settings: Callable[[Recipe], dict[str, Any]] = lambda recipe: {}
    """What its result depends on beside its own section, the task and the seed; an entry takes the place of the
    section."""
    sections: tuple[str, ...] = ()
    """Sections that its command shows in its help beside its own."""
    precision: str = ""
    """Section whose `precision` its matrix products have; empty: it has no choice."""
    derived: bool = False
    """Made anew whenever what it reads has changed, without being asked: a matter of seconds, with nothing to lose."""
    outside: Callable[[Recipe], dict[str, Outside]] = lambda recipe: {}
    """What it reads from outside the run folder, by setting."""
    writes: tuple[str, ...] = ()
    """Names in its folder, as patterns, beside those that any stage may leave unfinished (`LEFTOVERS`)."""
    restarts: tuple[str, ...] = ()
    """Names in its unfinished folder that are nothing to lose: with other settings it begins anew without being asked,
    as from an empty folder."""
    shared: bool = True
    """Before the tuning of policies: `shared_seed` is its seed where there is one, and one of them serves many
    tunings."""


def _parts(recipe: Recipe) -> dict[str, Any]:
    return {"parts": asdict(recipe.parts)}


def _judged_by(llm: bool, recipe: Recipe) -> dict[str, Any]:
    return {"judge": judge_identity(recipe.judge)} if llm else {}


def _rl(algorithm: str, recipe: Recipe) -> dict[str, Any]:
    return {"rl": rl_identity(recipe.rl) | {"algorithm": algorithm}}


def _dpo(recipe: Recipe) -> dict[str, Any]:
    """Judged pairs are ordered by the verdicts that the reward models learn; held-out pairs are as many as SFT's."""
    shared = {"rubric": recipe.reward.rubric, "max_eval_examples": recipe.sft.max_eval_examples}
    return {"dpo": asdict(recipe.dpo) | shared}


def _evaluate(recipe: Recipe) -> dict[str, Any]:
    """The readings change no answer and no verdict of the first judge. `shared_seed` chooses the examples; `seed` draws
    the answers."""
    own = _without(recipe.evaluate, "readings", "answers")
    models = evaluated_models(recipe)
    return {
        "evaluate": own | {"batch_size": recipe.sample.batch_size},
        "shared_seed": recipe.shared_seed,
        **_judged_by(uses_llm_judge("evaluate", recipe), recipe),
        **_parts(recipe),  # an embedding judge is calibrated anew
        # It chooses by TPPO's reward, whatever algorithm the section names.
        **(_rl("tppo", recipe) if "best_of_n" in models else {}),
        **({"start_model": recipe.sft.model} if "untuned" in models else {}),
    }


def _read(recipe: Recipe) -> dict[str, Any]:
    """Of the one reading that `of_variant` leaves in the recipe. `shared_seed` chooses the examples."""
    (reading,) = recipe.evaluate.readings
    depends: dict[str, Any] = {"read": asdict(reading), "shared_seed": recipe.shared_seed}
    depends |= _judged_by(reading.reader in ("llm", "vote"), recipe)
    if reading.reader == "vote":
        depends["rubric"] = recipe.reward.rubric
    if reading.reader == "embedding":
        depends |= {"label": asdict(recipe.label), **_parts(recipe)}  # how it is calibrated
    if reading.reader == "distance":
        depends |= {"precision": recipe.rl.precision}
        depends |= {name: getattr(recipe.evaluate, name) for name in ("splits", "max_examples")}
    return depends


def _judge_encoder(stage: str, recipe: Recipe) -> dict[str, Outside]:
    """The encoder of the offline judge, where that is who judges; no other stage loads it."""
    return {} if uses_llm_judge(stage, recipe) else {"label.encoder": Model(recipe.label.encoder)}


def _read_outside(recipe: Recipe) -> dict[str, Outside]:
    (reading,) = recipe.evaluate.readings
    return {"label.encoder": Model(recipe.label.encoder)} if reading.reader == "embedding" else {}


def _start_model(recipe: Recipe) -> dict[str, Outside]:
    return {} if recipe.sft.model == "scratch" else {"sft.model": Model(recipe.sft.model)}


def _tuned(recipe: Recipe) -> list[str]:
    return [rl_stage(algorithm) for algorithm in recipe.algorithms]


LEFTOVERS = (*UNFINISHED, "tmp-checkpoint-*", "tmp-old-checkpoint-*", "scratch", "checkpoint-*", "facts.json")
"""Names, as patterns, of what a stage that was stopped may leave in its folder, beside half of a file that it writes:
half a model, work kept to go on from."""
_TRACKED = ("tensorboard", "events.out.tfevents.*", "wandb", "mlruns", "mlflow.db", ".trackio")

STAGES = {
    stage.name: stage
    for stage in (
        Stage("synthetic", "tppo.logs.synthetic", "write the seeded synthetic log", writes=("log.tsv",)),
        Stage(
            "prepare",
            "tppo.logs.prepare",
            "interaction log -> examples (history, next queries), with every rejected row accounted for",
            inputs=lambda recipe: ["synthetic"] if recipe.prepare.source == ["synthetic"] else [],
            outside=lambda recipe: (
                {} if recipe.prepare.source == ["synthetic"] else {"prepare.source": Log(tuple(recipe.prepare.source))}
            ),
            writes=("examples.parquet", "rejects.parquet"),
            # A pass over the log; the advice of a stop (a setting, a mended file) has to lead somewhere.
            restarts=("scratch", "rejects.parquet"),
        ),
        Stage(
            "sft",
            "tppo.tune.sft",
            "examples -> a language model fine-tuned on the true next queries",
            inputs=lambda recipe: ["prepare"],
            settings=_parts,
            sections=("parts",),
            precision="sft",
            outside=_start_model,
            writes=("model", "metrics.jsonl", "trained_on.parquet"),
        ),
        Stage(
            "sample",
            "tppo.generate.sample",
            "draw query lists from the SFT model: the responses to be labelled",
            inputs=lambda recipe: ["prepare", "sft"],
            settings=_parts,
            sections=("parts",),
            precision="sft",
            writes=("responses.parquet", "seen.parquet"),
        ),
        Stage(
            "label",
            "tppo.judge.label",
            "judge every word and every response for relevance",
            inputs=lambda recipe: ["prepare", "sample"],
            settings=lambda recipe: _parts(recipe) | _judged_by(uses_llm_judge("label", recipe), recipe),
            sections=("judge", "parts"),
            outside=lambda recipe: _judge_encoder("label", recipe),
            writes=("labels.parquet", "constructed.parquet", "judge.json", "seen.parquet"),
        ),
        Stage(
            "reward",
            "tppo.reward.train",
            "labels -> token-level reward model and its sentence-level rival",
            inputs=lambda recipe: ["prepare", "label"],
            precision="reward",
            outside=lambda recipe: {"reward.encoder": Model(recipe.reward.encoder)},
            writes=("token", "sentence", "metrics.jsonl"),
        ),
        Stage(
            "check_reward",
            "tppo.reward.gate",
            "the gate before RL: do the reward models know their job? Held-out users, probes, thresholds",
            inputs=lambda recipe: ["prepare", "label", "reward"],
            # What RL does with the verdict is no part of it: the check is the same either way.
            settings=lambda recipe: {"check_reward": _without(recipe.check_reward, "allow_failed")},
            writes=("check.json", "README.md"),
        ),
        Stage(
            "rl",
            "tppo.rl.stage",
            "policy + reward model -> tuned policy (tppo, ppo or ppo_sum: --rl.algorithm)",
            inputs=lambda recipe: ["prepare", "sft", "sample", "reward"],
            settings=lambda recipe: _rl(recipe.rl.algorithm, recipe) | _parts(recipe),
            sections=("parts",),
            precision="rl",
            writes=("model", "metrics.jsonl", "samples.jsonl", "run.json", "trackers.json", *_TRACKED),
            shared=False,
        ),
        Stage(
            "dpo",
            "tppo.tune.dpo",
            "policy + pairs of responses -> tuned policy (direct preference optimisation, no reward model)",
            inputs=lambda recipe: ["prepare", "sft", "sample", *(["label"] if recipe.dpo.pairs == "judged" else [])],
            settings=_dpo,
            precision="dpo",
            writes=("model", "metrics.jsonl"),
            shared=False,
        ),
        Stage(
            "evaluate",
            "tppo.evaluate.stage",
            "judge SFT and every tuned policy on users never trained on",
            inputs=lambda recipe: [
                *("prepare", "sft", "label"),
                *(["sample", "reward"] if "best_of_n" in evaluated_models(recipe) else []),
                *_tuned(recipe),
            ],
            settings=_evaluate,
            sections=("judge",),
            precision="rl",
            outside=lambda recipe: {
                "evaluate.encoder": Model(recipe.evaluate.encoder),
                **_judge_encoder("evaluate", recipe),
                **(_start_model(recipe) if "untuned" in evaluated_models(recipe) else {}),
            },
            writes=("answers.parquet", "readings.parquet", "metrics.json"),
            shared=False,
        ),
        Stage(
            "read",
            "tppo.evaluate.readings",
            "another judge, votes or distances on finished answers (evaluate.readings)",
            inputs=lambda recipe: [
                "prepare",
                *(
                    ["sft", *_tuned(recipe)]
                    if recipe.evaluate.readings[0].reader == "distance"
                    else []
                    if recipe.evaluate.answers
                    else ["evaluate"]
                ),
            ],
            settings=_read,
            sections=("evaluate", "judge"),
            precision="rl",
            outside=_read_outside,
            writes=("readings.parquet",),
            shared=False,
        ),
        Stage(
            "report",
            "tppo.report.page",
            "one self-contained HTML page: verdict, tables, curves, samples",
            inputs=lambda recipe: [
                *("prepare", "sft", "label", "reward", "check_reward"),
                *_tuned(recipe),
                "evaluate",
                *read_stages(recipe),
            ],
            derived=True,
            writes=("report.html", "summary.md", "metrics.json"),
            shared=False,
        ),
    )
}


def rl_stage(algorithm: str) -> str:
    """Name of the stage (and its folder) that trains with this algorithm."""
    return f"rl_{algorithm}"


def read_stages(recipe: Recipe) -> list[str]:
    """Names of the stages that read finished answers."""
    return [f"read_{reading.reader}" for reading in recipe.evaluate.readings]


def stage_names() -> list[str]:
    """Every stage that a run can have, by the name of its folder."""
    single = [name for name in STAGES if name not in ("rl", "dpo", "read")]
    tuned = [rl_stage(algorithm) for algorithm in get_args(TuningAlgorithm)]
    return [*single, *tuned, *(f"read_{reader}" for reader in get_args(Reader))]


def split_stage(stage: str) -> tuple[str, str]:
    """Name in `STAGES` and variant: `rl_ppo` -> ("rl", "ppo"), `rl_dpo` -> ("dpo", "dpo"), `sft` -> ("sft", "")."""
    kind, _, variant = stage.partition("_")
    if kind not in ("rl", "read"):
        return stage, ""
    return ("dpo" if stage == "rl_dpo" else kind), variant


def of_variant(stage: str, recipe: Recipe) -> Recipe:
    """The recipe as a variant of a stage reads it: the algorithm, or the one reading, that its name says.

    Raises:
        UserError: a reading that the recipe does not have.
    """
    name, variant = split_stage(stage)
    if name == "rl":
        return replace(recipe, rl=replace(recipe.rl, algorithm=cast(Algorithm, variant)))
    if name != "read":
        return recipe
    readings = [reading for reading in recipe.evaluate.readings if reading.reader == variant]
    if len(readings) != 1:
        raise UserError(
            f"evaluate.readings={[asdict(reading) for reading in recipe.evaluate.readings]} has to name the reader "
            f"{variant} once: `--evaluate.readings '[{{reader: {variant}, examples: 100}}]'`"
        )
    return replace(recipe, evaluate=replace(recipe.evaluate, readings=readings))


def stage_command(stage: str, recipe: Recipe) -> tuple[str, list[str]]:
    """Subcommand that runs a stage, and the flags it needs."""
    name, variant = split_stage(stage)
    flags = {"rl": ["--rl.algorithm", variant]}.get(name, [])
    if name == "read":
        (reading,) = of_variant(stage, recipe).evaluate.readings
        flags = ["--evaluate.readings", json.dumps([asdict(reading)])]
    return name.replace("_", "-"), flags


def stage_inputs(stage: str, recipe: Recipe) -> list[str]:
    """Stages (all to the left) that a stage reads."""
    return list(STAGES[split_stage(stage)[0]].inputs(of_variant(stage, recipe)))


def stage_outside(stage: str, recipe: Recipe) -> dict[str, Outside]:
    """What a stage reads from outside the run folder, by setting."""
    return STAGES[split_stage(stage)[0]].outside(of_variant(stage, recipe))


def stage_seed(stage: str, recipe: Recipe) -> int:
    """The seed that a stage's work has."""
    return recipe.data_seed if STAGES[split_stage(stage)[0]].shared else recipe.seed


def precision_section(stage: str) -> str:
    """The section whose `precision` a stage's matrix products have; empty for a stage that has no choice."""
    name, variant = split_stage(stage)
    return "" if name == "read" and variant != "distance" else STAGES[name].precision


def evaluated_models(recipe: Recipe) -> list[str]:
    """Who answers, in the order of the tables: policies, baselines, references; those of `evaluate.models` if it names
    any."""
    evaluate = recipe.evaluate
    untuned = ["untuned"] if evaluate.untuned else []
    everybody = ["sft", *recipe.algorithms, *untuned, *evaluate.baselines, *REFERENCES]
    return [model for model in everybody if not evaluate.models or model in evaluate.models]


def all_stages(recipe: Recipe) -> list[str]:
    """The stages of `tppo run`, left to right."""
    return [*shared_stages(recipe), *_tuned(recipe), "evaluate", *read_stages(recipe), "report"]


def shared_stages(recipe: Recipe) -> list[str]:
    """The stages before the tuning of policies, left to right: one set of them serves many tunings."""
    first = stage_inputs("prepare", recipe)
    return [name for name, stage in STAGES.items() if stage.shared and (name != "synthetic" or name in first)]


def stage_config(stage: str, recipe: Recipe) -> dict[str, Any]:
    """The settings a stage depends on: its own section, the task and the seed."""
    name, _ = split_stage(stage)
    recipe = of_variant(stage, recipe)
    section = {name: asdict(getattr(recipe, name))} if hasattr(recipe, name) else {}
    config = {
        "seed": stage_seed(stage, recipe),
        "task": asdict(recipe.task),
        **section,
        **STAGES[name].settings(recipe),
    }
    return without_settings(config, WITHOUT_EFFECT)


def without_settings(config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Settings by section without some, given as `section.name`."""
    return {
        section: {name: value for name, value in values.items() if f"{section}.{name}" not in names}
        if isinstance(values, dict)
        else values
        for section, values in config.items()
    }


def uses_llm_judge(stage: str, recipe: Recipe) -> bool:
    """Whether the section `judge` says who judges in `label` or `evaluate`."""
    by_labels = recipe.label.judge == "llm"
    judge = recipe.evaluate.judge
    return by_labels if stage == "label" else judge == "llm" or (judge == "label" and by_labels)


def _without(section: Any, *names: str) -> dict[str, Any]:
    return {name: value for name, value in asdict(section).items() if name not in names}
