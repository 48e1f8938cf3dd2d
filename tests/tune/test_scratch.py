"""The policy made from scratch: one maker, seeded, and an ordinary model folder once the sft stage has trained it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo.cli import main
from tppo.core.common import UserError
from tppo.core.config import SFT, Scratch, Task
from tppo.core.models import load_policy
from tppo.core.run import RunFolder
from tppo.core.text import render_prompt, render_response
from tppo.evaluate.stage import check_settings as check_evaluate
from tppo.model_sizes import policy_size
from tppo.tune.scratch import END, check_settings, start_from_scratch

TASK = Task(num_queries=3, history_events=4, max_prompt_tokens=160, max_response_tokens=40)
SMALL = Scratch(vocabulary=400, hidden_size=32, intermediate_size=48, layers=2, heads=4)


@pytest.fixture(scope="module")
def made(example_factory):
    return start_from_scratch(SMALL, example_factory(16), TASK, seed=3)


def test_the_model_has_the_sizes_asked_for(made):
    model, tokenizer = made
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 48, 2)
    assert config.num_attention_heads == config.num_key_value_heads == 4
    assert config.max_position_embeddings == 200
    assert config.vocab_size == len(tokenizer) == 400
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == (END, END, "left")
    assert tokenizer.eos_token_id == config.eos_token_id == 0
    assert not model.training


def test_the_seed_makes_it_and_nothing_else_is_touched(made, example_factory):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again, tokenizer = start_from_scratch(SMALL, example_factory(16), TASK, seed=3)
    other, _ = start_from_scratch(SMALL, example_factory(16), TASK, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert tokenizer.get_vocab() == made[1].get_vocab()
    weights = [dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"] for model in (made[0], again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_the_tokenizer_gives_any_text_back(made, text):
    tokenizer = made[1]
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id not in ids


def test_words_of_the_log_are_short(made, example_factory):
    """It was trained on them: fewer tokens than half the characters."""
    for example in example_factory(4):
        text = render_prompt(example.history, 3) + render_response(example.targets)
        assert len(made[1](text)["input_ids"]) < len(text) / 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"vocabulary": 256},
            "sft.scratch.vocabulary=256 must be at least 257: 256 bytes and the end-of-sequence token",
        ),
        ({"layers": 0}, "sft.scratch.layers=0 must be at least 1"),
        ({"hidden_size": 36, "heads": 4}, "sft.scratch.hidden_size=36 must be an even multiple of sft.scratch.heads=4"),
    ],
)
def test_sizes_that_cannot_be_are_named(sizes, message):
    with pytest.raises(UserError, match=message):
        check_settings(Scratch(**sizes))


def test_without_an_example_there_is_no_tokenizer():
    with pytest.raises(UserError, match="trains its tokenizer on the training examples"):
        start_from_scratch(SMALL, [], TASK, seed=0)


def test_it_is_made_not_loaded():
    with pytest.raises(UserError, match="load its folder `sft/model`"):
        load_policy("scratch")


def test_the_plan_counts_the_model_that_is_made(prepared_recipe, made):
    recipe = prepared_recipe()
    recipe.sft, recipe.task = SFT(model="scratch", scratch=SMALL), TASK
    assert policy_size(recipe).parameters == made[0].num_parameters()


def test_random_weights_are_not_evaluated(prepared_recipe):
    recipe = prepared_recipe()
    recipe.sft.model, recipe.evaluate.untuned = "scratch", True
    with pytest.raises(UserError, match=r"evaluate\.untuned asks for answers of random weights"):
        check_evaluate(recipe)


def test_the_sft_stage_trains_it_and_its_card_says_what_it_is(prepared_recipe):
    recipe = prepared_recipe()
    flags = ["--sft.model", "scratch", "--sft.scratch.vocabulary", "400", "--sft.scratch.hidden_size", "32"]
    flags += ["--sft.scratch.intermediate_size", "48", "--sft.scratch.heads", "4", "--sft.scratch.layers", "2"]
    flags += [
        "--sft.learning_rate",
        "1e-2",
        "--sft.epochs",
        "8",
        "--sft.batch_size",
        "8",
        "--sft.micro_batch_size",
        "8",
    ]
    flags += ["--sft.precision", "fp32", "--prepare.source", "[made-up.tsv]"]
    main(["sft", "--run_dir", recipe.run_dir, *flags])
    folder = RunFolder(recipe).path("sft")
    model, tokenizer = load_policy(folder / "model")
    assert model.config.hidden_size == 32
    assert len(tokenizer) == 400
    card = (folder / "model" / "README.md").read_text()
    assert "Made from scratch" in card
    assert "demos, tests and controlled studies" in card
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 1
