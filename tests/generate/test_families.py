"""Every kind of causal language model: taken from the folder to a trained one that is loaded again, or refused.

All families of transformers are in docs/models.md, made by the same functions (benchmarks/families.py).
"""

from __future__ import annotations

import copy
import logging

import families
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from tppo.core import causal
from tppo.core.causal import check_family, is_unpadded, read
from tppo.core.common import UserError
from tppo.core.models import load_policy
from tppo.generate.engine import generate

SLOW = (
    "bloom",
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "jamba",
    "qwen2_moe",
    "qwen3_next",
    "xglm",
)


@pytest.mark.parametrize("family", families.QUICK)
def test_a_family_of_each_kind_works(family):
    assert families.outcome(family) == families.Outcome(True, "")


@pytest.mark.slow
@pytest.mark.parametrize("family", SLOW)
def test_further_families_work(family):
    assert families.outcome(family) == families.Outcome(True, "")


@pytest.mark.slow
def test_layers_that_share_weights_take_no_adapters():
    """Merged, the adapter of one layer would change the others; all the rest works (Zamba's transformer blocks)."""
    found = families.outcome("zamba2")
    assert not found.works
    assert "takes no LoRA adapters (several of its layers share their weights): tuning=full" in found.told


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("roberta", "given positions from 0"),
        ("xlm", "depend on the tokens after it"),
        ("moshi", "continued with its cache"),
    ],
)
def test_a_family_that_differs_is_refused_at_load(tmp_path, family, why):
    folder = families.make_folder(family, tmp_path / "start")
    with pytest.raises(UserError, match=rf"family {family}\) cannot be sampled and trained: .*{why}.*docs/models.md"):
        load_policy(folder)


def test_an_encoder_that_is_no_decoder_is_refused_with_the_way_out(tmp_path):
    config = families.tiny_config("bert")
    config.is_decoder = False
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r'no causal model .*"is_decoder": true in its config.json'):
        load_policy(tmp_path)


@pytest.fixture
def llama():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(families.tiny_config("llama")).eval()


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("padding", "beside a longer one"),
        ("cache", "continued with its cache"),
        ("training", "padded prompt and response"),
        ("nan", "not finite"),
        ("raises", r"its forward fails on two prompts \(RuntimeError: no such kernel\)"),
    ],
)
def test_what_is_wrong_is_named(llama, monkeypatch, fault, why):
    """Faults put into a model that works, one at a time."""
    forward = type(llama).forward

    def broken(self, input_ids, attention_mask=None, position_ids=None, cache=None, logits_to_keep=0, **further):
        if fault == "raises":
            raise RuntimeError("no such kernel\nand a long trace")
        if fault == "padding" and attention_mask is not None:
            attention_mask = torch.ones_like(attention_mask)
        if fault == "cache" and cache is not None:
            position_ids = None if position_ids is None else position_ids * 0
        if fault == "training" and isinstance(logits_to_keep, int) and logits_to_keep:
            position_ids = position_ids + torch.arange(position_ids.shape[1])
        return forward(
            self, input_ids, attention_mask, position_ids, cache, logits_to_keep=logits_to_keep, **further
        )  # fmt: skip

    causal._arguments.cache_clear()
    monkeypatch.setattr(type(llama), "forward", broken)
    # What helps a family that sees padding helps here, too: only the first of the two ways is looked at.
    problem = causal._problem
    monkeypatch.setattr(causal, "_problem", lambda model, unpadded: problem(model, unpadded=False))
    if fault == "nan":
        llama.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=why):
        check_family(llama, "mine")
    causal._arguments.cache_clear()


def test_the_check_leaves_the_mode_and_knows_who_sees_padding(llama):
    for training in (True, False):
        check_family(llama.train(training), "mine")
        assert llama.training is training
    assert not is_unpadded(llama)
    bart = AutoModelForCausalLM.from_config(families.tiny_config("bart")).eval()
    check_family(bart, "bart")
    assert is_unpadded(bart)
    assert is_unpadded(copy.deepcopy(bart))


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_padded_rows_are_read_as_alone(tmp_path, family):
    model, _ = load_policy(families.make_folder(family, tmp_path / "start"))
    rows, left, right = [[3, 9, 4, 7, 5], [8, 6, 2]], [1, 2], [0, 1]
    ids = torch.tensor([[0] * a + row + [0] * b for row, a, b in zip(rows, left, right, strict=True)])
    mask = torch.tensor([[0] * a + [1] * len(row) + [0] * b for row, a, b in zip(rows, left, right, strict=True)])
    with torch.no_grad():
        found = read(model, ids, mask, keep=3)
        head = model.get_output_embeddings()
        for row, (ids_T, end) in enumerate(zip(rows, (0, 1), strict=True)):
            alone = model(input_ids=torch.tensor([ids_T])).logits[0]
            real = 3 - end
            torch.testing.assert_close(found.logits[row, :real], alone[-real:], atol=1e-5, rtol=0)
            torch.testing.assert_close(head(found.hidden[row, :real]), alone[-real:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "minimax", "rwkv"])
def test_a_prompts_sample_does_not_depend_on_the_batch(tmp_path, family):
    model, words = load_policy(families.make_folder(family, tmp_path / "start"))

    def draw(batch_size):
        found = generate(
            model, words, families.PROMPTS * 3, max_new_tokens=6, temperature=1.0, seed=1, batch_size=batch_size
        )
        return [g.response_ids for g in found]

    assert draw(1) == draw(5) == draw(32)


def test_nothing_deprecated_is_asked_of_transformers(tmp_path, monkeypatch, caplog):
    """transformers 5.24 says what goes in 5.40, once a process: so what it has said before is forgotten here."""
    model, words = load_policy(families.make_folder("llama", tmp_path / "start"))
    transformers_logging.get_logger().warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        generate(model, words, families.PROMPTS, max_new_tokens=4, temperature=1.0, seed=0)
    assert "deprecated" not in caplog.text
