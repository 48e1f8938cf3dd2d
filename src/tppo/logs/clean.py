"""The text of one event: normalise it, shorten URLs, and say why it cannot be used; user ids as keyed hashes.

The navigational rule, in the order it is applied to a normalised search:
1. it starts with `http`, `www.` or `www ` (the address bar of another window);
2. without its spaces it is a known site name (`NAVIGATIONAL`), or such a name and com/net/org ("yahoo com");
3. it is one word that ends in a dot and a common top-level domain, path or not ("example.com/shop"), or at most
   three words of which the last is `com`, `.com`, `. com` and the like.
A site's name among other words ("ebay seller fees", "walmart.com jobs") is kept.

The patterns of personal data are a floor, not a promise: names and addresses pass. `prepare.min_users_per_target` is
the second measure (a query that several users typed is hardly about one of them).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import tempfile
from contextlib import suppress
from functools import lru_cache
from urllib.parse import unquote

from tppo.core.common import UserError
from tppo.core.files import cache_dir
from tppo.core.text import normalise_query

MAX_URL_CHARS = 2048
MAX_CACHED_CHARS = 256
_URL = "url"
"""Beside the kinds of events: a text known to be a URL."""
_SITES = """
google googlesearch yahoo yahoomail yahoosearch aol aolmail aolsearch msn hotmail gmail bing ask askjeeves
duckduckgo baidu yandex ebay amazon walmart target bestbuy homedepot lowes sears costco alibaba aliexpress
etsy myspace facebook fb youtube twitter instagram tiktok linkedin pinterest reddit whatsapp snapchat
netflix mapquest googlemaps maps weatherchannel weather craigslist craigslistorg wikipedia imdb cnn espn
foxnews bankofamerica wellsfargo chase capitalone citibank paypal ups usps fedex expedia travelocity orbitz
internet search searchengine searchengines homepage login email mail
"""
NAVIGATIONAL = frozenset(_SITES.split())
_TOP_LEVEL = "com|net|org|edu|gov|info|biz|us|uk|ca|de|fr|it|es|nl|au|in|io|co|tv|mil"
_ADDRESS = re.compile(rf"[\w-]+(?:\.[\w-]+)*\.(?:{_TOP_LEVEL})(?:[:/?#]\S*)?")
_SPACED_ENDINGS = ("com", "net", "org", "edu", "gov")
_SPACED_ADDRESS = re.compile(rf"\S+(?: \S+)? ?[. ] ?(?:{'|'.join(_SPACED_ENDINGS)})")
_PREFIX = re.compile(r"https?\b|www\b")
_NAME_ENDINGS = ("com", "net", "org")
_NO_NAME = re.compile(r"[\W_]+")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
KEY_VARIABLE = "TPPO_HASH_KEY"
MIN_KEY_CHARS = 16
_EMAIL = re.compile(r"[^\s@]@[^\s@]")
_CARD = re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)")
_NUMBERS = {
    "ssn": re.compile(r"(?<!\d)\d{3}[- ]\d{2}[- ]\d{4}(?!\d)"),
    "phone": re.compile(
        r"(?<!\d)(?:\+?\d{1,3}[-. ]?)?(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-. ]\d{4}(?!\d)"  # (212) 555-0147
        r"|\+\d(?:[-. ()]{0,2}\d){7,14}(?!\d)"  # +351 21 555 0147
        r"|(?<![\d-])\d{3}-\d{4}(?![\d-])"  # 555-0147
    ),
    "long_number": re.compile(r"\d{7,}"),
}
_DIGIT = re.compile(r"\d")


def is_navigational(query: str) -> bool:
    """Whether a normalised search only names a site (the rule is in the module docstring)."""
    # The conditions before the patterns only save time: no text that meets the pattern fails them.
    if query.startswith(("http", "www")) and _PREFIX.match(query):
        return True
    name = query.replace(" ", "")
    if not name.isalnum():
        name = _NO_NAME.sub("", name)
    if name in NAVIGATIONAL or (name[-3:] in _NAME_ENDINGS and name[:-3] in NAVIGATIONAL):
        return True
    if query.endswith(_SPACED_ENDINGS) and _SPACED_ADDRESS.fullmatch(query):
        return True
    return "." in query and bool(_ADDRESS.fullmatch(query))


def url_host(url: str) -> str:
    """Host of a URL without scheme, user, port and `www.`: 'http://www.example.org:80/a' -> 'example.org'."""
    rest = _SCHEME.sub("", url, count=1)
    host = re.split(r"[/?#\\]", rest, maxsplit=1)[0].rpartition("@")[2].partition(":")[0]
    return host.removeprefix("www.").strip(".")


def clean_text(kind: str, raw: str, max_chars: int) -> tuple[str, str | None]:
    """(normalised text, None), or ("", reason): a key of readers.REASONS.

    A URL in an event other than a search becomes its host, so personal data in its path or parameters cannot
    stay; it rejects the row all the same, but for bare long numbers, which are item ids more often than not.
    """
    # Long texts are not worth a place in the cache: 65,536 of them would be gigabytes.
    clean = _clean_text if len(raw) <= MAX_CACHED_CHARS else _clean_text.__wrapped__
    return clean(kind, raw, max_chars)


def clean_url(raw: str, max_chars: int) -> tuple[str, str | None]:
    """As clean_text, for a text known to be a URL (with or without scheme): its host."""
    return clean_text(_URL, raw, max_chars)


@lru_cache(maxsize=1 << 16)
def _clean_text(kind: str, raw: str, max_chars: int) -> tuple[str, str | None]:
    """What clean_text says of a text of this kind of event, or of a URL."""
    if kind == _URL:
        return _host_of(raw, max_chars)
    text = normalise_query(raw)
    if kind != "search" and (_SCHEME.match(text) or text.startswith("www.")):
        return _host_of(text, max_chars)
    if not any(map(str.isalnum, text)):
        return "", "no_text"
    if len(text) > max_chars:
        return "", "too_long_text"
    reason = find_personal(text)
    if reason is None and kind == "search" and is_navigational(text):
        reason = "navigational"
    return ("", reason) if reason else (text, None)


def _host_of(raw: str, max_chars: int) -> tuple[str, str | None]:
    if len(raw) > MAX_URL_CHARS:
        return "", "too_long_text"
    url = normalise_query(raw)
    reason = find_personal(unquote(url))
    host = url_host(url)
    if reason in (None, "long_number"):
        reason = find_personal(host)
    if reason is None and not any(map(str.isalnum, host)):
        reason = "no_text"
    if reason is None and len(host) > max_chars:
        reason = "too_long_text"
    return ("", reason) if reason else (host, None)


def find_personal(text: str) -> str | None:
    """The first kind of personal data in a normalised text (a key of readers.REASONS), or None.

    Any telephone, account or tracking number without separators counts as long_number.
    """
    if "@" in text and _EMAIL.search(text):
        return "email"
    if not _DIGIT.search(text):
        return None
    if any(_luhn(match.group()) for match in _CARD.finditer(text)):
        return "card"
    return next((reason for reason, pattern in _NUMBERS.items() if pattern.search(text)), None)


def _luhn(number: str) -> bool:
    """ISO/IEC 7812 checksum; separators are skipped."""
    digits = [int(c) for c in reversed(number) if c.isdecimal()]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def hash_key() -> bytes:
    """Key of the user hashes: TPPO_HASH_KEY, else a random one made once (mode 600) in the cache folder.

    It is never written into a run folder: with it, anybody could test which user is behind a hash.

    Raises:
        UserError: the variable is too short, or the key file is readable by others or damaged.
    """
    if given := os.environ.get(KEY_VARIABLE):
        if len(given) < MIN_KEY_CHARS:
            raise UserError(f"{KEY_VARIABLE} has {len(given)} characters: give at least {MIN_KEY_CHARS}")
        return given.encode()
    path = cache_dir() / "hash_key"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # made with mode 600
            file.write(secrets.token_hex(32))
            file.flush()
            with suppress(FileExistsError):  # Another process was first; its key counts.
                os.link(file.name, path)
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:  # Windows has no such modes
        raise UserError(f"{path} can be read by others: run `chmod 600 {path}`")
    key = path.read_bytes().strip()
    if len(key) < MIN_KEY_CHARS:
        raise UserError(f"{path} is damaged: delete it (new user hashes follow) or set {KEY_VARIABLE}")
    return key


@lru_cache(maxsize=1 << 10)  # a user's rows mostly follow each other; an id can be 64 KiB long
def hash_user(key: bytes, user: str) -> int:
    """User id -> 64-bit HMAC-SHA256; tables show it as 16 hexadecimal digits."""
    return int.from_bytes(hmac.digest(key, user.encode("utf-8", "surrogatepass"), "sha256")[:8], "big")


def user_draw(seed: int, user: str) -> tuple[int, int]:
    """Two 64-bit numbers of a user that the seed and the id alone decide: one chooses the split, one the bucket.

    The same recipe so has the same training and test users on every machine, whatever the key of the hashes. Neither
    number is ever written: anybody can compute them from an id.
    """
    digest = hashlib.sha256(f"{seed}/split/{user}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
