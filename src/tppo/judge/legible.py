"""Which words an encoder can read. A verdict on a word that it cannot read would be a guess.

- A word is *lost* when a token for the unknown stands for a part of it, or no token at all for its letters: an emoji,
  100 letters in a row, a stray character in the middle of a word. To the encoder it is no word.
- A word is *not read* when it is written in a script that the encoder knows the letters of at most, so that it is
  lost, or spelled and not understood: two neighbouring letters of such a script (one stray letter, "α-carotene", is
  none), or one Chinese character that is lost or not of a known script. Of MiniLM's 30,522 pieces 27,586 have two or
  more Latin letters, 8 have two or more Cyrillic ones, and 488 of the some 3,000 Chinese characters in daily use are in
  it. A script counts as known from `PIECES` such pieces, or `CHARACTERS` characters of Chinese, on; in a vocabulary of
  less than 2,000 from a twentieth of it on.

That an encoder has the pieces does not show that it was trained well; that it has none shows that it was not.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any

from tppo.core.common import UserError, console
from tppo.core.words import Span, word_spans

PIECES = 100
CHARACTERS = 2000
VOCABULARY_SHARE = 0.05
MAX_UNREAD = 0.2
"""Largest share of a log's words that may be unreadable: above, hardly an answer would have all of its words read."""
_HAN = "HAN"
_BATCH = 1024


class Legibility:
    """What an encoder's fast tokenizer can read. `spelling` False: only what is lost counts as not read, which is right
    for an encoder that is about to be trained on the texts."""

    def __init__(self, tokenizer: Any, spelling: bool = True) -> None:
        self.tokenizer = tokenizer
        self.spelling = spelling

    @cached_property
    def scripts(self) -> frozenset[str]:
        """Scripts known, by the first word of their letters' Unicode names; HAN: Chinese characters."""
        decoder = self.tokenizer.backend_tokenizer.decoder
        pieces: Counter[str] = Counter()
        vocabulary = self.tokenizer.get_vocab()
        for token in vocabulary:
            found = _letters(token if decoder is None or token.isascii() else decoder.decode([token]))
            if len(found) == 1:
                script, count = found.popitem()
                pieces[script] += script == _HAN or count > 1
        share = VOCABULARY_SHARE * len(vocabulary)
        return frozenset(
            script for script, count in pieces.items() if count >= min(CHARACTERS if script == _HAN else PIECES, share)
        )

    def unread(self, texts: Sequence[str]) -> list[list[bool]]:
        """For each text, of each of its words (`word_spans`) whether it is not read."""
        marks: list[list[bool]] = []
        for start in range(0, len(texts), _BATCH):
            batch = list(texts[start : start + _BATCH])
            encoded = self.tokenizer(
                batch, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
            )
            for text, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                marks.append(self.unread_words(text, ids, offsets))
        return marks

    def lost_words(self, text: str, ids: Sequence[int], offsets: Sequence[Span]) -> list[bool]:
        """Of each word of a text that is tokenised already whether it is lost; special tokens have an empty span."""
        kept, lost = bytearray(len(text)), bytearray(len(text))  # of each character: in a token, in one for the unknown
        for token, (start, end) in zip(ids, offsets, strict=True):
            kept[start:end] = b"\1" * (end - start)
            if token == self.tokenizer.unk_token_id:
                lost[start:end] = b"\1" * (end - start)
        return [
            any(lost[start:end]) or (not any(kept[start:end]) and any(map(str.isalnum, text[start:end])))
            for start, end in word_spans(text)
        ]

    def unread_words(self, text: str, ids: Sequence[int], offsets: Sequence[Span]) -> list[bool]:
        """The same, whether it is not read."""
        lost = self.lost_words(text, ids, offsets)
        if not self.spelling:
            return lost
        words = (text[start:end] for start, end in word_spans(text))
        return [
            self._is_foreign(word) or (is_lost and _HAN in map(_script, word))
            for word, is_lost in zip(words, lost, strict=True)
        ]

    def _is_foreign(self, word: str) -> bool:
        previous = ""
        for script in map(_script, unicodedata.normalize("NFKC", word)):
            if script not in ("", *self.scripts) and script in (_HAN, previous):
                return True
            previous = script
        return False

    def share_unread(self, texts: Iterable[str]) -> tuple[float, str]:
        """Share of the words of these texts that are not read, and their three commonest scripts."""
        listed = list(texts)
        words = unread = 0
        scripts: Counter[str] = Counter()
        for text, marks in zip(listed, self.unread(listed), strict=True):
            words, unread = words + len(marks), unread + sum(marks)
            for (start, end), is_unread in zip(word_spans(text), marks, strict=True):
                if is_unread:
                    scripts.update(set(_letters(text[start:end])) - self.scripts or {"symbols"})
        return (unread / words if words else 0.0), ", ".join(name.capitalize() for name, _ in scripts.most_common(3))

    def check(self, texts: Iterable[str], setting: str, way_out: str) -> float:
        """Share of the words of these texts (all of a log) that are not read.

        Raises:
            UserError: it is above `MAX_UNREAD`. Names the setting and the scripts, no text.
        """
        share, scripts = self.share_unread(texts)
        if share > MAX_UNREAD:
            raise UserError(
                f"{setting} cannot read {share:.0%} of the words of this log (in {scripts}; more than {MAX_UNREAD:.0%} "
                f"is too many), so what it says of them would be a guess: {way_out}"
            )
        if share:
            console.print(f"{setting} cannot read {share:.1%} of the words of this log (in {scripts})")
        return share


def _letters(text: str) -> Counter[str]:
    """Letters of each script."""
    return Counter(script for script in map(_script, text) if script)


@lru_cache(maxsize=1 << 12)
def _script(character: str) -> str:
    """Script of a letter or of a mark that belongs to one, by its Unicode name; "" for anything else."""
    if unicodedata.category(character) not in ("Lo", "Ll", "Lu", "Lt", "Mn", "Mc"):
        return ""
    name = unicodedata.name(character, "").partition(" ")[0]
    return {"CJK": _HAN, "COMBINING": "", "VARIATION": ""}.get(name, name)
