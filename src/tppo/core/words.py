"""What a query and a word are: one normal form of a text, and one way to cut a text into words.

Words. White space ends a word, in every script, and in a script that is written with spaces nothing else does:
"e-mail", "don't" and "100%," are one word each. Chinese, Japanese, Thai, Lao, Khmer, Burmese and Tibetan are written
without spaces; a piece of text that holds such characters is cut further, at the word boundaries of Unicode (UAX #29)
with ICU's dictionaries, and where such a script meets another ("ซื้อiPhone"). Punctuation and symbols (emoji too) belong
to the word before them, opening brackets and currency signs to the word behind, and what a reader takes for one
character (UAX #29, grapheme cluster) is never cut.

    "iPhone手机 「東京」ホテル"    [iPhone][手机] [「東京」][ホテル]

The normal form (`normalise_query`). Two texts that a reader cannot tell apart, or that differ in letter case, width or
ligatures only, become the same text: NFKC, lower case, one space between words. Of what cannot be seen

- kept, because the text would read otherwise: ZWJ and ZWNJ that join letters (Indic conjuncts, Persian) or emoji
  (families), as CONTEXTJ of RFC 5892 has it, wider where that forbids what people write; variation selectors and tags
  of emoji; characters newer than this Python, and private ones;
- a space: control characters, noncharacters, and U+200B, which marks a word's end (Unicode, 23.2);
- removed: soft hyphens, directional marks, byte-order marks, word joiners, and joiners that join nothing.

A half of a surrogate pair, which no file can hold, becomes U+FFFD, as in any decoder.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from itertools import accumulate, pairwise

import regex
from icu4py.breakers import WordBreaker

Span = tuple[int, int]
"""Half-open range of characters: text[start:end]."""

# Between words: white space, control characters, U+200B, Hangul fillers, annotation marks, noncharacters.
_BLANK = r"\s\p{Cc}\u200b\u115f\u1160\u3164\uffa0\ufff9-\ufffb\p{Noncharacter_Code_Point}"
_CHUNK = regex.compile(rf"[^{_BLANK}]+")
_INVISIBLE = (
    r"\u00ad\u034f\u061c\u17b4\u17b5\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\U0001bca0-\U0001bca3"
    r"\U0001d173-\U0001d17a\U000e0001"
)
_TAGS = r"\U000e0020-\U000e007f"
# Seen by what they do to their neighbours: joiners, Mongolian's vowel separator, variation selectors, tags.
_BINDING = r"\u200c\u200d\u180e\p{Variation_Selector}"
# Letters and marks of scripts whose characters join or stack; those of Latin, Greek and Cyrillic have a case.
_JOINING = r"[[\p{Lo}\p{Lm}\p{M}]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Variation_Selector}]]"
_PICTURE = r"[\p{S}\p{Cn}\ufe0e\ufe0f\u20e3\U000e007f]"
_KEPT = "|".join(
    (
        r"(?<=\p{Canonical_Combining_Class=9})[\u200c\u200d]",  # behind a virama: Indic conjuncts, old Malayalam
        rf"(?<={_JOINING})[\u200c\u200d\u180e](?={_JOINING})",  # Persian, Bengali ya-phalaa, Mongolian
        rf"(?<={_PICTURE})\u200d(?={_PICTURE})",  # families, professions
        r"(?<=[\p{S}\p{P}\p{Cn}\p{Han}\p{Mongolian}])\p{Variation_Selector}",  # emoji, ideographs
        r"(?<=[0-9])\ufe0f(?=\u20e3)",  # keycaps
    )
)
_UNSEEN = regex.compile(
    rf"[{_INVISIBLE}]+|(?!{_KEPT})[{_BINDING}]|(?<![\p{{So}}{_TAGS}])[{_TAGS}]+",  # tags are kept in flags of regions
    regex.VERSION1,
)
_NO_INK = regex.compile(rf"[{_INVISIBLE}{_BINDING}{_TAGS}]+")
_SURROGATE = regex.compile(r"[\ud800-\udfff]")

# Scripts without spaces. SA (UAX #14): Thai, Lao, Khmer, Myanmar, the Tai scripts, Ahom; U+1361 ends Ethiopic words.
_COMPLEX = r"\p{Line_Break=SA}"
_UNSPACED = regex.compile(rf"[{_COMPLEX}\p{{Line_Break=CJ}}\p{{Han}}\p{{Hiragana}}\p{{Katakana}}\p{{Tibetan}}\u1361]")
_LETTER = regex.compile(r"[\p{L}\p{N}\p{Co}]")
# ICU does not end a word where such a script meets letters or digits of another.
_MEETING = regex.compile(
    rf"(?<=[{_COMPLEX}])(?=[[\p{{L}}\p{{N}}]--[{_COMPLEX}]])"
    rf"|(?=[[{_COMPLEX}]--[\p{{M}}]])(?<=[[\p{{L}}\p{{N}}]--[{_COMPLEX}]]\p{{M}}*)",
    regex.VERSION1,
)
_OPENING = regex.compile(r"[\p{Ps}\p{Pi}\p{Sc}#@]+$")
_CLUSTER = regex.compile(r"\X")


def normalise_query(text: str) -> str:
    """The normal form of a text (the rule is in the module's docstring); normalising again changes nothing."""
    if text.isascii() and text.isprintable():  # most texts
        return " ".join(text.split()).lower()
    if _SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    # Again until it stays: letters can combine once they are small, or once nothing unseen stands between them.
    while (folded := _folded(text)) != text:
        text = folded
    return text


def _folded(text: str) -> str:
    seen = _UNSEEN.sub("", " ".join(_CHUNK.findall(unicodedata.normalize("NFKC", text))))
    return " ".join(seen.split()).lower()


def word_spans(text: str) -> list[Span]:
    """Where the words of a text are, in order (the rule is in the module's docstring). Texts need not be normalised.

    >>> [text[a:b] for text in ["don't  panic,", "北京天气预报"] for a, b in word_spans(text)]
    ["don't", 'panic,', '北京', '天气', '预报']
    """
    spans: list[Span] = []
    for match in _CHUNK.finditer(text):
        chunk, start = match.group(), match.start()
        if chunk.isascii():
            spans.append(match.span())
        elif not _NO_INK.fullmatch(chunk):
            cuts = [0, *(_cuts(chunk) if _UNSPACED.search(chunk) else ()), len(chunk)]
            spans += [(start + a, start + b) for a, b in pairwise(cuts)]
    return spans


def split_words(text: str) -> list[str]:
    """The words of a text, as written."""
    return [text[start:end] for start, end in word_spans(text)]


def join_words(words: Iterable[str]) -> str:
    """Words as a text: a space between two of them, but where both are of scripts without spaces.

    >>> join_words(["iphone", "手机", "价格"])
    'iphone 手机价格'
    """
    text, unspaced = "", False
    for word in words:
        before, unspaced = unspaced, bool(_UNSPACED.search(word))
        text += word if not text or (before and unspaced) else f" {word}"
    return text


def one_spaced(text: str) -> str:
    """A text as written, but for what stands between words: one space. Its words are the same."""
    return " ".join(chunk for chunk in _CHUNK.findall(text) if not _NO_INK.fullmatch(chunk))


def _cuts(chunk: str) -> list[int]:
    """Where a piece of text without white space is cut, in order, its two ends left out."""
    whole = {match.end() for match in _CLUSTER.finditer(chunk)}  # no cut inside what a reader takes for one character
    ends = sorted(whole & {*_icu_ends(chunk), *(match.start() for match in _MEETING.finditer(chunk))})
    lettered = [span for span in pairwise([0, *ends]) if _LETTER.search(chunk, *span)]
    cuts = []
    for (start, gap), (behind, end) in pairwise(lettered):
        if _UNSPACED.search(chunk, start, end):
            opening = _OPENING.search(chunk, gap, behind)
            cuts.append(opening.start() if opening and opening.start() in whole else behind)
    return cuts


def _icu_ends(chunk: str) -> list[int]:
    """Ends of ICU's words, in characters. ICU counts UTF-16 units and takes no half of a surrogate pair."""
    breaker = WordBreaker(_SURROGATE.sub("\ufffd", chunk), "root")
    ends = [end for _, end in breaker.segments()]
    if max(chunk) <= "\uffff":
        return ends
    units = accumulate(1 + (character > "\uffff") for character in chunk)
    characters = {unit: count for count, unit in enumerate(units, start=1)}
    return [characters[end] for end in ends]
