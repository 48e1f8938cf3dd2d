"""From words to tokens, and from one tokenizer's tokens to another's: everything meets in characters.

A judge labels words, the reward model classifies *its* tokens, and the policy is paid on *its* tokens. The
three cut the same response differently:

    response            cheap flights 日本
    words               [cheap][flights][日本]
    reward model        [cheap][ flights][ ][日][本]
    policy (bytes)      [che][ap][ flights][ ␣+2 bytes of 日 ][1 byte of 日][本]

so each token is given its span of characters, and classes and probabilities travel along overlaps:

    words --classes_from_words--> reward-model tokens --pool_probabilities--> policy tokens

Spans of generated ids come from decoding what they show token by token (`token_spans`). Encoding the text again would
not do: a sampled response is often cut otherwise than the tokenizer would cut it. Reading a token's string
would not do either: a byte-level token may hold two thirds of a character.

Class of a token: 0 separator (white space, special, nothing), 1 irrelevant, 2 relevant.
Letters in shapes: T tokens, W words, S source tokens, 3 classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tppo.core.text import ParsedResponse, Word
from tppo.generate.engine import decode_response

Span = tuple[int, int]
"""Half-open range of characters: text[start:end]. Empty (start == end) for a token that shows nothing."""
SEPARATOR, IRRELEVANT, RELEVANT = 0, 1, 2
_WINDOW = 8
"""Tokens between two anchors of `_prefixes`, at least: fewer cost more anchors, more cost longer decoding."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows bytes that are no whole character (yet)


def token_spans(tokenizer: Any, ids: Sequence[int]) -> list[Span]:
    """Character span of each token in `decode_response(tokenizer, ids)`.

    Token t covers what decoding ids[:t+1] shows beyond decoding ids[:t]. A character made by several tokens
    belongs to each of them, so that none of them goes without the reward of its word. Special tokens, and
    white space the tokenizer swallows, get an empty span. Every character is in at least one span, and the
    non-empty spans start and end in order.

    >>> from tppo.tune.scratch import train_tokenizer
    >>> tokenizer = train_tokenizer(["red shoes", "red hat"], 300)
    >>> token_spans(tokenizer, tokenizer("red hat")["input_ids"])
    [(0, 3), (3, 7)]
    """
    text = decode_response(tokenizer, ids)
    # Where decoding in pieces does not give the text, every prefix is decoded whole: slow, and right all the same.
    prefixes = _prefixes(tokenizer, ids, text, _WINDOW) or _prefixes(tokenizer, ids, text, len(ids))
    assert prefixes is not None, "the last prefix is the whole response"
    spans: list[Span] = []
    done = 0  # characters of `text` that are complete so far
    last = (0, 0)  # span of the last token that showed something
    for token, (head, before, tail) in zip(ids, prefixes, strict=True):
        end = max(done, head + _common_length(tail, text[head : head + len(tail)]))
        if tail == before and not (tail.endswith(_BROKEN) and decode_response(tokenizer, [token])):
            spans.append((done, done))  # special or swallowed: nothing to see, now or later
            continue
        if head + len(tail) > end < len(text):
            last = (done, end + 1)  # some bytes of the character at `end`, which later tokens complete
        elif end > done:
            last = (done, end)
        else:
            last = (max(last[0], done - 1), last[1])  # more bytes of a character that stays broken for good
        spans.append(last)
        done = end
    assert done == len(text), "the last prefix is the whole response"
    return spans


def _prefixes(tokenizer: Any, ids: Sequence[int], text: str, window: int) -> list[tuple[int, str, str]] | None:
    """For each t (head, before, tail): ids[:t+1] shows text[:head] + tail, and ids[:t] text[:head] + before.

    Tokens are decoded from the last anchor but one on, at most about twice `window` of them where the text is whole.
    An anchor is a place that decoding ids up to there and from there on agree about: the text so far stands (it does
    not end in half a character, nor in a byte token, whose neighbours decide together whether they are characters).
    The tokens between the two anchors are the context: a decoder treats its first token otherwise than the others (it
    swallows a space, keeps the ## of a word piece), and what the context alone shows is cut off again.

    Returns:
        None when the pieces do not give `text`: this tokenizer's decoding depends on more than the context.
    """
    found: list[tuple[int, str, str]] = []
    start = anchor = head = 0
    context = before = tail = ""
    for t in range(len(ids)):
        shown = decode_response(tokenizer, ids[start : t + 1])
        if not shown.startswith(context):
            return None
        tail = shown[len(context) :]
        found.append((head, before, tail))
        before = tail
        stands = text.startswith(tail, head) and not tail.endswith(_BROKEN)
        if t + 1 - anchor < window or not stands or _is_byte(tokenizer, ids[t]):
            continue
        if next_context := decode_response(tokenizer, ids[anchor : t + 1]):
            start, anchor, context = anchor, t + 1, next_context
            head, before, tail = head + len(tail), "", ""
    return found if text[:head] + tail == text else None


def _is_byte(tokenizer: Any, token: int) -> bool:
    """Whether this is a byte of a character that the vocabulary lacks, as SentencePiece writes it: <0xE6>."""
    return bool(_BYTE_TOKEN.fullmatch(str(tokenizer.convert_ids_to_tokens(token))))


def response_spans(tokenizer: Any, ids: Sequence[int], finished: bool) -> list[Span]:
    """`token_spans` of a sampled response: the id that ended it has no text, also where it is no special token."""
    if not finished:
        return token_spans(tokenizer, ids)
    spans = token_spans(tokenizer, ids[:-1])
    end = max((end for _, end in spans), default=0)
    return [*spans, (end, end)]


def encoder_spans(tokenizer: Any, encoding: Any, response: str) -> tuple[int, list[Span]]:
    """Where the response sits in an encoded (history, response) pair, and its tokens' spans in `response`.

    Rule: if decoding the response's ids gives the response back, their spans come from `token_spans`, as for
    the policy. Byte-level and SentencePiece encoders are of this kind, and their offsets are the ones that
    have been wrong in places. Otherwise the tokenizer normalises (WordPiece lower-cases and strips accents;
    an unknown character becomes [UNK]) and its offsets, which it carries through the normalisation, are used.

    Args:
        tokenizer: a fast (Rust) tokenizer.
        encoding: the `tokenizers.Encoding` of the pair; the response is the second sequence, not truncated.

    Returns:
        Position of the response's first token (the length of the input when it has none), and one span per
        response token.
    """
    positions = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
    if not positions:
        return len(encoding.ids), []
    first, last = positions[0], positions[-1]
    assert positions == list(range(first, last + 1)), "the response's tokens are contiguous"
    ids = encoding.ids[first : last + 1]
    if decode_response(tokenizer, ids) == response:
        return first, token_spans(tokenizer, ids)
    spans = encoding.offsets[first : last + 1]
    assert all(0 <= start <= end <= len(response) for start, end in spans), spans
    return first, spans


def classes_from_words(words: Sequence[Word], word_classes: Sequence[int], spans: Sequence[Span]) -> list[int]:
    """The class of each token: that of the word it shares most characters with (the first of equals).

    A token that touches no word (white space, separators, specials) is of class 0. Every token gets exactly
    one class; a word gives its class to all of its tokens.

    >>> words = [Word("red", 0, 3, 0), Word("shoes", 4, 9, 0)]
    >>> classes_from_words(words, [RELEVANT, IRRELEVANT], [(0, 3), (3, 7), (7, 9), (9, 9)])  # red, _sho, es, the end
    [2, 1, 1, 0]
    """
    assert len(words) == len(word_classes), (len(words), len(word_classes))
    if not words or not spans:
        return [SEPARATOR] * len(spans)
    overlap_TW = _overlap(_bounds(spans), _bounds([(word.start, word.end) for word in words]))
    best_T = np.asarray(word_classes)[overlap_TW.argmax(axis=1)]
    return np.where(overlap_TW.any(axis=1), best_T, SEPARATOR).tolist()


def pool_probabilities(
    source_spans: Sequence[Span], source_probs: np.ndarray, target_spans: Sequence[Span], text: str
) -> np.ndarray:
    """Class probabilities of source tokens (S,3) -> of target tokens (T,3) over the same text.

    A target token's distribution is the mean of those of the source tokens it shares characters with,
    weighted by how many; white space counts for nothing, so " new" and "new" are the same. A target token
    without any shared character is a separator for sure: [1, 0, 0].

    >>> one_token = np.array([[0.0, 0.25, 0.75]])  # "shoes" by the reward model's tokenizer
    >>> pool_probabilities([(0, 5)], one_token, [(0, 3), (3, 5), (5, 5)], "shoes").tolist()  # sho, es, the end
    [[0.0, 0.25, 0.75], [0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]
    """
    assert source_probs.shape == (len(source_spans), 3), source_probs.shape
    # Positions among the non-space characters only: in these coordinates white space has no width.
    ink = np.concatenate([[0], np.cumsum([not character.isspace() for character in text])]).astype(np.int64)
    overlap_TS = _overlap(ink[_bounds(target_spans)], ink[_bounds(source_spans)])
    shared_T1 = overlap_TS.sum(axis=1, keepdims=True)
    pooled_T3 = overlap_TS @ source_probs / np.maximum(shared_T1, 1)
    return np.where(shared_T1 > 0, pooled_T3, [1.0, 0.0, 0.0]).astype(np.float32)


def query_lengths(parsed: ParsedResponse, spans: Sequence[Span]) -> list[int]:
    """Tokens of each query of a response, its separator (or end-of-sequence) counted with it.

    Eq. 4's position l counts those tokens too, so the suggested length made of these lengths has to.
    """
    lengths = []
    for query in range(len(parsed.queries)):
        words = [word for word in parsed.words if word.query == query]
        start, end = words[0].start, words[-1].end
        lengths.append(1 + sum(s < end and e > start for s, e in spans))
    return lengths


def _common_length(a: str, b: str) -> int:
    """Number of characters two strings start with alike."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))


def _bounds(spans: Sequence[Span]) -> np.ndarray:
    return np.asarray(spans, dtype=np.int64).reshape(len(spans), 2)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Characters shared by each span of `a` (N,2) with each span of `b` (M,2): (N,M)."""
    start = np.maximum(a[:, None, 0], b[None, :, 0])
    end = np.minimum(a[:, None, 1], b[None, :, 1])
    return np.maximum(end - start, 0)
