"""Text -> token ids, and back. The one place where text of a user becomes ids, of a policy or of an encoder.

Rule 1: no text becomes a control token. `<|im_end|>` in a search is nine characters, not the end of the sequence, even
where it comes out of a normalisation (`＜|im_end|＞`), and even where the tokenizer's model itself holds the piece.
A tokenizer's own switch, `split_special_tokens`, does not do it: it knows special tokens only, not the others that were
added (`<tool_call>`), and a Unigram or word-level model still finds `</s>` among its pieces. So text is encoded by a
copy of the tokenizer in which no control token has a spelling that anybody could write (`_without_spellings`).

Rule 2: a policy never sees the unknown token either. Where it is also the end-of-sequence token it would end the text;
elsewhere a response could not be written back. What a tokenizer cannot spell is `?`, as in `str.encode`'s "replace".
Encoders of reward models keep their unknown token: they were trained with it.

Rule 3: a prompt begins as the tokenizer begins a text (`start_ids`: BOS where it adds one), and never ends as it ends
one.
"""

from __future__ import annotations

import json
import secrets
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import Encoding, Tokenizer

from tppo.core.common import UserError

STAND_IN = "?"
"""What is written for a character that the tokenizer cannot spell, where it can spell this one."""
_ROUNDS = 8  # of respelling a text; one is enough but where a tokenizer joins what was taken apart


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Every token that means something to the model beyond its text: spelling -> id.

    Those are the special tokens, and of the tokens added to the vocabulary those that look like markup: words, single
    characters and runs of white space that somebody added stay ordinary text.
    """
    special = set(tokenizer.all_special_ids)
    found = {
        token.content: id
        for id, token in tokenizer.added_tokens_decoder.items()
        if token.special or id in special or not _is_ordinary(token.content)
    }
    return found | {token: id for id in special if (token := tokenizer.convert_ids_to_tokens(id)) is not None}


def _is_ordinary(content: str) -> bool:
    """A word, a single character, or white space (▁ is a space of SentencePiece)."""
    return len(content) == 1 or all(unicodedata.category(c)[0] in "LMNZC" or c == "▁" for c in content)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text of the policy's prompt or response: none of a control token, none of the unknown token.

    >>> from tppo.tune.scratch import train_tokenizer
    >>> tokenizer = train_tokenizer(["red shoes", "red hat"], 300)
    >>> tokenizer.eos_token_id in tokenizer("red<|end|>")["input_ids"]
    True
    >>> ids = encode_text(tokenizer, "red<|end|>")
    >>> tokenizer.eos_token_id in ids, decode_text(tokenizer, ids)
    (False, 'red<|end|>')
    """
    plain, text = _plain(tokenizer), _whole(text)
    return _encode_slowly(tokenizer, plain.control, text) if plain.backend is None else plain.encode(text)


def encode_batch(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int | None = None
) -> list[Encoding]:
    """Encodings (ids, offsets, types) of texts, or of pairs of texts, as an encoder reads them: begun and ended as its
    tokenizer does it, but no control token inside.

    Args:
        tokenizer: a fast (Rust) one.
        max_length: the end of a longer text is cut off; None cuts nothing.
    """
    backend = _plain(tokenizer).backend
    assert backend is not None, "offsets need a fast tokenizer"
    whole = [_whole(text) for text in texts]
    if max_length is None:
        return backend.encode_batch(whole if pairs is None else list(zip(whole, map(_whole, pairs), strict=True)))
    backend.enable_truncation(max_length)
    try:
        return backend.encode_batch(whole)
    finally:
        backend.no_truncation()


def encode_padded(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[dict[str, Any], np.ndarray]:
    """What an encoder is called with for a batch of texts (see `encode_batch`), as tensors (B,T) of torch, and the span
    of characters of every token, (B,T,2); empty for padding and for what begins and ends a text.

    Args:
        tokenizer: a fast (Rust) one with a padding token.
        max_length: the end of a longer text is cut off.
    """
    encodings = encode_batch(tokenizer, texts, max_length=max_length)
    rows = {"input_ids": [encoding.ids for encoding in encodings]}
    if "token_type_ids" in tokenizer.model_input_names:
        rows["token_type_ids"] = [encoding.type_ids for encoding in encodings]
    batch = tokenizer.pad(rows, return_tensors="pt")
    mask_BT = batch["attention_mask"].numpy().astype(bool)
    offsets_BT2 = np.zeros((*mask_BT.shape, 2), dtype=np.int64)
    offsets_BT2[mask_BT] = np.concatenate([encoding.offsets for encoding in encodings])
    return dict(batch), offsets_BT2


def decode_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of ids without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode_prompt(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of a prompt's ids: control tokens of a chat are shown, what begins every prompt is not."""
    start = start_ids(tokenizer)
    shown = ids[len(start) :] if list(ids[: len(start)]) == start else ids
    return tokenizer.decode(list(shown), clean_up_tokenization_spaces=False)


def start_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text (BOS, where it has that convention); never end-of-sequence."""
    return list(_plain(tokenizer).start)


def brings_back(tokenizer: Any, text: str, ids: Sequence[int]) -> bool:
    """Whether ids of a text decode to it, up to case and Unicode normal form."""
    return _folded(decode_text(tokenizer, ids)) == _folded(text)


def check_round_trip(tokenizer: Any, name: str, required: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Refuse a tokenizer that loses what it is given, before anything is trained with it.

    Args:
        name: of the tokenizer, for the message.
        required: texts that have to come back.
        optional: texts, each in a script, that have to come back if the tokenizer knows all of their characters.

    Raises:
        UserError: says what is lost.
    """
    try:
        plain = _plain(tokenizer)
        known = [] if plain.backend is None else [text for text in optional if all(map(plain.spells, set(text)))]
        ids_of = {text: encode_text(tokenizer, text) for text in [*required, *known]}
        lossy = next((text for text in ids_of if not brings_back(tokenizer, text, ids_of[text])), None)
    except MemoryError:
        raise
    except Exception as error:  # of the tokenizer's model, which may lack the unknown token that it needs
        raise UserError(
            f"the tokenizer of '{name}' fails on text that it does not know ({error}): give it an unknown token, or "
            "take a model whose tokenizer keeps all text"
        ) from None
    if lossy is not None:
        raise UserError(
            f"the tokenizer of '{name}' does not bring back what it is given: {_loss(tokenizer, lossy, ids_of[lossy])}"
            ". Queries could not be told apart, or not be written. Take a model whose tokenizer keeps all text, such "
            "as those of the GPT-2, Llama, Mistral, Qwen, Gemma and SmolLM kinds"
        )


def _loss(tokenizer: Any, text: str, ids: Sequence[int]) -> str:
    """What of a text (one of ours, not of a user) does not come back."""
    before, after = (Counter(_folded(t)) for t in (text, decode_text(tokenizer, ids)))
    lost, gained = before - after, after - before
    words = [name for character, name in (("\n", "line breaks"), (" ", "spaces")) if lost[character]]
    if others := sorted(set(lost) - {"\n", " "}):
        words.append(f"characters ({' '.join(others[:8])})")
    if words:
        return f"{' and '.join(words)} are lost"
    return "spaces are added" if gained[" "] else "its characters come in another order"


@dataclass(frozen=True)
class _Plain:
    """How a tokenizer spells text."""

    backend: Tokenizer | None
    """The copy without spellings of control tokens; None for a tokenizer written in Python."""
    unknown: int | None
    """Id that the copy gives what it cannot spell."""
    control: frozenset[int]
    byte_ids: frozenset[int]
    """Ids of <0x00> to <0xFF>, where the model falls back to them."""
    missing: frozenset[int]
    """Bytes that a byte-level model has no token for, and drops without a word (SmolLM2: parts of rare characters)."""
    drops: bool
    """Whether the model leaves out characters that it has no token for: it has no unknown token and knows no bytes."""
    start: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        assert self.backend is not None
        if self.drops or not self.missing.isdisjoint(text.encode()):
            lost = set(filter(self._is_lost, set(text)))
            text = "".join(self.stand_in if c in lost else c for c in text)
        encoding = self.backend.encode(text, add_special_tokens=False)
        for _ in range(_ROUNDS):
            trouble = self._trouble(encoding, text)
            if not trouble:
                return encoding.ids
            for start, end, instead in reversed(trouble):
                text = text[:start] + instead + text[end:]
            encoding = self.backend.encode(text, add_special_tokens=False)
        return [id for id in encoding.ids if id != self.unknown]

    def _trouble(self, encoding: Encoding, text: str) -> list[tuple[int, int, str]]:
        """Places in the text that have to be spelt otherwise, in order, and how: what came out as unknown, and a
        `<0x0A>` that was written as such, which a Unigram model takes for the byte."""
        if self.unknown not in encoding.ids and self.byte_ids.isdisjoint(encoding.ids):
            return []
        places = {}
        times = Counter(encoding.offsets)
        for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            place = text[start:end]
            if id == self.unknown:
                space = place[: len(place) - len(place.lstrip())]
                places[start, end] = space + self.stand_in if place.strip() != self.stand_in else ""
            # The bytes of a run of unknown characters share one span; a byte that was written out has its own.
            elif id in self.byte_ids and len(place) > 1 and times[start, end] == 1:
                places[start, end] = f"{place[0]} {place[1:]}"
        return sorted((start, end, instead) for (start, end), instead in places.items())

    def spells(self, text: str) -> bool:
        """Whether the tokenizer has tokens for a text."""
        assert self.backend is not None
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if not ids or self.unknown in ids or not self.missing.isdisjoint(text.encode()):
            return False
        # What is dropped may leave a token of the space before it. White space may be one however much there is.
        return not self.drops or text.isspace() or self.backend.encode(text * 2, add_special_tokens=False).ids != ids

    def _is_lost(self, character: str) -> bool:
        """Whether the model leaves a character out without a word. (Marks and the like are the normaliser's.)"""
        if self.drops and unicodedata.category(character)[0] in "LNPS":
            return not self.spells(character)
        return not self.missing.isdisjoint(character.encode())

    @cached_property
    def stand_in(self) -> str:
        return STAND_IN if self.spells(STAND_IN) else ""


def _encode_slowly(tokenizer: Any, control: Collection[int], text: str) -> list[int]:
    """By a tokenizer in Python. Should its model hold a control token as a piece, a character at a time."""

    def ids_of(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def without_control(ids: list[int]) -> list[int]:
        return [id for id in ids if id not in control]

    ids = ids_of(text)
    if len(without_control(ids)) == len(ids):
        return ids
    stand_in = without_control(ids_of(STAND_IN))
    return [id for character in text for id in without_control(ids_of(character)) or stand_in]


Made = TypeVar("Made")


def made_once(
    made: WeakKeyDictionary[Any, tuple[Any, Made]], tokenizer: Any, state: Any, make: Callable[[Any], Made]
) -> Made:
    """What `make` makes of a tokenizer, kept in `made`, and made again when its `state` is another one."""
    known = made.get(tokenizer)
    if known is None or known[0] != state:
        known = made[tokenizer] = (state, make(tokenizer))
    return known[1]


_made: WeakKeyDictionary[Any, tuple[Any, _Plain]] = WeakKeyDictionary()


def _plain(tokenizer: Any) -> _Plain:
    state = (len(tokenizer), tuple(tokenizer.all_special_ids), getattr(tokenizer, "add_bos_token", None))
    return made_once(_made, tokenizer, state, _make_plain)


def _make_plain(tokenizer: Any) -> _Plain:
    control = control_tokens(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = tuple(id for id in _before_a_text(tokenizer) if id == bos or id != eos)
    if not getattr(tokenizer, "is_fast", False):
        return _Plain(None, None, frozenset(control.values()), frozenset(), frozenset(), False, start)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    unknown = _without_spellings(content, control)
    backend = Tokenizer.from_str(json.dumps(content))
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] if content["model"].get("byte_fallback") else []
    byte_ids = frozenset(id for piece in pieces if (id := backend.token_to_id(piece)) is not None)
    drops = unknown is None and not byte_ids and "ByteLevel" not in str(backend.decoder)
    return _Plain(backend, unknown, frozenset(control.values()), byte_ids, _missing_bytes(backend), drops, start)


def _missing_bytes(backend: Tokenizer) -> frozenset[int]:
    """Bytes without a token; none for a model that does not spell in bytes."""
    if "ByteLevel" not in str(backend.decoder):
        return frozenset()
    # GPT-2's alphabet: a byte is the Latin-1 character it is, or, where that cannot be seen, one from U+0100 on.
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = iter(range(0x100, 0x200))
    alphabet = [chr(byte if byte in seen else next(unseen)) for byte in range(0x100)]
    return frozenset(byte for byte, symbol in enumerate(alphabet) if backend.token_to_id(symbol) is None)


def _before_a_text(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts before a text of its own accord."""
    whole, bare = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    return whole[: next(starts, 0)]


def _without_spellings(content: dict[str, Any], control: Collection[str]) -> int | None:
    """Rename every control token in a serialised tokenizer (changed in place) to what nobody can write; ids stay.

    Returns:
        Id of what the model cannot spell, if it has one.
    """
    model = content["model"]
    vocab, unknown = model["vocab"], model.get("unk_token")
    # The unknown token need not be a special one.
    names = {token: f"<{secrets.token_hex(16)}>" for token in {*control, unknown} - {None}}
    content["truncation"] = content["padding"] = None
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(vocab, list):  # Unigram: [piece, score] by id
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
        return model.get("unk_id")
    held = names.keys() & vocab.keys()
    unknown_id = vocab.get(unknown)
    for token in held:
        vocab[names[token]] = vocab.pop(token)
    if unknown_id is not None:
        model["unk_token"] = names[unknown]
    if held and "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if held.isdisjoint((a, b, a + b[prefix:]))]
    return unknown_id


def _whole(text: str) -> str:
    """The text without halves of characters (lone surrogates), which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
