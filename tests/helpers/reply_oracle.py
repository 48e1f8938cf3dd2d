"""A second reader of judge replies, to hold the judge's own reader against: no json, no pydantic, no recursion.

The contract. The content is one JSON object, white space (space, tab, line feed, carriage return) around any token:

    {"words": [{"i": 0, "word": "...", "score": 0}, ...], "sentence": 1}      token template
    {"sentence": 1}                                                           sentence template

Keys in any order, each exactly once, no others. `i` counts from 0 in steps of 1. Scores are the characters 0 or 1:
not "1", true, 1.0, 1e0 or -0. Strings may use any JSON escape, also in keys; one that escapes a lone surrogate, or
holds one, is refused, since it is no text. Everything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import EllipsisType

_SPACE = " \t\n\r"
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_HEX = "0123456789abcdefABCDEF"


class _NotThisGrammar(Exception):
    """The content is not a reply of the contract."""


def canonical(content: str, words: Sequence[str] | EllipsisType | None = ...) -> str | None:
    """The scores of a reply that keeps the contract exactly, else None.

    "words=011 sentence=1" for the token template, "sentence=1" for the sentence template. `words` are those that
    the request showed: their count and echo are checked. None: the request was of the sentence template. Left
    out: any reply of either template will do.
    """
    try:
        echoes, scores, sentence = _Reader(content).reply()
    except _NotThisGrammar:
        return None
    if words is not ... and echoes != (None if words is None else list(words)):
        return None
    return f"sentence={sentence}" if echoes is None else f"words={scores} sentence={sentence}"


class _Reader:
    """A cursor over the content; every method takes one thing from it or raises."""

    def __init__(self, content: str) -> None:
        self.content, self.position = content, 0

    def reply(self) -> tuple[list[str] | None, str, str]:
        """Echoed words (None in the sentence template), word scores, sentence score."""
        echoes, scores, sentence = None, "", ""
        self.take("{")
        for key in self.keys({"words", "sentence"}):
            if key == "words":
                echoes, scores = self.words()
            else:
                sentence = self.score()
        self.skip_space()
        if self.position != len(self.content) or not sentence:
            raise _NotThisGrammar
        return echoes, scores, sentence

    def keys(self, allowed: set[str]) -> Iterator[str]:
        """The keys of an object whose `{` is taken, one by one; the caller takes each value."""
        missing = set(allowed)
        while True:
            key = self.string()
            if key not in missing:
                raise _NotThisGrammar
            missing.remove(key)
            self.take(":")
            yield key
            if self.next() == "}":
                self.take("}")
                return
            self.take(",")

    def words(self) -> tuple[list[str], str]:
        echoes: list[str] = []
        scores = ""
        self.take("[")
        if self.next() == "]":
            self.take("]")
            return echoes, scores
        while True:
            found: dict[str, str] = {}
            self.take("{")
            for key in self.keys({"i", "word", "score"}):
                found[key] = {"i": self.index, "word": self.string, "score": self.score}[key]()
            if set(found) != {"i", "word", "score"} or found["i"] != str(len(echoes)):
                raise _NotThisGrammar
            echoes.append(found["word"])
            scores += found["score"]
            if self.next() == "]":
                self.take("]")
                return echoes, scores
            self.take(",")

    def score(self) -> str:
        if self.next() not in ("0", "1"):
            raise _NotThisGrammar
        return self.take(self.next())

    def index(self) -> str:
        """Decimal digits; that there is no leading zero follows from the comparison with the expected index."""
        digits = self.next()
        if digits not in tuple("0123456789"):
            raise _NotThisGrammar
        self.position += 1
        while self.peek() in tuple("0123456789"):
            digits += self.take_any()
        return digits

    def string(self) -> str:
        self.take('"')
        units: list[str] = []
        while (character := self.take_any()) != '"':
            if character < " ":
                raise _NotThisGrammar
            units.append(self.escape() if character == "\\" else character)
        text = "".join(units)
        # Escaped surrogate pairs are one character: UTF-16 joins them, and refuses lone ones.
        try:
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            raise _NotThisGrammar from None

    def escape(self) -> str:
        character = self.take_any()
        if character in _ESCAPES:
            return _ESCAPES[character]
        digits = "".join(self.take_any() for _ in range(4)) if character == "u" else ""
        if len(digits) != 4 or any(digit not in _HEX for digit in digits):
            raise _NotThisGrammar
        return chr(int(digits, 16))

    def take(self, character: str) -> str:
        if self.next() != character:
            raise _NotThisGrammar
        self.position += 1
        return character

    def take_any(self) -> str:
        character = self.peek()
        if not character:
            raise _NotThisGrammar
        self.position += 1
        return character

    def next(self) -> str:
        """The next character after white space, which is skipped; empty at the end."""
        self.skip_space()
        return self.peek()

    def peek(self) -> str:
        return self.content[self.position : self.position + 1]

    def skip_space(self) -> None:
        while self.peek() and self.peek() in _SPACE:
            self.position += 1
