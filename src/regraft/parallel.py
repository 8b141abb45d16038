"""Modules side by side: of decompositions and passes over weights, several at once are done sooner than one by many."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(function: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[R]:
    """``map``, with several items at work at once, each by one thread; results in the items' order.

    No more than one item beyond the workers is begun before its turn, so that memory stays that of a few.

    Args:
        function: releases Python's lock for most of its time, as torch does.
        items: what to do.
        workers: how many at once; by default torch's number of threads.
    """
    threads = torch.get_num_threads()
    workers = threads if workers is None else workers
    if workers < 2:
        yield from map(function, items)
        return
    # A worker with threads of its own would have them wait for those of the others.
    torch.set_num_threads(1)
    pending: deque[Future[R]] = deque()
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                for item in items:
                    pending.append(pool.submit(function, item))
                    if len(pending) > workers:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)
