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

import pyarrow as pa
import torch

from tppo.core.common import stream_seed
from tppo.core.resume import Row, chunks, make_rows
from tppo.core.tables import Example, field
from tppo.evaluate.answers import Policy
from tppo.generate.engine import Generation
from tppo.rl.losses import kl_estimate
from tppo.rl.policy import pad_batch, response_logprobs

TEMPERATURE = 1.0
"""KL is one of the policy itself, not of a sharpened one."""
RATIOS = pa.schema(
    [field("row", pa.int64(), "number of the response"), field("ratio", pa.float64(), "log ratio in nats")]
)


def distances(
    policies: Mapping[str, Path],
    sft: Path,
    examples: Sequence[Example],
    load: Callable[[Path], Policy],
    seed: int,
    parts: Path | None = None,
) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """Of every policy its name, and for each example the tokens of a response (end-of-sequence included) and its log
    ratio to SFT.

    Args:
        policies: model folders by name; `load` loads one.
        parts: keeps responses and ratios as they come; None keeps nothing.
    """
    reference = load(sft)
    for name, folder in policies.items():
        policy = load(folder)
        stream, description = stream_seed(seed, "distance"), f"distance: {name} answers"
        generations, _ = policy.respond(examples, TEMPERATURE, stream, description, parts and parts / name)
        pad_id, size, kept = policy.tokenizer.eos_token_id, policy.batch_size, parts and parts / f"{name}.ratios"
        ratios = log_ratios(policy.model, reference.model, generations, pad_id, size, name, kept)
        yield name, [(len(g.response_ids), ratio) for g, ratio in zip(generations, ratios, strict=True)]


def log_ratios(
    policy: Any,
    reference: Any,
    generations: Sequence[Generation],
    pad_id: int,
    batch_size: int,
    name: str = "policy",
    folder: Path | None = None,
) -> list[float]:
    """log pi(y|x) - log pi_ref(y|x) of each response in nats, end-of-sequence included, both at temperature 1.

    Args:
        folder: keeps them as they come (`tppo.core.resume`).
    """
    order = sorted(range(len(generations)), key=lambda i: len(generations[i].prompt_ids))  # little padding

    def measure(numbers: range) -> list[Row]:
        chunk = order[numbers.start : numbers.stop]
        batch = pad_batch([generations[i] for i in chunk], pad_id)
        with torch.inference_mode():
            ours_BT, theirs_BT = (response_logprobs(lm, batch, TEMPERATURE)[0] for lm in (policy, reference))
        ratios = kl_estimate("k1", ours_BT, theirs_BT).sum(-1).tolist()
        return [{"row": i, "ratio": ratio} for i, ratio in zip(chunk, ratios, strict=True)]

    units, description = chunks(len(order), batch_size), f"distance: {name} beside SFT"
    found = make_rows(folder, RATIOS, units, measure, made_with={"batch_size": batch_size}, description=description)
    return found.sort_by("row")["ratio"].to_pylist()
