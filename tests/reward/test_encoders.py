"""Every kind of encoder on the whole road of a reward model: start, train, score, save, load, score again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.encoder_kinds import POSITIONS, TOKENIZERS, write_encoder
from tests.helpers.tokenizer_kinds import get_tokenizer
from tppo.core.common import UserError
from tppo.core.config import Reward
from tppo.core.text import Event, parse_response
from tppo.generate.engine import decode_response
from tppo.reward.align import token_spans
from tppo.reward.data import LabelledResponse, encode_pairs, make_items
from tppo.reward.models import SentenceRewardModel, TokenRewardModel
from tppo.reward.train import fit

KINDS = sorted(TOKENIZERS)
GLOBAL_ATTENTION = ("history", "response", "cls", "none")
MODELS = [(kind, "history") for kind in KINDS] + [("longformer", where) for where in GLOBAL_ATTENTION[1:]]
GOOD, BAD = ["pizza", "kids", "hotels"], ["weather", "flat", "tyre"]
_started: dict[tuple[str, str], tuple[TokenRewardModel, SentenceRewardModel]] = {}


@pytest.fixture(scope="module")
def both_models(tmp_path_factory):
    """A function: token and sentence model of a kind, made once."""

    def make(kind: str, where: str) -> tuple[TokenRewardModel, SentenceRewardModel]:
        if (kind, where) not in _started:
            encoder = write_encoder(kind, tmp_path_factory.mktemp(kind))
            token, sentence = (
                cls.start(encoder, 96, global_attention=where) for cls in (TokenRewardModel, SentenceRewardModel)
            )
            _started[kind, where] = token, sentence
        return _started[kind, where]

    return make


def labelled(words: list[str]) -> LabelledResponse:
    response = " ".join(words)
    found = parse_response(response, True, 3).words
    classes = [2 if word in GOOD else 1 for word in words]
    return LabelledResponse("e", "u", [Event("search", "best town")], response, found, classes, int(words[0] in GOOD))


@pytest.mark.parametrize("kind", sorted({*TOKENIZERS.values()}))
def test_control_tokens_that_a_user_typed_are_text(kind: str) -> None:
    """Also where the tokenizer's model itself holds them, as Unigram's does."""
    tokenizer = get_tokenizer(kind)
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    typed = " ".join(tokenizer.all_special_tokens)
    pairs = [
        encode_pairs(tokenizer, [[Event("search", f"best {text}town")]], [f"{text}pizza"], 96)[0]
        for text in ("", f"{typed} ")
    ]
    counts = [sum(id in special for id in pair.inputs["input_ids"]) for pair in pairs]
    assert counts[0] == counts[1]
    assert len(pairs[1]) > len(pairs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_trains_saves_loads_and_scores(kind: str, tmp_path: Path) -> None:
    """Which words are relevant depends on the word alone, so a few steps lower the loss and order them."""
    torch.set_num_threads(1)
    model = TokenRewardModel.start(write_encoder(kind, tmp_path / "encoder"), 64)
    rows = [labelled([a, b]) for a in GOOD + BAD for b in GOOD + BAD]
    items = make_items(model.tokenizer, rows, 64)
    log: list[dict] = []
    chosen = Reward(epochs=6, batch_size=6, learning_rate=2e-3, evals_per_epoch=1)
    fit(model, items, items, chosen, 0, log.append)
    evaluations = [row for row in log if row["split"] == "reward_eval"]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert evaluations[-1]["token_auc"] > 0.8

    model.save(tmp_path / "model")
    loaded = TokenRewardModel.load(tmp_path / "model")
    histories, responses = [row.history for row in rows[:4]], [row.response for row in rows[:4]]
    spans = [[(word.start, word.end) for word in row.words] for row in rows[:4]]
    before, after = (scorer.score(histories, responses, spans) for scorer in (model, loaded))
    np.testing.assert_allclose(np.concatenate(after), np.concatenate(before), atol=1e-6)


def test_as_a_longformer_trains_saves_loads_and_scores(tmp_path: Path) -> None:
    """The copied global projections get gradients of their own."""
    torch.set_num_threads(1)
    model = TokenRewardModel.start(write_encoder("bert", tmp_path / "encoder"), 256, longformer_window=16)
    names = [f"longformer.encoder.layer.1.attention.self.{name}.weight" for name in ("query", "query_global")]
    same = [model.model.state_dict()[name].clone() for name in names]
    torch.testing.assert_close(*same, rtol=0, atol=0)
    items = make_items(model.tokenizer, [labelled([a, b]) for a in GOOD + BAD for b in GOOD + BAD], 256)
    chosen = Reward(epochs=2, batch_size=6, learning_rate=2e-3, evals_per_epoch=1)
    fit(model, items, items, chosen, 0, lambda row: None)
    trained = [model.model.state_dict()[name] for name in names]
    assert not torch.equal(trained[0], same[0])
    assert not torch.equal(trained[1], same[1])
    assert not torch.equal(*trained)


words = st.sampled_from(["pizza", "new", "york", "tokyo", "日本", "😀", "café", "xxxx"])
queries = st.lists(words, max_size=8).map(" ".join)
# Short enough for the models' 96 tokens whatever the tokenizer; histories are longer than that at times.
responses_of_few_words = st.lists(st.lists(words, max_size=4).map(" ".join), max_size=2).map("\n".join)
examples = st.tuples(st.lists(queries, max_size=6), responses_of_few_words)


@pytest.mark.parametrize(("kind", "where"), MODELS)
def test_scores_do_not_depend_on_padding_or_batch(kind: str, where: str, both_models) -> None:
    token, sentence = both_models(kind, where)
    policy = get_tokenizer("byte_level_bpe")

    @settings(max_examples=12, deadline=None)
    @given(st.lists(examples, min_size=2, max_size=6), st.randoms(use_true_random=False))
    def check(batch, random):
        order = random.sample(range(len(batch)), len(batch))
        histories = [[Event("search", text) for text in history] for history, _ in batch]
        ids = [[*policy(text, add_special_tokens=False)["input_ids"], policy.eos_token_id] for _, text in batch]
        responses = [decode_response(policy, row) for row in ids]
        spans = [token_spans(policy, row) for row in ids]

        def scores(rows):
            chosen = [[values[i] for i in rows] for values in (histories, responses, spans)]
            return token.score(*chosen), sentence.score(*chosen[:2])

        together = scores(range(len(batch)))
        shuffled = scores(order)
        for place, i in enumerate(order):
            (alone,), (number,) = scores([i])
            for other in (together[0][i], shuffled[0][place]):
                np.testing.assert_allclose(other, alone, atol=1e-4)
            assert [together[1][i], shuffled[1][place]] == pytest.approx([number] * 2, abs=1e-4)

    check()
    # Scores that hardly differ between inputs would pass anything above.
    other_history = [[Event("search", "pizza pizza")], [Event("search", "weather flat tyre")]]
    first, second = token.score(other_history, ["new york"] * 2, [[(0, 8)]] * 2)
    assert np.abs(first - second).max() > 1e-2 or where == "none"


@pytest.mark.parametrize("kind", KINDS)
def test_reads_as_many_tokens_as_the_encoder_has_positions_for(kind: str, tmp_path: Path) -> None:
    encoder = write_encoder(kind, tmp_path)
    longest = min(POSITIONS, get_tokenizer(TOKENIZERS[kind]).model_max_length)
    model = TokenRewardModel.start(encoder, longest)
    history = [Event("search", f"pizza new york {i}") for i in range(80)]
    (pair,) = model.encode([history], ["pizza\ntown"])
    assert len(pair) == longest
    assert model.truncated == 1
    assert np.isfinite(model.response_logits([pair])[0]).all()
    with pytest.raises(UserError, match=rf"reward.max_length={longest + 1} must be between 16 and {longest}"):
        TokenRewardModel.start(encoder, longest + 1)


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_token_types_that_the_encoder_does_not_know_are_left_out(kind: str, tmp_path: Path) -> None:
    """A BERT tokenizer tells two types of tokens apart; these encoders take one, or none."""
    tokenizer = get_tokenizer("minilm")
    model = TokenRewardModel.start(write_encoder(kind, tmp_path / "encoder", tokenizer), 64)
    assert "token_type_ids" in tokenizer.model_input_names
    history, span = [[Event("search", "pizza")]], [[(0, 4)]]
    before = model.score(history, ["town"], span)
    model.save(tmp_path / "model")
    np.testing.assert_allclose(TokenRewardModel.load(tmp_path / "model").score(history, ["town"], span), before)


def test_an_encoder_that_does_not_load_is_said(tmp_path: Path) -> None:
    write_encoder("bert", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"reward.encoder=.* holds no encoder and tokenizer that load"):
        TokenRewardModel.start(str(tmp_path), 64)
