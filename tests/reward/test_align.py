"""Alignment: every token gets exactly one class and one span, whatever the tokenizer and the text."""

from __future__ import annotations

import random
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.tokenizer_kinds import KINDS, get_tokenizer
from tppo.core.models import load_policy
from tppo.core.text import Word, parse_response
from tppo.generate.engine import decode_response
from tppo.reward import align
from tppo.reward.align import classes_from_words, encoder_spans, pool_probabilities, token_spans

TEXTS = [
    "",
    " ",
    "cheap flights to new york\nhotels in tokyo",
    "new york new york\nnew york",
    "  two  spaces\n\nand\tan empty line \n",
    "naïve café œuvre\nDon't panic!",
    "東京 日本旅行\nホテル 😀👍🏽 emoji👨‍👩‍👧",
    "e\u0301 combining, ﬁ ligature, ½, Ⅳ",
    "zero\u200bwidth \u00a0nbsp \u3000wide",
    "the [SEP] </s> <s> literal � mark",
    "x" * 60,
]
texts = st.one_of(
    st.sampled_from(TEXTS),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.lists(st.sampled_from(["new", "york", "café", "😀", "日", "ß", "", "\n"]), max_size=12).map(" ".join),
)
kinds = st.sampled_from(sorted(KINDS))
relaxed = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def check_spans(text, spans):
    """Inside the text, in order, and every character covered."""
    assert all(0 <= start <= end <= len(text) for start, end in spans)
    shown = [span for span in spans if span[0] < span[1]]
    assert [start for start, _ in shown] == sorted(start for start, _ in shown)
    assert [end for _, end in shown] == sorted(end for _, end in shown)
    assert set(range(len(text))) == {i for start, end in shown for i in range(start, end)}


@given(kind=kinds, text=texts)
@relaxed
def test_spans_cover_the_decoded_text(kind, text):
    tokenizer = get_tokenizer(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spans = token_spans(tokenizer, ids)
    assert len(spans) == len(ids)
    check_spans(decode_response(tokenizer, ids), spans)


@given(kind=kinds, data=st.data())
@relaxed
def test_spans_of_arbitrary_ids(kind, data):
    """A sampled response may be any sequence of ids: half characters, stray specials, odd cuts."""
    tokenizer = get_tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    spans = token_spans(tokenizer, ids)
    check_spans(decode_response(tokenizer, ids), spans)
    specials = set(tokenizer.all_special_ids)
    assert all(start == end for (start, end), token in zip(spans, ids, strict=True) if token in specials)


def spans_by_whole_prefixes(tokenizer, ids):
    """The definition taken literally: n prefixes of n tokens are decoded."""
    text = decode_response(tokenizer, ids)
    spans, shown, done, last = [], "", 0, (0, 0)
    for t, token in enumerate(ids):
        before, shown = shown, decode_response(tokenizer, ids[: t + 1])
        common = next((i for i, (x, y) in enumerate(zip(shown, text, strict=False)) if x != y), None)
        end = max(done, min(len(shown), len(text)) if common is None else common)
        if shown == before and not (shown.endswith("\ufffd") and decode_response(tokenizer, [token])):
            spans.append((done, done))
            continue
        if len(shown) > end < len(text):
            last = (done, end + 1)
        elif end > done:
            last = (done, end)
        else:
            last = (max(last[0], done - 1), last[1])
        spans.append(last)
        done = end
    return spans


@given(kind=kinds, window=st.integers(1, 8), data=st.data())
@relaxed
def test_spans_are_those_of_whole_prefixes(kind, window, data):
    """Whatever is sampled, wherever the anchors fall: broken characters, byte tokens, specials, swallowed spaces."""
    tokenizer = get_tokenizer(kind)
    any_id = st.integers(0, len(tokenizer) - 1)
    bits = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    pieces = data.draw(st.lists(st.one_of(st.sampled_from(bits), st.lists(any_id, max_size=6)), max_size=8))
    ids = [token for piece in pieces for token in piece]
    with mock.patch.object(align, "_WINDOW", window):
        assert token_spans(tokenizer, ids) == spans_by_whole_prefixes(tokenizer, ids)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_decoding_grows_with_the_length_not_with_its_square(kind):
    """Counted, not timed: the tokens decoded for twice the response are twice as many."""
    tokenizer = get_tokenizer(kind)
    ids = tokenizer("cheap flights to new york\nbest pizza in town " * 20, add_special_tokens=False)["input_ids"]

    def decoded(ids):
        with mock.patch.object(align, "decode_response", wraps=decode_response) as decode:
            token_spans(tokenizer, ids)
        return sum(len(call.args[1]) for call in decode.call_args_list)

    assert decoded(ids) < 20 * len(ids)
    assert decoded(ids * 2) < 2.2 * decoded(ids)


def test_a_decoder_that_looks_far_back_is_still_followed():
    """Decoding in pieces is not taken on trust: here the first five tokens are shown otherwise than the rest."""

    class Counting:
        def decode(self, ids, **_):
            return "".join(chr(97 + token) * (1 + (i < 5)) for i, token in enumerate(ids))

        def convert_ids_to_tokens(self, token):
            return chr(97 + token)

    ids = [0, 1, 2, 2, 3] * 6
    assert token_spans(Counting(), ids) == spans_by_whole_prefixes(Counting(), ids)


@given(kind=kinds, text=texts, data=st.data())
@relaxed
def test_truncated_responses(kind, text, data):
    """Cut anywhere, in the middle of a character too; what is left aligns, and complete tokens as before."""
    tokenizer = get_tokenizer(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = data.draw(st.integers(0, len(ids)))
    check_spans(decode_response(tokenizer, ids[:cut]), token_spans(tokenizer, ids[:cut]))


@given(kind=kinds, text=texts, seed=st.integers(0, 99))
@relaxed
def test_every_token_gets_exactly_one_class(kind, text, seed):
    tokenizer = get_tokenizer(kind)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], eos]
    response = decode_response(tokenizer, ids)
    words = parse_response(response, True, 3).words
    labels = [random.Random(seed + i).choice([1, 2]) for i in range(len(words))]
    spans = token_spans(tokenizer, ids)
    classes = classes_from_words(words, labels, spans)
    assert len(classes) == len(ids)
    assert set(classes) <= {0, 1, 2}
    for (start, end), klass in zip(spans, classes, strict=True):
        touched = {
            label for word, label in zip(words, labels, strict=True) if max(word.start, start) < min(word.end, end)
        }
        assert klass in touched if touched else klass == 0
    for word, label in zip(words, labels, strict=True):  # a word alone in its tokens is found again
        own = [
            klass
            for (start, end), klass in zip(spans, classes, strict=True)
            if response[start:end].strip() and word.start <= start and end <= word.end
        ]
        assert set(own) <= {label}


@pytest.mark.parametrize("text", ["cheap flights to new york", "new york pizza new york"])
def test_round_trip_of_plain_text(tokenizer, text):
    """Where a tokenizer keeps the text, the pieces joined are the text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    response = decode_response(tokenizer, ids)
    assert response.split() == text.split()
    assert "".join(response[start:end] for start, end in token_spans(tokenizer, ids)) == response


def test_one_character_in_several_tokens():
    for kind in ("byte_level_bpe", "llama_bpe"):
        tokenizer = get_tokenizer(kind)
        ids = tokenizer("a 🦜b", add_special_tokens=False)["input_ids"]
        text = decode_response(tokenizer, ids)
        assert text == "a 🦜b"
        spans = token_spans(tokenizer, ids)
        parrot = text.index("🦜")
        pieces = [span for span in spans if span[0] <= parrot < span[1]]
        assert len(pieces) >= 4, kind
        assert all(end == parrot + 1 for _, end in pieces), kind
        # all of its tokens earn the class of its word, one word "🦜b"
        classes = classes_from_words(parse_response(text, True, 3).words, [1, 2], spans)
        assert [c for span, c in zip(spans, classes, strict=True) if span in pieces] == [2] * len(pieces)


def test_character_left_incomplete_by_the_token_limit():
    tokenizer = get_tokenizer("byte_level_bpe")
    ids = tokenizer("hi 🦜", add_special_tokens=False)["input_ids"][:-1]
    text = decode_response(tokenizer, ids)
    assert text == "hi �"
    spans = token_spans(tokenizer, [*ids, tokenizer.eos_token_id])
    assert spans[-1][0] == spans[-1][1], "end of sequence shows nothing"
    assert [end for _, end in spans[-4:-1]] == [4, 4, 4], "all three bytes stand for the broken character"


def test_classes_by_largest_overlap_then_first():
    words = [
        Word("ab", 0, 2, 0),
        Word("cdef", 2, 6, 0),
    ]  # touching words, as a tokenizer without spaces sees them
    assert classes_from_words(words, [1, 2], [(0, 3), (1, 3), (1, 6), (6, 7), (3, 3)]) == [1, 1, 2, 0, 0]
    assert classes_from_words([], [], [(0, 1), (1, 1)]) == [0, 0]
    assert classes_from_words(words, [1, 2], []) == []


def test_pooling_by_hand():
    text = "new york"
    source_spans = [(0, 3), (4, 6), (6, 8)]
    source = np.array([[0.0, 1.0, 0.0], [0.0, 0.5, 0.5], [0.2, 0.0, 0.8]])
    targets = [(0, 1), (1, 5), (5, 8), (3, 4), (8, 8)]
    pooled = pool_probabilities(source_spans, source, targets, text)
    expected = [
        source[0],
        (2 * source[0] + source[1]) / 3,  # "ew y": the space counts for nothing
        (source[1] + 2 * source[2]) / 3,
        [1, 0, 0],  # white space only
        [1, 0, 0],  # end of sequence
    ]
    np.testing.assert_allclose(pooled, expected, atol=1e-6)
    assert pooled.dtype == np.float32


def test_pooling_nothing():
    assert pool_probabilities([], np.zeros((0, 3)), [], "").shape == (0, 3)
    np.testing.assert_array_equal(pool_probabilities([], np.zeros((0, 3)), [(0, 1)], "x"), [[1, 0, 0]])


@given(source=kinds, target=kinds, text=texts)
@relaxed
def test_pooling_between_any_two_tokenizers(source, target, text):
    """Rows are distributions, and pooling the gold one-hot classes of words gives the words' classes back."""
    policy, encoder = get_tokenizer(target), get_tokenizer(source)
    ids = policy(text, add_special_tokens=False)["input_ids"]
    response = decode_response(policy, ids)
    spans = token_spans(policy, ids)
    words = parse_response(response, True, 3).words
    labels = [1 + i % 2 for i in range(len(words))]
    encoding = encoder([""], [response], split_special_tokens=True).encodings[0]
    _, encoder_side = encoder_spans(encoder, encoding, response)
    one_hot = np.eye(3)[classes_from_words(words, labels, encoder_side)].reshape(-1, 3)
    pooled = pool_probabilities(encoder_side, one_hot, spans, response)
    assert pooled.shape == (len(ids), 3)
    np.testing.assert_allclose(pooled.sum(axis=1), 1, atol=1e-5)
    for (start, end), row in zip(spans, pooled, strict=True):
        if not response[start:end].strip():
            np.testing.assert_array_equal(row, [1, 0, 0])


@given(kind=kinds, history=texts, text=texts)
@relaxed
def test_encoder_spans_are_valid(kind, history, text):
    tokenizer = get_tokenizer(kind)
    encoding = tokenizer([history], [text], split_special_tokens=True).encodings[0]
    first, spans = encoder_spans(tokenizer, encoding, text)
    assert [encoding.sequence_ids[first + i] for i in range(len(spans))] == [1] * len(spans)
    assert sum(sequence == 1 for sequence in encoding.sequence_ids) == len(spans)
    assert all(0 <= start <= end <= len(text) for start, end in spans)
    assert [end for _, end in spans] == sorted(end for _, end in spans)


def test_encoder_spans_of_a_normalising_tokenizer():
    """Decoding gives 'naive cafe', not the text; the spans are still those of the text."""
    tokenizer = get_tokenizer("minilm")
    text = "Naïve CAFÉ|日本 😀 restaurants"
    encoding = tokenizer(["search: x"], [text]).encodings[0]
    first, spans = encoder_spans(tokenizer, encoding, text)
    assert encoding.tokens[first - 1] == "[SEP]"
    assert [text[start:end] for start, end in spans] == [
        "Naïve", "CAFÉ", "|", "日", "本", "😀", "restaurants"
    ]  # fmt: skip


def test_every_word_reaches_the_encoder(tokenizer):
    """Each word of an ordinary response has at least one encoder token of its class."""
    text = "cheap flights|to New York|weather"
    words = [Word(w, text.index(w), text.index(w) + len(w), 0) for w in ("cheap", "flights", "New", "weather")]
    encoding = tokenizer(["click: hotels"], [text]).encodings[0]
    _, spans = encoder_spans(tokenizer, encoding, text)
    for word in words:
        classes = classes_from_words([word], [2], spans)
        assert 2 in classes, (word, spans)


@pytest.mark.slow
def test_real_policy_tokenizer():
    """SmolLM2's byte-level BPE against MiniLM's WordPiece, on all texts and on random ids."""
    _, policy = load_policy("smollm2")
    generator = random.Random(0)
    samples = [policy(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    samples += [[generator.randrange(len(policy)) for _ in range(32)] for _ in range(100)]
    encoder = get_tokenizer("minilm")
    for ids in samples:
        response, spans = decode_response(policy, ids), token_spans(policy, ids)
        check_spans(response, spans)
        encoding = encoder([""], [response], split_special_tokens=True).encodings[0]
        _, encoder_side = encoder_spans(encoder, encoding, response)
        pooled = pool_probabilities(encoder_side, np.tile([0, 0, 1], (len(encoder_side), 1)), spans, response)
        assert pooled.shape == (len(ids), 3)
