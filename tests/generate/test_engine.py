from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from tppo.core.config import Task
from tppo.core.models import load_policy
from tppo.core.text import encode_prompt
from tppo.generate.engine import decode_response, encode_examples, generate, sample_tokens
from tppo.reward.align import response_spans


@pytest.fixture
def prompts(tiny_tokenizer, example_factory):
    """Twelve prompts of different lengths."""
    examples = example_factory(12)
    return [encode_prompt(tiny_tokenizer, e.history[: 1 + i % 4], 3, 512)[0] for i, e in enumerate(examples)]


def end_often(model, eos_id: int, amount: float = 6.0) -> None:
    """Raise the end-of-sequence logit of every position: random weights rarely end."""

    def hook(module, inputs, logits):
        logits = logits.clone()
        logits[..., eos_id] += amount
        return logits

    model.lm_head.register_forward_hook(hook)


@torch.no_grad()
def greedy_by_hand(model, prompt, eos_id, limit):
    """No cache, no padding, no batch."""
    ids = list(prompt)
    for _ in range(limit):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos_id:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_greedy_equals_a_plain_loop_whatever_the_batch(tiny_model, tiny_tokenizer, prompts, batch_size):
    end_often(tiny_model, tiny_tokenizer.eos_token_id)
    out = generate(tiny_model, tiny_tokenizer, prompts, max_new_tokens=10, temperature=0, batch_size=batch_size)
    expected = [greedy_by_hand(tiny_model, p, tiny_tokenizer.eos_token_id, 10) for p in prompts]
    assert [g.response_ids for g in out] == expected
    assert [g.prompt_ids for g in out] == prompts
    assert len({len(ids) for ids in expected}) > 1, "some responses have to end early for this test to mean much"


def test_ends_at_the_first_end_of_sequence_although_it_also_pads(tiny_model, tiny_tokenizer, prompts):
    eos = tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.pad_token_id == eos
    end_often(tiny_model, eos)
    out = generate(tiny_model, tiny_tokenizer, prompts * 4, max_new_tokens=6, temperature=1.0, seed=0)
    assert {g.finished for g in out} == {True, False}
    for g in out:
        assert eos not in g.response_ids[:-1]
        assert g.finished == (g.response_ids[-1] == eos)
        assert g.finished or len(g.response_ids) == 6
        assert g.response == decode_response(tiny_tokenizer, g.response_ids)
        assert tiny_tokenizer.eos_token not in g.response


def chi_square_p_value(tokens: list[int], probabilities: torch.Tensor) -> float:
    """Rare tokens share one bin, so that every expected count is at least 5."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    expected = probabilities.double().numpy() * len(tokens)
    common = expected >= 5
    observed_bins = np.append(counts[common], counts[~common].sum())
    expected_bins = np.append(expected[common], expected[~common].sum())
    return stats.chisquare(observed_bins, expected_bins * len(tokens) / expected_bins.sum()).pvalue


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draws_from_softmax_of_logits_and_nothing_else(tiny_model, tiny_tokenizer, prompts, temperature):
    # What a hub model's generation_config.json may bring along; all of it has to be without effect.
    tiny_model.generation_config.update(top_k=3, top_p=0.5, repetition_penalty=3.0, min_new_tokens=5)
    prompt = prompts[3]
    out = generate(
        tiny_model, tiny_tokenizer, [prompt] * 6000, max_new_tokens=2, temperature=temperature, seed=1,
        batch_size=2000,
    )  # fmt: skip
    with torch.no_grad():
        first = torch.softmax(tiny_model(torch.tensor([prompt])).logits[0, -1] / temperature, -1)
    firsts = [g.response_ids[0] for g in out]
    assert chi_square_p_value(firsts, first) > 1e-3
    common = max(set(firsts) - {tiny_tokenizer.eos_token_id}, key=firsts.count)
    with torch.no_grad():
        logits = tiny_model(torch.tensor([[*prompt, common]])).logits[0, -1]
    seconds = [g.response_ids[1] for g in out if g.response_ids[0] == common]
    assert len(seconds) > 200
    assert chi_square_p_value(seconds, torch.softmax(logits / temperature, -1)) > 1e-3
    assert len(set(firsts)) > 3


def test_a_seed_reproduces_and_leaves_the_global_generator_alone(tiny_model, tiny_tokenizer, prompts):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = generate(tiny_model, tiny_tokenizer, prompts, max_new_tokens=8, temperature=1.0, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    again = generate(tiny_model, tiny_tokenizer, prompts, max_new_tokens=8, temperature=1.0, seed=5, batch_size=3)
    assert again == first, "not even the batch size changes a prompt's sample"
    other = generate(tiny_model, tiny_tokenizer, prompts, max_new_tokens=8, temperature=1.0, seed=6)
    assert other != first


def test_without_a_seed_the_global_generator_decides(tiny_model, tiny_tokenizer, prompts):
    def draw():
        return generate(tiny_model, tiny_tokenizer, prompts, max_new_tokens=4, temperature=1.0)

    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert draw() == first != second


def test_the_model_comes_back_in_the_mode_it_had(tiny_model, tiny_tokenizer, prompts):
    for training in (True, False):
        tiny_model.train(training)
        generate(tiny_model, tiny_tokenizer, prompts[:1], max_new_tokens=1, temperature=0)
        assert tiny_model.training is training


def test_no_prompts_and_bad_arguments(tiny_model, tiny_tokenizer):
    assert generate(tiny_model, tiny_tokenizer, [], max_new_tokens=3, temperature=1.0, description="x") == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(tiny_model, tiny_tokenizer, [[5], []], max_new_tokens=3, temperature=1.0)
    with pytest.raises(ValueError, match="temperature"):
        generate(tiny_model, tiny_tokenizer, [[5]], max_new_tokens=3, temperature=-1)


def test_sample_tokens_never_draws_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(4, 1)
    uniforms = torch.tensor([0.0, 0.4999, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert sample_tokens(logits, 1.0, uniforms).tolist() == [1, 1, 3, 3]


def test_encode_examples_keeps_the_newest_events_and_counts_the_dropped(tiny_tokenizer, example_factory):
    [example] = example_factory(1)
    full, dropped = encode_examples(tiny_tokenizer, [example], Task(history_events=2))
    assert dropped == 0
    text = tiny_tokenizer.decode(full[0])
    assert example.history[-1].text in text
    assert f"search: {example.history[0].text}\n" not in text
    budget = len(full[0]) - 1
    short, dropped = encode_examples(tiny_tokenizer, [example], Task(history_events=2, max_prompt_tokens=budget))
    assert dropped == 1
    assert len(short[0]) <= budget


def test_bf16_folder_generates(tiny_policy, example_factory):
    model, tokenizer = load_policy(tiny_policy, dtype=torch.bfloat16)
    prompts, _ = encode_examples(tokenizer, example_factory(3), Task())
    out = generate(model, tokenizer, prompts, max_new_tokens=5, temperature=1.0, seed=0)
    assert len(out) == 3


def test_every_stop_id_of_the_model_ends_a_response(tiny_model, tiny_tokenizer, prompts):
    """Also one that is an ordinary token: its text is no part of the response, and no word is paid by it."""
    [free] = generate(tiny_model, tiny_tokenizer, prompts[:1], max_new_tokens=10, temperature=0)
    place = next(i for i, token in enumerate(free.response_ids) if i and token not in free.response_ids[:i])
    stop = free.response_ids[place]
    tiny_model.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, stop]
    [ended] = generate(tiny_model, tiny_tokenizer, prompts[:1], max_new_tokens=10, temperature=0)
    assert ended.response_ids == free.response_ids[: place + 1]
    assert ended.finished
    assert ended.response == decode_response(tiny_tokenizer, free.response_ids[:place])
    spans = response_spans(tiny_tokenizer, ended.response_ids, ended.finished)
    assert len(spans) == place + 1
    assert spans[-1] == (len(ended.response), len(ended.response))
