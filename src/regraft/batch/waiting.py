"""Rows that wait for a worker, those among them whose last worker died."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass

from regraft.batch.pairs import Fitted
from regraft.batch.rows import Row
from regraft.batch.work import Found, failed
from regraft.errors import RegraftError
from regraft.report.batch_schema import BatchRow

#: A row and its pair.
Job = tuple[Row, Fitted]
Result = tuple[Job, Found]


@dataclass(frozen=True)
class Attempt:
    """A row as a worker gets it, and which of its workers that is."""

    job: Job
    number: int = 1


class Jobs(Iterator[Job]):
    """What was asked about, then the next that nobody had: after the last one, there may be one again."""

    def __init__(self, asking: deque[Job], fresh: Iterator[Job | Future[Fitted]]) -> None:
        """Of two sources of jobs.

        Args:
            asking: looked into first.
            fresh: where its next jobs wait for a fit, that comes before them.
        """
        self._asking, self._fresh = asking, fresh
        self._next: Job | Future[Fitted] | None = None

    def __next__(self) -> Job:
        while (fit := self.fit()) is not None:
            wait([fit])
        if self._asking:
            return self._asking.popleft()
        job, self._next = self._next, None
        if not isinstance(job, tuple):
            raise StopIteration
        return job

    def fit(self) -> Future[Fitted] | None:
        """What the next job waits for; None where it is there, or where there is none."""
        if self._asking:
            return None
        while self._next is None or (isinstance(self._next, Future) and self._next.done()):
            self._next = next(self._fresh, None)
            if self._next is None:
                return None
        return self._next if isinstance(self._next, Future) else None


class Waiting:
    """Rows in the order that workers get them; one whose worker died comes again, so often and no more."""

    def __init__(self, jobs: Iterable[Job], retries: int, timeout: float | None) -> None:
        """Take jobs one by one.

        Args:
            jobs: of the batch; those of `Jobs` are not waited for while a fit is not through.
            retries: how often a row whose worker died is begun again.
            timeout: of a row's worker in seconds, which is told of where rows died.
        """
        self._jobs = jobs if isinstance(jobs, Jobs) else Jobs(deque(), iter(jobs))
        self._retries, self._timeout = retries, timeout
        self._again: deque[Attempt] = deque()

    def take(self) -> Attempt | Future[Fitted] | None:
        """The next one; or the fit that it waits for, which takes minutes; or None while there is none."""
        if self._again:
            return self._again.popleft()
        if (fit := self._jobs.fit()) is not None:
            return fit
        job = next(self._jobs, None)
        return None if job is None else Attempt(job)

    def ended(self, attempt: Attempt, result: Found | None) -> Result | None:
        """What an attempt came to, where the row is through.

        Args:
            attempt: of `take`.
            result: None where the worker died: the row waits again, or has failed.
        """
        if result is None and attempt.number <= self._retries:
            self._again.append(Attempt(attempt.job, attempt.number + 1))
            return None
        if result is None:
            result = failed(attempt.job[0], _died(attempt.number, self._timeout))
        if isinstance(result, BatchRow):
            result = result.model_copy(update={"attempts": attempt.number})
        return attempt.job, result


def _died(attempts: int, timeout: float | None) -> RegraftError:
    slow = "" if timeout is None else f", or took longer than {timeout:g} s,"
    what = f"the process that worked on it died{slow} {attempts} time{'s' * (attempts > 1)}"
    more = "" if timeout is None else ", or a longer --timeout"
    return RegraftError(what, remedy=f"Is there memory for it? Try it alone with `regraft port`{more}.")
