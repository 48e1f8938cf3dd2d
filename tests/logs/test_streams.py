"""Compression, encodings and line ends of text files."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tppo.core.common import UserError
from tppo.logs.streams import MAX_LINE_BYTES, check_encoding, is_compressed, read_blocks

TEXT = "a\tb\nfür\tzwei\n好\t\n".encode()


def compressed_by(name: str) -> Callable[[bytes], bytes]:
    return lambda data: pa.compress(data, name, asbytes=True)


COMPRESSIONS = {
    "gzip": gzip.compress,
    "zstd": compressed_by("zstd"),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


def read(data: bytes, encoding: str = "auto", size: int = 1 << 16, name: str = "log") -> bytes:
    number = 1
    whole = b""
    for first, block in read_blocks(Path(name), io.BytesIO(data), encoding, size):
        assert first == number
        number += block.count(b"\n")
        whole += block
    return whole


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_members_after_each_other_are_one_text(name: str) -> None:
    compress = COMPRESSIONS[name]
    assert read(compress(TEXT) + compress(TEXT)) == TEXT * 2
    with pytest.raises(UserError, match=f"damaged {name} data after line") as error:
        read(compress(TEXT * 9)[:-10])
    assert "zwei" not in str(error.value)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_damaged_later_member_is_no_end(name: str) -> None:
    member = COMPRESSIONS[name](TEXT)
    for later in (b"\xff\xff" + member[2:], member[:2], b"private", b"\0" * 70_000 + b"private"):
        with pytest.raises(UserError, match=f"damaged {name} data after line") as error:
            read(member + later)
        assert "private" not in str(error.value)


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz"])
def test_zeros_may_pad_a_member(name: str) -> None:
    member = COMPRESSIONS[name](TEXT)
    for zeros in (4, 80_000):
        assert read(member + b"\0" * zeros) == TEXT
        assert read(member + b"\0" * zeros + member, size=5) == TEXT * 2


@pytest.mark.parametrize("name", ["zstd", "lz4"])
def test_frames_of_notes_are_skipped(name: str) -> None:
    member = pa.compress(TEXT, name, asbytes=True) if name == "zstd" else lz4_frame(TEXT)
    notes = [
        bytes([first]) + b"\x2a\x4d\x18" + len(note).to_bytes(4, "little") + note
        for first, note in ((0x50, b""), (0x5F, b"note" * 10))
    ]
    for data in (notes[0] + member, notes[1] + notes[0] + member, notes[1] + member + notes[0] + member):
        assert is_compressed(io.BytesIO(data))
        assert read(data) == TEXT * data.count(member)
    assert not is_compressed(io.BytesIO(notes[1]))


def lz4_frame(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def test_what_follows_a_member_is_not_quoted() -> None:
    with pytest.raises(UserError, match="damaged gzip data") as error:
        read(gzip.compress(TEXT) + b"private words")
    assert "pr" not in str(error.value).removeprefix("log")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(encoding: str) -> None:
    assert read(TEXT.decode().encode(encoding)) == TEXT
    assert read(gzip.compress(TEXT.decode().encode(encoding)), size=3) == TEXT


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16-le", "utf-16-be", "big5"])
def test_an_encoding_that_is_named(encoding: str) -> None:
    text = "甲\t乙\n丙\t丁\n"
    assert read(text.encode(encoding), encoding, size=3).decode() == text


def test_bytes_that_are_no_characters_spoil_their_line_only() -> None:
    data = "甲\n".encode("gb18030") + b"\xff\xff\n" + "乙\n".encode("gb18030")
    lines = read(data, "gb18030").split(b"\n")
    assert (lines[0].decode(), lines[2].decode()) == ("甲", "乙")
    with pytest.raises(UnicodeDecodeError):
        lines[1].decode()


@pytest.mark.parametrize("name", ["utf-9", "hex", "zlib", "undefined", "idna", "punycode", "", "a\0b"])
def test_no_such_encoding(name: str) -> None:
    with pytest.raises(UserError, match=f"prepare.encoding={name}"):
        check_encoding(name)


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"a\rb\rc", b"a\nb\nc"),
        (b"a\rb\r", b"a\nb\n"),
        (b"a\rb\r\nc\n", b"a\nb\nc\n"),
        (b"a\nb\rc\n", b"a\nb\rc\n"),  # the first line ends with LF: a CR is a character
        (b"a\r\nb\r\n", b"a\r\nb\r\n"),
        (b"a\r\r\nb\r\r\n", b"a\r\r\nb\r\r\n"),
    ],
)
@pytest.mark.parametrize("size", [4, 5, 1 << 16])
def test_line_ends(data: bytes, lines: bytes, size: int) -> None:
    assert read(data, size=size) == lines


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"PK\x03\x04", "ZIP archive or an Excel workbook.*save the sheet as CSV"),
        (b"\xd0\xcf\x11\xe0", "old Excel workbook"),
        (b"PAR1", "set prepare.format to parquet"),
        (b"ORC\x00", "ORC file: write it as Parquet"),
        (b"Obj\x01", "Avro file"),
        (b"SQLite format 3\0", "SQLite database"),
    ],
)
def test_what_is_no_text_is_refused_with_the_way_out(head: bytes, message: str) -> None:
    for data in (head + b"\0" * 50, gzip.compress(head + b"\0" * 50)):
        with pytest.raises(UserError, match=message):
            read(data)


@pytest.mark.parametrize("name", ["log.gz", "log.zst", "log.bz2", "log.xz"])
def test_compressed_in_name_only(name: str) -> None:
    with pytest.raises(UserError, match="is named"):
        read(TEXT, name=name)


@given(st.lists(st.binary(max_size=30), max_size=8), st.integers(1, 40))
def test_blocks_of_any_size_hold_the_same_lines(lines: list[bytes], size: int) -> None:
    data = b"head\n" + b"".join(line.replace(b"\r", b"") + b"\n" for line in lines) + b"end"
    assert read(data, size=size + 10) == data


def test_of_a_long_line_the_beginning_is_kept() -> None:
    lines = read(b"a\n" + b"x" * 10_000_000 + b"\nb\n", size=1 << 12).split(b"\n")
    assert lines[0] == b"a"
    assert lines[2] == b"b"
    assert MAX_LINE_BYTES < len(lines[1]) < 2 * MAX_LINE_BYTES
