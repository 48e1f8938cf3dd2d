"""Writes trl.json: masked whitening of TRL 1.9.0 (the last TRL with PPO) and its inline GAE and losses.

TRL keeps GAE and losses inside `PPOTrainer.train`, so they are lifted out of its source text and run as they
stand. TRL 1.9.0 can't be installed beside the TRL we need; run by hand with it on PYTHONPATH:
    pip install --no-deps --target /some/folder trl==1.9.0
    PYTHONPATH=/some/folder python tests/rl/oracles/make_trl.py
"""

import importlib.metadata
import inspect
import json
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch
from trl.experimental.ppo import ppo_trainer


def lifted(first: str, last: str) -> str:
    """Lines of PPOTrainer.train from the one starting with `first` to the one starting with `last`."""
    lines = inspect.getsource(ppo_trainer.PPOTrainer.train).splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    stop = next(i for i, line in enumerate(lines) if i >= start and line.strip().startswith(last))
    return textwrap.dedent("\n".join(lines[start : stop + 1]))


def main() -> None:
    torch.manual_seed(1)
    batch, tokens = 4, 6
    # TRL masks values one token later than log-probabilities; full-length rows make both masks the same.
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    args = SimpleNamespace(gamma=0.97, lam=0.9, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1)
    space = {
        "torch": torch,
        "args": args,
        "rewards": torch.randn(batch, tokens),
        "values": torch.randn(batch, tokens),
        "responses": torch.zeros(batch, tokens),
        "padding_mask": padding,
        "padding_mask_p1": padding,
        "masked_whiten": ppo_trainer.masked_whiten,
        "masked_mean": ppo_trainer.masked_mean,
        "micro_batch_inds": slice(None),
    }
    exec(lifted("lastgaelam = 0", "returns = advantages + values"), space)
    unwhitened = space["advantages"].clone()
    exec(lifted("advantages = masked_whiten", "advantages = torch.masked_fill"), space)
    space |= {
        "mb_advantage": space["advantages"],
        "mb_return": space["returns"],
        "mb_values": space["values"],
        "mb_logprobs": torch.randn(batch, tokens) - 2,
        "new_logprobs": torch.randn(batch, tokens) - 2,
        "vpred": torch.randn(batch, tokens),
    }
    exec(lifted("vpredclipped = ", ")"), space)
    exec(lifted("vf_losses1 = ", "vf_loss = "), space)
    exec(lifted("logprobs_diff = ", "pg_loss = "), space)
    names = ("rewards", "values", "mb_logprobs", "new_logprobs", "vpred")
    result = {
        "trl": importlib.metadata.version("trl"),
        "gamma": args.gamma,
        "lam": args.lam,
        "inputs": {name: space[name].tolist() for name in names},
        "advantages": unwhitened.tolist(),
        "whitened": space["advantages"].tolist(),
        "returns": space["returns"].tolist(),
        "policy_loss": space["pg_loss"].item(),
        "value_loss": space["vf_loss"].item(),
    }
    Path(__file__).with_name("trl.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
