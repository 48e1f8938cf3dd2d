"""How far the tuned policies are from SFT on the evaluation users, in nats: distance.parquet.

RL measures its KL on the rollouts of its own training, and DPO samples nothing while it trains. Here every policy
answers the same prompts of unseen users anew, at temperature 1, and the log ratio of its own tokens is an unbiased
estimate of KL(policy || SFT) at that prompt (k1 of `tppo.rl.losses`). So what was gained can be compared with how far a
policy went for it, whatever tuned it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from tppo.core.common import UserError, stream_seed, track
from tppo.core.config import Recipe
from tppo.core.device import generation_dtype
from tppo.core.models import load_policy
from tppo.core.run import RunFolder
from tppo.core.stages import rl_stage
from tppo.core.tables import Example, write_table
from tppo.evaluate.answers import asked_about, choose_examples
from tppo.evaluate.metrics import DISTANCES
from tppo.generate.engine import Generation, encode_examples, generate
from tppo.rl.losses import kl_estimate
from tppo.rl.policy import pad_batch, response_logprobs

TEMPERATURE = 1.0
"""KL is one of the policy itself, not of a sharpened one."""


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """The stage `distance`: `evaluate.distance_examples` of each set, one response of every algorithm to each.

    Raises:
        UserError: nothing to measure, an evaluation set is empty, or a stage to the left is not finished.
    """
    if recipe.evaluate.distance_examples < 1 or not recipe.algorithms:
        raise UserError(
            f"distance measures {recipe.algorithms} on evaluate.distance_examples="
            f"{recipe.evaluate.distance_examples} examples of each set: name an algorithm, and give at least 1"
        )
    by_split: dict[str, list[Example]] = {s: choose_examples(recipe, run, s) for s in recipe.evaluate.splits}
    examples = asked_about(recipe, by_split, recipe.evaluate.distance_examples)
    dtype = generation_dtype(recipe.rl.precision)  # as `evaluate` samples
    sft, tokenizer = load_policy(run.require("sft") / "model", dtype=dtype)
    prompts, _ = encode_examples(tokenizer, examples, recipe.task)
    rows: list[dict[str, Any]] = []
    for algorithm in recipe.algorithms:
        policy, _ = load_policy(run.require(rl_stage(algorithm)) / "model", dtype=dtype)
        generations = generate(
            policy,
            tokenizer,
            prompts,
            max_new_tokens=recipe.task.max_response_tokens,
            temperature=TEMPERATURE,
            seed=stream_seed(recipe.seed, "distance"),
            batch_size=recipe.evaluate.batch_size,
            description=f"distance: {algorithm} answers",
        )
        ratios = log_ratios(policy, sft, generations, tokenizer.eos_token_id, recipe.evaluate.batch_size, algorithm)
        rows += [
            _row(example, algorithm, generation, ratio)
            for example, generation, ratio in zip(examples, generations, ratios, strict=True)
        ]
    write_table(folder / "distance.parquet", rows, DISTANCES)
    means = {name: fmean(row["kl_from_sft"] for row in rows if row["model"] == name) for name in recipe.algorithms}
    return {"examples": len(examples), "kl_from_sft": means}


def log_ratios(
    policy: Any, reference: Any, generations: Sequence[Generation], pad_id: int, batch_size: int, name: str = "policy"
) -> list[float]:
    """log pi(y|x) - log pi_ref(y|x) of each response in nats, end-of-sequence included, both at temperature 1."""
    order = sorted(range(len(generations)), key=lambda i: len(generations[i].prompt_ids))  # little padding
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found = [0.0] * len(generations)
    with torch.inference_mode():
        for chunk in track(chunks, f"distance: {name} beside SFT"):
            batch = pad_batch([generations[i] for i in chunk], pad_id)
            ours_BT, theirs_BT = (response_logprobs(lm, batch, TEMPERATURE)[0] for lm in (policy, reference))
            for i, ratio in zip(chunk, kl_estimate("k1", ours_BT, theirs_BT).sum(-1).tolist(), strict=True):
                found[i] = ratio
    return found


def _row(example: Example, model: str, generation: Generation, ratio: float) -> dict[str, Any]:
    own = {"example_id": example.example_id, "user_id": example.user_id, "split": example.split, "model": model}
    return {**own, "sampled_tokens": len(generation.response_ids), "kl_from_sft": ratio}
