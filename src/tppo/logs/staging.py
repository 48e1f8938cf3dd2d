"""Pass 1 of `prepare`: rows of the log -> cleaned rows in chunk files, the rows of each bucket of users apart.

Each row is cleaned on its own (`clean_row`), a block of the log at a time, in worker processes. A chunk file (Arrow
IPC, LZ4) holds what a block became: a record batch for each bucket, and a last one for the rows rejected so far; pass 2
reads one bucket of all chunks. A chunk appears whole or not at all, and is not made again when `prepare` goes on after
a stop. No chunk holds a user id of the log, only keyed hashes; of the hashes without a key that choose split and
bucket (`clean.user_draw`), only what they chose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tppo.core.common import progress_bar
from tppo.core.config import Columns, Prepare
from tppo.core.files import write_json
from tppo.core.tables import SPLITS, field
from tppo.core.text import EVENT_KINDS
from tppo.core.words import normalise_query
from tppo.logs.clean import clean_text, clean_url, hash_user, user_draw
from tppo.logs.readers import Block, read_log
from tppo.logs.rows import REASONS, BadRow, RawRow
from tppo.logs.times import parse_time
from tppo.logs.workers import Map

BLOCK_BYTES = 1 << 24
"""Bytes of the log in a block: some 250,000 rows of AOL."""
_BATCH_ROWS = 1 << 16
_FILE_SHIFT = 40
"""A row's `place` is its file's number times 2^40 plus its line: rows in the order of the log."""
REASON_NAMES = tuple(REASONS)
STAGED = pa.schema(
    [
        field("place", pa.int64(), "file and line of the row (place)"),
        field("reason", pa.uint8(), "why the row is rejected: number in REASON_NAMES; only of the last batch", True),
        field("user_id", pa.uint64(), "keyed hash of the user id", True),
        field("split", pa.uint8(), "number in SPLITS", True),
        field("time", pa.timestamp("us"), "time in UTC (as given, when without a zone)", True),
        field("kind", pa.uint8(), "number in EVENT_KINDS", True),
        field("text", pa.large_string(), "normalised text", True),
        field("click", pa.large_string(), "host clicked in the same row (AOL), else null", True),
    ]
)
"""Rows cleaned one by one, not yet compared with each other."""
_REJECTED = ("place", "reason")
_KEPT = [name for name in STAGED.names if name != "reason"]
_KIND_NUMBERS = {kind: number for number, kind in enumerate(EVENT_KINDS)}
_REASON_NUMBERS = {reason: number for number, reason in enumerate(REASON_NAMES)}


class Missing(NamedTuple):
    """Values that stand for none: of user ids (_folded), of users that are several people, of texts."""

    users: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, prepare: Prepare) -> Missing:
        users, shared = (frozenset(map(_folded, v)) for v in (prepare.null_values, prepare.shared_users))
        return cls(users, shared, frozenset(prepare.null_values))


@dataclass(frozen=True)
class Cleaning:
    """What cleaning a row depends on, beside the row."""

    key: bytes
    seed: int
    shares: tuple[float, float, float]
    """Shares of users in reward_eval, eval1 and eval2."""
    buckets: int
    max_text_chars: int
    missing: Missing
    time_zone: str


def clean_row(
    row: RawRow | BadRow,
    key: bytes,
    max_text_chars: int,
    missing: Missing = Missing(),  # noqa: B008 - a constant
    time_format: str = "auto",
    time_zone: str = "",
) -> tuple[Any, ...]:
    """(reason, user hash, time, kind, text, click): why the row is rejected, or what is kept of it."""
    if isinstance(row, BadRow):
        return _rejected(row.reason)
    _, user, time, kind, text, url = row
    reason, user_id = clean_user(user, key, missing)
    if reason is not None:
        return _rejected(reason)
    when = parse_time(time, time_format, time_zone)
    if when is None:
        return _rejected("bad_time")
    if kind not in EVENT_KINDS:
        kind = kind.strip().lower()
        if kind not in EVENT_KINDS:
            return _rejected("unknown_kind")
    if text.strip() in missing.texts:
        # A text without a letter or digit is no text, as ever.
        return _rejected("missing_value" if any(map(str.isalnum, text)) else "no_text")
    if not text.isascii() and _has_surrogates(text):
        return _rejected("bad_utf8")
    text, reason = clean_text(kind, text, max_text_chars)
    click = None
    if reason is None and url is not None and url not in missing.texts:
        click, reason = clean_url(url, max_text_chars)
    return _rejected(reason) if reason else (None, user_id, when, kind, text, click)


def _has_surrogates(text: str) -> bool:
    """Whether a text holds half of a character, as JSON can write one (a backslash and `ud800`)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _rejected(reason: str) -> tuple[Any, ...]:
    return reason, None, None, None, None, None


@lru_cache(maxsize=1 << 10)  # a user's rows mostly follow each other; an id can be 64 KiB long
def _folded(user: str) -> str:
    """An id as it is compared with those that are none: without case, width and what cannot be seen."""
    # A normal form has a space for U+200B, which ends a word; an id is no words.
    return user.strip().casefold() if user.isascii() else normalise_query(user.replace("\u200b", ""))


def clean_user(user: str, key: bytes, missing: Missing) -> tuple[str | None, int]:
    """(None, hash), or (reason, 0) for an id that is none, or several people's."""
    folded = _folded(user)
    if not folded or folded in missing.users:
        return "missing_value", 0
    return ("shared_user", 0) if folded in missing.shared else (None, hash_user(key, user))


@lru_cache(maxsize=1 << 10)
def split_and_bucket(seed: int, shares: tuple[float, float, float], buckets: int, user: str) -> tuple[int, int]:
    """Number of the user's split in SPLITS, and of their bucket; the same on every machine."""
    draw, bucket = user_draw(seed, user)
    bounds = zip(("reward_eval", "eval1", "eval2"), accumulate(shares), strict=True)
    split = next((name for name, bound in bounds if draw / 2**64 < bound), "train")
    return SPLITS.index(split), bucket * buckets >> 64


class Cleaned(NamedTuple):
    """What a block became."""

    kept: pa.Table
    """Rows (STAGED but for `reason`), in the order of the log."""
    buckets: np.ndarray
    """Bucket of each kept row's user."""
    rejected: pa.RecordBatch
    """`place` and `reason` of the others."""


def stage_block(cleaning: Cleaning, job: tuple[Path, int, Block]) -> int:
    """Write the chunk file of a block of a file (by its number); returns the number of rows."""
    path, file, block = job
    cleaned = clean_block(cleaning, file, block)
    _write_chunk(path, cleaned, cleaning.buckets)
    return cleaned.kept.num_rows + cleaned.rejected.num_rows


def clean_block(cleaning: Cleaning, file: int, block: Block) -> Cleaned:
    """Clean every row of a block of a file (by its number)."""
    first = file << _FILE_SHIFT
    rules = (cleaning.key, cleaning.max_text_chars, cleaning.missing, block.layout.time_format, cleaning.time_zone)
    bad_places: list[int] = []
    bad_reasons: list[int] = []
    buckets: list[int] = []
    parts: list[pa.RecordBatch] = []
    columns: list[list[Any]] = [[] for _ in _KEPT]
    places, users, splits, times, kinds, texts, clicks = columns
    for row in block.rows():
        reason, user_id, when, kind, text, click = clean_row(row, *rules)
        if reason is not None or isinstance(row, BadRow):
            bad_places.append(first + row.line)
            bad_reasons.append(_REASON_NUMBERS[reason])
            continue
        split, bucket = split_and_bucket(cleaning.seed, cleaning.shares, cleaning.buckets, row.user)
        buckets.append(bucket)
        places.append(first + row.line)
        users.append(user_id)
        splits.append(split)
        times.append(when)
        kinds.append(_KIND_NUMBERS[kind])
        texts.append(text)
        clicks.append(click)
        if len(places) == _BATCH_ROWS:
            parts.append(_batch(columns))
    parts.append(_batch(columns))
    rejected = pa.record_batch([pa.array(bad_places, pa.int64()), pa.array(bad_reasons, pa.uint8())], list(_REJECTED))
    return Cleaned(pa.Table.from_batches(parts), np.array(buckets, np.int64), rejected)


def _batch(columns: list[list[Any]]) -> pa.RecordBatch:
    """The lists, emptied, as columns."""
    batch = pa.record_batch([pa.array(c, STAGED.field(n).type) for c, n in zip(columns, _KEPT, strict=True)], _KEPT)
    for column in columns:
        column.clear()
    return batch


def _filled(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with nulls for the columns of STAGED that it lacks."""
    names = batch.schema.names
    columns = [batch.column(f.name) if f.name in names else pa.nulls(len(batch), f.type) for f in STAGED]
    return pa.record_batch(columns, schema=STAGED)


def _write_chunk(path: Path, cleaned: Cleaned, buckets: int) -> None:
    kept, bucket, rejected = cleaned
    order = np.argsort(bucket, kind="stable")
    (batch,) = kept.take(order).combine_chunks().to_batches() or [_batch([[] for _ in _KEPT])]
    ends = np.searchsorted(bucket[order], np.arange(buckets), side="right").tolist()
    schema = STAGED.with_metadata({"rows": str(kept.num_rows + rejected.num_rows)})
    temporary = path.with_suffix(".tmp")
    with pa.ipc.new_file(temporary, schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        for start, end in pairwise([0, *ends]):
            writer.write_batch(_filled(batch.slice(start, end - start)))
        writer.write_batch(_filled(rejected))
    temporary.replace(path)
    pa.default_memory_pool().release_unused()


def stage_files(
    files: dict[Path, Path], encoding: str, columns: Columns, format: str, cleaning: Cleaning, folder: Path, run: Map
) -> int:
    """Write the chunk files that `folder` does not hold yet; returns the number of rows of all."""
    finished = folder / "read.json"
    if finished.exists():
        return int(json.loads(finished.read_text(encoding="utf-8"))["rows"])
    sizes = [path.stat().st_size for path in files]
    rows = 0
    with progress_bar() as bar:
        task = bar.add_task("prepare: kB read", total=sum(sizes) // 1000)
        positions: dict[Path, int] = {}

        def jobs() -> Iterator[tuple[Path, int, Block]]:
            nonlocal rows
            chunk = 0
            for number, (path, given) in enumerate(files.items()):
                with path.open("rb") as raw:
                    for block in read_log(path, raw, format, columns, encoding, BLOCK_BYTES, given):
                        target = chunk_path(folder, chunk)
                        chunk += 1
                        if target.exists():
                            rows += chunk_rows(target)
                            continue
                        at = sum(sizes[:number]) + min(_position(raw), sizes[number])
                        positions[target] = at
                        sent.append(target)
                        yield target, number, block

        sent: list[Path] = []
        for done, count in enumerate(run(partial(stage_block, cleaning), jobs())):
            rows += count
            bar.update(task, completed=positions.pop(sent[done]) // 1000)
    write_json(finished, {"rows": rows})
    return rows


def _position(raw: Any) -> int:
    try:
        return int(raw.tell())
    except (OSError, ValueError):
        return 0


def chunk_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.arrow"


def chunk_rows(path: Path) -> int:
    """Rows of a chunk file, rejected ones included."""
    with pa.memory_map(str(path)) as source:
        return int(pa.ipc.open_file(source).schema.metadata[b"rows"])


def read_bucket(folder: Path, bucket: int) -> pa.Table:
    """The rows of a bucket (STAGED) from all chunks, in the order of the log."""
    batches = [batch for batch in _batches(folder, bucket) if batch.num_rows]
    return pa.Table.from_batches(batches, STAGED)


def rejected_rows(folder: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """`place` and `reason` of the rows rejected one by one, a chunk at a time."""
    schema = pa.schema([STAGED.field(name) for name in _REJECTED])
    return schema, (batch.select(list(_REJECTED)) for batch in _batches(folder, -1))


def _batches(folder: Path, number: int) -> Iterator[pa.RecordBatch]:
    """A batch of every chunk; -1 is the last."""
    for path in sorted(folder.glob("*.arrow")):
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            batch = reader.get_batch(number if number >= 0 else reader.num_record_batches - 1)
            yield batch.replace_schema_metadata(None)


def file_and_line(place: pa.Array | Any) -> tuple[Any, Any]:
    """Numbers of the files and lines of places (NumPy)."""
    return place >> _FILE_SHIFT, place & ((1 << _FILE_SHIFT) - 1)
