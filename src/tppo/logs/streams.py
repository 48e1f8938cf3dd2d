"""Bytes of a text log -> blocks of whole lines in UTF-8, however it is compressed and encoded and ends its lines.

- Compression (gzip, zstd, bzip2, xz, lz4 frames; several members after each other) is recognised by the first bytes.
- Encoding: UTF-8, or what `prepare.encoding` says; a byte order mark of UTF-16 or UTF-32 says so by itself. A line with
  bytes that are none of the encoding's characters becomes invalid UTF-8, and so one rejected row.
- Lines end with LF or CR LF. Where the first line ends with a lone CR (Excel for Mac), every CR ends a line.

Memory is bounded by the size of a block: of a line longer than MAX_LINE_BYTES only the beginning is kept.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from tppo.core.common import UserError

MAX_LINE_BYTES = 1 << 16
_BUFFER = 1 << 16
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"} | {
    b"\x04\x22\x4d\x18": "lz4"
}
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18.{4}", re.DOTALL)
_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz", ".lz4": "lz4"}
_NOT_TEXT = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook: unpack it, or save the sheet as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save the sheet as CSV (UTF-8)",
    b"PAR1": "a Parquet file: set prepare.format to parquet",
    b"ORC": "an ORC file: write it as Parquet",
    b"Obj\x01": "an Avro file: write it as Parquet or as JSON lines",
    b"ARROW1": "an Arrow file: write it as Parquet",
    b"SQLite format 3\0": "an SQLite database: export the table as CSV",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"\xff\x06\x00\x00sNaPpY": "compressed with snappy: compress it with gzip or zstd instead",
    b"\x1f\x9d": "compressed with compress (.Z): compress it with gzip or zstd instead",
}
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""In this order: the mark of UTF-32 begins with that of UTF-16."""
_BAD = "tppo_bad_bytes"
# A lone surrogate is no character of UTF-8, so the line it stands in is rejected where lines are decoded.
codecs.register_error(_BAD, lambda error: ("\udcff", cast(UnicodeDecodeError, error).end))


def is_compressed(raw: BinaryIO) -> bool:
    """Whether a file begins as compressed data does; leaves it at its start."""
    return _compression(raw) is not None


def _compression(raw: BinaryIO) -> str | None:
    """Name of the compression that a file begins with; leaves it at its start."""
    magic = raw.read(16)
    while _SKIPPABLE.match(magic):  # frames of notes that zstd and lz4 have in common: pzstd begins with one
        raw.seek(int.from_bytes(magic[4:8], "little") + 8 - len(magic), io.SEEK_CUR)
        magic = raw.read(16)
    raw.seek(0)
    return next((name for mark, name in _COMPRESSED.items() if magic.startswith(mark)), None)


def check_encoding(name: str) -> None:
    """UserError for `prepare.encoding` when Python knows no such encoding of text, or cannot read it in pieces."""
    try:
        if name != "auto":
            "a".encode(name)
            codecs.getincrementaldecoder(name)(_BAD).decode(b"a", final=True)
    except (LookupError, ValueError):
        raise UserError(
            f"prepare.encoding={name}: no such encoding; give auto, or a name such as utf-8, utf-16, gb18030, shift_jis"
        ) from None


def read_blocks(path: Path, raw: BinaryIO, encoding: str, size: int) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, 1-based; whole lines in UTF-8, each but perhaps the last ended by LF), in order.

    Args:
        raw: the file at its start (callers may watch its position).
        size: bytes read at a time; equal sizes give equal blocks.

    Raises:
        UserError: no text file, or damaged compression.
    """
    number = 1
    kind, stream = _decompressed(path, raw)
    try:
        for data in _whole_lines(_decoded(path, stream, encoding), size):
            yield number, data
            number += data.count(b"\n")
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the data's
        # The libraries' messages may quote the data.
        raise UserError(f"{path}: damaged {kind} data after line {number - 1}: get the file again") from None


def _whole_lines(stream: BinaryIO, size: int) -> Iterator[bytes]:
    rest, held = b"", b""
    ends_cr: bool | None = None
    while piece := stream.read(size):
        if ends_cr is None:
            ends_cr = _ends_with_cr(piece)
        if ends_cr:
            piece, held = held + piece, b""
            if piece.endswith(b"\r"):  # perhaps half of a CR LF
                piece, held = piece[:-1], b"\r"
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        data = rest + piece
        cut = data.rfind(b"\n") + 1
        rest = data[cut : cut + MAX_LINE_BYTES + 1]  # a longer line is rejected by its length, whatever follows
        if cut:
            yield data[:cut]
    if rest + held:
        yield rest + held.replace(b"\r", b"\n")


def _decompressed(path: Path, raw: BinaryIO) -> tuple[str, BinaryIO]:
    """Name of the compression, empty for none, and the content."""
    kind = _compression(raw)
    if kind is None:
        if named := _SUFFIXES.get(path.suffix):
            raise UserError(f"{path} is named {path.suffix} but is not {named} data: rename it or get it again")
        return "", io.BufferedReader(cast(Any, _Unclosed(raw)), _BUFFER)
    if kind == "gzip":
        stream: object = gzip.GzipFile(fileobj=raw)
    elif kind == "bzip2":
        stream = _Members(raw, bz2.BZ2Decompressor)
    elif kind == "xz":
        stream = _Members(raw, lzma.LZMADecompressor)
    else:
        stream = pa.CompressedInputStream(pa.PythonFile(_Unclosed(raw), mode="r"), kind)
    return kind, io.BufferedReader(cast(Any, _Unclosed(stream)), _BUFFER)


class _Members:
    """The members of a bzip2 or xz file, one after the other: Python's own readers end at a member that is damaged at
    its beginning, as if the file ended there."""

    def __init__(self, raw: BinaryIO, begin: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._raw, self._begin = raw, begin
        self._member = begin()
        self._held = b""

    def read(self, size: int) -> bytes:
        """Some bytes, none at the end; EOFError, OSError or LZMAError where the data are damaged."""
        while True:
            if self._member.eof:
                self._held = self._after(self._member.unused_data)
                if not self._held:
                    return b""
                self._member = self._begin()
            block = b""
            if self._member.needs_input:
                block, self._held = self._held or self._raw.read(_BUFFER), b""
                if not block:
                    raise EOFError
            if data := self._member.decompress(block, size):
                return data

    def _after(self, rest: bytes) -> bytes:
        """What follows a member and the zeros that may pad it."""
        rest = rest.lstrip(b"\0")
        while not rest and (block := self._raw.read(_BUFFER)):
            rest = block.lstrip(b"\0")
        return rest


class _Unclosed(io.RawIOBase):
    """A stream of bytes whose closing is left to its owner."""

    def __init__(self, stream: object) -> None:
        self._stream = cast(BinaryIO, stream)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(size)


def _decoded(path: Path, stream: BinaryIO, encoding: str) -> BinaryIO:
    """The stream in UTF-8 without a byte order mark."""
    head = cast(io.BufferedReader, stream).peek(16)
    for mark, kind in _NOT_TEXT.items():
        if head.startswith(mark):
            raise UserError(f"{path} is {kind}")
    marked = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if head.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        marked = "utf-8"
    name = marked or ("utf-8" if encoding == "auto" else codecs.lookup(encoding).name)
    if name == "utf-8":
        return stream
    return cast(BinaryIO, _Recoded(stream, name))


class _Recoded:
    """Reads text of another encoding as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(_BAD)

    def read(self, size: int) -> bytes:
        while block := self._stream.read(size):
            if text := self._decoder.decode(block):
                return text.encode("utf-8", "surrogatepass")
        return self._decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")


def _ends_with_cr(piece: bytes) -> bool:
    """Whether the first line ends with a CR that no LF follows."""
    cr, lf = piece.find(b"\r"), piece.find(b"\n")
    return cr >= 0 and (lf < 0 or bool(piece[cr:lf].strip(b"\r")))
