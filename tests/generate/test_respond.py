"""Responses drawn batch by batch are those drawn all at once."""

from __future__ import annotations

import pytest

from tppo.core.config import Task
from tppo.generate import respond as module
from tppo.generate.engine import encode_examples, generate
from tppo.generate.respond import Repeated, as_generations, respond

TASK = Task(max_prompt_tokens=300, max_response_tokens=8)


def drawn(model, tokenizer, examples, folder=None, batch_size=5):
    table = respond(
        model, tokenizer, examples, TASK, temperature=1.0, seed=7, batch_size=batch_size, description="x", folder=folder
    )
    prompts, dropped = encode_examples(tokenizer, examples, TASK)
    assert sum(table["dropped"].to_pylist()) == dropped
    return as_generations(model, tokenizer, table, prompts)


def at_once(model, tokenizer, examples, batch_size=5):
    prompts, _ = encode_examples(tokenizer, examples, TASK)
    return generate(model, tokenizer, prompts, max_new_tokens=8, temperature=1.0, seed=7, batch_size=batch_size)


def test_they_are_what_one_call_of_the_engine_draws(tiny_model, tiny_tokenizer, example_factory, tmp_path):
    examples = Repeated(example_factory(11), 2)
    assert len(examples) == 22
    assert examples[5] == examples[4] == list(examples)[4]
    wanted = at_once(tiny_model, tiny_tokenizer, list(examples))
    assert drawn(tiny_model, tiny_tokenizer, examples) == wanted
    assert drawn(tiny_model, tiny_tokenizer, examples, tmp_path / "parts") == wanted
    tiny_model.forward = None  # type: ignore[assignment]  # not asked again
    assert drawn(tiny_model, tiny_tokenizer, examples, tmp_path / "parts") == wanted


@pytest.mark.parametrize("window", [4, 7])
def test_windows_change_no_number_that_a_prompt_is_drawn_with(
    tiny_model, tiny_tokenizer, example_factory, monkeypatch, window
):
    """Only which prompts share a batch, and so the rounding; here one at a time."""
    examples = example_factory(13)
    monkeypatch.setattr(module, "WINDOW", window)
    found = drawn(tiny_model, tiny_tokenizer, examples, batch_size=1)
    assert found == at_once(tiny_model, tiny_tokenizer, examples, batch_size=1)


def test_nobody_to_respond_to(tiny_model, tiny_tokenizer):
    assert drawn(tiny_model, tiny_tokenizer, []) == []
