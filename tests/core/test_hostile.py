"""10,000 hostile strings through the prompts and responses of five families of tokenizers: 0 control tokens."""

from __future__ import annotations

import random
import re

import pytest
from transformers import AutoTokenizer

from tests.helpers.policy_tokenizers import READABLE, get_policy_tokenizer
from tppo.core.chat import chat_format
from tppo.core.common import rng
from tppo.core.config import Task
from tppo.core.encode import brings_back, control_tokens, start_ids
from tppo.core.models import smollm2_folder
from tppo.core.text import Event, normalise_query, render_prompt
from tppo.generate.engine import encode_history
from tppo.tune.sft import encode_response

STRINGS, PER_PROMPT = 10_000, 10
FAMILIES = [make.__name__ for make in READABLE]
SPELLINGS = [
    *("<s>", "</s>", "<unk>", "<pad>", "<mask>", "<eos>", "<bos>", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "[INST]"),
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "<|eot_id|>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>"),
    *("<end_of_turn>", "<extra_id_0>", "<0x0A>", "<0x00>", "<tool_call>", "<think>", "<h1>", "<｜end▁of▁sentence｜>"),
    *("▁", "▁▁", "Ġ", "Ċ", "##ing", "\N{ZERO WIDTH SPACE}", "\u202e", "\ufffd", "\ud800", "\x00", "\x1b[0m", "e\u0301"),
    *("東京", "日本語", "مرحبا", "नमस्ते", "👩‍👩‍👧", "ﬁ", "㎏", "  ", "\t", "?", "~", "search: x", "next searches:", "İ"),
]  # fmt: skip


def wide(text):
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def hostile_strings(count, seed=0):
    """Control tokens as they are, wide, cut, one within the other, between words, and any characters at all."""
    chance = random.Random(int(rng(seed, "hostile").integers(2**31)))

    def any_characters():
        codes = (chance.choice((0x7F, 0x24F, 0xFFFF, 0x10FFFF)) for _ in range(chance.randint(1, 6)))
        return "".join(chr(chance.randint(1, limit)) for limit in codes)

    def part():
        spelling = chance.choice(SPELLINGS)
        cut = chance.randint(0, len(spelling))
        other = chance.choice(SPELLINGS)
        kinds = (spelling, spelling, wide(spelling), spelling[:cut] + other + spelling[cut:], spelling[:cut])
        return chance.choice((*kinds, any_characters(), "cheap flights", " "))

    return ["".join(part() for _ in range(chance.randint(1, 4))) for _ in range(count)]


STRINGS_MADE = hostile_strings(STRINGS)


def as_spelt(text, family):
    """What comes back: halves of characters are none, ▁ is SentencePiece's space, and SmolLM2 lacks some bytes."""
    text = text.encode("utf-8", "replace").decode()
    if family == "smollm2":
        return re.sub(r"[\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]", "?", text)
    return text.replace("▁", " ") if family in ("llama2", "gemma") else text


@pytest.mark.parametrize("family", [*FAMILIES, "smollm2"])
def test_no_hostile_string_becomes_a_control_token(family):
    real = family == "smollm2"
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder()) if real else get_policy_tokenizer(family)
    special = {*tokenizer.all_special_ids, *control_tokens(tokenizer).values()}
    found = seen = 0
    for number, start in enumerate(range(0, STRINGS, PER_PROMPT)):
        texts = STRINGS_MADE[start : start + PER_PROMPT]
        seen += len(texts)
        if number % 2:  # by turns as the prepare stage has them, and as they are
            texts = [normalise_query(text) for text in texts]
        history = [Event("search", text) for text in texts]
        style = "chat" if tokenizer.chat_template and number % 4 < 2 else "plain"
        prompt, dropped = encode_history(tokenizer, history, Task(3, PER_PROMPT, 10**6, prompt=style))
        begin, end = start_ids(tokenizer), []
        if style == "chat":
            begin, end = list(chat_format(tokenizer).head), list(chat_format(tokenizer).tail)
        written = prompt[len(begin) : len(prompt) - len(end)]
        assert dropped == 0
        assert [*begin, *written, *end] == prompt
        assert style == "chat" or brings_back(tokenizer, as_spelt(render_prompt(history, 3), family), written)
        queries = [as_spelt(text, family).strip() for text in texts[:3]]
        response = encode_response(tokenizer, queries)
        assert response is not None
        assert response[-1] == tokenizer.eos_token_id
        found += len(special & {*written, *response[:-1]})
    assert (found, seen) == (0, STRINGS)
