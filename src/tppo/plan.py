"""`tppo plan recipe.yaml`: a dry run. Checks every section without data, and says what each stage would take.

Nothing is downloaded, loaded or run. Models are counted from their config: of a local folder, of the hub's cache, or
(for those of the paper and the bundled one) built in. Estimates are upper bounds in length, since every prompt and
response is taken at its token limit; formulas and sources are in `tppo.estimate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tppo import estimate
from tppo.core.common import UserError
from tppo.core.config import DPO, SFT, Recipe
from tppo.core.recipe import check_samples
from tppo.core.run import RunFolder
from tppo.core.stages import REFERENCES, STAGES, all_stages, evaluated_models, of_variant, split_stage, uses_llm_judge
from tppo.estimate import GIB, Machine, ModelSize
from tppo.evaluate.compare import voted_pairs
from tppo.evaluate.stage import check_settings as check_evaluate
from tppo.judge.label import check_settings as check_label
from tppo.judge.llm import LLMJudge
from tppo.judge.probes import PROBES
from tppo.logs.prepare import check_settings as check_prepare
from tppo.model_sizes import encoder_size, policy_size
from tppo.reward.train import KINDS, settings_for
from tppo.reward.train import check_settings as check_reward
from tppo.rl.guards import check_config
from tppo.tune.trl import check_batch_sizes

UTILISATION = 0.4
"""Share of the peak speed that is reached: a usual figure for well-tuned training. Where you measured another one, give
`plan.tflops` the speed you measured, divided by this."""


@dataclass
class StagePlan:
    """What one stage would do and take; None: it cannot be told before the data are there."""

    stage: str
    does: str
    memory: dict[str, float] | None = None
    """Bytes at the peak, by what they are for."""
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)


def print_plan(recipe: Recipe) -> None:
    """Check the recipe and print the plan."""
    print(plan_text(recipe))


def check(recipe: Recipe, policy: ModelSize, encoder: ModelSize) -> None:
    """Every check of settings that needs no data.

    Raises:
        UserError: names the setting that is out of range, or the two that contradict each other.
    """
    check_prepare(recipe.prepare)
    check_batch_sizes(recipe.sft, "sft")
    check_label(recipe.label)
    check_reward(recipe.reward)
    check_config(recipe.rl, recipe.task.max_response_tokens)
    if "dpo" in recipe.algorithms:
        check_batch_sizes(recipe.dpo, "dpo")
    check_samples(recipe)
    check_evaluate(recipe)
    asked = any(reading.reader in ("llm", "vote") for reading in recipe.evaluate.readings)
    if asked or any(uses_llm_judge(stage, recipe) for stage in ("label", "evaluate")):
        LLMJudge(recipe.judge)
    task, reward, judge = recipe.task, recipe.reward, recipe.judge
    length = task.max_prompt_tokens + task.max_response_tokens
    by_llm = recipe.label.judge == "llm"
    wrong = [
        (task.num_queries < 1, f"task.num_queries={task.num_queries}: ask for at least 1"),
        (
            len(set(recipe.algorithms)) < len(recipe.algorithms),
            f"algorithms={recipe.algorithms} names one twice",
        ),
        (
            0 < policy.positions < length,
            f"task.max_prompt_tokens + task.max_response_tokens is {length}, more than the {policy.positions} "
            f"positions of sft.model={recipe.sft.model}",
        ),
        (
            0 < encoder.positions < reward.max_length,
            f"reward.max_length={reward.max_length} is more than the {encoder.positions} positions of "
            f"reward.encoder={reward.encoder} (reward.to_longformer gives it more)",
        ),
        (
            by_llm and reward.rubric not in judge.rubrics,
            f"reward.rubric={reward.rubric} is not among judge.rubrics={judge.rubrics}: nobody would label it",
        ),
        (
            by_llm and judge.template == "sentence",
            "judge.template=sentence gives no word labels, which the token-level reward model learns from: use token",
        ),
    ]
    for is_wrong, words in wrong:
        if is_wrong:
            raise UserError(words)


class Planner:
    """Plans of the stages of one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe = _on_the_assumed_device(recipe)
        plan = recipe.plan
        for name in ("tflops", "bandwidth", "device_memory"):
            if getattr(plan, name) <= 0:
                raise UserError(f"plan.{name}={getattr(plan, name)}: give a number above 0")
        self.machine = Machine(plan.tflops * 1e12 * UTILISATION, plan.bandwidth * 1e12)
        self.policy = policy_size(recipe)
        self.encoder = encoder_size(recipe.reward)
        check(recipe, self.policy, self.encoder)
        self.prompt, self.response = recipe.task.max_prompt_tokens, recipe.task.max_response_tokens
        self.length = self.prompt + self.response
        self.run = RunFolder(recipe)

    def stages(self) -> list[StagePlan]:
        return [self._stage(stage) for stage in all_stages(self.recipe)]

    def _stage(self, stage: str) -> StagePlan:
        section = split_stage(stage)[0]
        plans = {
            "sft": self.sft,
            "sample": self.sample,
            "label": self.label,
            "reward": self.reward,
            "check_reward": self.check_reward,
            "evaluate": self.evaluate,
        }
        if section == "rl":
            return self.rl(stage)
        if section == "read":
            return self.read(stage)
        if section in plans:
            return plans[section]()
        if section == "dpo":
            return self.dpo(stage)
        does = {"prepare": f"reads {', '.join(self.recipe.prepare.source)}; memory_limit "
                f"{self.recipe.prepare.memory_limit}", "synthetic": "writes a log"}  # fmt: skip
        return StagePlan(stage, does.get(section, "writes the page"))

    def examples(self, limit: int, split: str) -> int | None:
        """How many examples of a split are used: the limit, or what `prepare` found if that is done; else unknown."""
        manifest = self.run.manifest("prepare")
        found = manifest["facts"].get("examples", {}).get(split) if manifest else None
        counts = [count for count in (limit or None, found) if count is not None]
        return min(counts) if counts else None

    def sft(self) -> StagePlan:
        settings = self.recipe.sft
        count = self.examples(settings.max_examples, "train")
        memory = self._training_memory(settings, settings.micro_batch_size, settings.micro_batch_size * self.response)
        if count is None:
            return StagePlan("sft", "all training examples: unknown before prepare", memory)
        passes = count * settings.epochs
        does = f"{count:,} examples x {settings.epochs:g} epochs = {passes / settings.batch_size:,.0f} steps of "
        seconds = self.machine.train(self.policy, passes * self.length, settings.tuning)
        return StagePlan("sft", f"{does}{settings.batch_size}, {_tokens(passes * self.length)}", memory, seconds)

    def dpo(self, stage: str) -> StagePlan:
        settings, sample = self.recipe.dpo, self.recipe.sample
        pairs = self.examples(sample.train_examples, "train") or 0
        sequences = 2 * settings.micro_batch_size
        # DPOTrainer makes logits at every position.
        memory = self._training_memory(settings, sequences, sequences * self.length)
        if settings.tuning == "full":
            memory["reference"] = estimate.weights(self.policy, "fp32")
        tokens = 2 * pairs * settings.epochs * self.length
        seconds = self.machine.train(self.policy, tokens, settings.tuning) + self.machine.forward(self.policy, tokens)
        does = f"{pairs:,} pairs x {settings.epochs:g} epochs = {pairs * settings.epochs / settings.batch_size:,.0f} "
        return StagePlan(stage, f"{does}steps of {settings.batch_size}, {_tokens(tokens)}", memory, seconds)

    def sample(self) -> StagePlan:
        settings, precision = self.recipe.sample, self.recipe.sft.precision
        count = self._responses()
        return StagePlan(
            "sample",
            f"{count:,} responses, at most {_tokens(count * self.response)}",
            self._generation_memory(precision, settings.batch_size),
            self._generate(count, settings.batch_size, precision),
        )

    def label(self) -> StagePlan:
        count, judge = self._responses() + self._constructed(), self.recipe.judge
        if self.recipe.label.judge == "llm":
            requests = count * len(judge.rubrics)
            does = f"{requests:,} requests to {judge.model} at {judge.base_url}"
            return StagePlan("label", does, notes=["label: time and memory are the endpoint's"])
        return StagePlan("label", f"{count:,} responses by the offline judge, both rubrics")

    def reward(self) -> StagePlan:
        settings, sample = self.recipe.reward, self.recipe.sample
        rows = (self.examples(sample.train_examples, "train") or 0) * sample.samples_per_example + self._constructed()
        held_out = (self.examples(sample.reward_eval_examples, "reward_eval") or 0) * sample.samples_per_example
        length, size = settings.max_length, self.encoder
        global_tokens = {
            "history": max(0, length - self.response),
            "response": min(length, self.response),
            "cls": 1,
            "none": 0,
        }[settings.global_attention]
        attended = min(length, size.window + 1 + global_tokens) if size.window else length
        memory = estimate.training_state(size, "full", 0, settings.precision)
        memory["activations"] = estimate.activations(size, settings.batch_size * length, settings.precision, attended)
        epochs = [settings_for(kind, settings).epochs for kind in KINDS]
        evaluations = sum(passes * settings.evals_per_epoch + 1 for passes in epochs)
        tokens = rows * sum(epochs) * length
        seconds = self.machine.train(size, tokens) + self.machine.forward(size, evaluations * held_out * length)
        steps = rows * sum(epochs) / settings.batch_size
        does = f"2 models on {rows:,} responses, {epochs[0]} and {epochs[1]} epochs = {steps:,.0f} steps of "
        return StagePlan("reward", f"{does}{settings.batch_size}, {_tokens(tokens)}", memory, seconds)

    def check_reward(self) -> StagePlan:
        sample = self.recipe.sample
        held_out = (self.examples(sample.reward_eval_examples, "reward_eval") or 0) * sample.samples_per_example
        probed = self.examples(self.recipe.check_reward.max_examples, "reward_eval") or 0
        responses = held_out + len(PROBES) * probed
        tokens = 2 * responses * self.recipe.reward.max_length
        memory = {"reward models": 2 * estimate.weights(self.encoder, "fp32")}
        does = f"2 models x {responses:,} responses of held-out users, {_tokens(tokens)}"
        return StagePlan("check_reward", does, memory, self.machine.forward(self.encoder, tokens))

    def rl(self, stage: str) -> StagePlan:
        settings, policy = self.recipe.rl, self.policy
        memory = estimate.training_state(policy, settings.tuning, settings.lora_r, settings.precision)
        memory["rollout copy"] = estimate.weights(policy, settings.precision)
        if settings.tuning == "full":
            memory["reference"] = estimate.weights(policy, settings.precision)
        if settings.value_function == "separate":
            memory["value model"] = (2 * estimate.FLOAT32 + estimate.ADAM_BYTES) * policy.parameters
        if settings.batch_size * settings.ppo_epochs > settings.minibatch_size:
            trained = estimate.trained_parameters(policy, settings.tuning, settings.lora_r)
            memory["snapshot"] = (estimate.FLOAT32 + estimate.ADAM_BYTES) * trained
        memory["reward models"] = 2 * estimate.weights(self.encoder, "fp32")
        update = self._backward(
            settings.micro_batch_size, settings.micro_batch_size * self.response, settings.precision
        )
        cache = estimate.kv_cache(policy, settings.batch_size, self.length, settings.precision)
        # Rollout and update take turns.
        memory |= update if sum(update.values()) > cache else {"key-value cache": cache}

        tokens = settings.batch_size * self.length
        scored = settings.batch_size * min(self.recipe.reward.max_length, self.encoder.positions or self.length)
        seconds = settings.updates * (
            self._generate(settings.batch_size, settings.batch_size, settings.precision)
            + 2 * self.machine.forward(policy, tokens)
            + 2 * self.machine.forward(self.encoder, scored)
            + self.machine.train(policy, settings.ppo_epochs * tokens, settings.tuning)
        )
        steps = settings.updates * settings.ppo_epochs * settings.batch_size // settings.minibatch_size
        rollouts = settings.updates * settings.batch_size
        does = (
            f"{settings.updates:,} updates x {settings.batch_size} prompts = {rollouts:,} rollouts, {steps:,} steps, "
        )
        return StagePlan(stage, does + _tokens(rollouts * self.length), memory, seconds)

    def evaluate(self) -> StagePlan:
        settings, precision, batch = self.recipe.evaluate, self.recipe.rl.precision, self.recipe.sample.batch_size
        found = [self.examples(settings.max_examples, split) for split in settings.splits]
        names = evaluated_models(self.recipe)
        policies = [name for name in names if name not in (*settings.baselines, *REFERENCES)]
        memory = self._generation_memory(precision, batch)
        counts = [count for count in found if count is not None]
        if len(counts) < len(found):
            return StagePlan("evaluate", "all evaluation examples: unknown before prepare", memory)
        count = sum(counts)
        generated = count * (len(policies) + ("best_of_n" in names) * settings.best_of)
        does = f"{count:,} examples x {len(names)} rows of the tables; {generated:,} responses generated"
        notes = []
        if uses_llm_judge("evaluate", self.recipe):
            requests = count * len(names) * len(self.recipe.judge.rubrics)
            notes = [f"evaluate: at most {requests:,} requests to {self.recipe.judge.model}"]
        return StagePlan("evaluate", does, memory, self._generate(generated, batch, precision), notes)

    def read(self, stage: str) -> StagePlan:
        """A reading of the answers of `evaluate`."""
        settings, names = self.recipe.evaluate, evaluated_models(self.recipe)
        reading = of_variant(stage, self.recipe).evaluate.readings[0]
        found = [self.examples(settings.max_examples, split) for split in settings.splits]
        counts = [min(count, reading.examples or count) for count in found if count is not None]
        if len(counts) < len(found):
            return StagePlan(stage, "evaluation examples: unknown before prepare")
        count, seconds = sum(counts), None
        if reading.reader == "vote":
            asked, does = 2 * len(voted_pairs(names)) * count, f"votes on {count:,} examples"
        elif reading.reader == "distance":
            asked, generated = 0, count * len(self.recipe.algorithms)
            seconds = self._generate(generated, self.recipe.sample.batch_size, self.recipe.rl.precision)
            does = f"{generated:,} responses generated"
        else:
            asked = count * len(names) * len(self.recipe.judge.rubrics) if reading.reader == "llm" else 0
            does = f"{count:,} examples x {len(names)} answers read"
        notes = [f"{stage}: at most {asked:,} requests to {self.recipe.judge.model}"] if asked else []
        return StagePlan(stage, does, seconds=seconds, notes=notes)

    def _responses(self) -> int:
        sample = self.recipe.sample
        parts = ((sample.train_examples, "train"), (sample.reward_eval_examples, "reward_eval"))
        return sample.samples_per_example * sum(self.examples(limit, split) or 0 for limit, split in parts)

    def _constructed(self) -> int:
        return sum(self.examples(count, "train") or 0 for count in self.recipe.label.constructed.values() if count)

    def _generate(self, count: int, batch: int, precision: str) -> float:
        return self.machine.generate(self.policy, count, batch, self.prompt, self.response, precision)

    def _generation_memory(self, precision: str, batch: int) -> dict[str, float]:
        cache = estimate.kv_cache(self.policy, batch, self.length, precision)
        return {"weights": estimate.weights(self.policy, precision), "key-value cache": cache}

    def _training_memory(self, settings: SFT | DPO, sequences: int, positions: int) -> dict[str, float]:
        state = estimate.training_state(self.policy, settings.tuning, settings.lora_r, settings.precision)
        return state | self._backward(sequences, positions, settings.precision)

    def _backward(self, sequences: int, positions: int, precision: str) -> dict[str, float]:
        """What a micro-batch keeps; `positions` of them have logits."""
        return {
            "activations": estimate.activations(self.policy, sequences * self.length, precision),
            "logits": estimate.logits(self.policy, positions, precision),
        }


def _on_the_assumed_device(recipe: Recipe) -> Recipe:
    """The recipe with `precision: auto` as bf16, which any device worth a plan multiplies in hardware."""
    auto = {
        section: replace(settings, precision="bf16")
        for section in {stage.precision for stage in STAGES.values() if stage.precision}
        if (settings := getattr(recipe, section)).precision == "auto"
    }
    return replace(recipe, **auto)


def plan_text(recipe: Recipe) -> str:
    """The plan as text.

    Raises:
        UserError: a setting that cannot be, or a model whose shape is unknown here.
    """
    planner = Planner(recipe)
    stages, machine = planner.stages(), recipe.plan
    lines = [f"Dry run of {recipe.run_dir}: every section checked, nothing made. Lengths are upper bounds.", ""]
    encoder = f"{recipe.reward.encoder}{' as a Longformer' if recipe.reward.to_longformer else ''}"
    for name, label, size in (
        (recipe.sft.model, "policy", planner.policy),
        (encoder, "reward model", planner.encoder),
    ):
        lines.append(f"{label}: {name}, {size.parameters:,} parameters")
    lines += ["", f"{'stage':<12} {'memory':>10} {'hours':>8}  work"]
    for plan in stages:
        total = sum(plan.memory.values()) if plan.memory else None
        memory = "" if total is None else f"{total / GIB:.1f} GiB"
        hours = "" if plan.seconds is None else f"{plan.seconds / 3600:.2f}"
        lines.append(f"{plan.stage:<12} {memory:>10} {hours:>8}  {plan.does}")
    known = [plan.seconds for plan in stages if plan.seconds is not None]
    lines += [f"{'all':<12} {'':>10} {sum(known) / 3600:>8.2f}", "", "Memory at the peak, GiB:"]
    for plan in stages:
        if plan.memory:
            parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.memory.items() if size)
            lines.append(f"  {plan.stage}: {parts}")
            if sum(plan.memory.values()) > machine.device_memory * GIB:
                way_out = "shard it, or tune with LoRA"
                if plan.stage == "reward":
                    fewer = ", or give the Longformer fewer global tokens (reward.global_attention)"
                    way_out = f"lower reward.batch_size{fewer if planner.encoder.window else ''}"
                lines.append(f"    more than one device of {machine.device_memory:g} GiB: {way_out}")
    lines += ["", *(note for plan in stages for note in plan.notes)]
    lines += [
        f"Assumed: {machine.tflops:g} TFLOP/s at {UTILISATION:.0%} (plan.tflops), "
        f"{machine.bandwidth:g} TB/s (plan.bandwidth), one device; precision: auto counts as bf16.",
        "Time: 6 N per trained token (4 N with LoRA), 2 N per token read, N the parameters; a generated token also",
        "takes at least one reading of weights and cache. Formulas and sources: src/tppo/estimate.py.",
    ]
    return "\n".join(lines)


def _tokens(count: float) -> str:
    return f"{count / 1e6:,.1f}M tokens"
