"""Look-ahead in threads: the next inputs are read while the model works on the present ones."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

DECODERS = 8  # threads that prepare for one model; more would wait for the interpreter

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ahead(work: Callable[[T], R], items: Iterable[T], workers: int | None = None, depth: int = 64) -> Generator[R, None, None]:
    """`map(work, items)` in order, with at most `depth` results under way or waiting.

    Threads, not processes: decoding, resizing and hashing release the interpreter lock. `items` is consumed by the
    caller's thread. An exception of `work` is raised where its result would have come.
    """
    source = iter(items)
    pool = ThreadPoolExecutor(workers or min(DECODERS, cores()), thread_name_prefix="ahead")
    pending: deque[Future[R]] = deque()
    try:
        pending.extend(pool.submit(work, item) for item in islice(source, depth))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(work, item) for item in islice(source, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def windows(items: Iterable[T], n: int) -> Iterator[list[T]]:
    """Lists of `n` items, the last one shorter (itertools.batched of Python 3.12, in lists)."""
    source = iter(items)
    while window := list(islice(source, n)):
        yield window
