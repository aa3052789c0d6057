"""Reading photos in the background while others are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Value = TypeVar("Value")
THREADS = 2


def read_ahead(
    items: Sequence, load: Callable[[Sequence], Value], *, chunk: int, ahead: int = 2
) -> Iterator[tuple[int, Value]]:
    """Items in chunks, loaded by threads before they are asked for.

    Memory is bounded: beside the chunk that was given out, at most `ahead` are loaded or waiting.

    Args:
        items: what is loaded, e.g. paths.
        load: a chunk of items -> its value, e.g. an array; called in other threads.
        chunk: items in a chunk, 1 or more; the last may have fewer.
        ahead: chunks that are read ahead, 1 or more.
    Yields:
        (index of the chunk's first item, its value), in order.
    Raises:
        Whatever `load` raises, when the turn of its chunk comes; nothing more is loaded then.
    """
    starts = iter(range(0, len(items), chunk))
    waiting: deque[tuple[int, Future]] = deque()
    pool = ThreadPoolExecutor(min(THREADS, ahead), thread_name_prefix="read-ahead")

    def submit() -> None:
        start = next(starts, None)
        if start is not None:
            waiting.append((start, pool.submit(load, items[start : start + chunk])))

    try:
        for _ in range(ahead):
            submit()
        while waiting:
            start, future = waiting.popleft()
            value = future.result()
            submit()
            yield start, value
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
