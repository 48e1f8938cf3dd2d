"""The reply contract against 10,000 mutated replies and an independent reader."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.mutations import BASE_REPLIES, canonical, mutations, shown_words
from tppo.judge.prompts import BrokenReply, Question, Reply, TokenReply, check_reply

MUTATIONS = 10_000


def question(words: list[str] | None) -> Question:
    return Question("sentence" if words is None else "token", "targets", "system", "user", tuple(words or ()))


def scores(reply: Reply) -> str:
    """What was understood, in the words of the independent reader."""
    sentence = f"sentence={reply.sentence}"
    if isinstance(reply, TokenReply):
        return f"words={''.join(str(word.score) for word in reply.words)} {sentence}"
    return sentence


def test_mutated_replies_are_never_mislabelled():
    """No crash; what is accepted is what an independent reader reads; broken ones are refused."""
    seen: Counter[tuple[str, bool]] = Counter()
    for number, base in enumerate(BASE_REPLIES):
        words = shown_words(base)
        right = scores(check_reply(question(words), _text(base), "stop"))
        for mutation in mutations(base, seed=number, count=MUTATIONS // len(BASE_REPLIES)):
            try:
                understood = scores(check_reply(question(words), mutation.content, "stop"))
            except BrokenReply:
                understood = None
            seen[mutation.expected, understood is not None] += 1
            assert understood == canonical(mutation.content, words), (mutation.name, mutation.content)
            if mutation.expected == "same":
                assert understood == right, (mutation.name, mutation.content)
            if mutation.expected == "invalid":
                assert understood is None, (mutation.name, mutation.content)
    assert sum(seen.values()) == MUTATIONS
    # The test would be worth nothing if one side were missing.
    assert seen["invalid", False] > 1000
    assert seen["same", True] > 1000


@pytest.mark.parametrize("reason", ["length", "content_filter", "tool_calls", None])
def test_a_reply_that_was_cut_is_refused_even_when_it_reads_well(reason):
    with pytest.raises(BrokenReply, match="truncated"):
        check_reply(question(None), '{"sentence": 1}', reason)


@pytest.mark.parametrize("content", [None, ""])
def test_no_text(content):
    with pytest.raises(BrokenReply, match="no_text"):
        check_reply(question(None), content, "stop")


@pytest.mark.parametrize(
    ("content", "winner"), [('{"winner": "a"}', "a"), ('{"winner":"tie"}', "tie"), ('{"winner": "A"}', None)]
)
def test_pair(content, winner):
    pair = Question("pair", "targets", "s", "u", ())
    if winner is None:
        with pytest.raises(BrokenReply, match="schema"):
            check_reply(pair, content, "stop")
    else:
        assert check_reply(pair, content, "stop").winner == winner


@given(st.text())
def test_any_text_is_read_as_the_independent_reader_reads_it(content):
    try:
        understood = scores(check_reply(question(["a"]), content, "stop"))
    except BrokenReply:
        understood = None
    assert understood == canonical(content, ["a"])


def _text(base: dict) -> str:
    import json

    return json.dumps(base)
