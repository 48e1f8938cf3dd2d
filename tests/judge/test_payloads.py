from __future__ import annotations

import json
from collections import Counter

from injection_payloads import PAYLOADS


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


def test_they_have_teeth():
    """Pasted between quotes instead of encoded, many change what the JSON says."""
    broken = 0
    for payload in PAYLOADS:
        try:
            broken += json.loads('{"returned_queries": ["' + payload.text + '"]}') != {
                "returned_queries": [payload.text]
            }
        except (ValueError, RecursionError):
            broken += 1
    assert broken > 100
