"""Text -> ids: no control token, the tokenizer's own beginning, and everything brought back, or a refusal."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from tests.helpers.letters import letter_tokenizer
from tests.helpers.policy_tokenizers import LOSSY, READABLE, get_policy_tokenizer, gpt2, qwen
from tests.helpers.tokenizer_kinds import KINDS, get_tokenizer
from tppo.core.common import UserError
from tppo.core.encode import (
    check_round_trip,
    control_tokens,
    decode_prompt,
    decode_text,
    encode_batch,
    encode_padded,
    encode_text,
    start_ids,
)
from tppo.core.models import _SCRIPTS, _TASK_TEXTS, smollm2_folder
from tppo.core.text import Event, encode_prompt, render_prompt

FAMILIES = [make.__name__ for make in (*READABLE, *LOSSY)]
HISTORY = [Event("search", "cheap flights to rome"), Event("click", "rome hotels near the station")]


def controls(tokenizer):
    return {*tokenizer.all_special_ids, *control_tokens(tokenizer).values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_control_token_is_ordinary_text(family):
    tokenizer = get_policy_tokenizer(family)
    for spelling in control_tokens(tokenizer):
        wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in spelling)
        for text in (spelling, f"a {spelling} b", f"a{spelling}b", wide, spelling * 2, f"{spelling[:3]}{spelling}"):
            ids = encode_text(tokenizer, text)
            assert not controls(tokenizer) & set(ids), (spelling, text)
            if family in [make.__name__ for make in READABLE]:
                assert decode_text(tokenizer, ids) == text


def test_an_added_token_that_is_not_special_is_one_all_the_same():
    tokenizer = get_policy_tokenizer("qwen")
    added = tokenizer.convert_tokens_to_ids("<tool_call>")
    assert added in tokenizer("<tool_call>", split_special_tokens=True)["input_ids"], "the tokenizer's own switch"
    assert added not in encode_text(tokenizer, "<tool_call>")


def test_added_words_and_white_space_stay_tokens():
    tokenizer = gpt2()
    tokenizer.add_tokens(["shinjuku", AddedToken("\n\n", normalized=False), "[stop]"])
    word, space, markup = (tokenizer.convert_tokens_to_ids(token) for token in ("shinjuku", "\n\n", "[stop]"))
    ids = encode_text(tokenizer, "shinjuku\n\n[stop]")
    assert word in ids
    assert space in ids
    assert markup not in ids
    assert decode_text(tokenizer, ids) == "shinjuku\n\n[stop]"


def test_a_token_made_special_later_counts_from_then_on():
    tokenizer = qwen()
    assert not controls(tokenizer) & set(encode_text(tokenizer, "<stop>"))
    tokenizer.add_special_tokens({"eos_token": "<stop>"})
    assert tokenizer.eos_token_id not in encode_text(tokenizer, "<stop>")


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_text_has_the_tokenizers_own_ids(family):
    tokenizer = get_policy_tokenizer(family)
    text = "search: cheap flights to new york hotels"
    assert encode_text(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec=None), max_size=30) | st.sampled_from(["</s>", "<unk>", "<0x0A>", "[SEP]"]))
def test_any_text_at_all(kind, text):
    tokenizer = get_tokenizer(kind)
    assert not controls(tokenizer) & set(encode_text(tokenizer, text))


def test_what_cannot_be_spelt_is_a_question_mark_or_left_out():
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "?": 2, "<eos>": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>")
    assert encode_text(tokenizer, "a 東京 a") == [1, 2, 1]
    assert encode_text(tokenizer, "a <eos> ?") == [1, 2, 2]
    letters = letter_tokenizer()  # its unknown token is end-of-sequence
    assert letters("a zz b")["input_ids"] == [1, 0, 2]
    assert encode_text(letters, "a zz b") == [1, 2]


def test_a_character_of_bytes_that_the_tokenizer_lacks_is_a_question_mark():
    """Half of it would be no character; SmolLM2 has no token for 0xF1."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    assert "\ufffd" in decode_text(tokenizer, tokenizer("a\U00040000b")["input_ids"])
    assert decode_text(tokenizer, encode_text(tokenizer, "a\U00040000b")) == "a?b"


def test_a_byte_that_is_written_out_is_no_byte():
    raw = Tokenizer(
        models.Unigram(
            [("<unk>", 0.0), *((f"<0x{byte:02X}>", -1.0) for byte in range(256)), *((c, -2.0) for c in "<>0xAab ")],
            unk_id=0,
            byte_fallback=True,
        )
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a<0x0A>b")["input_ids"]) == ["a", "<0x0A>", "b"]
    assert "".join(tokenizer.convert_ids_to_tokens(encode_text(tokenizer, "a<0x0A>b"))) == "a< 0x0A>b"
    assert tokenizer.convert_ids_to_tokens(encode_text(tokenizer, "é")) == ["<0xC3>", "<0xA9>"], "a real byte is one"


def sentencepiece_like():
    """Unigram, byte fallback, ▁ for spaces: what a SentencePiece model is converted to."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(0x21, 0x7F)), "▁"]
    scores = [0.0, 0.0, *[-1.0] * (len(pieces) - 2)]
    raw = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=0, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("text", ["東京駅 弁当", "rome 東京駅", "é", "naïve café 😀😀", "東京<0x0A>駅"])
def test_a_run_of_characters_in_bytes_is_no_byte_that_was_written_out(text):
    tokenizer = sentencepiece_like()
    ids = encode_text(tokenizer, text)
    if "<0x" not in text:
        assert (ids, decode_text(tokenizer, ids)) == (tokenizer(text, add_special_tokens=False)["input_ids"], text)
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    assert newline not in ids
    for hostile in (f"{text}</s>{text}", f"</s>{text}<unk>", "<</s>/s>"):
        assert not {0, 1} & set(encode_text(tokenizer, hostile))


@pytest.mark.parametrize("space", [None, "▁"])
def test_what_a_model_without_an_unknown_token_drops_is_a_question_mark(space):
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(["</s>", *"abc?", space or " ", "ab"])}, [("a", "b")]))
    raw.decoder = decoders.Fuse()
    if space:
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    text = "ab東京c 弁ab"
    assert len(tokenizer(text)["input_ids"]) < len(encode_text(tokenizer, text)), "its own way leaves them out"
    assert decode_text(tokenizer, encode_text(tokenizer, text)) == "ab??c ?ab"


def test_a_tokenizer_written_in_python():
    tokenizer = ByT5Tokenizer()
    text = "a</s><extra_id_0> 東京"
    assert tokenizer.eos_token_id in tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = encode_text(tokenizer, text)
    assert not controls(tokenizer) & set(ids)
    assert decode_text(tokenizer, ids) == text


@pytest.mark.parametrize(
    ("family", "start"),
    [
        ("gpt2", []), ("llama2", ["<s>"]), ("llama3", ["<|begin_of_text|>"]), ("gemma", ["<bos>"]), ("qwen", []),
        ("t5", []), ("xglm", []), ("bert", ["[CLS]"]),
    ],
)  # fmt: skip
def test_a_prompt_begins_as_the_tokenizer_begins_a_text_and_never_ends(family, start):
    tokenizer = get_policy_tokenizer(family)
    assert tokenizer.convert_ids_to_tokens(start_ids(tokenizer)) == start
    ids, _ = encode_prompt(tokenizer, HISTORY, 3, 1000)
    assert tokenizer.convert_ids_to_tokens(ids)[: len(start)] == start
    assert tokenizer.eos_token_id not in ids
    if family in [make.__name__ for make in READABLE]:
        assert decode_prompt(tokenizer, ids) == render_prompt(HISTORY, 3)


def test_a_beginning_that_is_also_the_end_is_kept_where_it_is_the_beginning():
    """OPT: `</s>` begins a text and ends it."""
    tokenizer = gpt2()
    end = tokenizer.eos_token_id

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
    )
    ids, _ = encode_prompt(tokenizer, HISTORY, 3, 1000)
    assert ids[0] == end
    assert end not in ids[1:]


def test_the_prompts_of_published_numbers_are_unchanged(tiny_tokenizer):
    for tokenizer in (tiny_tokenizer, AutoTokenizer.from_pretrained(smollm2_folder())):
        ids, dropped = encode_prompt(tokenizer, HISTORY, 3, 1000)
        assert dropped == 0
        assert ids == tokenizer(render_prompt(HISTORY, 3), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_the_oldest_events_go_first_and_no_more_than_need_be(style, monkeypatch):
    tokenizer = get_policy_tokenizer("llama3")
    history = [Event("search", f"cheap flights {i} " * (1 + i % 3)) for i in range(200)]

    def size(dropped):
        return len(encode_prompt(tokenizer, history[dropped:], 3, 10**6, style)[0])

    for limit in (200, 500, 1500):
        ids, dropped = encode_prompt(tokenizer, history, 3, limit, style)
        assert len(ids) == size(dropped) <= limit < size(dropped - 1)
    characters = 0

    def counted(tokenizer, text):
        nonlocal characters
        characters += len(text)
        return encode_text(tokenizer, text)

    for module in ("text", "chat"):
        monkeypatch.setattr(f"tppo.core.{module}.encode_text", counted)
    encode_prompt(tokenizer, history, 3, 200, style)
    assert characters < 4 * len(render_prompt(history, 3)), "not every suffix of the history"
    with pytest.raises(UserError, match=r"without any history already has \d+ tokens"):
        encode_prompt(tokenizer, history, 3, 5, style)


def test_pairs_for_an_encoder_are_begun_and_ended_but_hold_no_control_token():
    for kind in ("unigram", "sentence_piece", "byte_level_bpe"):
        tokenizer = get_tokenizer(kind)
        [encoding] = encode_batch(tokenizer, ["a </s> hotel"], ["</s><s> tokyo"])
        inside = [id for id, of in zip(encoding.ids, encoding.sequence_ids, strict=True) if of is not None]
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(inside)
        assert encoding.ids[0] == tokenizer.bos_token_id
        assert encoding.ids[-1] == tokenizer.eos_token_id
        ordinary = ("hotels in tokyo", "best pizza")
        assert encode_batch(tokenizer, *([t] for t in ordinary))[0].ids == tokenizer(*ordinary)["input_ids"]
        [cut] = encode_batch(tokenizer, ["hotels in tokyo " * 9], max_length=12)
        assert cut.ids == tokenizer("hotels in tokyo " * 9, truncation=True, max_length=12)["input_ids"]


def test_a_padded_batch_is_what_the_tokenizer_makes_of_ordinary_text():
    texts = ["hotels in tokyo", "best", "hotels in tokyo " * 9]
    for kind in ("minilm", "unigram"):
        tokenizer = get_tokenizer(kind)
        batch, offsets_BT2 = encode_padded(tokenizer, texts, 12)
        expected = tokenizer(
            texts, padding=True, truncation=True, max_length=12, return_offsets_mapping=True, return_tensors="pt"
        )
        assert (offsets_BT2 == expected.pop("offset_mapping").numpy()).all()
        assert set(batch) == set(expected)
        assert all((batch[name] == expected[name]).all() for name in batch)


@pytest.mark.parametrize("family", [make.__name__ for make in READABLE])
def test_tokenizers_that_keep_all_text_pass(family):
    check_round_trip(get_policy_tokenizer(family), family, _TASK_TEXTS, _SCRIPTS)


def test_case_alone_is_no_loss():
    tokenizer = gpt2()

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    check_round_trip(tokenizer, "lower", _TASK_TEXTS, _SCRIPTS)


@pytest.mark.parametrize(
    ("family", "lost"),
    [("t5", "line breaks"), ("xglm", "line breaks"), ("bert", "line breaks")],
)
def test_tokenizers_that_lose_text_are_refused(family, lost):
    with pytest.raises(UserError, match=rf"tokenizer of '{family}' does not bring back.*{lost}.* lost.*Take a model"):
        check_round_trip(get_policy_tokenizer(family), family, _TASK_TEXTS, _SCRIPTS)


def test_accents_that_are_stripped_and_doubled_spaces_are_losses():

    tokenizer = gpt2()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    with pytest.raises(UserError, match=r"characters .* are lost"):
        check_round_trip(tokenizer, "x", _TASK_TEXTS, _SCRIPTS)
    tokenizer = gpt2()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(" ", "  ")])
    with pytest.raises(UserError, match="spaces are added"):
        check_round_trip(tokenizer, "x", _TASK_TEXTS, _SCRIPTS)


def test_a_script_that_is_not_known_is_no_reason_to_refuse():
    check_round_trip(get_tokenizer("characters"), "characters", ["how to\nfix a flat"], _SCRIPTS)


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"</s>": 0, "a": 1}, unk_token="<gone>"),
        models.WordPiece({"</s>": 0, "a": 1}, unk_token="<gone>"),
        models.Unigram([("</s>", 0.0), ("a", -1.0)]),
    ],
)
def test_a_tokenizer_that_fails_on_what_it_does_not_know_is_refused(model):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>")
    with pytest.raises(UserError, match="tokenizer of 'mine' fails on text that it does not know"):
        check_round_trip(tokenizer, "mine", _TASK_TEXTS, _SCRIPTS)
