"""How far the tuned policies are from SFT on the evaluation users, in nats.

RL measures its KL on the rollouts of its own training, and DPO samples nothing while it trains. Here every policy
answers the same prompts of unseen users anew, at temperature 1, and the log ratio of its own tokens is an unbiased
estimate of KL(policy || SFT) at that prompt (k1 of `tppo.rl.losses`). So what was gained can be compared with how far a
policy went for it, whatever tuned it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tppo.core.common import stream_seed, track
from tppo.core.config import Recipe
from tppo.core.device import generation_dtype
from tppo.core.models import load_policy
from tppo.core.run import RunFolder
from tppo.core.stages import rl_stage
from tppo.core.tables import Example
from tppo.generate.engine import Generation, encode_examples, generate
from tppo.rl.losses import kl_estimate
from tppo.rl.policy import pad_batch, response_logprobs

TEMPERATURE = 1.0
"""KL is one of the policy itself, not of a sharpened one."""


def distances(
    recipe: Recipe, run: RunFolder, examples: Sequence[Example]
) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """Of every algorithm its name, and for each example the tokens of a response (end-of-sequence included) and its log
    ratio to SFT.

    Raises:
        UserError: a stage to the left is not finished.
    """
    dtype = generation_dtype(recipe.rl.precision)  # as `evaluate` samples
    sft, tokenizer = load_policy(run.require("sft") / "model", dtype=dtype)
    prompts, _ = encode_examples(tokenizer, examples, recipe.task)
    for algorithm in recipe.algorithms:
        policy, _ = load_policy(run.require(rl_stage(algorithm)) / "model", dtype=dtype)
        generations = generate(
            policy,
            tokenizer,
            prompts,
            max_new_tokens=recipe.task.max_response_tokens,
            temperature=TEMPERATURE,
            seed=stream_seed(recipe.seed, "distance"),
            batch_size=recipe.sample.batch_size,
            description=f"distance: {algorithm} answers",
        )
        ratios = log_ratios(policy, sft, generations, tokenizer.eos_token_id, recipe.sample.batch_size, algorithm)
        yield algorithm, [(len(g.response_ids), ratio) for g, ratio in zip(generations, ratios, strict=True)]


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
