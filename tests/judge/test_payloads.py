from __future__ import annotations

import json
from collections import Counter

import pytest
from payloads import PAYLOADS, PLACES, Payload, item

from tppo.judge.record import split_response


def test_enough_of_them_and_all_distinct():
    assert len(PAYLOADS) >= 200
    assert len({payload.text for payload in PAYLOADS}) == len(PAYLOADS)
    assert len({payload.name for payload in PAYLOADS}) == len(PAYLOADS)


def test_families_are_all_there():
    families = Counter(payload.family for payload in PAYLOADS)
    assert {"json break-out", "markup", "unicode", "order", "fake reply", "tool call", "escape", "long"} < set(families)
    assert {"chatml", "llama3", "llama2", "mistral", "gemma", "deepseek", "phi"} < set(families)
    assert min(families.values()) >= 5


def test_texts_are_valid_unicode_without_lone_surrogates():
    for payload in PAYLOADS:
        assert payload.text.encode("utf-8").decode("utf-8") == payload.text
        assert payload.text


@pytest.mark.parametrize("place", PLACES)
def test_a_payload_changes_only_its_place(place):
    plain = {p: item(Payload("", "", "x"), p) for p in PLACES}
    for payload in PAYLOADS:
        placed = item(payload, place)
        shown = {
            "history": [event.text for event in placed.history],
            "targets": placed.targets,
            "response": placed.response.split("\n", 2),
        }
        assert shown[place][2] == payload.text
        for other in set(PLACES) - {place}:
            assert getattr(placed, other) == getattr(plain[place], other)


def test_an_unknown_place_is_refused():
    with pytest.raises(ValueError, match="nowhere"):
        item(PAYLOADS[0], "nowhere")


def test_the_unescaped_texts_do_break_a_message_built_by_hand():
    """The payloads have teeth: pasted between quotes instead of encoded, many change what JSON says."""
    broken = 0
    for payload in PAYLOADS:
        try:
            broken += json.loads('{"returned_queries": ["' + payload.text + '"]}') != {
                "returned_queries": [payload.text]
            }
        except (ValueError, RecursionError):
            broken += 1
        assert json.loads(json.dumps({"returned_queries": [payload.text]})) == {"returned_queries": [payload.text]}
    assert broken > 100


def test_payloads_survive_in_the_words_of_a_response():
    """What a judge has to echo: the words of the response, with all that is not white space."""
    for payload in PAYLOADS:
        words = split_response(item(payload, "response").response).words
        assert [word.text for word in words[:5]] == ["brake", "pads", "cost", "oil", "filter"]
