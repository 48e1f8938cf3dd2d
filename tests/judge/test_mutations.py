from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.mutations import BASE_REPLIES, INVALID, SAME, Mutation, canonical, mutations, shown_words

PER_REPLY = 500  # x 20 base replies = 10,000


def all_mutations() -> list[tuple[dict[str, Any], Mutation]]:
    return [(reply, mutation) for reply in BASE_REPLIES for mutation in mutations(reply, 0, PER_REPLY)]


def scores(reply: dict[str, Any]) -> str:
    """The expected canonical form, worked out from the dict."""
    if "words" not in reply:
        return f"sentence={reply['sentence']}"
    return f"words={''.join(str(word['score']) for word in reply['words'])} sentence={reply['sentence']}"


def read_with_json(content: str, words: list[str] | None) -> str | None:
    """The contract once more, on top of json: a third opinion for the oracle's tests."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        # Numbers stay text in a tuple, so that 1.0, -0 and true are told from 1 and 0.
        reply = json.loads(
            content, object_pairs_hook=unique, parse_int=lambda text: (text,), parse_float=lambda text: (text, "float")
        )
    except (ValueError, RecursionError):
        return None
    expected = [{"i": (str(i),), "word": word} for i, word in enumerate(words or [])]
    if not isinstance(reply, dict) or set(reply) != {"sentence"} | ({"words"} if words is not None else set()):
        return None
    if not isinstance(reply.get("words", []), list) or len(reply.get("words", [])) != len(expected):
        return None
    digits = []
    for word, wanted in zip(reply.get("words", []), expected, strict=True):
        if not isinstance(word, dict) or {k: v for k, v in word.items() if k != "score"} != wanted:
            return None
        digits.append(word.get("score"))
    if any(digit not in (("0",), ("1",)) for digit in [*digits, reply["sentence"]]):
        return None
    prefix = "" if words is None else f"words={''.join(digit[0] for digit in digits)} "
    return f"{prefix}sentence={reply['sentence'][0]}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"sentence": 1}', "sentence=1"),
        (' \t\r\n{ "sentence" :\n0 } ', "sentence=0"),
        ('{"\\u0073entence": 1}', "sentence=1"),
        ('{"words": [], "sentence": 0}', "words= sentence=0"),
        ('{"sentence":0,"words":[{"score":1,"word":"a","i":0},{"i":1,"word":"b","score":0}]}', "words=10 sentence=0"),
        ('{"sentence": 01}', None),
        ('{"sentence": 1.0}', None),
        ('{"sentence": -0}', None),
        ('{"sentence": "1"}', None),
        ('{"sentence": true}', None),
        ('{"sentence": 1, "sentence": 1}', None),
        ('{"sentence": 1, "\\u0073entence": 1}', None),
        ('{"sentence": 1,}', None),
        ('{"sentence": 1} {"sentence": 1}', None),
        ('{"sentence": 1}x', None),
        ('\ufeff{"sentence": 1}', None),
        ('{\u00a0"sentence": 1}', None),
        ('{"sentence": 1', None),
        ('{"sentence":', None),
        ("{}", None),
        ("", None),
        ('{"words": []}', None),
        ('{"words": [{"i": 1, "word": "a", "score": 1}], "sentence": 1}', None),
        ('{"words": [{"i": 00, "word": "a", "score": 1}], "sentence": 1}', None),
        ('{"words": [{"i": 0, "word": "a"}], "sentence": 1}', None),
        ('{"words": [{"i": 0, "word": "a", "score": 1},], "sentence": 1}', None),
        ('{"words": [{"i": 0, "word": "\\ud800", "score": 1}], "sentence": 1}', None),
        ('{"words": [{"i": 0, "word": "\\u12", "score": 1}], "sentence": 1}', None),
        ('{"words": [{"i": 0, "word": "a\nb", "score": 1}], "sentence": 1}', None),
        ("[" * 100_000, None),
    ],
)
def test_oracle_by_hand(content, expected):
    assert canonical(content) == expected


def test_oracle_reads_every_escape_and_checks_the_echo():
    content = (
        '{"words": [{"i": 0, "word": "\\u00e9\\"\\\\\\/\\b\\f\\n\\r\\t\\uD83D\\ude00", "score": 1}], "sentence": 0}'
    )
    word = 'é"\\/\b\f\n\r\t😀'
    assert canonical(content, [word]) == "words=1 sentence=0"
    assert canonical(content, [word + "x"]) is None
    assert canonical(content, []) is None
    assert canonical(content, [word, word]) is None
    assert canonical(content, None) is None
    assert canonical('{"sentence": 0}', None) == "sentence=0"
    assert canonical('{"sentence": 0}', []) is None


@given(
    words=st.none() | st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=6),
    bits=st.lists(st.integers(0, 1), min_size=7, max_size=7),
    ascii_only=st.booleans(),
    indent=st.none() | st.integers(0, 3),
)
def test_oracle_reads_whatever_json_writes(words, bits, ascii_only, indent):
    reply: dict[str, Any] = {"sentence": bits[6]}
    if words is not None:
        reply["words"] = [{"i": i, "word": word, "score": bits[i]} for i, word in enumerate(words)]
    assert canonical(json.dumps(reply, ensure_ascii=ascii_only, indent=indent), words) == scores(reply)


def test_named_mutations_are_what_they_say():
    for reply, mutation in all_mutations():
        if mutation.expected == "unknown":
            continue
        expected = scores(reply) if mutation.expected == "same" else None
        assert canonical(mutation.content, shown_words(reply)) == expected, (reply, mutation.name)


def test_oracle_and_json_agree_on_every_mutation():
    """Also on random edits, of which some have to stay replies: with the same scores and with others."""
    kept: Counter[str] = Counter()
    for reply, mutation in all_mutations():
        words = shown_words(reply)
        found = canonical(mutation.content, words)
        assert found == read_with_json(mutation.content, words), (mutation.name, mutation.content[:300])
        if mutation.expected == "unknown":
            kept["none" if found is None else "same" if found == scores(reply) else "other"] += 1
    assert min(kept[outcome] for outcome in ("none", "same", "other")) > 20, kept


def test_ten_thousand_seeded_and_varied():
    first = [mutation for _, mutation in all_mutations()]
    assert first == [mutation for _, mutation in all_mutations()]
    assert len(first) == 10_000
    assert len({mutation.content for mutation in first}) > 5_000
    assert {mutation.name for mutation in first} == {*INVALID, *SAME, "random edits"}
    counts = Counter(mutation.expected for mutation in first)
    assert min(counts.values()) > 1_000, counts
    assert first[:PER_REPLY] != list(mutations(BASE_REPLIES[0], 1, PER_REPLY))


def test_base_replies_keep_the_contract():
    for reply in BASE_REPLIES:
        assert canonical(json.dumps(reply), shown_words(reply)) == scores(reply)
    assert None in [shown_words(reply) for reply in BASE_REPLIES]
    assert [] in [shown_words(reply) for reply in BASE_REPLIES]
