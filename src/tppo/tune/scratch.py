"""A small policy made from scratch: a Llama with random weights, and a byte-level BPE tokenizer trained on the log.

For demos, tests and controlled studies: it trains in a minute on two cores and knows nothing but the log it has seen.
The one maker of small models: tests and benchmarks use it, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tppo.core.common import UserError
from tppo.core.config import Scratch, Task
from tppo.core.models import SCRATCH
from tppo.core.tables import Example
from tppo.core.text import render_prompt, render_response

END = "<|end|>"
"""The end-of-sequence token of a tokenizer made here; it also pads."""
_BYTES = len(pre_tokenizers.ByteLevel.alphabet())


def start_from_scratch(settings: Scratch, examples: Sequence[Example], task: Task, seed: int) -> tuple[Any, Any]:
    """The policy that `sft.model: scratch` starts from, and its tokenizer, as `load_policy` gives them.

    Args:
        examples: the training examples; the tokenizer is trained on their prompts and responses.

    Raises:
        UserError: sizes that do not fit together, or no example to train a tokenizer on.
    """
    check_settings(settings)
    if not examples:
        raise UserError(f"sft.model={SCRATCH} trains its tokenizer on the training examples, and there is none")
    texts = (
        render_prompt(example.history, task.num_queries) + render_response(example.targets) for example in examples
    )
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    config = llama_config(settings, len(tokenizer), task.max_prompt_tokens + task.max_response_tokens)
    return make_policy(config, seed), tokenizer


def check_settings(settings: Scratch) -> None:
    """Sizes that cannot be.

    Raises:
        UserError: names the setting and what it has to be.
    """
    least = {"hidden_size": 1, "intermediate_size": 1, "layers": 1, "heads": 1, "vocabulary": _BYTES + 1}
    for name, smallest in least.items():
        if (value := getattr(settings, name)) < smallest:
            why = f": {_BYTES} bytes and the end-of-sequence token" if name == "vocabulary" else ""
            raise UserError(f"sft.scratch.{name}={value} must be at least {smallest}{why}")
    if settings.hidden_size % (2 * settings.heads):
        raise UserError(
            f"sft.scratch.hidden_size={settings.hidden_size} must be an even multiple of "
            f"sft.scratch.heads={settings.heads}"
        )


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens: it writes any text, and pads on the left."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, padding_side="left")


def llama_config(settings: Scratch, vocabulary: int, positions: int, **further: Any) -> LlamaConfig:
    """The shape of the model: token 0 ends a sequence, embeddings are those of the output.

    Args:
        vocabulary: tokens of the tokenizer.
        positions: longest sequence, prompt and response.
        further: fields of LlamaConfig that win.
    """
    return LlamaConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": settings.hidden_size,
            "intermediate_size": settings.intermediate_size,
            "num_hidden_layers": settings.layers,
            "num_attention_heads": settings.heads,
            "num_key_value_heads": settings.heads,
            "max_position_embeddings": positions,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        }
        | further
    )


def make_policy(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A model with random float32 weights, in eval mode; the same ones for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
