"""Jobs on worker processes, results in the order of the jobs."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import Any, Protocol, TypeVar

from tppo.core.common import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


class Map(Protocol):
    """`map` of one function over jobs."""

    def __call__(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]: ...


@contextmanager
def workers(count: int) -> Iterator[Map]:
    """A `map` that runs in this many processes, or in this one for 1. Jobs are taken as results are: one waits at
    most, since a job may hold a large part of a log. Workers end with this process, however it ends.

    Raises:
        UserError: a worker was ended from outside.
    """
    if count == 1:
        yield lambda function, jobs: map(function, jobs)
        return
    # spawn: the threads of pyarrow and of the progress bar do not survive a fork.
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_end_with_parent)
    try:
        yield lambda function, jobs: _in_order(pool, count, function, jobs)
    except BrokenProcessPool:
        raise UserError(
            "a worker process of prepare was ended from outside, for lack of memory more often than not: lower "
            "prepare.threads or prepare.memory_limit and give the same command again (what was read is kept). "
            "A script of your own has to call tppo under `if __name__ == '__main__':`"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, waiting: int, function: Callable[[Job], Result], jobs: Iterable[Job]
) -> Iterator[Result]:
    futures: deque[Future[Any]] = deque()
    for job in jobs:
        futures.append(pool.submit(function, job))
        if len(futures) > waiting:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _end_with_parent() -> None:
    """A worker waits for jobs for ever when its parent was killed; and Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
