"""How far the tuned policies are from SFT on the evaluation users, in nats.

RL measures its KL on the rollouts of its own training, and DPO samples nothing while it trains. Here every policy
answers the same prompts of unseen users anew, at temperature 1, and the log ratio of its own tokens is an unbiased
estimate of KL(policy || SFT) at that prompt (k1 of `tppo.rl.losses`). So what was gained can be compared with how far a
policy went for it, whatever tuned it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tppo.core.common import stream_seed, track
from tppo.core.tables import Example
from tppo.evaluate.answers import Policy
from tppo.generate.engine import Generation
from tppo.rl.losses import kl_estimate
from tppo.rl.policy import pad_batch, response_logprobs

TEMPERATURE = 1.0
"""KL is one of the policy itself, not of a sharpened one."""


def distances(
    policies: Mapping[str, Path], sft: Path, examples: Sequence[Example], load: Callable[[Path], Policy], seed: int
) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """Of every policy its name, and for each example the tokens of a response (end-of-sequence included) and its log
    ratio to SFT.

    Args:
        policies: model folders by name; `load` loads one.
    """
    reference = load(sft)
    for name, folder in policies.items():
        policy = load(folder)
        stream, description = stream_seed(seed, "distance"), f"distance: {name} answers"
        generations, _ = policy.respond(examples, TEMPERATURE, stream, description)
        pad_id, size = policy.tokenizer.eos_token_id, policy.batch_size
        ratios = log_ratios(policy.model, reference.model, generations, pad_id, size, name)
        yield name, [(len(g.response_ids), ratio) for g, ratio in zip(generations, ratios, strict=True)]


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
