"""What is on the desk: the job at work, what came of the ones before, and the files that may be handed out.

One person sits at it. Several windows of their browser show the same desk, and closing one stops nothing.
"""

from __future__ import annotations

import secrets
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from regraft.errors import UsageError, first_line
from regraft.report.refine_schema import RefineLook
from regraft.report.schema import Picture
from regraft.ui import places
from regraft.ui.work import Made
from regraft.ui.worker import Told, Worker

#: What is no longer true once a job has made something anew.
_AFTER = {"port": ("refine", "measure"), "refine": ("measure",)}


@dataclass
class Progress:
    """A job as the page shows it.

    Attributes:
        name: of the job.
        title: what it is called on the page.
        done, total, what: of the last tick.
        looks, prompts, pictures: of a refine until now.
        state: ``running``, ``done``, ``stopped`` or ``error``.
        wrong: what is wrong and what to do.
        began, ended: by the monotonic clock.
        change: counts up with whatever is told.
    """

    name: str
    title: str
    done: int = 0
    total: int = 0
    what: str = ""
    looks: Sequence[RefineLook] = ()
    prompts: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    state: str = "running"
    wrong: tuple[str, str] = ("", "")
    began: float = field(default_factory=monotonic)
    ended: float | None = None
    change: int = 0

    @property
    def seconds(self) -> float:
        """Until now, or in all."""
        return (self.ended or monotonic()) - self.began

    def hear(self, told: Told) -> None:
        """Take in what the job says."""
        if told.kind == "tick":
            self.done, self.total, self.what = told.said
        elif told.kind == "shows":
            self.looks, self.prompts, self.pictures = told.said
        else:
            self.wrong = told.said if told.kind == "error" else ("", "")
            # Last, since whoever reads it as ended reads the rest then.
            self.state, self.ended = told.kind, monotonic()
        self.change += 1


@dataclass
class Desk:
    """See above.

    Attributes:
        out: folder for what is written.
        device: that models run on.
        worker: does the jobs.
        results: name of a job → what it made last.
        job: the one at work, or the last one.
    """

    out: Path
    device: str = "cpu"
    worker: Worker = field(default_factory=Worker)
    results: dict[str, Made] = field(default_factory=dict)
    job: Progress | None = None
    _served: dict[str, Path] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, name: str, title: str, **arguments: Any) -> Progress:
        """Begin a job.

        Args:
            name: of a function of `regraft.ui.work`.
            title: what the page calls it.
            arguments: of the function.

        Raises:
            UsageError: another one is at work.
        """
        with self._lock:
            if self.running is not None:
                raise UsageError(f"{self.running.title} is still at work", remedy="Wait for it, or stop it.")
            job = self.job = Progress(name, title)
            for stale in (name, *_AFTER.get(name, ())):
                self.results.pop(stale, None)
        follower = threading.Thread(target=self._follow, args=(job, arguments), daemon=True, name=f"regraft-ui-{name}")
        follower.start()
        return job

    @property
    def running(self) -> Progress | None:
        """The job at work."""
        job = self.job
        return job if job is not None and job.state == "running" else None

    def stop(self) -> None:
        """Stop the job at work, where there is one."""
        if self.running is not None:
            self.worker.stop()

    def serve(self, path: str) -> str:
        """A name under which the page may fetch a file that regraft has written, and no other."""
        with self._lock:
            for token, served in self._served.items():
                if served == Path(path):
                    return token
            token = secrets.token_urlsafe(12)
            self._served[token] = Path(path)
            return token

    def served(self, token: str) -> Path | None:
        """The file of such a name."""
        return self._served.get(token)

    def _follow(self, job: Progress, arguments: dict[str, Any]) -> None:
        try:
            for told in self.worker.run(job.name, **arguments):
                if told.kind == "done":
                    self.results[job.name] = told.said
                    # A base that nothing could be done with is not offered again.
                    places.remember(*told.said.bases)
                job.hear(told)
        except Exception as error:
            # No process could be begun, or what it said can't be read: no later job may find this one still at work.
            traceback.print_exc()
            job.hear(Told("error", (f"the job could not be run ({first_line(error)})", "Start regraft ui again.")))
