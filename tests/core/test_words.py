"""Words and the normal form, in many scripts. What is expected of a language is what its speakers would say."""

from __future__ import annotations

import unicodedata
from itertools import pairwise

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo.core.text import parse_response
from tppo.core.words import join_words, normalise_query, one_spaced, split_words, word_spans

SPOKEN = [  # language, words as a speaker cuts them, joined by |
    ("zh", "北京|天气|预报"),
    ("zh-Hant", "臺北|天氣"),
    ("ja", "東京|旅行|の|ホテル|予約"),
    ("ja", "カタカナ・|テスト"),
    ("th", "ราคา|ตั๋ว|เครื่อง|บิน|ไป|เชียงใหม่"),
    ("lo", "ສະບາຍດີ|ປະເທດ|ລາວ"),
    ("km", "សៀវភៅ|ភាសាខ្មែរ"),
    ("my", "မြန်မာနိုင်ငံ|ရာသီဥတု"),
    ("bo", "བོད་|ཡིག"),
    ("ko", "한국어 |날씨 |예보"),
    ("hi", "दिल्ली |का |मौसम"),
    ("si", "ශ්‍රී |ලංකා |පුවත්"),
    ("fa", "می‌خواهم |کتاب |بخرم"),
    ("ar", "طقس |اليوم"),
    ("he", 'צה"ל |חדשות'),
    ("ru", "погода |в |москве"),
    ("el", "καιρός |σήμερα"),
    ("am", "ሰላም፡|ዓለም"),
    ("vi", "thời |tiết |hà |nội"),
    ("en", "don't |panic, |e-mail |100% |C++ |3.5mm |u.s.a."),
    ("zh+en", "iPhone|手机|价格|¥100"),
    ("th+en", "ซื้อ|iPhone15|ราคา|ถูก"),
    ("zh+en", "e-mail|天气"),
    ("zh+en", "北京,|shanghai|天气"),
    ("ja", "東京|「ホテル」|(新宿)"),
    ("ja+emoji", "ホテル👨‍👩‍👧|東京"),
    ("zh, beyond the BMP", "🍕🍕𠮷|天气👍🏽"),
    ("th+digits", "ราคา|๑๐๐|บาท"),
]


@pytest.mark.parametrize(("language", "spoken"), SPOKEN)
def test_words_are_those_a_speaker_would_say(language, spoken):
    text = spoken.replace("|", "")
    assert split_words(text) == [word.strip() for word in spoken.split("|")]
    assert [word.text for word in parse_response(f"x\n{text}", True, 9).words] == ["x", *split_words(text)]


CONTROL_LIKE = (
    "\u200b\u200c\u200d\u00ad\ufeff\u2060\u180e\ufe0f\ufe0e\U000e0067\U000e007f\u115f\u3164\x00\x1c\x85\ufdd0"
)
PIECES = [
    *"aZß éİΣ\n\t 1,-「(¥#。·",
    "天气",
    "の",
    "ตั๋ว",
    "ລາວ",
    "ខ្មែរ",
    "한국",
    "ශ්",
    "می",
    "👩",
    "🏽",
    "🏳",
    "☠",
    "𠮷",
    "\u0301",
]
texts = st.one_of(
    st.text(st.characters(exclude_categories=[]), max_size=30),  # all of Unicode, halves of surrogate pairs too
    st.lists(st.sampled_from([*PIECES, *CONTROL_LIKE]), max_size=14).map("".join),
)
thorough = settings(max_examples=400, deadline=None)


@given(texts)
@thorough
def test_words_and_gaps_give_the_text_back(text):
    spans, end = word_spans(text), 0
    clusters = {0, *(match.end() for match in regex.finditer(r"\X", text))}
    for start, stop in spans:
        assert end <= start < stop
        assert not normalise_query(text[end:start]), "between words there is nothing to be seen"
        assert normalise_query(text[start:stop]), "and a word is something"
        end = stop
    assert not normalise_query(text[end:])
    for (_, stop), (start, _) in pairwise(spans):
        assert stop != start or stop in clusters, "never inside what a reader takes for one character"


@given(texts)
@thorough
def test_a_query_has_words_and_its_line_has_the_same(text):
    parsed = parse_response(text, True, 99)
    assert {word.query for word in parsed.words} == set(range(len(parsed.queries)))
    assert [split_words(line) for line in parsed.lines] == parsed.query_words
    assert split_words(one_spaced(text)) == split_words(text)


@given(st.text(st.characters(codec="latin-1"), max_size=40))
def test_scripts_with_spaces_are_cut_at_white_space_only(text):
    if not any(unicodedata.category(c) in ("Cc", "Cf") for c in text):
        assert split_words(text) == text.split()


@given(st.lists(st.sampled_from([word for _, spoken in SPOKEN for word in spoken.split("|")]).map(str.strip)))
def test_joined_words_lose_nothing(words):
    assert join_words(words).replace(" ", "") == "".join(words)


def test_joined_words_are_written_as_their_script_is():
    assert join_words(["北京，", "天气", "iphone", "15", "手机"]) == "北京，天气 iphone 15 手机"


@given(texts)
@thorough
def test_normalising_twice_changes_nothing(text):
    once = normalise_query(text)
    assert normalise_query(once) == once
    assert once == once.strip() == " ".join(once.split())
    assert unicodedata.is_normalized("NFKC", once)
    once.encode("utf-8")


def test_every_character_has_a_fixed_normal_form():
    for block in [
        *range(0, 0x3400, 0x100),
        *range(0x3400, 0xE000, 0x1000),
        *range(0xF800, 0x20000, 0x100),
        0x2F800,
        0xE0000,
        0xE0100,
    ]:
        once = normalise_query(" ".join(f"a{chr(code)}b" for code in range(block, block + 0x100)))
        assert normalise_query(once) == once, hex(block)


@given(st.text(st.characters(max_codepoint=127), max_size=30))
def test_ascii_takes_the_short_road_to_the_same_place(text):
    assert normalise_query(text) == normalise_query(text + "é")[:-1].rstrip()


KEPT = [
    "ශ්‍රී ලංකා පුවත්",  # the case logs/zwj_zwnj
    "ක්‍රිකට් ලකුණු",
    "می‌خواهم کتاب بخرم",
    "خرید لپ‌تاپ",
    "👨‍👩‍👧 emoji family",
    "র‍্যাব",  # Bengali: ZWJ before the virama
    "അവന്‍ ml",  # Malayalam: an old chillu at the end of a word
    "क्‌ष hi",
    "❤️‍🔥 🏳️‍🌈 🏴‍☠️ 👩🏽‍⚕️ 🙂‍↔️ 👁️‍🗨️",
    "1️⃣ #️⃣ ❤️ ©️",
    "🏴󠁧󠁢󠁥󠁮󠁧󠁿 flag",
    "ᠮᠣᠩᠭᠣᠯ ᠪᠠᠶᠢᠨ᠎ᠠ",  # Mongolian: the vowel separator
    "葛󠄀 城",  # an ideograph's variant
    "🫨 🩷 \U0001fae9 \U0003ffee",  # newer than the Python that reads this, and never given
    "\uf8ff \U000f0000",  # private
    "\u06dd ٢",
]


@pytest.mark.parametrize("text", KEPT)
def test_what_a_reader_would_miss_is_kept(text):
    assert normalise_query(text) == text
    assert len(split_words(text)) == text.count(" ") + 1


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("donau\u00addampf schiff", "donaudampf schiff"),  # the case logs/zwj_zwnj
        ("Café\x07Paris", "café paris"),
        ("cafe\u0301", "café"),
        ("e\u00ad\u0301", "é"),
        ("T\u0308", "ẗ"),
        ("İstanbul ΟΔΟΣ", "i̇stanbul οδος"),
        ("\ufeffBOM \u2060join\u200eer\u202c", "bom joiner"),
        ("Auf\u200clage a\u200db", "auflage ab"),
        ("می\u200c\u200c کتاب\u200d", "می کتاب"),
        ("zero\u200bwidth ខ្មែរ\u200bភាសា", "zero width ខ្មែរ ភាសា"),
        ("hotel\ufe0f \U000e0041x", "hotel x"),
        ("\u3164 \u200d \u00ad", ""),
        ("a\ufdd0b\U0010ffffc\x85d", "a b c d"),
        ("pair \ud83d\ude00 half \ud83d", "pair 😀 half \ufffd"),
        ("Ｆｕｌｌ　ﬁne ½", "full fine 1⁄2"),
    ],
)
def test_what_nobody_sees_makes_no_difference(raw, normal):
    assert normalise_query(raw) == normal


def test_a_long_row_of_unseen_characters_takes_no_time():
    for text in ("\U000e0020" * 50_000, "\ufe0f\u200d" * 50_000, "a\u200d" * 50_000, "👩\u200d" * 50_000):
        assert normalise_query(normalise_query(text)) == normalise_query(text)
