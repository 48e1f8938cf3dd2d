"""The benchmark's count of floating-point operations against torch's own counter."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from tppo.generate.engine import Generation
from tppo.rl.policy import pad_batch, response_logprobs


@pytest.fixture(scope="module")
def benchmark_module():
    path = Path(__file__).parents[2] / "benchmarks" / "rl_speed.py"
    spec = importlib.util.spec_from_file_location("rl_speed", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("layers", "new_tokens"), [(1, 3), (3, 7)])
def test_update_flops(benchmark_module, layers, new_tokens):
    work = benchmark_module.Work(
        layers=layers, hidden=48, intermediate=96, heads=4, kv_heads=2, vocabulary=300, batch=4, prompt_tokens=11,
        new_tokens=new_tokens,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    batch = pad_batch([Generation([5] * 11, [7] * new_tokens, "", True)] * 4, pad_id=0)
    with FlopCounterMode(display=False) as counter:
        response_logprobs(LlamaForCausalLM(config), batch, 1.0)[0].sum().backward()
    # Eager attention multiplies the whole square; the benchmark counts the causal half, which is what is needed.
    length = 11 + new_tokens
    other_half = 3 * layers * 4 * 4 * 48 * (length**2 - length * (length + 1) / 2)
    assert counter.get_total_flops() == pytest.approx(benchmark_module.update_flops(work) + other_half, rel=0.01)
