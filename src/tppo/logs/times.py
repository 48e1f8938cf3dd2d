"""Times of a log, as text, number or datetime -> time in UTC without zone. What is not certain is no time.

Read
- ISO 8601, extended or basic: `2024-01-20`, `2024-01-20 10:00[:00[.123456]]` (or `T`, or `/` between the numbers of
  the date), `20240120`, `20240120T100000`, `20240120100000[123]`; then perhaps `Z`, an offset (`+01:00`, `+0100`,
  `+01`), or a zone by its IANA name (` Europe/Berlin`, ` UTC`, ` EST`, `[Europe/Berlin]`; an offset before it counts).
- RFC 2822 (`Tue, 04 Feb 2020 20:03:01 +0000`) and the access logs' `04/Feb/2020:20:03:01 +0000`: the month is a word.
- Seconds, milliseconds, microseconds or nanoseconds since 1970 (UTC), with a fraction or without.

`auto` tells these apart by the number of digits: within the years below, none has as many digits as another, but for
ten digits, which are `YYYYMMDDHH` as well as seconds of 2033 to 2036: no time under `auto`. Nor are 9 digits (seconds
before 2001, or any number) and 18 (nanoseconds before 2001, or .NET's ticks). All times of a file are of
one kind, the first's; others are no times.

Decided
- Years before 1990 and after 2099 are no times: a unit or a column is wrong.
- 24:00 is midnight of the next day; a leap second (hh:59:60) is the second after it; digits of a fraction beyond
  microseconds are cut off.
- A local time that its zone skipped (clocks set forward) is no time; one that came twice (clocks set back) is taken for
  the first.
- `DD/MM/YYYY`, `MM/DD/YYYY` and years of two digits are no times: nobody can tell them apart.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from tppo.core.common import UserError

FIRST, LAST = datetime(1990, 1, 1), datetime(2100, 1, 1)
"""Plausible times lie from FIRST on and before LAST."""
EPOCH = datetime(1970, 1, 1)
_UNITS = {"epoch_s": 1_000_000, "epoch_ms": 1_000, "epoch_us": 1}
"""Microseconds in a unit; nanoseconds are divided."""
_EPOCH_DIGITS = {10: "epoch_s", 12: "epoch_ms", 13: "epoch_ms", 15: "epoch_us", 16: "epoch_us", 19: "epoch_ns"}
"""Digits before the point of the seconds, milliseconds and so on that `auto` takes a number for. Of the plausible years
before 2001 (10^9 s), seconds (9 digits) may be any number, and nanoseconds (18) .NET's ticks: they need the setting."""
_NO_ZONES = ("localtime", "posixrules", "Factory")
"""Files of the zone database that are whatever this machine's owner chose, or a placeholder."""
_CLOCK = r"(?P<hour>\d\d)(?:(?P<c>:?)(?P<minute>\d\d)(?:(?P=c)(?P<second>\d\d)(?:[.,](?P<fraction>\d+))?)?)?"
_ZONE = (
    r"(?: ?(?P<offset>[Zz]|[+-]\d\d(?::?\d\d(?::?\d\d)?)?))?(?: (?P<name>[A-Za-z][\w/+-]*)|\[(?P<bracket>[\w/+-]+)\])?"
)
_DATE = r"(?P<year>\d{4})(?P<d>[-/]?)(?P<month>\d\d)(?P=d)(?P<day>\d\d)"
_ISO = re.compile(rf"{_DATE}(?:[ Tt]{_CLOCK}{_ZONE})?", re.ASCII)
_COMPACT = re.compile(
    r"(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)(?P<hour>\d\d)(?:(?P<minute>\d\d)"
    rf"(?:(?P<second>\d\d)(?:[.,]?(?P<fraction>\d{{3}}|\d{{6}}))?)?)?{_ZONE}",
    re.ASCII,
)
_WORDED = re.compile(
    r"(?:[A-Za-z]{3}, ?)?(?P<day>\d\d?)(?P<d>[ /-])(?P<word>[A-Za-z]{3})(?P=d)(?P<year>\d{4})[ :]"
    rf"(?P<hour>\d\d):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:\.(?P<fraction>\d+))?)?{_ZONE}",
    re.ASCII,
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_NUMBER = re.compile(r"(\d+)(?:\.(\d+))?", re.ASCII)


def parse_time(value: str | datetime, format: str = "auto", zone: str = "") -> datetime | None:
    """The time in UTC (as given, where it has no zone and `zone` is empty); None when it is none.

    Args:
        format: `columns.time_format`.
        zone: name of the zone of times that have none of their own.
    """
    try:
        if type(value) is str and len(value) == 19 and format in ("auto", "iso") and not zone and _is_usual(value):
            # Most times of most logs: many times faster than the patterns.
            return datetime.fromisoformat(value)
        if isinstance(value, datetime):
            when: datetime | None = _in_utc(value, value.tzinfo)
        else:
            when = _parse(value.strip(), format, zone)
    except (ValueError, OverflowError):
        return None
    return when if when is not None and FIRST <= when < LAST else None


def _is_usual(text: str) -> bool:
    """Whether 19 characters have the signs of `YYYY-MM-DD HH:MM:SS` at their places, and neither 24:00 nor a leap
    second, in a plausible year. (Python's own parser takes any character between date and time.)"""
    signs = text[4] + text[7] + text[13] + text[16] == "--::" and text[10] in " T"
    return signs and text[17] != "6" and text[11:13] != "24" and "1990" <= text[:4] < "2100"


def time_kind(value: str | datetime) -> str | None:
    """`iso`, `epoch_s` and so on: which format `auto` takes a value for; None when it is no time."""
    if isinstance(value, datetime):
        return "iso"
    text = value.strip()
    number = _NUMBER.fullmatch(text)
    if number is None:
        return "iso" if parse_time(text, "iso") else None
    compact = number[2] is None and parse_time(text, "iso") is not None
    epoch = _EPOCH_DIGITS.get(len(number[1]))
    if epoch and parse_time(text, epoch) is None:
        epoch = None
    return None if compact and epoch else "iso" if compact else epoch


def check_zone(name: str) -> None:
    """UserError for the name of a zone that there is not."""
    if name and _named_zone(name) is None:
        raise UserError(
            f"prepare.columns.time_zone: there is no zone {name}: give an IANA name such as Europe/Berlin or UTC"
        )


def _parse(text: str, format: str, zone: str) -> datetime | None:
    if format == "auto":
        kind = time_kind(text)
        return _parse(text, kind, zone) if kind else None
    if format != "iso":
        return _from_epoch(text, format)
    match = _ISO.fullmatch(text) or _COMPACT.fullmatch(text) or _WORDED.fullmatch(text)
    return _from_parts(match.groupdict(), zone) if match else None


def _from_epoch(text: str, unit: str) -> datetime | None:
    number = _NUMBER.fullmatch(text)
    if number is None or len(number[1]) > 25:
        return None
    whole, fraction = int(number[1]), int((number[2] or "")[:9].ljust(9, "0"))
    if unit == "epoch_ns":
        return EPOCH + timedelta(microseconds=whole // 1000)
    return EPOCH + timedelta(microseconds=whole * _UNITS[unit] + fraction * _UNITS[unit] // 10**9)


def _from_parts(parts: dict[str, str | None], zone: str) -> datetime | None:
    """Raises ValueError where a part is out of its range."""
    year, day = int(parts["year"] or 0), int(parts["day"] or 0)
    month = _MONTHS.index(str(parts["word"]).lower()) + 1 if "word" in parts else int(parts["month"] or 0)
    hour, minute, second = (int(parts.get(name) or 0) for name in ("hour", "minute", "second"))
    micros = int((parts.get("fraction") or "")[:6].ljust(6, "0"))
    later = timedelta()
    if hour == 24 and not (minute or second or micros):
        hour, later = 0, timedelta(days=1)
    if second == 60 and minute % 15 == 14:  # in local time, too: offsets are quarters of an hour
        second, later = 59, timedelta(seconds=1)
    when = datetime(year, month, day, hour, minute, second, micros) + later
    name = parts.get("name") or parts.get("bracket")
    named = _named_zone(name or zone) if name or zone else None
    if name and named is None:
        return None
    offset = parts.get("offset")
    return _in_utc(when, _offset(offset) if offset else named)


def _in_utc(when: datetime, zone: tzinfo | None) -> datetime | None:
    """None for a time that the zone skipped."""
    if zone is None:
        return when
    instant = when.replace(tzinfo=zone, fold=0).astimezone(UTC)
    if isinstance(zone, ZoneInfo) and instant.astimezone(zone).replace(tzinfo=None) != when.replace(tzinfo=None):
        return None
    return instant.replace(tzinfo=None)


def _offset(text: str) -> timezone:
    if text in "Zz":
        return UTC
    digits = text[1:].replace(":", "").ljust(6, "0")
    size = timedelta(hours=int(digits[:2]), minutes=int(digits[2:4]), seconds=int(digits[4:]))
    if size > timedelta(hours=15):
        raise ValueError("no such offset")
    return timezone(-size if text[0] == "-" else size)


@lru_cache(maxsize=1 << 10)
def _named_zone(name: str) -> tzinfo | None:
    if name in _NO_ZONES or name.startswith("right/"):  # `right`: its clocks count leap seconds, ours do not
        return None
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None
