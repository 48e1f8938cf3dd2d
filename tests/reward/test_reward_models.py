"""Encoding, loading, saving and scoring of the reward models."""

from __future__ import annotations

import json
from datetime import datetime

import numpy as np
import pytest
import torch
from transformers import LongformerConfig, LongformerModel

from tests.helpers.tokenizer_kinds import get_tokenizer
from tppo.core.common import UserError
from tppo.core.config import Reward
from tppo.core.tables import EXAMPLES, LABELS, Example, write_table
from tppo.core.text import Event
from tppo.generate.engine import decode_response
from tppo.judge.verdict import Verdict, WordVerdict, split_response, verdict_to_row
from tppo.plan import encoder_size
from tppo.reward.align import token_spans
from tppo.reward.data import collate, encode_pairs, load_labelled, make_items, targets
from tppo.reward.models import SentenceRewardModel, TokenRewardModel, pool_sentence

HISTORIES = [
    [Event("search", "cheap flights"), Event("click", "flights to new york")],
    [Event("search", "pizza")],
    [Event("visit", f"page number {i} about naïve things") for i in range(40)],
    [],
    [Event("search", "日本 旅行")],
]
TIME = datetime(2006, 3, 1)
RESPONSES = ["new york hotels\nflights tokyo", "", "pizza near me 😀\ncafé\nx", "\n ", "東京 ホテル"]


def label_row(example_id, text, split="train", rubric="targets", **changes):
    example = Example(example_id, "u", split, [], [], TIME)
    words = [WordVerdict(0.5, bool(i % 2)) for i in range(len(split_response(text).words))]
    row = verdict_to_row(example, 0, rubric, "test", text, Verdict(words, 0.5, True, "ok", None))
    return {**row, **changes}


def write_folders(tmp_path, rows, splits=("train", "reward_eval")):
    example = {"user_id": "u", "targets": ["a", "b", "c"], "target_time": TIME}
    history = [{"kind": "search", "text": "cheap flights"}]
    ids = {(row["example_id"], row["split"]): None for row in rows}
    examples = [
        {**example, "example_id": example_id, "split": split, "history": history}
        for example_id, split in ids
        if split in splits
    ]
    write_table(tmp_path / "examples.parquet", examples, EXAMPLES)
    write_table(tmp_path / "labels.parquet", rows, LABELS)


def test_load_labelled_takes_split_rubric_and_counts_abstentions(tmp_path):
    rows = [
        label_row("a", "new york\npizza"),
        label_row("a", "other rubric", rubric="history"),
        label_row("b", "held out", split="reward_eval"),
        label_row("c", "x", status="abstained", sentence_label=None, words=[]),
    ]
    write_folders(tmp_path, rows)
    labelled, abstained = load_labelled(tmp_path, tmp_path, "targets", "train")
    assert [row.response for row in labelled] == ["new york\npizza"]
    assert abstained == 1
    assert labelled[0].classes == [1, 2, 1]
    assert labelled[0].history == [Event("search", "cheap flights")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sentence_label": None}, "sentence_label is None"),
        ({"response": "york new\npizza"}, "word 0 is not at characters 0 to 3"),
        ({"split": "nowhere"}, None),
    ],
)
def test_contradicting_rows_are_refused(tmp_path, changes, message):
    write_folders(tmp_path, [label_row("a", "fine"), label_row("b", "new york\npizza", **changes)])
    if message is None:
        assert len(load_labelled(tmp_path, tmp_path, "targets", "train")[0]) == 1
    else:
        with pytest.raises(UserError, match=r"labels.parquet, row 1 \(example b\): " + message):
            load_labelled(tmp_path, tmp_path, "targets", "train")


def test_wrong_word_label_and_unknown_example(tmp_path):
    row = label_row("a", "new york")
    row["words"][1]["label"] = 0
    write_folders(tmp_path, [row])
    with pytest.raises(UserError, match="word 1 has label 0, neither 1 nor 2"):
        load_labelled(tmp_path, tmp_path, "targets", "train")
    write_folders(tmp_path, [label_row("a", "new york")], splits=())
    with pytest.raises(UserError, match="no example of split train"):
        load_labelled(tmp_path, tmp_path, "targets", "train")


def test_long_history_loses_its_oldest_part_and_the_response_nothing():
    tokenizer = get_tokenizer("minilm")
    history = [Event("search", f"oldest{i}") for i in range(60)] + [Event("search", "newest")]
    (short,) = encode_pairs(tokenizer, [history], ["new york\npizza"], 40)
    (long,) = encode_pairs(tokenizer, [history], ["new york\npizza"], 500)
    assert len(short) == 40
    assert short.dropped == len(long) - 40
    assert long.dropped == 0
    tokens = tokenizer.convert_ids_to_tokens(short.inputs["input_ids"])
    assert tokens[0] == "[CLS]"
    assert tokens[short.start :] == ["new", "york", "|", "pizza", "[SEP]"]
    assert tokens[short.start - 2 : short.start] == ["newest", "[SEP]"]
    assert short.spans == long.spans == [(0, 3), (4, 8), (8, 9), (9, 14)]
    assert short.inputs["token_type_ids"][short.start - 1 : short.start + 1] == [0, 1]


def test_a_response_is_never_cut():
    tokenizer = get_tokenizer("minilm")
    with pytest.raises(UserError, match=r"response 1 of 2 has 40 reward-model tokens.*reward.max_length=40"):
        encode_pairs(tokenizer, [[], []], ["ok", "a " * 40], 40)


@pytest.mark.parametrize("response", ["", "\n" * 300, " \t", "\u200b"])
def test_a_response_without_text_has_no_tokens(response):
    """Nor too many: 300 line breaks are not 300 separators."""
    (pair,) = encode_pairs(get_tokenizer("minilm"), [[Event("search", "x")]], [response], 40)
    assert pair.spans == []
    assert len(pair) <= 40


def test_special_tokens_typed_by_a_user_are_text():
    tokenizer = get_tokenizer("minilm")
    (pair,) = encode_pairs(tokenizer, [[Event("search", "[SEP] x")]], ["[SEP] y [PAD]"], 64)
    assert pair.inputs["input_ids"].count(tokenizer.sep_token_id) == 2
    assert tokenizer.pad_token_id not in pair.inputs["input_ids"]


def test_separators_are_class_zero_and_batches_line_up(tmp_path):
    write_folders(tmp_path, [label_row("a", "new york\npizza"), label_row("b", "flights", sentence_label=0)])
    labelled, _ = load_labelled(tmp_path, tmp_path, "targets", "train")
    tokenizer = get_tokenizer("minilm")
    items = make_items(tokenizer, labelled, 64)
    assert items[0].classes == [1, 2, 0, 1]
    batch = collate(items, tokenizer.pad_token_id, torch.device("cpu"))
    classes_BT, labels_B = targets(items, batch)
    assert batch.response_mask_BT.sum(dim=1).tolist() == [4, 1]
    assert classes_BT[0][batch.response_mask_BT[0]].tolist() == [1, 2, 0, 1]
    assert classes_BT[~batch.response_mask_BT].sum() == 0
    assert labels_B.tolist() == [1, 0]


def policy_side(responses):
    policy = get_tokenizer("byte_level_bpe")
    ids = [[*policy(text, add_special_tokens=False)["input_ids"], policy.eos_token_id] for text in responses]
    assert [decode_response(policy, row) for row in ids] == responses
    return [token_spans(policy, row) for row in ids]


def test_token_scores(tiny_encoder):
    model = TokenRewardModel.start(str(tiny_encoder), 64)
    spans = policy_side(RESPONSES)
    scores = model.score(HISTORIES, RESPONSES, spans)
    assert [score.shape for score in scores] == [(len(row), 3) for row in spans]
    for response, row, score in zip(RESPONSES, spans, scores, strict=True):
        assert score.dtype == np.float32
        np.testing.assert_allclose(score.sum(axis=1), 1, atol=1e-5)
        for (start, end), probs in zip(row, score, strict=True):
            assert (probs.tolist() == [1, 0, 0]) == (not response[start:end].strip())
    assert model.truncated == 1, "the 40-event history does not fit into 64 tokens, and that is counted"


def test_scores_do_not_depend_on_padding_or_batch(tiny_encoder):
    token, sentence = (kind.start(str(tiny_encoder), 96) for kind in (TokenRewardModel, SentenceRewardModel))
    spans = policy_side(RESPONSES)
    together = token.score(HISTORIES, RESPONSES, spans)
    together_sentence = sentence.score(HISTORIES, RESPONSES)
    for i in range(len(RESPONSES)):
        (alone,) = token.score(HISTORIES[i : i + 1], RESPONSES[i : i + 1], spans[i : i + 1])
        np.testing.assert_allclose(alone, together[i], atol=1e-4)
        (number,) = sentence.score(HISTORIES[i : i + 1], RESPONSES[i : i + 1])
        assert number == pytest.approx(together_sentence[i], abs=1e-4)
    reverse = token.score(HISTORIES[::-1], RESPONSES[::-1], spans[::-1])[::-1]
    for a, b in zip(together, reverse, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_sentence_scores(tiny_encoder):
    model = SentenceRewardModel.start(str(tiny_encoder), 64)
    model.model.train()
    scores = model.score(HISTORIES, RESPONSES)
    assert model.model.training, "scoring leaves the mode as it was"
    assert scores == model.score(HISTORIES, RESPONSES), "without dropout"
    assert all(0 <= score <= 1 for score in scores)
    assert scores[1] == scores[3] == 0, "nothing to read"
    assert model.score([], []) == []


@pytest.mark.parametrize(("pooling", "pooled"), [("mean", 4.5), ("max", 6), ("cls", 9)])
def test_pooling(pooling, pooled):
    """Mean and maximum of the response's tokens (not of those beside it), or the first token; 0 without a response."""
    logits = torch.tensor([[[9.0], [3.0], [6.0], [7.0]], [[3.0], [9.0], [9.0], [9.0]]], requires_grad=True)
    mask = torch.tensor([[False, True, True, False], [False] * 4])
    result = pool_sentence(logits, mask, pooling)
    assert result.tolist() == [pooled, 0]
    result.sum().backward()
    assert logits.grad[0].sum() == 1
    assert (logits.grad[1] == 0).all()


@pytest.mark.parametrize("pooling", ["mean", "max", "cls"])
def test_pooling_in_batches_and_after_loading(tiny_encoder, tmp_path, pooling):
    model = SentenceRewardModel.start(str(tiny_encoder), 64)
    model.use_pooling(pooling)
    scores = model.score(HISTORIES, RESPONSES)
    alone = [model.score([history], [text])[0] for history, text in zip(HISTORIES, RESPONSES, strict=True)]
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    assert scores[1] == scores[3] == 0, "nothing to read"
    model.save(tmp_path / "model")
    np.testing.assert_allclose(SentenceRewardModel.load(tmp_path / "model").score(HISTORIES, RESPONSES), scores)


def test_cls_pooling_needs_a_cls_token(tiny_encoder):
    model = SentenceRewardModel.start(str(tiny_encoder), 64)
    model.tokenizer.cls_token = model.tokenizer.sep_token
    with pytest.raises(UserError, match=r"reward.sentence_pooling=cls: inputs of .* do not begin with a \[CLS\]"):
        model.use_pooling("cls")
    assert model.pooling == "mean"


@pytest.mark.parametrize("kind", [TokenRewardModel, SentenceRewardModel])
def test_save_and_load(tiny_encoder, tmp_path, kind):
    model = kind.start(str(tiny_encoder), 64)
    model.save(tmp_path / "model", rubric="targets", metrics={"auc": None})
    info = json.loads((tmp_path / "model" / "reward.json").read_text())
    assert info["kind"] == kind.kind
    assert info["classes"] == list(kind.values)
    assert info["max_length"] == 64
    assert info["rubric"] == "targets"
    assert {path.suffix for path in (tmp_path / "model").iterdir()} <= {".json", ".safetensors", ".txt", ".md"}
    loaded = kind.load(tmp_path / "model")
    for a, b in zip(
        model.response_logits(model.encode(HISTORIES, RESPONSES)),
        loaded.response_logits(loaded.encode(HISTORIES, RESPONSES)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)
    other = SentenceRewardModel if kind is TokenRewardModel else TokenRewardModel
    with pytest.raises(UserError, match="of kind"):
        other.load(tmp_path / "model")


def test_folders_that_are_no_reward_model(tiny_encoder, tmp_path):
    with pytest.raises(UserError, match=r"reward.json does not exist"):
        TokenRewardModel.load(tiny_encoder)
    with pytest.raises(UserError, match=r"reward.json does not exist"):
        SentenceRewardModel.load(tmp_path / "nowhere")


def test_damaged_folders(tiny_encoder, tmp_path):
    folder = tmp_path / "model"
    SentenceRewardModel.start(str(tiny_encoder), 64).save(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no model or tokenizer that loads"):
        SentenceRewardModel.load(folder)
    (folder / "reward.json").write_text('{"kind": "sentence"')
    with pytest.raises(UserError, match=r"reward.json is damaged"):
        SentenceRewardModel.load(folder)


def test_max_length_beyond_the_encoder(tiny_encoder):
    with pytest.raises(UserError, match=r"reward.max_length=256 must be between 16 and 128"):
        TokenRewardModel.start(str(tiny_encoder), 256)


def test_longformer_gives_the_history_global_attention(tmp_path):
    tokenizer = get_tokenizer("byte_level_bpe")
    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=tokenizer.pad_token_id + 121,
        attention_window=[8, 8],
        pad_token_id=tokenizer.pad_token_id,
    )
    LongformerModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = TokenRewardModel.start(str(tmp_path), 120)
    spans = policy_side(RESPONSES)
    scores = model.score(HISTORIES, RESPONSES, spans)
    changed = [[Event("search", "qqqq"), *HISTORIES[0][1:]], *HISTORIES[1:]]
    moved = model.score(changed, RESPONSES, spans)
    # the first event lies outside of the window of the response's last word
    assert np.abs(scores[0][-2] - moved[0][-2]).max() > 0
    np.testing.assert_allclose(scores[2], moved[2], atol=1e-4)


def test_the_first_layers_of_an_encoder(tiny_encoder, tmp_path):
    """As many as asked, with the encoder's own weights; more than it has is an error that says how many it has."""
    whole, first = (TokenRewardModel.start(str(tiny_encoder), 64, layers=layers) for layers in (0, 1))
    assert (whole.model.config.num_hidden_layers, first.model.config.num_hidden_layers) == (2, 1)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(whole.model.state_dict()[name], first.model.state_dict()[name])
    first.save(tmp_path / "saved")
    assert TokenRewardModel.load(tmp_path / "saved").model.config.num_hidden_layers == 1
    with pytest.raises(UserError, match=r"reward.encoder_layers=3: .* has 2 layers; 0 keeps all"):
        TokenRewardModel.start(str(tiny_encoder), 64, layers=3)
    size = encoder_size(Reward(encoder=str(tiny_encoder), encoder_layers=1))
    assert size.config.num_hidden_layers == 1
    assert size.parameters == sum(p.numel() for p in first.model.parameters())
