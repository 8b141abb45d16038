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
#: Bytes that may be at work at once, where there is more than one item.
MOST_BYTES = 256_000_000


def side_by_side(
    function: Callable[[T], R],
    items: Iterable[T],
    workers: int | None = None,
    *,
    size: Callable[[T], int] = lambda item: 0,
) -> Iterator[R]:
    """``map``, with several items at work at once; results in the items' order.

    No more than one item beyond the workers is begun before its turn, so that memory stays that of a few. Until the
    last result is taken, torch has no more threads in the whole process than each worker's share.

    Args:
        function: releases Python's lock for most of its time, as torch does.
        items: what to do.
        workers: how many at once; by default torch's number of threads, up to `MOST`.
        size: bytes that an item takes; no more are at once begun than come to `MOST_BYTES`.
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

    pending: deque[tuple[Future[R], int]] = deque()
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                for item in items:
                    own = size(item)
                    while pending and own + sum(held for _, held in pending) > MOST_BYTES:
                        yield pending.popleft()[0].result()
                    pending.append((pool.submit(alike, item), own))
                    if len(pending) > workers:
                        yield pending.popleft()[0].result()
                while pending:
                    yield pending.popleft()[0].result()
            finally:
                for future, _ in pending:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)
