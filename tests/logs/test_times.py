"""Times: what is certain is read, what is not is no time."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.core.common import UserError
from tppo.logs.times import EPOCH, check_zone, parse_time, time_kind

PLAUSIBLE = st.datetimes(datetime(1990, 1, 1), datetime(2099, 12, 31, 23, 59, 59))


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("2024-01-20", "2024-01-20"),
        ("2024/01/20 10:00", "2024-01-20 10:00"),
        ("20240120", "2024-01-20"),
        ("20240120T100203", "2024-01-20 10:02:03"),
        ("20200204200301539", "2020-02-04 20:03:01.539"),
        ("20231102215548Z", "2023-11-02 21:55:48"),
        ("20200204200302", "2020-02-04 20:03:02"),
        ("1710112341234", "2024-03-10 23:12:21.234"),
        ("1700000000", "2023-11-14 22:13:20"),
        ("1700000000.5", "2023-11-14 22:13:20.5"),
        ("1700000000000001", "2023-11-14 22:13:20.000001"),
        ("1700000000000000001", "2023-11-14 22:13:20"),
        ("2024-01-20T10:00:00,123456789+01:00", "2024-01-20 09:00:00.123456"),
        ("2024-01-20 10:00:00 -0330", "2024-01-20 13:30"),
        ("2024-01-20T24:00:00", "2024-01-21"),
        ("2016-12-31T23:59:60Z", "2017-01-01"),
        ("2017-01-01T05:29:60.5+05:30", "2017-01-01 00:00:00.5"),
        ("2024-07-20 10:00:00 Europe/Berlin", "2024-07-20 08:00"),
        ("2024-01-20 10:00:00 UTC", "2024-01-20 10:00"),
        ("2024-01-20 10:00:00 EST", "2024-01-20 15:00"),
        ("2024-01-20T10:00:00+01:00[Europe/Berlin]", "2024-01-20 09:00"),
        ("2024-10-27 02:30:00 Europe/Berlin", "2024-10-27 00:30"),  # came twice: the first
        ("Tue, 04 Feb 2020 20:03:01 +0000", "2020-02-04 20:03:01"),
        ("04/Feb/2020:20:03:01 -0500", "2020-02-05 01:03:01"),
        (" 2024-01-20 10:00:00 ", "2024-01-20 10:00"),
    ],
)
def test_times_that_are_certain(text: str, when: str) -> None:
    assert parse_time(text) == datetime.fromisoformat(when)


@pytest.mark.parametrize(
    "text",
    [
        *("", "soon", "12", "1.5", "-1700000000", "1e9", "nan", "0x65"),
        *("01/02/2024", "20/01/2024", "01-02-2024", "24-01-20", "Feb 4 20", "04 Feb 20 20:03:01"),
        *("2024-01-20x10:00:00", "2024-01-20_10:00:00", "2024-01-20  10:00:00", "2024-01-20110:00:00"),
        *("2024-13-01", "2023-02-29", "2024-01-20 25:00:00", "2024-01-20 24:00:01", "2024-01-20 10:00:61"),
        *("2024-01-20 10:30:60", "2024-0120", "2024-01/20", "2024-01-20 10:00 PM", "2024-W03-6"),
        *("2024-01-20 10:00:00 CST", "2024-01-20 10:00:00 Europe/Nowhere", "2024-01-20 10:00:00 ../etc"),
        "2024-01-20 10:00:00+99:00",
        "2024-03-31 02:30:00 Europe/Berlin",  # skipped
        *(
            "1710-11-23 12:34",
            "1970-01-01",
            "2900-01-01",
            "9999-12-31",
            "0",
            "253402300800",
            "99999999999999999999999999",
        ),
        *("638412345678901234", "123456789"),  # .NET's ticks, or nanoseconds; any number, or seconds
        *("2024-01-20 10:00:00 localtime", "2024-01-20 10:00:00 right/UTC"),
        "2034010112",  # January 2034 by the hour, or seconds of June
        "\u0662\u0660\u0662\u0664-01-20",
    ],
)
def test_what_is_not_certain_is_no_time(text: str) -> None:
    assert parse_time(text) is None


@given(PLAUSIBLE)
def test_every_way_to_write_a_time_says_the_same(when: datetime) -> None:
    micros = (when - EPOCH) // timedelta(microseconds=1)
    second = when.replace(microsecond=0)
    assert parse_time(when) == when
    for text in (when.isoformat(), when.isoformat(" "), when.isoformat() + "Z", when.strftime("%Y%m%dT%H%M%S.%f")):
        assert parse_time(text) == parse_time(text, "iso") == when
        assert time_kind(text) == "iso"
    assert parse_time(when.strftime("%Y%m%d%H%M%S%f")[:17]) == when.replace(microsecond=when.microsecond // 1000 * 1000)
    assert parse_time(second.strftime("%Y%m%d%H%M%S")) == second
    for unit, size in (("epoch_s", 1_000_000), ("epoch_ms", 1_000), ("epoch_us", 1)):
        text = str(micros // size)
        assert parse_time(text, unit) == EPOCH + timedelta(microseconds=micros // size * size)
        # Either the digits say which it is, or nothing does.
        assert parse_time(text) in (parse_time(text, unit), None)
        assert parse_time(text) is not None or len(text) in (9, 10)


def test_a_format_that_is_given_is_the_only_one() -> None:
    assert parse_time("1700000000000", "epoch_s") is None
    assert parse_time("2024-01-20", "epoch_s") is None
    assert parse_time("1700000000", "iso") is None
    assert parse_time("700000000", "epoch_s") == datetime(1992, 3, 7, 20, 26, 40)
    assert parse_time("700000000000000000", "epoch_ns") == datetime(1992, 3, 7, 20, 26, 40)
    assert parse_time("2034010112", "iso") == datetime(2034, 1, 1, 12)
    assert parse_time("2034010112", "epoch_s") == datetime(2034, 6, 15, 18, 48, 32)


def test_the_zone_is_that_of_times_without_one() -> None:
    assert parse_time("2024-07-20 10:00:00", zone="Europe/Berlin") == datetime(2024, 7, 20, 8)
    assert parse_time("2024-07-20 10:00:00Z", zone="Europe/Berlin") == datetime(2024, 7, 20, 10)
    assert parse_time("1700000000", zone="Europe/Berlin") == datetime(2023, 11, 14, 22, 13, 20)
    assert parse_time(datetime(2024, 7, 20, tzinfo=UTC)) == datetime(2024, 7, 20)
    check_zone("")
    check_zone("Asia/Tokyo")
    with pytest.raises(UserError, match=r"no zone Berlin.*Europe/Berlin"):
        check_zone("Berlin")
    for name in ("localtime", "posixrules", "Factory", "right/Europe/Berlin"):
        with pytest.raises(UserError, match="no zone"):
            check_zone(name)
