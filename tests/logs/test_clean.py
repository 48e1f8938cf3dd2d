"""Normalisation, the navigational rule, URLs and personal data patterns."""

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.core.common import UserError
from tppo.logs import clean
from tppo.logs.clean import (
    clean_text,
    clean_url,
    find_personal,
    hash_key,
    hash_user,
    is_navigational,
    url_host,
)


@pytest.mark.parametrize(
    "query",
    [
        "google",
        "g oogle",
        "yahoo com",
        "yahoo mail",
        "my space",
        "www.x.com",
        "http://x.org/a",
        "www x com",
        "x.com",
        "shop.x.co.uk/sale?a=1",
        "x .com",
        "x. com",
        "big shop.com",
        "mapquest.",
        "https",
        "ebay.net",
    ],
)
def test_navigational(query: str) -> None:
    assert is_navigational(query)


@pytest.mark.parametrize(
    "query",
    [
        "google stock price",
        "ebay seller fees",
        "walmart.com jobs",
        "how to register a dot com",
        "node.js",
        "weather rome",
        "amazon river",
        "compost",
        "htaccess rules",
        "cheap www",
        "used cars st. louis",
    ],
)
def test_not_navigational(query: str) -> None:
    assert not is_navigational(query)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("mail jane.doe@mail.example now", "email"),
        ("jane%40", None),
        ("a @ b", None),
        ("who is 212-555-0147", "phone"),
        ("(212) 555 0147", "phone"),
        ("call 555-0147", "phone"),
        ("+351 21 555 0147", "phone"),
        ("1.800.555.0147", "phone"),
        ("078-05-1120", "ssn"),
        ("078 05 1120 owner", "ssn"),
        ("4111 1111 1111 1111", "card"),
        ("4111111111111111 stolen", "card"),
        ("4111-1111-1111-1112", None),
        ("4111111111111112", "long_number"),
        ("2125550147", "long_number"),
        ("٢١٢٥٥٥٠١٤٧", "long_number"),
        ("zip 90210-1234", None),
        ("world cup 1998-2002", None),
        ("toyota 2019 under 10000", None),
        ("windows 10 22h2", None),
    ],
)
def test_personal(text: str, reason: str | None) -> None:
    assert find_personal(text) == reason


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://www.example.org:80/a?b=c", "example.org"),
        ("https://user:secret@shop.example/x", "shop.example"),
        ("www.example.org", "example.org"),
        ("example.org#top", "example.org"),
        ("http://", ""),
    ],
)
def test_url_host(url: str, host: str) -> None:
    assert url_host(url) == host


def test_clean_text_and_url() -> None:
    assert clean_text("search", "  Cheap\tFLIGHTS ﬁji ", 120) == ("cheap flights fiji", None)
    assert clean_text("search", "-", 120) == ("", "no_text")
    assert clean_text("search", "a" * 121, 120) == ("", "too_long_text")
    assert clean_text("search", "Google", 120) == ("", "navigational")
    assert clean_text("click", "Google", 120) == ("google", None)
    assert clean_text("click", "HTTP://WWW.A.example/b/12345678?q=1", 120) == ("a.example", None)
    assert clean_url("http://a.example/?mail=jane%40mail.example", 120) == ("", "email")
    assert clean_url("http://a.example/card/4111111111111111", 120) == ("", "card")
    assert clean_url("http://", 120) == ("", "no_text")
    assert clean_url("http://a/" + "x" * 3000, 120) == ("", "too_long_text")
    assert clean_url("a" * 121, 120) == ("", "too_long_text")


@given(st.text(max_size=300), st.sampled_from(["search", "click", "visit"]))
def test_clean_text_never_fails(text: str, kind: str) -> None:
    cleaned, reason = clean_text(kind, text, 120)
    assert (cleaned == "") == (reason is not None)
    assert len(cleaned) <= 120


def test_long_texts_are_not_cached() -> None:
    before = clean._clean_text.cache_info().currsize
    for length in (300, 60_000):
        assert clean_text("search", "x" * length, 120) == ("", "too_long_text")
        assert clean_url("x" * length, 120) == ("", "too_long_text")
    assert clean._clean_text.cache_info().currsize == before


def test_hash_key_is_private_and_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TPPO_HASH_KEY", raising=False)
    monkeypatch.setenv("TPPO_CACHE", str(tmp_path / "cache"))
    key = hash_key()
    path = tmp_path / "cache" / "hash_key"
    assert hash_key() == key
    assert len(key) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["hash_key"]
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        hash_key()
    path.chmod(0o600)
    path.write_text("")
    with pytest.raises(UserError, match="damaged"):
        hash_key()
    monkeypatch.setenv("TPPO_HASH_KEY", "short")
    with pytest.raises(UserError, match="at least 16"):
        hash_key()
    monkeypatch.setenv("TPPO_HASH_KEY", "k" * 16)
    assert hash_key() == b"k" * 16


def test_user_hash_depends_on_user_and_key() -> None:
    first, second = b"a" * 16, b"b" * 16
    assert hash_user(first, "u1") == hash_user(first, "u1") < 2**64
    assert len({hash_user(first, "u1"), hash_user(first, "u2"), hash_user(second, "u1")}) == 3
    assert hash_user(first, "\ud800") >= 0
