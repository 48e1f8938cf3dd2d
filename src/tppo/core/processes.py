"""Who is at work in a run folder: locks, the processes a run starts, and how they end together.

A lock is the system's own on a file (filelock), so it goes with its process, however that ends. The process that works
on a stage holds the stage's lock, `tppo run` and `tppo study` hold their folder's: a stage that outlives the run that
started it still keeps others out.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import psutil

from tppo.core.common import UserError, console
from tppo.core.files import write_json

FOLDER = ".tppo"
"""In a run folder: locks, and the recipe that the run under way was started with."""
RUN = "run"
"""Name of the lock of a whole run folder; a stage's lock has its name."""
GRACE_SECONDS = 20.0
"""Between asking a process to end and killing it."""


class Stopped(KeyboardInterrupt):
    """The system asked this process to end (SIGTERM, SIGHUP). What is under way can be resumed, as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


class Children:
    """Processes that end when this one does."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[Any]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def call(self, command: Sequence[str], **settings: Any) -> int:
        """Run a command to its end; its exit status. Whatever ends the wait ends the command first."""
        with self._lock:
            if self._stopped:
                raise UserError("stopped; give the same command again to go on")
            process = subprocess.Popen(command, **settings)
            self._running.add(process)
        try:
            return process.wait()
        except BaseException:
            end(process)
            raise
        finally:
            self._running.discard(process)

    def stop(self) -> None:
        """End them all, and start none any more."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        end(*running)


def end(*processes: subprocess.Popen[Any]) -> None:
    """Ask processes to end, and after `GRACE_SECONDS` end them; then what they have started and left behind."""
    left_behind = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            left_behind += psutil.Process(process.pid).children(recursive=True)
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for child in left_behind:
        with suppress(psutil.NoSuchProcess):
            child.kill()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Stopped` inside, so that files are closed and children end; as found afterwards."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough: what cleans up is not to be stopped
        raise Stopped(number)

    found: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # One that somebody ignores (nohup) or handles stays theirs.
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                found[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)


@contextmanager
def locked(root: Path, name: str = RUN, *, wait: bool = False) -> Iterator[Children]:
    """Hold a run folder, or a stage of it; yields the processes that are to end with the block.

    Args:
        wait: for whoever holds it to end, instead of giving up.

    Raises:
        UserError: another process holds it; with its id, and what to do.
    """
    lock = _acquired(root, name, wait)
    try:
        command = [Path(sys.argv[0]).name, *sys.argv[1:3]] if sys.argv else []
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(command)}
        write_json(_owner_path(root, name), {**owner, "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        children = Children()
        try:
            yield children
        except BaseException:
            children.stop()
            raise
    finally:
        lock.release()


def check_free(root: Path, name: str, *, wait: bool = False) -> None:
    """Raise UserError when another process holds a lock, or wait for it; writes nothing."""
    if (root / FOLDER / f"{name}.lock").exists():
        _acquired(root, name, wait).release()


def _acquired(root: Path, name: str, wait: bool) -> filelock.BaseFileLock:
    path = root / FOLDER / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        what = str(root) if name == RUN else f"stage {name} of {root}"
        if not wait:
            raise UserError(
                f"{what} is in use by {_owner(root, name)}: wait until it has ended, or end it and give this command "
                "again; another --run_dir is free at once"
            ) from None
        console.print(f"{what} is in use by {_owner(root, name)}: waiting for it", soft_wrap=True, markup=False)
        lock.acquire()
    return lock


def _owner_path(root: Path, name: str) -> Path:
    return root / FOLDER / f"{name}.json"


def _owner(root: Path, name: str) -> str:
    """Who holds a lock, as far as is known: the process writes it down just after it has the lock."""
    try:
        owner = json.loads(_owner_path(root, name).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} (`{owner['command']}`, since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
