"""Writes verl.json: inputs and outputs of verl's PPO functions on random masked tensors.

Needs verl importable (it was made with verl 0.9.1), which wants Ray and more; so the numbers are committed and this
script is run by hand:  python tests/rl/oracles/make_verl.py
"""

import importlib.metadata
import json
from pathlib import Path

import torch
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional


def main() -> None:
    torch.manual_seed(0)
    batch, tokens = 5, 7
    lengths = torch.tensor([7, 1, 4, 6, 3])
    mask = (torch.arange(tokens)[None] < lengths[:, None]).float()
    make = lambda scale=1.0: torch.randn(batch, tokens) * scale * mask  # noqa: E731
    logprobs, old_logprobs, ref_logprobs = make() - 2, make() - 2, make() - 2
    rewards, values, old_values = make(), make(), make()
    cases = []
    for gamma, lam in [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)]:
        advantages, returns = core_algos.compute_gae_advantage_return(rewards, old_values, mask, gamma, lam)
        unwhitened = (returns - old_values) * mask
        policy, clip_fraction, _, _ = core_algos.compute_policy_loss(
            old_logprobs, logprobs, advantages, mask, cliprange=0.2, clip_ratio_c=1e9
        )
        value, value_clip_fraction = core_algos.compute_value_loss(values, returns * mask, old_values, mask, 0.2)
        cases.append(
            {
                "gamma": gamma,
                "lam": lam,
                "advantages": unwhitened.tolist(),
                "whitened": (advantages * mask).tolist(),
                "returns": (returns * mask).tolist(),
                "policy_loss": policy.item(),
                "clip_fraction": clip_fraction.item(),
                "value_loss": value.item(),
                "value_clip_fraction": value_clip_fraction.item(),
            }
        )
    inputs = {
        "mask": mask,
        "logprobs": logprobs,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "rewards": rewards,
        "values": values,
        "old_values": old_values,
    }
    result = {
        "verl": importlib.metadata.version("verl"),
        "inputs": {name: tensor.tolist() for name, tensor in inputs.items()},
        "k1": (core_algos.kl_penalty(logprobs, ref_logprobs, "kl") * mask).tolist(),
        "masked_whiten": (torch_functional.masked_whiten(rewards, mask) * mask).tolist(),
        "cases": cases,
    }
    Path(__file__).with_name("verl.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
