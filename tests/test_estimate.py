"""The formulas by hand, and against what tiny models really hold and save for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    BertConfig,
    LlamaConfig,
    LongformerConfig,
)

from tppo.core.models import lora_config
from tppo.plan import Machine, ModelSize, known_configs, model_size

SIZE = ModelSize(
    LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
    parameters=1000,
    positions=64,
    gated=True,
    linear_widths=30,
)


def llama(layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def test_training_state_by_hand():
    full = SIZE.training_state("full", 16, "bf16")
    assert full == {"weights": 4000, "gradients": 4000, "Adam moments": 8000, "bf16 weights of autocast": 2000}
    lora = SIZE.training_state("lora", 2, "fp32")  # 60 parameters in the adapters
    assert lora == {"weights": 4240, "gradients": 240, "Adam moments": 480, "bf16 weights of autocast": 0}


def test_activations_logits_and_cache_by_hand():
    # Per token and layer: 4 bytes x 6 x 8 around the norms, 2 bytes x (4 x 8 + 4 x 16) in the products.
    assert SIZE.activations(10, "bf16") == 10 * 2 * (192 + 192)
    assert SIZE.logits(3, "bf16") == 3 * 50 * (2 + 4 + 4 + 4)
    assert SIZE.logits(3, "fp32") == 3 * 50 * (4 + 4 + 4)
    assert SIZE.kv_cache(5, 7, "bf16") == 2 * 2 * 2 * 4 * 5 * 7


def test_times_by_hand():
    machine = Machine(flops=1e6, bandwidth=1e3)
    assert machine.forward(SIZE, 10) == pytest.approx(2 * 1000 * 10 / 1e6)
    assert machine.train(SIZE, 10) == pytest.approx(6 * 1000 * 10 / 1e6)
    assert machine.train(SIZE, 10, "lora") == pytest.approx(4 * 1000 * 10 / 1e6)
    # Bound by memory: each of 4 tokens reads 2,000 bytes of weights and the cache of 3 sequences of 5 + 2 tokens.
    cache = SIZE.kv_cache(3, 7, "bf16")
    expected = 2 * 1000 * 3 * 5 / 1e6 + 4 * (2000 + cache) / 1e3
    assert machine.generate(SIZE, 3, 3, 5, 4, "bf16") == pytest.approx(expected)
    assert machine.generate(SIZE, 6, 3, 5, 4, "bf16") == pytest.approx(2 * expected)
    fast_memory = Machine(flops=1e6, bandwidth=1e12)
    assert fast_memory.generate(SIZE, 3, 3, 5, 4, "bf16") == pytest.approx(2 * 1000 * 3 * (5 + 4) / 1e6)
    assert fast_memory.generate(SIZE, 0, 3, 5, 4, "bf16") == 0


def test_the_built_in_shapes_have_the_published_sizes():
    sizes = {
        name: model_size(config).parameters for name, config in known_configs().items() if "longformer" not in name
    }
    assert sizes == {"mistralai/Mistral-7B-v0.1": 7_241_732_096, "smollm2": 134_515_008}
    longformer = known_configs()["allenai/longformer-base-4096"]
    assert model_size(longformer, num_labels=3).parameters == pytest.approx(148e6, rel=0.005)


def test_predicted_weights_are_what_a_model_holds(tiny_model: Any):
    size = model_size(tiny_model.config)
    held = sum(parameter.numel() * parameter.element_size() for parameter in tiny_model.parameters())
    assert size.weights("fp32") == held


def test_predicted_adapters_are_what_peft_makes(tiny_model: Any):
    from peft import get_peft_model

    size = model_size(tiny_model.config)
    model = get_peft_model(tiny_model, lora_config(4))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert size.trained("lora", 4) == trained


def test_predicted_cache_is_what_a_model_keeps(tiny_model: Any):
    with torch.no_grad():
        cache = tiny_model(input_ids=torch.ones(3, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert model_size(tiny_model.config).kv_cache(3, 5, "fp32") == held


def saved_bytes(model: Any, precision: str, **inputs: torch.Tensor) -> int:
    """Bytes of the distinct storages that a forward pass saves for the backward pass, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that its address is not used again
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        kept = model(**inputs)
    assert kept.logits.requires_grad
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_a_causal_model(precision: str):
    ids = torch.randint(0, 50, (2, 64))
    saved = [saved_bytes(AutoModelForCausalLM.from_config(llama(n)), precision, input_ids=ids) for n in (2, 4)]
    predicted = [model_size(llama(n)).activations(ids.numel(), precision) for n in (2, 4)]
    # Layer by layer: embeddings and loss are no part of it.
    assert predicted[1] - predicted[0] == pytest.approx(saved[1] - saved[0], rel=0.2)


@pytest.mark.parametrize("global_tokens", [None, 1, 96])
def test_activations_of_an_encoder_with_dropout(global_tokens: int | None):
    """None: BERT; else a Longformer with so many global tokens."""
    ids = torch.randint(2, 50, (2, 128))
    inputs = {"input_ids": ids}
    if global_tokens:
        inputs |= {"attention_mask": torch.ones_like(ids), "global_attention_mask": torch.zeros_like(ids)}
        inputs["global_attention_mask"][:, :global_tokens] = 1

    def config(layers: int) -> Any:
        shape = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
        if global_tokens:
            windows = {"attention_window": [16] * layers, "max_position_embeddings": 300, "pad_token_id": 1}
            return LongformerConfig(num_hidden_layers=layers, **shape, **windows)
        return BertConfig(num_hidden_layers=layers, **shape)

    attended = 16 + 1 + global_tokens if global_tokens else 128
    saved, predicted = [], []
    for layers in (2, 4):
        model = AutoModelForTokenClassification.from_config(config(layers)).train()
        saved.append(saved_bytes(model, "fp32", **inputs))
        size = model_size(config(layers), num_labels=3)
        predicted.append(size.activations(ids.numel(), "fp32", attended))
    assert predicted[1] - predicted[0] == pytest.approx(saved[1] - saved[0], rel=0.2)
