"""`tppo plan recipe.yaml`: a dry run. Checks every section without data, and says what each stage would take.

Nothing is downloaded, loaded or run. Models are counted from their config: of a local folder, of the hub's cache, or
(for those of the paper and the bundled one) built in. Estimates are upper bounds in length, since every prompt and
response is taken at its token limit.

Memory is that of one device holding everything, as this package's stages do. Per parameter, with AdamW: float32
weights 4 bytes, gradients 4, two moments 8 (Rajbhandari et al., ZeRO, SC 2020, section 3.1, with float32 weights in
place of its float16 ones and their float32 copy); under bf16 autocast 2 more for the cached bf16 weights. What is
saved for the backward pass is counted tensor by tensor, as Korthikanti et al. (MLSys 2023, section 4.1) do, without
checkpointing: per token and layer 6 values of the hidden size around the two norms (float32 at all times) and, in the
precision of the products, 4 hidden sizes in the attention (a Longformer's global projections: 3 more), 4 (gated) or 2
intermediate sizes in the feed-forward part; and per head and attended position, where dropout or Longformer's own code
keeps the scores, 10 or 26 bytes. A causal model's attention keeps none (`scaled_dot_product_attention`). Both
constants were found by counting the saved tensors of tiny models; tests/test_estimate.py counts them again.

Time is floating-point operations over the assumed rate: 2 N per token forward, 6 N forward and backward, 4 N when only
adapters are trained (Kaplan et al. 2020, section 2.1; N all parameters; attention scores left out). A generated token
is also bounded by reading the weights and the key-value cache once (Pope et al., MLSys 2023, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from tppo.core.common import UserError
from tppo.core.config import DPO, RL, SFT, Recipe, Reward
from tppo.core.models import MINILM, SCRATCH, SMOLLM2, load_encoder_path
from tppo.core.pipeline import check_sections
from tppo.core.run import RunFolder
from tppo.core.stages import REFERENCES, all_stages, evaluated_models, of_variant, split_stage, uses_llm_judge
from tppo.evaluate.compare import voted_pairs
from tppo.judge import probes
from tppo.reward import train
from tppo.reward.longformer import to_longformer
from tppo.reward.models import first_layers
from tppo.rl.guards import check_config
from tppo.tune import scratch

ADAM_BYTES, FLOAT32 = 8, 4
WIDTH = {"fp32": FLOAT32, "bf16": 2, "auto": 2}
"""Bytes of a value in each precision; any device worth a plan multiplies bf16 in hardware, so `auto` counts as that."""
GIB = 2**30
Bytes = dict[str, float]  # memory, by what it is for


class ModelSize(NamedTuple):
    """A model's config and what is counted of its modules; the methods give bytes."""

    config: Any
    parameters: int
    positions: int  # longest input
    window: int = 0  # Longformer: tokens attended to beside the global ones; 0: full attention
    gated: bool = False  # the feed-forward part has a gate (three matrices in place of two)
    linear_widths: int = 0  # inputs + outputs of the linear layers but the last: LoRA has rank x this many parameters

    def trained(self, tuning: str, lora_r: int) -> int:
        """Parameters that are trained: all of them, or those of the adapters."""
        return lora_r * self.linear_widths if tuning == "lora" else self.parameters

    def training_state(self, tuning: str, lora_r: int, precision: str) -> Bytes:
        """What training holds from the first step to the last."""
        trained = self.trained(tuning, lora_r)
        held = self.parameters + (trained if tuning == "lora" else 0)
        state: Bytes = {"weights": FLOAT32 * held, "gradients": FLOAT32 * trained, "Adam moments": ADAM_BYTES * trained}
        return state | {"bf16 weights of autocast": 0 if precision == "fp32" else WIDTH["bf16"] * held}

    def weights(self, precision: str) -> float:
        """A frozen copy."""
        return WIDTH[precision] * self.parameters

    def activations(self, tokens: int, precision: str, attended: int = 0) -> float:
        """What one forward pass over `tokens` tokens keeps for the backward pass.

        `attended` are the positions whose scores each token keeps: 0 for a causal model, the sequence for an encoder
        trained with dropout, window + 1 + global tokens for a Longformer.
        """
        hidden, intermediate = self.config.hidden_size, self.config.intermediate_size
        in_products = (7 if self.window else 4) * hidden + (4 if self.gated else 2) * intermediate
        scores = (26 if self.window else 10) * self.config.num_attention_heads * attended
        of_layer = FLOAT32 * 6 * hidden + WIDTH[precision] * in_products + scores
        return tokens * self.config.num_hidden_layers * of_layer

    def logits(self, positions: int, precision: str) -> float:
        """The output layer and the loss: logits, their float32 copy if they are not, log-softmax, gradient."""
        float32_copies = 2 if precision == "fp32" else 3
        return (WIDTH[precision] + float32_copies * FLOAT32) * positions * self.config.vocab_size

    def kv_cache(self, sequences: int, tokens: int, precision: str) -> float:
        """Keys and values of `sequences` sequences of `tokens` tokens."""
        config, heads = self.config, self.config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        values = (getattr(config, "num_key_value_heads", None) or heads) * width
        return 2 * WIDTH[precision] * config.num_hidden_layers * values * sequences * tokens


def model_size(config: Any, num_labels: int = 0) -> ModelSize:
    """Count a token classifier of so many classes (0: a causal language model), built where it takes no memory."""
    if num_labels:
        config.num_labels = num_labels
    with torch.device("meta"):
        model = (AutoModelForTokenClassification if num_labels else AutoModelForCausalLM).from_config(config)
    head = None if num_labels else model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    text = config.get_text_config()
    window = getattr(text, "attention_window", 0)  # of all layers, or of each
    return ModelSize(
        text,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        positions=getattr(text, "max_position_embeddings", 0),
        window=max(window) if isinstance(window, list | tuple) else window,
        gated=any(name.endswith("gate_proj") for name, _ in model.named_modules()),
        linear_widths=sum(module.in_features + module.out_features for module in linears),
    )


def known_configs() -> dict[str, Any]:
    """Shapes of models that need not be on this machine, as their config.json has them."""
    longformer = {"vocab_size": 50265, "max_position_embeddings": 4098, "type_vocab_size": 1, "pad_token_id": 1}
    smollm2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    smollm2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    return {
        "mistralai/Mistral-7B-v0.1": AutoConfig.for_model("mistral", max_position_embeddings=32768),
        "allenai/longformer-base-4096": AutoConfig.for_model("longformer", attention_window=[512] * 12, **longformer),
        SMOLLM2: AutoConfig.for_model("llama", tie_word_embeddings=True, **smollm2),
    }


def config_of(name: str, setting: str) -> Any:
    """The config of a model, without a download. UserError: it is not built in, no folder, not in the hub's cache."""
    known = known_configs()
    if name in known:
        return known[name]
    source = load_encoder_path(name) if name == MINILM else name
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        where = "is no model folder" if Path(name).is_dir() else "is not on this machine"
        raise UserError(
            f"{setting}={name} {where} and its shape is not built in (built in: {', '.join(known)}): a dry run "
            "downloads nothing; give a folder that holds its config.json"
        ) from None


def policy_size(recipe: Recipe) -> ModelSize:
    """The size of the policy; that of one made from scratch with all the tokens its tokenizer may have."""
    sft, length = recipe.sft, recipe.task.max_prompt_tokens + recipe.task.max_response_tokens
    if sft.model != SCRATCH:
        return model_size(config_of(sft.model, "sft.model"))
    scratch.check_settings(sft.scratch)
    return model_size(scratch.llama_config(sft.scratch, sft.scratch.vocabulary, length))


def encoder_size(reward: Reward) -> ModelSize:
    """The size of a reward model."""
    config = config_of(reward.encoder, "reward.encoder")
    config.update(first_layers(config, reward.encoder, reward.encoder_layers))
    if reward.to_longformer:
        with torch.device("meta"):
            short = AutoModelForTokenClassification.from_config(config)
            config = to_longformer(short, reward.max_length, reward.attention_window).config
    return model_size(config, num_labels=3)


class Machine(NamedTuple):
    """Assumed speed of one device; the methods give seconds."""

    flops: float  # floating-point operations per second, utilisation included
    bandwidth: float  # bytes per second between memory and processor

    def forward(self, size: ModelSize, tokens: float) -> float:
        """To read `tokens` tokens."""
        return 2 * size.parameters * tokens / self.flops

    def train(self, size: ModelSize, tokens: float, tuning: str = "full") -> float:
        """Forward and backward passes over `tokens` tokens."""
        return (4 if tuning == "lora" else 6) * size.parameters * tokens / self.flops

    def generate(self, size: ModelSize, count: int, batch: int, prompt: int, response: int, precision: str) -> float:
        """To answer `count` prompts of `prompt` tokens, `batch` at a time, each with `response` tokens."""
        seconds, (full, rest) = 0.0, divmod(count, batch)
        for sequences, times in ((batch, full), (rest, 1 if rest else 0)):
            # The mean cache over the response; every step reads it and the weights once.
            read = size.weights(precision) + size.kv_cache(sequences, prompt + (response + 1) // 2, precision)
            step = max(self.forward(size, sequences), read / self.bandwidth)
            seconds += times * (self.forward(size, sequences * prompt) + response * step)
        return seconds


@dataclass
class StagePlan:
    """What one stage would do and take."""

    stage: str
    does: str
    memory: Bytes = field(default_factory=dict)  # at the peak; empty: unknown
    seconds: float | None = None  # None: unknown before the data are there
    notes: list[str] = field(default_factory=list)
    way_out: str = "shard it, or tune with LoRA"  # when one device cannot hold it


class Planner:
    """Plans of the stages of one recipe; a stage with a model is planned by the method called like its section."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, plan, task, sample = recipe, recipe.plan, recipe.task, recipe.sample
        for name in ("tflops", "utilisation", "bandwidth", "device_memory"):
            if getattr(plan, name) <= 0:
                raise UserError(f"plan.{name}={getattr(plan, name)}: give a number above 0")
        self.machine = Machine(plan.tflops * 1e12 * plan.utilisation, plan.bandwidth * 1e12)
        self.policy, self.encoder = policy_size(recipe), encoder_size(recipe.reward)
        check(recipe, self.policy, self.encoder)
        self.prompt, self.response = task.max_prompt_tokens, task.max_response_tokens
        self.length = self.prompt + self.response
        manifest = RunFolder(recipe).manifest("prepare") or {"facts": {}}
        self.prepared = manifest["facts"].get("examples", {})
        # How many pairs and responses there are; 0 where only the data can tell.
        self.pairs = self.examples(sample.train_examples, "train", recipe.parts.reward) or 0
        self.sampled = self.pairs * sample.samples_per_example
        self.held_out = (self.examples(sample.reward_eval_examples, "reward_eval") or 0) * sample.samples_per_example
        counts = [n for n in recipe.label.constructed.values() if n]
        self.constructed = sum(self.examples(n, "train", recipe.parts.reward) or 0 for n in counts)
        self.seen = (self.examples(sample.seen_examples, "train", recipe.parts.sft) or 0) if sample.seen_examples else 0

    def examples(self, limit: int, split: str, share: float = 1) -> int | None:
        """How many examples of a split are used: the limit, or what `prepare` found if that is done; else unknown.

        Args:
            share: of the users, where the parts are disjoint; about as large a share of the examples is theirs.
        """
        found = self.prepared.get(split)
        if found is not None and self.recipe.parts.disjoint:
            found = round(share * found)
        return min((count for count in (limit or None, found) if count is not None), default=None)

    def stages(self) -> list[StagePlan]:
        source = f"reads {', '.join(self.recipe.prepare.source)}; memory_limit {self.recipe.prepare.memory_limit}"
        plain = {"synthetic": "writes a log", "prepare": source, "report": "writes the page"}
        return [
            StagePlan(stage, plain[stage]) if stage in plain else getattr(self, split_stage(stage)[0])(stage)
            for stage in all_stages(self.recipe)
        ]

    def sft(self, stage: str) -> StagePlan:
        settings, sequences = self.recipe.sft, self.recipe.sft.micro_batch_size
        state, kept = self._training(settings, sequences, sequences * self.response)
        count = self.examples(settings.max_examples, "train", self.recipe.parts.sft)
        if count is None:
            return StagePlan(stage, "all training examples: unknown before prepare", state | kept)
        tokens = count * settings.epochs * self.length
        seconds = self.machine.train(self.policy, tokens, settings.tuning)
        return StagePlan(stage, _passes(count, "examples", settings, tokens), state | kept, seconds)

    def dpo(self, stage: str) -> StagePlan:
        settings, sequences = self.recipe.dpo, 2 * self.recipe.dpo.micro_batch_size
        # DPOTrainer makes logits at every position.
        memory, kept = self._training(settings, sequences, sequences * self.length)
        memory |= kept
        if settings.tuning == "full":
            memory["reference"] = self.policy.weights("fp32")
        tokens = 2 * self.pairs * settings.epochs * self.length
        seconds = self.machine.train(self.policy, tokens, settings.tuning) + self.machine.forward(self.policy, tokens)
        return StagePlan(stage, _passes(self.pairs, "pairs", settings, tokens), memory, seconds)

    def sample(self, stage: str) -> StagePlan:
        count = self.sampled + self.held_out + self.seen
        does = f"{count:,} responses, at most {_tokens(count * self.response)}"
        taken = self._generation(count, self.recipe.sample.batch_size, self.recipe.sft.precision)
        return StagePlan(stage, does, *taken)

    def label(self, stage: str) -> StagePlan:
        count, judge = self.sampled + self.held_out + self.constructed + self.seen, self.recipe.judge
        if self.recipe.label.judge != "llm":
            return StagePlan(stage, f"{count:,} responses by the offline judge, both rubrics")
        does = f"{count * len(judge.rubrics):,} requests to {judge.model} at {judge.base_url}"
        return StagePlan(stage, does, notes=["label: time and memory are the endpoint's"])

    def reward(self, stage: str) -> StagePlan:
        settings, size = self.recipe.reward, self.encoder
        batch, length = settings.batch_size, settings.max_length
        response = min(length, self.response)
        global_tokens = {"history": length - response, "response": response, "cls": 1, "none": 0}
        attended = min(length, size.window + 1 + global_tokens[settings.global_attention]) if size.window else length
        memory = size.training_state("full", 0, settings.precision)
        memory["activations"] = size.activations(batch * length, settings.precision, attended)
        rows, epochs = self.sampled + self.constructed, [train.settings_for(k, settings).epochs for k in train.KINDS]
        evaluations = sum(passes * settings.evals_per_epoch + 1 for passes in epochs)
        tokens = rows * sum(epochs) * length
        seconds = self.machine.train(size, tokens) + self.machine.forward(size, evaluations * self.held_out * length)
        steps = f"{rows * sum(epochs) / batch:,.0f} steps of {batch}, {_tokens(tokens)}"
        does = f"2 models on {rows:,} responses, {epochs[0]} and {epochs[1]} epochs = {steps}"
        fewer = ", or give the Longformer fewer global tokens (reward.global_attention)" if size.window else ""
        return StagePlan(stage, does, memory, seconds, way_out=f"lower reward.batch_size{fewer}")

    def check_reward(self, stage: str) -> StagePlan:
        probed = self.examples(self.recipe.check_reward.max_examples, "reward_eval") or 0
        responses = self.held_out + len(probes.PROBES) * probed
        tokens = 2 * responses * self.recipe.reward.max_length
        does = f"2 models x {responses:,} responses of held-out users, {_tokens(tokens)}"
        memory = {"reward models": 2 * self.encoder.weights("fp32")}
        return StagePlan(stage, does, memory, self.machine.forward(self.encoder, tokens))

    def rl(self, stage: str) -> StagePlan:
        settings, policy, machine = self.recipe.rl, self.policy, self.machine
        batch, sequences = settings.batch_size, settings.micro_batch_size
        rollout, rollout_seconds = self._generation(batch, batch, settings.precision)
        memory, kept = self._training(settings, sequences, sequences * self.response)
        memory["rollout copy"] = rollout.pop("weights")
        if settings.tuning == "full":
            memory["reference"] = policy.weights(settings.precision)
        if settings.value_function == "separate":
            memory["value model"] = (2 * FLOAT32 + ADAM_BYTES) * policy.parameters
        if batch * settings.ppo_epochs > settings.minibatch_size:
            memory["snapshot"] = (FLOAT32 + ADAM_BYTES) * policy.trained(settings.tuning, settings.lora_r)
        memory["reward models"] = 2 * self.encoder.weights("fp32")
        # Rollout and update take turns.
        memory |= kept if sum(kept.values()) > sum(rollout.values()) else rollout

        tokens = batch * self.length
        scored = batch * min(self.recipe.reward.max_length, self.encoder.positions or self.length)
        seconds = settings.updates * (
            rollout_seconds
            + 2 * machine.forward(policy, tokens)
            + 2 * machine.forward(self.encoder, scored)
            + machine.train(policy, settings.ppo_epochs * tokens, settings.tuning)
        )
        rollouts = settings.updates * batch
        steps = rollouts * settings.ppo_epochs // settings.minibatch_size
        does = f"{settings.updates:,} updates x {batch} prompts = {rollouts:,} rollouts, {steps:,} steps, "
        return StagePlan(stage, does + _tokens(rollouts * self.length), memory, seconds)

    def evaluate(self, stage: str) -> StagePlan:
        settings, judge, names = self.recipe.evaluate, self.recipe.judge, evaluated_models(self.recipe)
        found = [self.examples(settings.max_examples, split) for split in settings.splits]
        counts = [count for count in found if count is not None]
        policies = [name for name in names if name not in (*settings.baselines, *REFERENCES)]
        count = sum(counts)
        generated = count * (len(policies) + ("best_of_n" in names) * settings.best_of)
        memory, seconds = self._generation(generated, self.recipe.sample.batch_size, self.recipe.rl.precision)
        if len(counts) < len(found):
            return StagePlan(stage, "all evaluation examples: unknown before prepare", memory)
        does = f"{count:,} examples x {len(names)} rows of the tables; {generated:,} responses generated"
        requests = count * len(names) * len(judge.rubrics)
        note = f"evaluate: at most {requests:,} requests to {judge.model}"
        return StagePlan(stage, does, memory, seconds, [note] if uses_llm_judge("evaluate", self.recipe) else [])

    def read(self, stage: str) -> StagePlan:
        """A reading of the answers of `evaluate`."""
        settings, judge, names = self.recipe.evaluate, self.recipe.judge, evaluated_models(self.recipe)
        reading = of_variant(stage, self.recipe).evaluate.readings[0]
        found = [self.examples(settings.max_examples, split) for split in settings.splits]
        counts = [min(count, reading.examples or count) for count in found if count is not None]
        if len(counts) < len(found):
            return StagePlan(stage, "evaluation examples: unknown before prepare")
        count, asked, seconds = sum(counts), 0, None
        if reading.reader == "vote":
            asked, does = 2 * len(voted_pairs(names)) * count, f"votes on {count:,} examples"
        elif reading.reader == "distance":
            generated = count * len(self.recipe.algorithms)
            seconds = self._generation(generated, self.recipe.sample.batch_size, self.recipe.rl.precision)[1]
            does = f"{generated:,} responses generated"
        else:
            asked = count * len(names) * len(judge.rubrics) if reading.reader == "llm" else 0
            does = f"{count:,} examples x {len(names)} answers read"
        notes = [f"{stage}: at most {asked:,} requests to {judge.model}"] if asked else []
        return StagePlan(stage, does, seconds=seconds, notes=notes)

    def _generation(self, count: int, batch: int, precision: str) -> tuple[Bytes, float]:
        """Memory and time of `count` responses, `batch` at a time."""
        cache = self.policy.kv_cache(batch, self.length, precision)
        seconds = self.machine.generate(self.policy, count, batch, self.prompt, self.response, precision)
        return {"weights": self.policy.weights(precision), "key-value cache": cache}, seconds

    def _training(self, settings: SFT | DPO | RL, sequences: int, positions: int) -> tuple[Bytes, Bytes]:
        """Memory of all of training, and what a micro-batch keeps for its backward pass; `positions` have logits."""
        policy, precision = self.policy, settings.precision
        kept = policy.activations(sequences * self.length, precision)
        state = policy.training_state(settings.tuning, settings.lora_r, precision)
        return state, {"activations": kept, "logits": policy.logits(positions, precision)}


def _passes(count: int, what: str, settings: SFT | DPO, tokens: float) -> str:
    steps = f"{count * settings.epochs / settings.batch_size:,.0f} steps of {settings.batch_size}"
    return f"{count:,} {what} x {settings.epochs:g} epochs = {steps}, {_tokens(tokens)}"


def _tokens(count: float) -> str:
    return f"{count / 1e6:,.1f}M tokens"


def check(recipe: Recipe, policy: ModelSize, encoder: ModelSize) -> None:
    """Every check of settings that needs no data."""
    task, reward = recipe.task, recipe.reward
    check_sections(recipe, all_stages(recipe), data=False)
    check_config(recipe.rl, task.max_response_tokens)  # the section's own algorithm is trained by `tppo rl`
    length, wrong = task.max_prompt_tokens + task.max_response_tokens, ""
    if 0 < policy.positions < length:
        wrong = f"task.max_prompt_tokens + task.max_response_tokens is {length}, more than the {policy.positions} "
        wrong += f"positions of sft.model={recipe.sft.model}"
    elif 0 < encoder.positions < reward.max_length:
        wrong = f"reward.max_length={reward.max_length} is more than the {encoder.positions} positions of "
        wrong += f"reward.encoder={reward.encoder} (reward.to_longformer gives it more)"
    if wrong:
        raise UserError(wrong)


def plan_text(recipe: Recipe) -> str:
    """The plan as text. UserError: a setting out of range, two that contradict each other, a model of unknown shape."""
    planner, assumed = Planner(recipe), recipe.plan
    stages, table, peaks = planner.stages(), [], []
    for plan in stages:
        used = sum(plan.memory.values())
        memory = f"{used / GIB:.1f} GiB" if used else ""
        hours = "" if plan.seconds is None else f"{plan.seconds / 3600:.2f}"
        table.append(f"{plan.stage:<12} {memory:>10} {hours:>8}  {plan.does}")
        if used:
            parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.memory.items() if size)
            peaks.append(f"  {plan.stage}: {parts}")
        if used > assumed.device_memory * GIB:
            peaks.append(f"    more than one device of {assumed.device_memory:g} GiB: {plan.way_out}")
    encoder = f"{recipe.reward.encoder}{' as a Longformer' if recipe.reward.to_longformer else ''}"
    lines = [
        f"Dry run of {recipe.run_dir}: every section checked, nothing made. Lengths are upper bounds.\n",
        f"policy: {recipe.sft.model}, {planner.policy.parameters:,} parameters",
        f"reward model: {encoder}, {planner.encoder.parameters:,} parameters\n",
        f"{'stage':<12} {'memory':>10} {'hours':>8}  work",
        *table,
        f"{'all':<12} {'':>10} {sum(plan.seconds or 0 for plan in stages) / 3600:>8.2f}\n",
        "Memory at the peak, GiB:",
        *peaks,
        "",
        *(note for plan in stages for note in plan.notes),
        f"Assumed: {assumed.tflops:g} TFLOP/s at {assumed.utilisation:.0%} (plan.tflops, plan.utilisation), "
        f"{assumed.bandwidth:g} TB/s (plan.bandwidth), one device; precision: auto counts as bf16.",
        "Time: 6 N per trained token (4 N with LoRA), 2 N per token read, N the parameters; a generated token also",
        "takes at least one reading of weights and cache. Formulas and sources: src/tppo/plan.py.",
    ]
    return "\n".join(lines)


def print_plan(recipe: Recipe) -> None:
    """`tppo plan`: check the recipe and print the plan."""
    print(plan_text(recipe))
