"""Mutated judge replies: 10,000 ways to be wrong, or to be right in another spelling.

`mutations(reply, seed, count)` starts from a right reply. Named mutations have a known outcome: "invalid" (the
contract of `reply_oracle` is broken) or "same" (another spelling of the same reply). Random edits are "unknown":
the oracle says what they are. Nothing here decides by the judge's own code.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from tests.helpers.reply_oracle import canonical

__all__ = ["BASE_REPLIES", "INVALID", "SAME", "Mutation", "canonical", "mutations", "shown_words"]

Expected = Literal["invalid", "same", "unknown"]
Reply = dict[str, Any]
# A rule makes a content from a right reply, or None when it does not apply to it.
Rule = Callable[[Reply, random.Random], str | None]


@dataclass(frozen=True)
class Mutation:
    """`content` is what the model answered. It may hold lone surrogates: JSON around it can escape them."""

    name: str
    content: str
    expected: Expected


def _reply(words: str | None, scores: str, sentence: int) -> Reply:
    if words is None:
        return {"sentence": sentence}
    pairs = zip(words.split(), scores, strict=True)
    return {
        "words": [{"i": i, "word": word, "score": int(score)} for i, (word, score) in enumerate(pairs)],
        "sentence": sentence,
    }


BASE_REPLIES: list[Reply] = [
    _reply(None, "", 0),
    _reply(None, "", 1),
    _reply("", "", 0),
    _reply("roses", "1", 1),
    _reply("tomato seeds raised bed", "1101", 1),
    _reply("new york new york", "0110", 0),  # repeated words
    _reply("a a a a a a", "010101", 1),
    _reply("0 1 1 0", "1001", 0),  # words that look like scores
    _reply("score word i words sentence", "00000", 0),  # words that look like keys
    _reply("true null NaN -1 1.0", "11111", 1),
    _reply('say "hi" c:\\temp back\\\\slash / a,b', "101011", 0),
    _reply('{"sentence":1} [] {} "}]} :,', "01010", 1),
    _reply("café Saatgut für naïve", "1101", 1),
    _reply("日本語 東京 ホテル", "101", 0),
    _reply("😀 👩\u200d🔬 𝟙 🌹🌹", "0110", 1),
    _reply("שלום مرحبا \u202eabc", "011", 0),
    _reply("zero\u200bwidth \ufeffbom nul\u2400", "110", 1),
    _reply("\u007f\u0080 \ue000 \uffff", "101", 1),
    _reply(" ".join(f"w{i}" for i in range(12)), "011010110100", 1),
    _reply(" ".join(["long"] * 40), "01" * 20, 0),
]


def shown_words(reply: Reply) -> list[str] | None:
    """The words of the request that `reply` is right for; None for the sentence template."""
    return [word["word"] for word in reply["words"]] if "words" in reply else None


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_MARK = "\ue123 mark"


def _put(reply: Reply, path: tuple[str | int, ...], raw: str) -> str:
    """The reply's JSON with the text `raw` in the place of the value at `path`."""
    changed = target = deepcopy(reply)
    for step in path[:-1]:
        target = target[step]  # type: ignore[index]
    target[path[-1]] = _MARK  # type: ignore[index]
    return _dumps(changed).replace(_dumps(_MARK), raw)


def _value(field: str, change: Callable[[Any, random.Random], str | None]) -> Rule:
    """Replace the text of one value of a field, drawn among the words and, for `score`, the sentence."""

    def rule(reply: Reply, rng: random.Random) -> str | None:
        slots: list[tuple[str | int, ...]] = [("words", k, field) for k in range(len(reply.get("words", ())))]
        if field == "score":
            slots.append(("sentence",))
        if not slots:
            return None
        path = rng.choice(slots)
        value = reply["sentence"] if path == ("sentence",) else reply["words"][path[1]][field]
        raw = change(value, rng)
        return None if raw is None else _put(reply, path, raw)

    return rule


def _words(change: Callable[[list[dict[str, Any]], random.Random], Any]) -> Rule:
    """Replace the array of words, when it has any, by another value; None: does not apply."""

    def rule(reply: Reply, rng: random.Random) -> str | None:
        if not reply.get("words"):
            return None
        changed = change(deepcopy(reply["words"]), rng)
        return None if changed is None else _dumps({**reply, "words": changed})

    return rule


def _word(change: Callable[[dict[str, Any], random.Random], str]) -> Rule:
    """Replace the JSON text of one element of the array of words."""

    def rule(reply: Reply, rng: random.Random) -> str | None:
        if not reply.get("words"):
            return None
        k = rng.randrange(len(reply["words"]))
        return _put(reply, ("words", k), change(deepcopy(reply["words"][k]), rng))

    return rule


def _text(change: Callable[[str, random.Random], str | None]) -> Rule:
    """Replace the whole text."""
    return lambda reply, rng: change(_dumps(reply), rng)


def _other(text: str | None, unless: str) -> str | None:
    """JSON of a text, or None when it is the right one after all."""
    return None if text == unless else _dumps(text)


def _renumber(words: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**word, "i": i} for i, word in enumerate(words)]


_BAD_SCORES = [
    *('"1"', '"0"', "true", "false", "null", "1.0", "0.0", "1e0", "0E0", "10e-1", "-0", "-1", "2", "10", "01", "00"),
    *("+1", "0x1", "0b1", ".1", "1.", "1_0", "1 0", "NaN", "Infinity", "-Infinity", "undefined", "None", "True", ""),
    *("[1]", "[]", "{}", '{"score": 1}', '""', '"\\u0031"', "'1'", '"yes"', "١", "１", "¹", "1/1", "1;", "1L", "1f"),
    *("9" * 400, "1" + "0" * 5_000, "-" + "9" * 5_000, "0." + "3" * 5_000, "1e999999", "9223372036854775808"),
    *("[" * 3_000 + "1" + "]" * 3_000, '{"a":' * 3_000 + "1" + "}" * 3_000, "18446744073709551617", "4294967297"),
]
_PREAMBLES = [
    *("Sure! ", "Here is the JSON:\n", "<think>\nall relevant\n</think>\n", "<think></think>", "JSON: ", "assistant\n"),
    *("1 ", "null ", "[] ", "{} ", "// verdict\n", "/* verdict */ ", "# verdict\n", "```json\n", "= ", "'", '"', "("),
    *("\ufeff", "\u00a0", "\f", "\v", "\x00", "\u2028", "\u3000", "\ud800", "\x1b[0m", ")]}',\n", "data: ", "\u200b"),
]
_TRAILERS = [
    *("\nI hope this helps.", "\n```", " // done", " /* done */", " # done", ",", ";", "}", "]", "\x00", "\ufeff"),
    *("\u00a0", "\f", "\u2028", "<|im_end|>", "</s>", " null", " 1", " {}", " []", '"', "\ud800", "\x1a", "...", "\\n"),
]
_NO_REPLIES = [
    *(
        "",
        " ",
        "\n\t\r ",
        "null",
        "true",
        "0",
        "1",
        "[]",
        "{}",
        '""',
        '"1"',
        "NaN",
        "I cannot help with that.",
        "{",
        "}",
    ),
    *('{"words": []}', '{"words": null, "sentence": 1}', '{"sentence"}', '{"sentence":}', "[" * 100_000, "\ufeff"),
    *('{"words":' * 50_000, "[" * 50_000 + "]" * 50_000, '{"a":' * 50_000 + "1" + "}" * 50_000, '"' * 999, "\\" * 999),
    *('{"words": {}, "sentence": 1}', "\ud800", "\x00" * 99, "9" * 9_999, "-", "🌹", '{"sentence": 1', "undefined"),
]

INVALID: dict[str, Rule] = {
    **{f"score {k} {raw[:12]}": _value("score", lambda v, rng, raw=raw: raw) for k, raw in enumerate(_BAD_SCORES)},
    **{f"preamble {raw!r}": _text(lambda text, rng, raw=raw: raw + text) for raw in _PREAMBLES},
    **{f"trailer {raw!r}": _text(lambda text, rng, raw=raw: text + raw) for raw in _TRAILERS},
    **{f"no reply {k} {raw[:12]!r}": _text(lambda text, rng, raw=raw: raw) for k, raw in enumerate(_NO_REPLIES)},
    "index as string": _value("i", lambda i, rng: f'"{i}"'),
    "index as float": _value("i", lambda i, rng: f"{i}.0"),
    "index with exponent": _value("i", lambda i, rng: f"{i}e0"),
    "index negative": _value("i", lambda i, rng: f"-{i}"),
    "index one too high": _value("i", lambda i, rng: str(i + 1)),
    "index one too low": _value("i", lambda i, rng: str(i - 1)),
    "index at random": _value("i", lambda i, rng: str(i + rng.randrange(2, 99))),
    "index padded": _value("i", lambda i, rng: f"0{i}"),
    "index true": _value("i", lambda i, rng: "true"),
    "index false": _value("i", lambda i, rng: "false"),
    "index null": _value("i", lambda i, rng: "null"),
    "index huge": _value("i", lambda i, rng: "9" * 5_000),
    "index modulo 2^64": _value("i", lambda i, rng: str(2**64 + i)),
    "index in an array": _value("i", lambda i, rng: f"[{i}]"),
    "index in other digits": _value("i", lambda i, rng: "".join(chr(0x0660 + int(digit)) for digit in str(i))),
    "echo of another word": _value("word", lambda word, rng: '"another"'),
    "echo upper case": _value("word", lambda word, rng: _other(word.upper(), word)),
    "echo title case": _value("word", lambda word, rng: _other(word.title(), word)),
    "echo decomposed": _value("word", lambda word, rng: _other(unicodedata.normalize("NFKD", word), word)),
    "echo shortened": _value("word", lambda word, rng: _dumps(word[:-1])),
    "echo with a blank": _value("word", lambda word, rng: _dumps(rng.choice([" " + word, word + " "]))),
    "echo with a zero-width space": _value("word", lambda word, rng: _dumps(word + "\u200b")),
    "echo with a lone surrogate": _value("word", lambda word, rng: _dumps(word)[:-1] + '\\ud800"'),
    "echo with a raw lone surrogate": _value("word", lambda word, rng: _dumps(word)[:-1] + '\udc00"'),
    "echo with surrogates swapped": _value("word", lambda word, rng: '"\\ude00\\ud83d"'),
    "echo with a raw line feed": _value("word", lambda word, rng: _dumps(word)[:-1] + '\n"'),
    "echo with a raw NUL": _value("word", lambda word, rng: _dumps(word)[:-1] + '\x00"'),
    "echo with an escaped NUL": _value("word", lambda word, rng: _dumps(word)[:-1] + '\\u0000"'),
    "echo with a bad escape": _value("word", lambda word, rng: _dumps(word)[:-1] + '\\x41"'),
    "echo with a short escape": _value("word", lambda word, rng: _dumps(word)[:-1] + '\\u41"'),
    "echo with a signed escape": _value("word", lambda word, rng: _dumps(word)[:-1] + '\\u+041"'),
    "echo escaped twice": _value("word", lambda word, rng: _dumps(_dumps(word))),
    "echo empty": _value("word", lambda word, rng: '""'),
    "echo null": _value("word", lambda word, rng: "null"),
    "echo a number": _value("word", lambda word, rng: "1"),
    "echo in an array": _value("word", lambda word, rng: f"[{_dumps(word)}]"),
    "echo unquoted": _value("word", lambda word, rng: f"w{word}"),
    "words: one dropped": _words(lambda words, rng: _without(words, rng.randrange(len(words)))),
    "words: one dropped, renumbered": _words(lambda words, rng: _renumber(_without(words, rng.randrange(len(words))))),
    "words: first dropped, renumbered": _words(lambda words, rng: _renumber(words[1:])),
    "words: last dropped": _words(lambda words, rng: words[:-1]),
    "words: none": _words(lambda words, rng: []),
    "words: one twice": _words(lambda words, rng: _with(words, rng)),
    "words: one twice, renumbered": _words(lambda words, rng: _renumber(_with(words, rng))),
    "words: one more": _words(lambda words, rng: [*words, {"i": len(words), "word": "more", "score": 1}]),
    "words: all twice": _words(lambda words, rng: words + words),
    "words: two swapped": _words(lambda words, rng: _swapped(words, rng)),
    "words: two swapped, renumbered": _words(lambda words, rng: _swapped(words, rng, echoes_only=True)),
    "words: reversed": _words(lambda words, rng: words[::-1] if len(words) > 1 else None),
    "words: from 1": _words(lambda words, rng: [{**word, "i": word["i"] + 1} for word in words]),
    "words: distinct only": _words(
        lambda words, rng: (
            _renumber(list({word["word"]: word for word in words}.values()))
            if len({word["word"] for word in words}) < len(words)
            else None
        )
    ),
    "words: keyed by word": _words(lambda words, rng: {word["word"]: word["score"] for word in words}),
    "words: keyed by index": _words(lambda words, rng: {str(word["i"]): word for word in words}),
    "words: scores only": _words(lambda words, rng: [word["score"] for word in words]),
    "words: arrays": _words(lambda words, rng: [list(word.values()) for word in words]),
    "words: nested": _words(lambda words, rng: [words]),
    "words: as text": _words(lambda words, rng: _dumps(words)),
    "words: null among them": _words(lambda words, rng: [*words, None]),
    "words: without index": _words(lambda words, rng: [_less(word, "i") for word in words]),
    "word: key missing": _word(lambda word, rng: _dumps(_less(word, rng.choice(list(word))))),
    "word: key more": _word(lambda word, rng: _dumps(word | {rng.choice(["why", "", "Score", "scores"]): 1})),
    "word: key renamed": _word(lambda word, rng: _dumps(_less(word, "score") | {"relevance": word["score"]})),
    "word: key in upper case": _word(lambda word, rng: _dumps({key.upper(): v for key, v in word.items()})),
    "word: key with a blank": _word(lambda word, rng: _dumps({f"{key} ": v for key, v in word.items()})),
    "word: key twice": _word(lambda word, rng: _twice(word, rng, lambda key, value: (key, value))),
    "word: key twice, spelt in escapes": _word(
        lambda word, rng: _twice(word, rng, lambda key, value: (f"\\u{ord(key[0]):04x}{key[1:]}", value))
    ),
    "word: score twice, both values": _word(lambda word, rng: f'{{"score": {1 - word["score"]}, {_dumps(word)[1:]}'),
    "word: null": _word(lambda word, rng: "null"),
    "word: trailing comma": _word(lambda word, rng: _dumps(word)[:-1] + ",}"),
    "word: comma missing": _word(lambda word, rng: _dumps(word).replace(", ", " ", 1)),
    "word: comma after": _word(lambda word, rng: _dumps(word) + ","),
    "sentence missing": _text(lambda text, rng: _dumps(_less(json.loads(text), "sentence"))),
    "sentence twice": _text(lambda text, rng: f'{{"sentence": 1, {text[1:]}'),
    "sentence twice, other value": _text(
        lambda text, rng: f'{text[:-1]}, "sentence": {1 - json.loads(text)["sentence"]}}}'
    ),
    "sentence twice, spelt in escapes": _text(lambda text, rng: f'{{"\\u0073entence": 0, {text[1:]}'),
    "words missing": lambda reply, rng: _dumps({"sentence": reply["sentence"]}) if "words" in reply else None,
    "words not asked for": lambda reply, rng: None if "words" in reply else _dumps({"words": [], **reply}),
    "words twice": lambda reply, rng: f'{{"words": [], {_dumps(reply)[1:]}' if "words" in reply else None,
    "key more": _text(lambda text, rng: f'{text[:-1]}, "{rng.choice(["reason", "", "__proto__", "Sentence"])}": 1}}'),
    "key in upper case": _text(lambda text, rng: text.replace('"sentence"', '"Sentence"')),
    "two objects": _text(lambda text, rng: text + rng.choice(["", " ", "\n", ", ", "\n\n---\n"]) + text),
    "second object a correction": _text(lambda text, rng: text + '\nCorrection: {"sentence": 1}'),
    "in an array": _text(lambda text, rng: f"[{text}]"),
    "in many arrays": _text(lambda text, rng: "[" * 2_000 + text + "]" * 2_000),
    "in an object": _text(lambda text, rng: f'{{"reply": {text}}}'),
    "in a string": _text(lambda text, rng: _dumps(text)),
    "in a fence": _text(lambda text, rng: f"```{rng.choice(['', 'json', 'JSON'])}\n{text}\n```"),
    "in tags": _text(lambda text, rng: f"<reply>{text}</reply>"),
    "in brackets": _text(lambda text, rng: f"({text})"),
    "single quotes": _text(lambda text, rng: text.replace('"', "'")),
    "typographic quotes": _text(lambda text, rng: text.replace('"', "”")),
    "keys unquoted": _text(lambda text, rng: text.replace('"sentence"', "sentence")),
    "Python's spelling": lambda reply, rng: repr(reply),
    "trailing comma": _text(lambda text, rng: text[:-1] + ",}"),
    "leading comma": _text(lambda text, rng: "{," + text[1:]),
    "comma missing": _text(lambda text, rng: text.replace(", ", " ", 1) if ", " in text else None),
    "colon missing": _text(lambda text, rng: text.replace(": ", " ", 1)),
    "equals sign": _text(lambda text, rng: text.replace('"sentence": ', '"sentence"= ')),
    "comment inside": _text(lambda text, rng: "{" + rng.choice(["/* a */", "// a\n", "# a\n", "<!-- -->"]) + text[1:]),
    "other white space inside": _text(
        lambda text, rng: "{" + rng.choice(["\u00a0", "\f", "\v", "\u2028", "\ufeff", "\x00", "\u0085"]) + text[1:]
    ),
    "NUL after each character": _text(lambda text, rng: "".join(c + "\x00" for c in text)),
    "cut at the end": _text(lambda text, rng: text[: rng.randrange(len(text))]),
    "cut at the start": _text(lambda text, rng: text[rng.randrange(1, len(text)) :]),
    "hole": _text(lambda text, rng: _hole(text, rng)),
}


def _without(words: list[Any], k: int) -> list[Any]:
    return words[:k] + words[k + 1 :]


def _with(words: list[Any], rng: random.Random) -> list[Any]:
    k = rng.randrange(len(words))
    return words[: k + 1] + words[k:]


def _swapped(words: list[Any], rng: random.Random, echoes_only: bool = False) -> list[Any] | None:
    """Two words change places; renumbered, that shows only when their texts differ."""
    places = [(a, b) for b in range(len(words)) for a in range(b)]
    if echoes_only:
        places = [(a, b) for a, b in places if words[a]["word"] != words[b]["word"]]
    if not places:
        return None
    a, b = rng.choice(places)
    words[a], words[b] = words[b], words[a]
    return _renumber(words) if echoes_only else words


def _less(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in value.items() if k != key}


def _twice(word: dict[str, Any], rng: random.Random, spell: Callable[[str, Any], tuple[str, Any]]) -> str:
    key, value = spell(*rng.choice(list(word.items())))
    return f'{_dumps(word)[:-1]}, "{key}": {_dumps(value)}}}'


def _hole(text: str, rng: random.Random) -> str:
    """Drop one character that carries structure: outside strings every one of these is needed."""
    needed = [match.start() for match in _TOKEN.finditer(text) if match.group() in "{}[]:,"]
    k = rng.choice(needed)
    return text[:k] + text[k + 1 :]


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')


def _spaced(text: str, rng: random.Random) -> str:
    def space() -> str:
        return "".join(rng.choices(" \t\n\r", k=rng.randrange(4)))

    return space() + "".join(token + space() for token in _TOKEN.findall(text))


def _shuffled(value: Any, rng: random.Random) -> Any:
    """The same value with the keys of every object in another order."""
    if isinstance(value, list):
        return [_shuffled(element, rng) for element in value]
    if not isinstance(value, dict):
        return value
    keys = rng.sample(list(value), len(value))
    return {key: _shuffled(value[key], rng) for key in keys}


def _escaped(text: str, rng: random.Random, share: float) -> str:
    """A share of the characters of all strings, keys too, as \\u escapes in either case (or as \\/)."""

    def unit(code: int) -> str:
        digits = f"{code:04x}"
        return "\\u" + (digits.upper() if rng.random() < 0.5 else digits)

    def character(match: re.Match[str]) -> str:
        c = match.group()
        if rng.random() >= share:
            return c
        if len(c) > 1:  # an escape already
            return c
        if c == "/" and rng.random() < 0.5:
            return "\\/"
        codes = c.encode("utf-16-be")
        return "".join(unit(int.from_bytes(codes[k : k + 2])) for k in range(0, len(codes), 2))

    def string(match: re.Match[str]) -> str:
        token = match.group()
        if token[0] != '"':
            return token
        return '"' + re.sub(r'\\u[0-9a-f]{4}|\\.|[^\\"]', character, token[1:-1], flags=re.DOTALL) + '"'

    return _TOKEN.sub(string, text)


SAME: dict[str, Rule] = {
    "as it is": lambda reply, rng: _dumps(reply),
    "compact": lambda reply, rng: json.dumps(reply, ensure_ascii=False, separators=(",", ":")),
    "wide": lambda reply, rng: json.dumps(reply, ensure_ascii=False, separators=(" ,  ", "\t:\r\n")),
    "indented": lambda reply, rng: json.dumps(reply, ensure_ascii=False, indent=rng.choice([0, 1, 2, 4, 8])),
    "indented by tabs": lambda reply, rng: json.dumps(reply, ensure_ascii=False, indent="\t"),
    "white space around": _text(lambda text, rng: f"\r\n\t {text} \n\n"),
    "random white space": _text(_spaced),
    "keys in another order": lambda reply, rng: _dumps(_shuffled(reply, rng)),
    "keys sorted": lambda reply, rng: json.dumps(reply, ensure_ascii=False, sort_keys=True),
    "ASCII only": lambda reply, rng: json.dumps(reply),
    "some characters escaped": _text(lambda text, rng: _escaped(text, rng, 0.3)),
    "all characters escaped": _text(lambda text, rng: _escaped(text, rng, 1.0)),
    "all at once": lambda reply, rng: _spaced(_escaped(_dumps(_shuffled(reply, rng)), rng, 0.3), rng),
}


def _edited(reply: Reply, rng: random.Random) -> str:
    """One to four random edits of the bytes, mostly one, a good part of them on the digits."""
    data = bytearray(_dumps(reply).encode())
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 4])):
        if not data:
            break
        digits = [k for k, byte in enumerate(data) if chr(byte).isdigit()]
        at = rng.choice(digits) if digits and rng.random() < 0.3 else rng.randrange(len(data))
        end = min(len(data), at + rng.randrange(1, 9))
        match rng.randrange(9):
            case 0:
                del data[at:end]
            case 1:
                data[at:at] = data[at:end]
            case 2:
                data[at] ^= 1 << rng.randrange(8)
            case 3:
                data[at] = rng.choice(b'01"{}[],: \\-.eu\n')
            case 4:
                data[at:at] = bytes([rng.choice(b'01"{}[],: \\-.eu\n')])
            case 5:
                data[at:at] = rng.randbytes(rng.randrange(1, 4))
            case 6:
                k = rng.randrange(len(data))
                data[at], data[k] = data[k], data[at]
            case 7:
                scores = [match.end() for match in re.finditer(rb'"(?:score|sentence)": (?=.)', data)]
                data[rng.choice(scores) if scores else at] = rng.choice(b"01")
            case 8:
                data[at:at] = rng.choice([b" ", b"\n", b"\t", b"\r"])
    # Bytes that are no UTF-8 come as replacement characters from most servers, as lone surrogates from some.
    return bytes(data).decode("utf-8", rng.choice(["replace", "surrogateescape"]))


def mutations(reply: Reply, seed: int, count: int) -> Iterator[Mutation]:
    """`count` mutations of a right reply: first every named one that applies, once; then drawn ones.

    Of the drawn ones 50% are "invalid", 15% "same" and 35% random edits.
    """
    rng = random.Random(f"{seed}:{_dumps(reply)}")
    families: list[tuple[Expected, dict[str, Rule]]] = [
        ("invalid", INVALID),
        ("same", SAME),
        ("unknown", {"random edits": _edited}),
    ]
    in_turn = [(expected, name, rule) for expected, rules in families for name, rule in rules.items()]
    made = 0
    while made < count:
        if in_turn:
            expected, name, rule = in_turn.pop(0)
        else:
            [(expected, rules)] = rng.choices(families, weights=(50, 15, 35))
            name, rule = rng.choice(list(rules.items()))
        content = rule(reply, rng)
        if content is not None:
            made += 1
            yield Mutation(name, content, expected)
