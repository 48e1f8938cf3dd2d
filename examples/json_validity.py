"""Token-level PPO outside of queries: teach a model to write valid JSON, paying every token for what it does.

A tiny model with random weights and a vocabulary of twelve tokens learns to write a JSON array. A token earns +0.1
when the text up to it can still become valid JSON and costs -1 when it breaks it; nothing is earned after that. The
whole response earns +1 at its end when it parses. Runs in seconds on a CPU:

    python examples/json_validity.py

For a model of your own, replace `make_policy()` by `AutoModelForCausalLM.from_pretrained(..., dtype=torch.float32)`
and its tokenizer.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tppo.core.config import RL
from tppo.rl.reward_function import Sample
from tppo.rl.trainer import TokenPPOTrainer

TOKENS = ["<eos>", "[", "]", ",", "1", "2", "true", '"a"', "{", "}", ":", "x"]


def make_policy() -> tuple[Any, Any]:
    """A random two-layer model and the tokenizer of its twelve tokens."""
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<eos>"))
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config), tokenizer


def is_array_prefix(text: str) -> bool:
    """Can more text make a flat JSON array of it? True when some ending does."""
    endings = ("", "]", "1]", ",1]", "[]")
    return any(_parses(text + ending) for ending in endings)


def _parses(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except json.JSONDecodeError:
        return False


def is_valid(sample: Sample) -> bool:
    return sample.finished and _parses(sample.prompt + sample.response)


def reward_json(samples: list[Sample]) -> list[list[float]]:
    """One float per response token: what this token did to the text so far."""
    rewards = []
    for sample in samples:
        tokens, broken = [], False
        for _, end in sample.spans:
            breaks = not broken and not is_array_prefix(sample.prompt + sample.response[:end])
            tokens.append(0.0 if broken else -1.0 if breaks else 0.1)
            broken |= breaks
        tokens[-1] += float(is_valid(sample))
        rewards.append(tokens)
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=40)
    updates = parser.parse_args().updates
    policy, tokenizer = make_policy()
    config = RL(
        updates=updates,
        batch_size=32,
        minibatch_size=32,
        micro_batch_size=32,
        ppo_epochs=2,
        learning_rate=5e-3,
        kl_coef=0.01,
        precision="fp32",
    )
    # Prompts may be texts, as here, or lists of token ids.
    trainer = TokenPPOTrainer(policy, reward_json, ["["], config, tokenizer=tokenizer, max_response_tokens=10)
    for _ in range(updates):
        result = trainer.step()
        samples = result.rollout.samples
        valid = sum(map(is_valid, samples))
        print(
            f"update {result.metrics['update']:2d}  reward {result.metrics['reward_mean']:+.2f}  "
            f"valid {valid}/{config.batch_size}  kl {result.metrics['kl']:.2f}  "
            f"e.g. {samples[0].prompt + samples[0].response}"
        )


if __name__ == "__main__":
    main()
