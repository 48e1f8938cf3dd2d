"""Stage `prepare`: interaction log -> examples.parquet and rejects.parquet.

Pass 1 (`staging`) reads and cleans the log a block at a time and puts each user's rows into one of many buckets; pass 2
(`examples`) compares the rows of a bucket with each other (duplicates, repeats, windows) in DuckDB. A log of more than
SMALL_BYTES is worked on by `prepare.threads` processes. Memory does not grow with the log: a process holds a block, or
a bucket. What is done is kept in the folder `scratch` and not done again after a stop; it is deleted at the end. It
holds no user id of the log, only keyed hashes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import shutil
import time
from collections import Counter
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from tppo.core.common import UserError, console, track
from tppo.core.config import Columns, Prepare, Recipe
from tppo.core.files import write_json
from tppo.core.run import RunFolder
from tppo.core.stages import stage_config
from tppo.core.tables import SPLITS
from tppo.core.text import EVENT_KINDS
from tppo.logs import examples, readers
from tppo.logs.clean import hash_key
from tppo.logs.examples import Work
from tppo.logs.parquet import is_parquet
from tppo.logs.staging import Cleaning, Missing, stage_files
from tppo.logs.staging import clean_row as clean_row  # what a row becomes, for callers with a row at hand
from tppo.logs.streams import check_encoding, is_compressed
from tppo.logs.times import check_zone
from tppo.logs.times import parse_time as parse_time
from tppo.logs.workers import Map, workers

SYNTHETIC_KEY = b"synthetic users need no secret, and the same ids everywhere"
SMALL_BYTES = 1 << 25
"""Smaller logs are one bucket, in this process."""
BUCKET_BYTES = 1 << 24
"""Bytes of the log in a bucket, uncompressed: some 250,000 rows of AOL."""
COMPRESSION = 5
"""Bytes of a log, roughly, for one of it compressed or as Parquet."""
HEAVY = 100
"""A user with so many times the rows of the median user is hardly one person: said, not dropped."""
MAX_BUCKETS = 4096
MIN_MEMORY = 1 << 25
"""Least memory of a DuckDB, in bytes: with less it does not begin."""
_VERSION = 1
"""Of the files in the scratch folder."""


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Write examples.parquet and rejects.parquet into `folder`; returns counts and times, no text of the log.

    Raises:
        UserError: a setting out of range, an unusable file, no usable row, or a split without examples.
    """
    prepare = recipe.prepare
    check_settings(prepare)
    start = time.monotonic()
    files, format, columns, key = _source(prepare, run)
    size = _check_files(files, format, columns, prepare.encoding)
    buckets = 1 if size <= SMALL_BYTES else min(MAX_BUCKETS, math.ceil(size / BUCKET_BYTES))
    processes = 1 if buckets == 1 else prepare.threads
    cleaning = Cleaning(
        key=key,
        seed=recipe.data_seed,
        shares=(prepare.reward_eval_share, prepare.eval1_share, prepare.eval2_share),
        buckets=buckets,
        max_text_chars=prepare.max_text_chars,
        missing=Missing.of(prepare),
        time_zone=columns.time_zone,
    )
    scratch = folder / "scratch"
    _go_on_or_clear(scratch, _plan(recipe, files, cleaning))
    memory = (examples.memory_bytes(prepare.memory_limit) or 0) // processes
    work = Work(scratch, prepare, recipe.task, memory, prepare.threads if buckets == 1 else 1)
    console.print(f"prepare: reading {len(files)} file(s), {size / 1e6:.1f} MB, {buckets} bucket(s) of users")
    with workers(processes) as in_workers:
        rows_read = stage_files(files, prepare.encoding, columns, format, cleaning, scratch / "rows", in_workers)
        facts: dict[str, Any] = {"files": len(files), "rows_read": rows_read}
        row_facts, hours = _sequences(work, buckets, in_workers)
        rejected = examples.write_rejects(work, buckets, [str(path) for path in files], folder / "rejects.parquet")
        facts |= _row_facts(rows_read, rejected, row_facts)
        if not facts["rows_kept"]:
            shutil.rmtree(scratch)
            _nothing_kept(facts["rejected"])
        facts["time_cut"] = examples.time_cut(hours, facts["last_time"], prepare.eval2_time_share)
        facts |= _examples(work, buckets, facts["time_cut"], folder / "examples.parquet", in_workers)
    shutil.rmtree(scratch)
    facts["seconds"] = round(time.monotonic() - start, 2)
    facts["rows_per_second"] = round(rows_read / (time.monotonic() - start))
    print_summary(facts)
    _check_splits(facts, prepare)
    return facts


def check(recipe: Recipe) -> None:
    """Every check of the stage's settings that needs no data."""
    check_settings(recipe.prepare)


def check_data(recipe: Recipe) -> None:
    """Every file of the log can be read, as far as its first block tells."""
    prepare = recipe.prepare
    if prepare.source != ["synthetic"]:
        _check_files(_log_files(prepare), prepare.format, prepare.columns, prepare.encoding)


def check_settings(prepare: Prepare) -> None:
    """UserError for a number out of range, or a name of nothing."""
    counts = ("min_history", "windows_per_user", "window_stride", "min_users_per_target", "max_text_chars", "threads")
    for name in counts:
        if getattr(prepare, name) < 1:
            raise UserError(f"prepare.{name} is {getattr(prepare, name)}: it must be at least 1")
    shares = ("reward_eval_share", "eval1_share", "eval2_share", "eval2_time_share")
    for name in shares:
        if not 0 < getattr(prepare, name) < 1:
            raise UserError(f"prepare.{name} is {getattr(prepare, name)}: it must lie between 0 and 1")
    held_out = sum(getattr(prepare, name) for name in shares[:3])
    if held_out >= 1:
        raise UserError(f"prepare: {' + '.join(shares[:3])} is {held_out:g}: no user is left to train on")
    check_encoding(prepare.encoding)
    check_zone(prepare.columns.time_zone)
    if (examples.memory_bytes(prepare.memory_limit) or 0) < MIN_MEMORY * prepare.threads:
        raise UserError(
            f"prepare.memory_limit={prepare.memory_limit} is not usable: give a size such as 1GB, of at least "
            f"{MIN_MEMORY >> 20}MiB for each of prepare.threads={prepare.threads}"
        )


def _source(prepare: Prepare, run: RunFolder) -> tuple[dict[Path, Path], str, Columns, bytes]:
    """Files (as readers.list_files gives them), format, columns and hash key of the log."""
    if prepare.source == ["synthetic"]:
        folder = run.require("synthetic")
        return {folder / "log.tsv": folder}, "tsv", Columns(), SYNTHETIC_KEY
    return _log_files(prepare), prepare.format, prepare.columns, hash_key()


def _log_files(prepare: Prepare) -> dict[Path, Path]:
    if "synthetic" in prepare.source:
        raise UserError("prepare.source: `synthetic` cannot be mixed with files")
    return readers.list_files(prepare.source, prepare.format)


def _check_files(files: dict[Path, Path], format: str, columns: Columns, encoding: str) -> int:
    """Bytes of the log, roughly, uncompressed.

    Raises:
        UserError: a file that cannot be read, by its first block: before hours go into the others.
    """
    size = 0
    for path, given in files.items():
        with path.open("rb") as raw:
            compressed = is_compressed(raw) or is_parquet(raw)
            next(readers.read_log(path, raw, format, columns, encoding, given=given), None)
        size += path.stat().st_size * (COMPRESSION if compressed else 1)
    return size


def _plan(recipe: Recipe, files: dict[Path, Path], cleaning: Cleaning) -> dict[str, Any]:
    """What the files of the scratch folder depend on."""
    stats = [path.stat() for path in files]
    plan = {
        "version": _VERSION,
        "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in zip(files, stats, strict=True)],
        "config": stage_config("prepare", recipe),
        "buckets": cleaning.buckets,
        "key": hmac.new(cleaning.key, b"scratch", hashlib.sha256).hexdigest()[:16],
    }
    return json.loads(json.dumps(plan))


def _go_on_or_clear(scratch: Path, plan: dict[str, Any]) -> None:
    """Keep what an earlier call left when it was of this very log, key and settings; else begin with nothing."""
    path = scratch / "plan.json"
    if scratch.exists():
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) == plan:
            console.print("prepare: going on where an earlier call stopped")
            return
        console.print("prepare: the log, the key or the settings have changed since an earlier call: reading anew")
        shutil.rmtree(scratch)
    (scratch / "rows").mkdir(parents=True)
    (scratch / "buckets").mkdir()
    write_json(path, plan)


def _sequences(work: Work, buckets: int, run: Map) -> tuple[dict[str, Any], Counter[str]]:
    """Event sequences of every bucket: their facts together, and events by hour."""
    kinds: Counter[int] = Counter()
    hours: Counter[str] = Counter()
    rows_of_users: Counter[int] = Counter()
    times: list[str] = []
    rows_kept = users = 0
    jobs = run(partial(examples.sequence_bucket, work), range(buckets))
    for found in track(jobs, "prepare: event sequences, by bucket", total=buckets):
        rows_kept += found["rows_kept"]
        users += found["users"]
        kinds.update(dict(found["kinds"]))
        hours.update(dict(found["hours"]))
        rows_of_users.update(dict(found["rows_of_users"]))
        times = sorted([*times, *found["times"]])[:: max(1, len(times) + len(found["times"]) - 1)]
    heavy = _heavy_users(rows_of_users)
    return {"rows_kept": rows_kept, "users": users, "kinds": kinds, "times": times, "heavy": heavy}, hours


def _heavy_users(rows_of_users: Counter[int]) -> dict[str, int]:
    """Users with more than HEAVY times the rows of the median user, and their rows."""
    median, _ = _middle(rows_of_users)
    heavy = {rows: users for rows, users in rows_of_users.items() if rows > HEAVY * median}
    return {"users": sum(heavy.values()), "rows": sum(rows * users for rows, users in heavy.items())}


def _row_facts(rows_read: int, rejected: Counter[str], found: dict[str, Any]) -> dict[str, Any]:
    """Facts about rows and events; asserts that every row read is either kept or rejected."""
    rows_rejected = rejected.total()
    assert rows_read == found["rows_kept"] + rows_rejected, (rows_read, found["rows_kept"], rejected)
    first, last = (datetime.fromisoformat(time) for time in found["times"] or [examples.NO_TIME] * 2)
    return {
        "rows_kept": found["rows_kept"],
        "rows_rejected": rows_rejected,
        "rejected": _by_count(rejected),
        "events": _by_count({EVENT_KINDS[kind]: count for kind, count in found["kinds"].items()}),
        "users": found["users"],
        "heavy_users": found["heavy"]["users"],
        "heavy_users_rows": found["heavy"]["rows"],
        "first_time": first,
        "last_time": last,
    }


def _by_count(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _counted(rejected: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in rejected.items())


def _nothing_kept(rejected: dict[str, int]) -> None:
    raise UserError(
        f"no row of the log could be kept ({_counted(rejected) or 'no row at all'}): check prepare.format, .encoding "
        f"and .columns; rejects.parquet in the stage's folder lists file and line"
    )


def _examples(work: Work, buckets: int, cut: datetime, path: Path, run: Map) -> dict[str, Any]:
    """Write examples.parquet; returns facts about windows and splits."""
    if work.prepare.min_users_per_target > 1:
        examples.find_common(work, buckets)
    counts = {split: [0, 0] for split in SPLITS}
    history: Counter[int] = Counter()
    too_short = without = 0
    writer = examples.ExamplesWriter(path)
    jobs = run(partial(examples.window_bucket, work, cut), range(buckets))
    for number, found in enumerate(track(jobs, "prepare: windows and splits, by bucket", total=buckets)):
        writer.add(work.bucket(number) / "examples.arrow")
        for split, *both in found["splits"]:
            counts[SPLITS[split]] = [a + b for a, b in zip(counts[SPLITS[split]], both, strict=True)]
        history.update(dict(found["history"]))
        too_short += found["too_short"]
        without += found["users_without"]
    writer.finish()
    return {
        "examples": {split: both[0] for split, both in counts.items()},
        "example_users": {split: both[1] for split, both in counts.items()},
        "windows_too_short": too_short,
        "users_too_few_events": without,
        "median_history": _median(history),
    }


def _median(counts: Counter[int]) -> float:
    """Median of values, given how often each occurs; 0 of none."""
    return sum(_middle(counts)) / 2


def _middle(counts: Counter[int]) -> tuple[int, int]:
    """The two values in the middle, one and the same of an odd number; zeros of none."""
    values = sorted(counts)
    if not values:
        return 0, 0
    ends = np.cumsum([counts[value] for value in values])
    # The values at the (0-based) places (total - 1) // 2 and total // 2.
    lower, upper = np.searchsorted(ends, [(ends[-1] - 1) // 2, ends[-1] // 2], side="right")
    return values[lower], values[upper]


def _check_splits(facts: dict[str, Any], prepare: Prepare) -> None:
    ways_out = {
        "train": "lower the other shares",
        "reward_eval": f"raise prepare.reward_eval_share ({prepare.reward_eval_share:g})",
        "eval1": f"raise prepare.eval1_share ({prepare.eval1_share:g})",
        "eval2": f"raise prepare.eval2_share ({prepare.eval2_share:g}) or prepare.eval2_time_share "
        f"({prepare.eval2_time_share:g})",
    }
    for split, way_out in ways_out.items():
        if not facts["examples"][split]:
            raise UserError(
                f"split {split} has no examples ({facts['users']} users in the log, "
                f"{facts['users_too_few_events']} of them with too few events): {way_out}, "
                f"lower prepare.min_history ({prepare.min_history}) or prepare.min_users_per_target "
                f"({prepare.min_users_per_target}), or give a log with more users; of {facts['rows_read']} rows "
                f"{facts['rows_rejected']} were rejected ({_counted(facts['rejected']) or 'none'}): see whether the "
                f"settings read the log as it is meant"
            )


def print_summary(facts: dict[str, Any]) -> None:
    """The facts as a table on the console."""
    table = Table(title="prepare", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in facts.items():
        for key, number in value.items() if isinstance(value, dict) else [("", value)]:
            label = f"{name} {key}".replace("_", " ")
            table.add_row(label, f"{number:,}" if isinstance(number, int | float) else str(number))
    console.print(table)
    if heavy := facts["heavy_users"]:
        console.print(
            f"[bold]caution[/]: {heavy:,} user(s) with more than {HEAVY} times the rows of the median user have "
            f"{facts['heavy_users_rows'] / facts['rows_read']:.0%} of all rows: robots, or ids that several people "
            f"share (prepare.shared_users); their rows were kept",
            soft_wrap=True,
            highlight=False,
        )
