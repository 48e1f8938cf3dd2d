"""Personal data: patterns that reject a row, and user ids as keyed hashes.

The patterns are a floor, not a promise: names and addresses pass. `prepare.min_users_per_target` is the
second measure (a query that several users typed is hardly about one of them).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import tempfile
from functools import lru_cache

from tppo.errors import UserError
from tppo.run import cache_dir

KEY_VARIABLE = "TPPO_HASH_KEY"
MIN_KEY_CHARS = 16

_EMAIL = re.compile(r"[^\s@]@[^\s@]")
_SSN = re.compile(r"(?<!\d)\d{3}[- ]\d{2}[- ]\d{4}(?!\d)")
_CARD = re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)")
_PHONE = re.compile(
    r"(?<!\d)(?:\+?\d{1,3}[-. ]?)?(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-. ]\d{4}(?!\d)"  # (212) 555-0147
    r"|\+\d(?:[-. ()]{0,2}\d){7,14}(?!\d)"  # +351 21 555 0147
    r"|(?<![\d-])\d{3}-\d{4}(?![\d-])"  # 555-0147
)
_LONG_NUMBER = re.compile(r"\d{7,}")
_DIGIT = re.compile(r"\d")


def find_personal(text: str) -> str | None:
    """The first kind of personal data in a normalised text (a key of schema.REASONS), or None.

    Any telephone, account or tracking number without separators counts as long_number.
    """
    if "@" in text and _EMAIL.search(text):
        return "email"
    if not _DIGIT.search(text):
        return None
    if any(_luhn(match.group()) for match in _CARD.finditer(text)):
        return "card"
    for reason, pattern in (("ssn", _SSN), ("phone", _PHONE), ("long_number", _LONG_NUMBER)):
        if pattern.search(text):
            return reason
    return None


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
        handle, temporary = tempfile.mkstemp(dir=path.parent)  # mkstemp makes files of mode 600
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass  # Another process was first; its key counts.
        finally:
            os.unlink(temporary)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UserError(f"{path} can be read by others: run `chmod 600 {path}`")
    key = path.read_bytes().strip()
    if len(key) < MIN_KEY_CHARS:
        raise UserError(f"{path} is damaged: delete it (new user hashes follow) or set {KEY_VARIABLE}")
    return key


class UserHasher:
    """User id -> 64-bit HMAC-SHA256, shown as 16 hexadecimal digits."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._cached = lru_cache(maxsize=1 << 16)(self._hash)

    def hash(self, user: str) -> int:
        return self._cached(user) if len(user) <= 256 else self._hash(user)

    def _hash(self, user: str) -> int:
        digest = hmac.new(self._key, user.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()
        return int.from_bytes(digest[:8], "big")
