"""The text side of the task: how a history becomes a prompt, and how a response becomes queries and words.

Every stage (SFT, sampling, labelling, reward models, RL, evaluation, serving) uses these functions and
no other, so that a word, a query or an unparseable output means the same thing everywhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tppo.core.chat import chat_format
from tppo.core.common import UserError
from tppo.core.config import PromptStyle
from tppo.core.encode import encode_text, start_ids
from tppo.core.words import normalise_query, one_spaced, word_spans

EventKind = Literal["search", "click", "purchase", "visit"]
EVENT_KINDS: tuple[str, ...] = get_args(EventKind)
QUERY_SEPARATOR = "\n"


@dataclass(frozen=True)
class Event:
    """One interaction of a user, already normalised by `prepare`: what was done, and with which text."""

    kind: str
    text: str


@dataclass(frozen=True)
class Word:
    """A word of a response: `response[start:end] == text`, in query number `query` (0-based)."""

    text: str
    start: int
    end: int
    query: int


Problem = Literal["empty", "truncated", "too_many_queries"]


@dataclass(frozen=True)
class ParsedResponse:
    """A response as queries (normalised, in order) and words (`tppo.core.words`, with spans into the raw text).

    `lines` are the queries as written, but for one space wherever there is white space: their words are `words`.

    `problem` is None when the response is usable as it stands; otherwise it counts as unparseable.
    Queries and words are given even then, so that a judge and a reward model can still look at them.
    """

    queries: list[str]
    words: list[Word]
    problem: Problem | None
    lines: list[str]

    @property
    def query_words(self) -> list[list[str]]:
        """The words of each query, as written."""
        grouped: list[list[str]] = [[] for _ in self.queries]
        for word in self.words:
            grouped[word.query].append(word.text)
        return grouped


def render_prompt(history: Sequence[Event], num_queries: int) -> str:
    """History (oldest event first) -> prompt. The response continues right after the last line."""
    lines = [f"A person's search history, oldest first. Write their next {num_queries} searches, one per line."]
    lines += [f"{event.kind}: {event.text}" for event in history]
    return "\n".join([*lines, "next searches:", ""])


def render_response(queries: Sequence[str]) -> str:
    """Target queries -> the response text SFT learns (the end-of-sequence token is added by the tokenizer)."""
    return QUERY_SEPARATOR.join(queries)


def render_history(history: Sequence[Event]) -> str:
    """History as the reward models and judges read it: one event per line, oldest first."""
    return "\n".join(f"{event.kind}: {event.text}" for event in history)


def parse_response(text: str, finished: bool, num_queries: int) -> ParsedResponse:
    """Split a response into queries (one per non-empty line) and words.

    `finished` says whether the model ended the response itself; a response cut off by the token limit is
    unparseable ("truncated"), since nobody can know whether its last query was complete. More than
    `num_queries` queries is unparseable too: the task asked for a number.
    """
    queries: list[str] = []
    words: list[Word] = []
    lines: list[str] = []
    position = 0
    for line in text.split(QUERY_SEPARATOR):
        query = normalise_query(line)
        if query:
            words += [
                Word(line[start:end], position + start, position + end, len(queries)) for start, end in word_spans(line)
            ]
            queries.append(query)
            lines.append(one_spaced(line))
        position += len(line) + len(QUERY_SEPARATOR)
    problem: Problem | None = None
    if not finished:
        problem = "truncated"
    elif not queries:
        problem = "empty"
    elif len(queries) > num_queries:
        problem = "too_many_queries"
    return ParsedResponse(queries, words, problem, lines)


def repeated_queries(history: Sequence[Event], queries: Sequence[str]) -> set[int]:
    """Numbers of the queries (normalised) that are not new: equal to a search of the history or to an earlier one."""
    seen = {normalise_query(event.text) for event in history if event.kind == "search"}
    repeated = set()
    for number, query in enumerate(queries):
        if query in seen:
            repeated.add(number)
        seen.add(query)
    return repeated


def encode_prompt(
    tokenizer: Any, history: Sequence[Event], num_queries: int, max_tokens: int, style: PromptStyle = "plain"
) -> tuple[list[int], int]:
    """Token ids of the prompt and the number of oldest events dropped to fit into `max_tokens`.

    A plain prompt begins as the tokenizer begins a text (BOS, where it adds one); with `style` "chat" it is the user's
    message in the model's chat template. No part of an event becomes a control token (`tppo.core.encode`). Prompt and
    response are always tokenised apart and joined as ids, so training and sampling see the same boundary.

    Raises:
        UserError: not even a prompt without history fits, or there is no chat template that could be followed.
    """

    def without(dropped: int) -> list[int]:
        text = render_prompt(history[dropped:], num_queries)
        if style == "chat":
            return chat_format(tokenizer).encode(tokenizer, text.strip())
        return [*start_ids(tokenizer), *encode_text(tokenizer, text)]

    ids = without(0)
    if len(ids) <= max_tokens:
        return ids, 0
    counts = range(1, len(history) + 1)
    dropped = 1 + bisect_left(counts, True, key=lambda dropped: len(without(dropped)) <= max_tokens)
    if dropped in counts:
        return without(dropped), dropped
    raise UserError(
        f"a prompt without any history already has {len(without(len(history)))} tokens, more than "
        f"task.max_prompt_tokens={max_tokens}: raise it"
    )
