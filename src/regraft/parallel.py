"""Modules side by side: of decompositions and passes over weights, several at once are done sooner than one by many."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
#: More at once hold more weights in memory than they save time.
MOST = 4


def side_by_side(function: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[R]:
    """``map``, with several items at work at once; results in the items' order.

    No more than one item beyond the workers is begun before its turn, so that memory stays that of a few. Until the
    last result is taken, torch has no more threads in the whole process than each worker's share.

    Args:
        function: releases Python's lock for most of its time, as torch does.
        items: what to do.
        workers: how many at once; by default torch's number of threads, up to `MOST`.
    """
    threads = torch.get_num_threads()
    workers = min(threads, MOST) if workers is None else workers
    if workers < 2:
        yield from map(function, items)
        return
    # With all threads for each worker, they would wait for one another.
    torch.set_num_threads(max(1, threads // workers))
    # What is switched off for one thread is not for another.
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def alike(item: T) -> R:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference):
            return function(item)

    pending: deque[Future[R]] = deque()
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                for item in items:
                    pending.append(pool.submit(alike, item))
                    if len(pending) > workers:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)
