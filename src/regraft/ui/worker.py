"""The process that jobs run in: the page stays quick, Ctrl-C's rules hold, and a job that dies takes nothing along.

It is begun once and kept, so that only the first job waits for the libraries.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from regraft.errors import RegraftError, first_line
from regraft.output import undisturbed

# A stop that a job does not heed, in the middle of one long call, becomes a kill after so many seconds.
_PATIENCE = 8.0


@dataclass(frozen=True)
class Told:
    """What a job says of itself: how far it is, what it shows, or how it ended.

    Attributes:
        kind: ``tick``, ``shows``, ``done``, ``stopped`` or ``error``; the last three end it.
        said: arguments of a tick or of what is shown; the result; what is wrong and what to do.
    """

    kind: str
    said: Any = None

    @property
    def last(self) -> bool:
        """Whether nothing comes after it."""
        return self.kind in ("done", "stopped", "error")


class Worker:
    """One process for one job at a time."""

    def __init__(self) -> None:
        self._spawn = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._line: Connection | None = None
        self._lock = threading.Lock()
        self._busy = False
        self._killer: threading.Timer | None = None

    def start(self) -> None:
        """Begin the process, where there is none."""
        with self._lock:
            if self._process is not None and self._process.is_alive():
                return
            self._line, theirs = self._spawn.Pipe()
            self._process = self._spawn.Process(target=_serve, args=(theirs,), daemon=False, name="regraft-ui-worker")
            with _uninterrupted():
                self._process.start()
            theirs.close()

    def run(self, name: str, **arguments: Any) -> Iterator[Told]:
        """Do one job of `regraft.ui.work`; yields what it says, to the end, and must be read to there.

        Args:
            name: of the function.
            arguments: all but ``tick`` and ``shows``.
        """
        self.start()
        assert self._line is not None
        line = self._line
        with self._lock:
            self._busy = True
        try:
            line.send((name, arguments))
            while True:
                told = line.recv()
                yield told
                if told.last:
                    return
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            yield Told("stopped") if self._killer is not None else Told("error", _of_death(code))
        finally:
            with self._lock:
                self._busy = False
                if self._killer is not None:
                    # It is of this job: the next one must not die of it.
                    self._killer.cancel()
                    self._killer = None

    def stop(self) -> None:
        """Interrupt the job, as Ctrl-C would; nothing happens between two jobs, or where it was asked for already."""
        with self._lock:
            if not self._busy or self._killer is not None or not self._process.is_alive():
                return
            self._killer = threading.Timer(_PATIENCE, self._process.kill)
            self._killer.daemon = True
            self._killer.start()
            if sys.platform == "win32":
                self._process.terminate()
            else:
                with suppress(ProcessLookupError):
                    os.kill(self._process.pid, signal.SIGINT)

    def close(self) -> None:
        """End the process."""
        if self._process is None or not self._process.is_alive():
            return
        assert self._line is not None
        with suppress(OSError):
            # This ends it between two jobs; within one, it is interrupted first.
            self._line.send(None)
        if sys.platform != "win32":
            os.kill(self._process.pid, signal.SIGINT)
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """What is begun in here takes no Ctrl-C until it says so: loading the libraries is not to end in a traceback."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _of_death(code: int | None) -> tuple[str, str]:
    killed = code is not None and code < 0 and -code == signal.SIGKILL
    what = (
        "the system ended the job, most likely since memory ran out" if killed else f"the job died (exit code {code})"
    )
    return what, "Nothing is half-written. Close other programs, or take smaller bases, and try again."


def _serve(line: Connection) -> None:
    """The process: takes jobs from ``line`` until it closes."""
    # A stop that comes between two jobs has nothing to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    warnings.simplefilter("ignore")
    from regraft.ui import work

    while True:
        try:
            given = line.recv()
        except (EOFError, OSError):
            return
        if given is None:
            return
        name, arguments = given
        try:
            told = _done(line, getattr(work, name), arguments)
        except KeyboardInterrupt:
            # It came in the last moment, between the job and here.
            told = Told("stopped")
        with suppress(OSError):
            line.send(told)


def _done(line: Connection, job: Any, arguments: dict[str, Any]) -> Told:
    sending = threading.Lock()

    def say(told: Told) -> None:
        # Half a message would be left on the line by a stop amid of it, and two mixed by a job of several threads.
        with undisturbed(), sending:
            line.send(told)

    def tick(done: int, total: int, what: str) -> None:
        say(Told("tick", (done, total, what)))

    def shows(*what: Any) -> None:
        say(Told("shows", what))

    told = {"tick": tick, **({"shows": shows} if job.__name__ == "refine" else {})}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return Told("done", job(**arguments, **told))
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        return Told("stopped")
    except RegraftError as error:
        return Told("error", error.told)
    except Exception as error:
        from regraft.hardware import said_of

        known = said_of(error) if isinstance(error, (MemoryError, RuntimeError)) else None
        if known is not None:
            return Told("error", (known, ""))
        # For whoever looks into it; the page has no room for it.
        traceback.print_exc()
        what = f"a fault of regraft itself: {type(error).__name__}: {first_line(error)}"
        return Told("error", (what, "The terminal that it was started from has the details: please report them."))
