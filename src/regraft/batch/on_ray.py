"""Rows as tasks of Ray: on this machine's, or on a cluster whose machines have regraft installed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from regraft.batch.local import at_most
from regraft.batch.pairs import Fitted
from regraft.batch.rows import Row
from regraft.batch.waiting import Attempt, Job, Result, Waiting
from regraft.batch.work import Found, failed, work
from regraft.errors import RegraftError, UsageError, first_line

# Tasks in flight for each processor: a free one finds the next task waiting for it.
_AHEAD = 2
# Kept in the object store: the one at work, and those before it of which a row may come again.
_PAIRS = 3
# Seconds between two looks at whether a pair is fitted.
_PAUSE = 0.5


@dataclass(frozen=True)
class RayExecutor:
    """Tasks of Ray, one processor each.

    Attributes:
        ray: the package, connected.
        retries: how often a row is begun again whose worker or machine is gone.
        address: as it was given.
        timeout: seconds, after which a row's worker gives up and ends; None for as long as it takes.
    """

    ray: Any
    retries: int = 2
    address: str = "auto"
    timeout: float | None = None

    @property
    def name(self) -> str:
        """For the record."""
        return f"Ray, {self._processors()} processors"

    def run(self, jobs: Iterable[Job], out: str | None) -> Iterator[Result]:
        """Results as they come; each pair lies in the object store once."""
        # Ray's own retries tell no number, and have no end where its memory monitor has killed a worker.
        task = self.ray.remote(max_retries=0, num_cpus=1)(_do)
        waiting = Waiting(jobs, self.retries, self.timeout)
        flying: dict[Any, Attempt] = {}
        pairs: deque[tuple[Fitted, Any]] = deque(maxlen=_PAIRS)
        while True:
            taken: Attempt | Future[Fitted] | None = None
            while len(flying) < _AHEAD * self._processors() and isinstance(taken := waiting.take(), Attempt):
                row, fitted = taken.job
                stored = next((place for pair, place in pairs if pair is fitted), None)
                if stored is None:
                    stored = self.ray.put(fitted)
                    pairs.append((fitted, stored))
                # In a list, a reference stays one: the worker fetches what it names once, not with every task.
                flying[task.remote(row, [stored], out, self.timeout)] = taken
            fit = taken if isinstance(taken, Future) else None
            if not flying:
                if fit is None:
                    return
                wait([fit])
                continue
            # Ray waits for its own alone: of a fit beside it, it is looked after again and again.
            for done in self.ray.wait(list(flying), num_returns=1, timeout=None if fit is None else _PAUSE)[0]:
                attempt = flying.pop(done)
                ended = waiting.ended(attempt, self._result(done, attempt.job[0]))
                if ended is not None:
                    yield ended

    def _result(self, done: Any, row: Row) -> Found | None:
        """What a task came to; None where its worker or machine is gone."""
        try:
            result: Found = self.ray.get(done)
            return result
        except self.ray.exceptions.RayTaskError as error:
            # Nothing of the row: a machine that lacks regraft, say. It would come to the same again.
            return failed(row, error.cause)
        except self.ray.exceptions.RayError:
            return None

    def _processors(self) -> int:
        # Asked anew each time: machines come and go.
        return max(1, int(self.ray.cluster_resources().get("CPU", 1)))


_last: tuple[str, Fitted] | None = None


def _do(row: Row, pair: list[Any], out: str | None, timeout: float | None) -> Found:
    global _last
    import ray
    import torch

    torch.set_num_threads(1)
    name = pair[0].hex()
    with at_most(timeout):
        if _last is None or _last[0] != name:
            _last = name, ray.get(pair[0])
        return work(row, _last[1], out)


def connect(address: str, jobs: int, retries: int, timeout: float | None = None) -> RayExecutor | None:
    """Ray at an address, or None where the package is not installed and ``auto`` was asked for.

    Args:
        address: of a cluster; ``auto`` for the one that this machine belongs to; ``local`` starts one here.
        jobs: processors of one that is started here.
        retries: see `RayExecutor`.
        timeout: likewise.

    Raises:
        UsageError: Ray is asked for by address and not installed.
        RegraftError: there is no cluster.
    """
    try:
        import ray
    except ImportError:
        if address == "auto":
            return None
        raise UsageError("--ray needs Ray", remedy="pip install 'regraft[batch]', or leave --ray out.") from None
    if not ray.is_initialized():
        here: dict[str, Any] = {"num_cpus": jobs, "include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **here)
        except (ConnectionError, ValueError, RuntimeError) as error:
            remedy = "--ray local starts one here; without --ray the processors of this machine do it."
            raise RegraftError(f"no Ray at {address!r} ({first_line(error)})", remedy=remedy) from None
    return RayExecutor(ray, retries, address, timeout)
