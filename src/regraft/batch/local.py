"""Rows on the processors of this machine: one process a slot, replaced where it dies."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from regraft.batch.pairs import Fitted
from regraft.batch.rows import Row
from regraft.batch.waiting import Attempt, Job, Result, Waiting
from regraft.batch.work import Found, failed, work


@dataclass(frozen=True)
class LocalExecutor:
    """Processes of this machine.

    Attributes:
        jobs: how many.
        retries: how often a row whose worker died is begun again.
        timeout: seconds, after which a row's worker gives up and ends; None for as long as it takes.
    """

    jobs: int
    retries: int = 2
    timeout: float | None = None

    @property
    def name(self) -> str:
        """For the record."""
        return f"{self.jobs} process{'es' if self.jobs > 1 else ''}"

    def run(self, jobs: Iterable[Job], out: str | None) -> Iterator[Result]:
        """Results as they come; a job is taken when a process is free."""
        waiting = Waiting(jobs, self.retries, self.timeout)
        idle = [_Slot() for _ in range(self.jobs)]
        slots = list(idle)
        flying: dict[Future[Found], tuple[_Slot, Attempt]] = {}
        try:
            while True:
                taken: Attempt | Future[Fitted] | None = None
                while idle and isinstance(taken := waiting.take(), Attempt):
                    slot = idle.pop()
                    flying[slot.submit(taken.job, out, self.timeout)] = slot, taken
                # A fit is waited for beside the rows: what they come to is told meanwhile.
                fit: list[Future[Any]] = [taken] if isinstance(taken, Future) else []
                if not flying and not fit:
                    return
                for future in flying.keys() & wait([*flying, *fit], return_when=FIRST_COMPLETED).done:
                    slot, attempt = flying.pop(future)
                    idle.append(slot)
                    result: Found | None = None
                    try:
                        result = future.result()
                    except BrokenProcessPool:
                        slot.replace()
                    except Exception as error:
                        # On the way there or back, as where no memory was left to send the pair: it takes another
                        # try as little as an error of the work itself. What the process has of the pair is not known.
                        slot.replace()
                        result = failed(attempt.job[0], error)
                    ended = waiting.ended(attempt, result)
                    if ended is not None:
                        yield ended
        finally:
            for slot in slots:
                slot.close()


class _Slot:
    """One worker process at a time: where it dies, it is known which row it had, and no other row is touched."""

    def __init__(self) -> None:
        self._sent: Fitted | None = None
        self._pool = _pool()

    def submit(self, job: Job, out: str | None, timeout: float | None) -> Future[Found]:
        """Hand over a row; its pair travels once."""
        row, fitted = job
        sent, self._sent = self._sent, fitted
        try:
            return self._pool.submit(_do, row, None if sent is fitted else fitted, out, timeout)
        except BrokenProcessPool:
            # It died while it had nothing to do.
            self.replace()
            self._sent = fitted
            return self._pool.submit(_do, row, fitted, out, timeout)

    def replace(self) -> None:
        """A new process in place of the dead one."""
        self.close()
        self._sent, self._pool = None, _pool()

    def close(self) -> None:
        """Let the process end; a row that it still has is not waited for where the driver is being stopped."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _pool() -> ProcessPoolExecutor:
    # A server that has imported torch once makes workers in no time, and with shared memory; a plain fork would copy
    # locks of the driver's threads in whatever state they are.
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["regraft.batch.work"])
    # The server keeps the environment that it was started in, the workers are to have the driver's.
    return ProcessPoolExecutor(1, context, _prepare, (dict(os.environ),))


_fitted: Fitted | None = None


def _do(row: Row, fitted: Fitted | None, out: str | None, timeout: float | None) -> Found:
    global _fitted
    _fitted = fitted or _fitted
    assert _fitted is not None
    with at_most(timeout):
        return work(row, _fitted, out)


@contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """End this process where what it does takes longer: what hangs on a disk or a network can't be told to stop."""
    if seconds is None:
        yield
        return
    # Its watchdog is a thread of C, which needs no lock of Python's; what it writes is for nobody.
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _prepare(environment: Mapping[str, str]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of the terminal: the driver alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, daemon=True).start()


def _end_with_driver() -> None:
    """A driver that was killed can't tell its workers to end: each of them watches it."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)
