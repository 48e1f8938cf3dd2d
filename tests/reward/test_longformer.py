"""Encoders made into Longformers: they compute what the source computes, and read more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForTokenClassification, LongformerForTokenClassification

from tests.helpers.encoder_kinds import POSITIONS, write_encoder
from tests.helpers.tokenizer_kinds import get_tokenizer
from tppo.core.common import UserError
from tppo.core.models import load_encoder_path
from tppo.core.text import Event
from tppo.reward.data import collate
from tppo.reward.longformer import first_position, tile_positions, to_longformer
from tppo.reward.models import SentenceRewardModel, TokenRewardModel

KINDS = ("bert", "minilm_tokens", "roberta", "xlm_roberta", "camembert")
WORDS = ["pizza", "tokyo", "cheap", "flights", "town", "new", "york", "station"]
CPU = torch.device("cpu")


def history_of(words: int) -> list[Event]:
    return [Event("search", " ".join(WORDS[(i + k) % 8] for k in range(4))) for i in range(0, words, 4)]


def source_model(kind, folder):
    return TokenRewardModel.start(write_encoder(kind, folder), POSITIONS)


def converted(source, max_length=256, window=64, where="none"):
    """The source with the same head, as a Longformer."""
    model = to_longformer(source.model, max_length, window)
    return TokenRewardModel(model, source.tokenizer, max_length, {"global_attention": where})


def logits_of(model, pairs):
    return model.response_logits(pairs)


def largest_difference(first, second):
    return max(np.abs(a - b).max() for a, b in zip(first, second, strict=True))


def short_pairs(source):
    """Pairs that a window of 64, which reaches 32 tokens to each side, covers, of different lengths."""
    histories = [[Event("search", "pizza")], [Event("click", "tokyo")], []]
    pairs = [pair for pair in source.encode(histories, ["new york", "pizza\ntown", "cheap"]) if len(pair) <= 33]
    assert len({len(pair) for pair in pairs}) >= 2
    return pairs


@pytest.mark.parametrize("where", ["none", "cls", "history", "response"])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_source_where_the_window_covers_the_input(kind, where, tmp_path):
    source = source_model(kind, tmp_path)
    pairs = short_pairs(source)
    np.testing.assert_allclose(
        np.concatenate(logits_of(converted(source, where=where), pairs)),
        np.concatenate(logits_of(source, pairs)),
        atol=1e-4,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_global_attention_covers_what_the_window_does_not(kind, tmp_path):
    """A window of 2 x 16 spans the response and, at full length, little else: the rest goes through the copies."""
    source = source_model(kind, tmp_path)
    pairs = source.encode([history_of(40), history_of(12)], ["pizza", "town"])
    assert max(len(pair) for pair in pairs) > 60
    assert all(len(pair) - pair.start <= 17 for pair in pairs)
    expected = logits_of(source, pairs)
    np.testing.assert_allclose(
        np.concatenate(logits_of(converted(source, window=32, where="history"), pairs)),
        np.concatenate(expected),
        atol=1e-4,
    )
    assert largest_difference(logits_of(converted(source, window=32, where="none"), pairs), expected) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_positions_beyond_the_source_are_its_own_over_and_over(kind, tmp_path):
    """The source reads a long input, too, when it is told positions that start anew after its last one."""
    source = source_model(kind, tmp_path)
    model = converted(source, max_length=384, window=32, where="history")
    (pair,) = model.encode([history_of(200)], ["pizza"])
    assert POSITIONS < len(pair) <= 384
    batch = collate([pair], source.tokenizer.pad_token_id, CPU)
    first = first_position(source.model.base_model.embeddings.position_embeddings)
    positions_1T = first + (torch.arange(len(pair)) % POSITIONS)[None]
    with torch.inference_mode():
        expected_TC = source.model(**batch.inputs, position_ids=positions_1T).logits[batch.response_mask_BT]
    np.testing.assert_allclose(logits_of(model, [pair])[0], expected_TC.numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["minilm_tokens", "roberta"])
@pytest.mark.parametrize("model_kind", [TokenRewardModel, SentenceRewardModel])
def test_saved_and_loaded_it_is_the_same(kind, model_kind, tmp_path):
    encoder = write_encoder(kind, tmp_path / "encoder")
    model = model_kind.start(encoder, 256, longformer_window=32, global_attention="cls")
    model.save(tmp_path / "model")
    loaded = model_kind.load(tmp_path / "model")
    assert isinstance(loaded.model, LongformerForTokenClassification)
    assert loaded.info["global_attention"] == "cls"
    assert loaded.tokenizer.model_max_length == loaded.max_length == 256
    pairs = model.encode([history_of(100), []], ["pizza\ntown", "new york"])
    assert len(pairs[0]) > POSITIONS
    np.testing.assert_array_equal(np.concatenate(logits_of(loaded, pairs)), np.concatenate(logits_of(model, pairs)))
    loaded.info["global_attention"] = "none"
    assert largest_difference(logits_of(loaded, pairs), logits_of(model, pairs)) > 1e-5


@pytest.mark.parametrize(
    ("where", "side"),
    [("cls", "right")] + [(where, side) for where in ("none", "history", "response") for side in ("left", "right")],
)
@pytest.mark.parametrize("amount", [1, 7, 16, 45])
def test_padding_changes_nothing_on_either_side(where, side, amount, tmp_path):
    """Among it the padding that transformers adds to reach a multiple of the window, here 16. Left padding with `cls`
    is no case: `collate` pads on the right, so the first token is no padding."""
    model = converted(source_model("roberta", tmp_path), window=16, where=where)
    (pair,) = model.encode([history_of(24)], ["pizza\ntown"])
    batch = collate([pair], model.tokenizer.pad_token_id, CPU)
    margin = (amount, 0) if side == "left" else (0, amount)
    padded = batch._replace(
        inputs={
            "input_ids": pad(batch.inputs["input_ids"], margin, value=model.tokenizer.pad_token_id),
            "attention_mask": pad(batch.inputs["attention_mask"], margin),
        },
        response_mask_BT=pad(batch.response_mask_BT, margin),
    )
    with torch.inference_mode():
        expected_TC = model.logits(batch)[batch.response_mask_BT]
        np.testing.assert_allclose(model.logits(padded)[padded.response_mask_BT], expected_TC, atol=1e-4)


def test_minilm_with_its_real_weights():
    source = TokenRewardModel.start(load_encoder_path("minilm"), 512)
    pairs = short_pairs(source)
    for where in ("none", "history"):
        model = converted(source, 2048, 64, where)
        np.testing.assert_allclose(
            np.concatenate(logits_of(model, pairs)), np.concatenate(logits_of(source, pairs)), atol=1e-4
        )
    (long,) = model.encode([history_of(1000)], ["pizza"])
    assert len(long) > 1000
    assert np.isfinite(logits_of(model, [long])[0]).all()


def test_tiled_positions():
    positions_PD = torch.tensor([[1.0], [2.0], [3.0]])
    assert tile_positions(positions_PD, 7)[:, 0].tolist() == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize(
    ("kind", "max_length", "window", "message"),
    [
        ("modernbert", 256, 64, "of kind modernbert, which reads long inputs as it is"),
        ("longformer", 256, 64, "of kind longformer, which reads long inputs as it is"),
        ("distilbert", 256, 64, "of kind distilbert cannot be converted, only encoders of kind bert, roberta"),
        ("deberta_v2", 256, 64, "of kind deberta-v2 cannot be converted"),
        ("bert", 256, 63, "reward.attention_window=63 must be even"),
        ("bert", 256, 0, "reward.attention_window=0 must be even and at least 2"),
        ("bert", 250, 64, "reward.max_length=250 must be a multiple of reward.attention_window=64, such as 256"),
        ("bert", 128, 64, "reads 128 tokens as it is, so reward.max_length=128 needs no Longformer"),
        ("roberta", 128, 64, "reads 128 tokens as it is, so reward.max_length=128 needs no Longformer"),
    ],
)
def test_what_cannot_be_converted_is_said(kind, max_length, window, message, tmp_path):
    encoder = write_encoder(kind, tmp_path)
    with pytest.raises(UserError, match=message):
        TokenRewardModel.start(encoder, max_length, longformer_window=window)


def test_decoders_cannot_be_converted(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForTokenClassification(LlamaConfig(vocab_size=30, **sizes))
    with pytest.raises(UserError, match="of kind llama cannot be converted"):
        to_longformer(llama, 256, 64)
    source = source_model("bert", tmp_path)
    source.model.config.is_decoder = True
    with pytest.raises(UserError, match=r"of kind bert \(decoder\) cannot be converted"):
        to_longformer(source.model, 256, 64)


def test_unknown_global_attention_is_refused(tmp_path):
    encoder = write_encoder("longformer", tmp_path / "encoder")
    with pytest.raises(UserError, match=r"reward.global_attention is 'all' and has to be one of history"):
        TokenRewardModel.start(encoder, 64, global_attention="all")
    model = TokenRewardModel.start(encoder, 64)
    del model.info["global_attention"]
    model.save(tmp_path / "model")
    with pytest.raises(UserError, match=r"reward.json: global_attention is None"):
        TokenRewardModel.load(tmp_path / "model")


def test_a_tokenizer_that_pads_with_another_token_is_refused(tmp_path):
    """Positions of a RoBERTa kind are counted by the padding token, so a foreign one would shift them in silence."""
    encoder = write_encoder("roberta", tmp_path)
    get_tokenizer("minilm").save_pretrained(encoder)
    with pytest.raises(UserError, match="its tokenizer pads with token 0, but the model counts positions"):
        TokenRewardModel.start(encoder, 64)
