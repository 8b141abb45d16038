"""The whole batch: rows by pair, pairs fitted one ahead of the rows, results written as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from time import perf_counter
from typing import Protocol

from regraft._version import __version__
from regraft.batch.done import Keys
from regraft.batch.journal import Journal, reused
from regraft.batch.lean import lean
from regraft.batch.out_place import alone_in, check_out, sweep
from regraft.batch.pairs import Fitted, PairSpec, fit_pair
from regraft.batch.places import without_slash, write_bytes_to, write_text_to
from regraft.batch.rows import Row
from regraft.batch.serving import INDEX
from regraft.batch.serving_index import serving_index
from regraft.batch.tables import count, parquet, summary, worst_first
from regraft.batch.waiting import Job, Jobs, Result
from regraft.batch.work import Asked, Known, failed, plainly, row_of
from regraft.errors import RegraftError
from regraft.report.batch_schema import BatchPair, BatchReport, BatchRow


class Executor(Protocol):
    """What hands rows to workers: `regraft.batch.local` or `regraft.batch.on_ray`."""

    @property
    def name(self) -> str:
        """For the record."""
        ...

    def run(self, jobs: Iterator[Job], out: str | None) -> Iterator[Result]:
        """Results as they come, in any order.

        Jobs are taken as workers are free, and asked for once more after every result: one may have come up since.
        Those of `regraft.batch.waiting.Jobs` tell which fit the next one waits for: no result should wait for that.
        """
        ...


def run_batch(
    rows: Sequence[Row],
    executor: Executor,
    *,
    out: str | None,
    check: bool = False,
    overwrite: bool = False,
    serve_from: str | None = None,
    tick: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> BatchReport:
    """Port or forecast every row; see `BatchReport` for what comes back.

    Args:
        rows: of `regraft.batch.expand`.
        executor: of this machine, or Ray's.
        out: folder or URL of outputs and tables; a forecast does without.
        check: forecast only.
        overwrite: take an output folder that holds other things.
        serve_from: where servers find the output folder, if elsewhere; for rows of `regraft.batch.serving`.
        tick: called with (rows done, rows in all, the row's name).

    Raises:
        UsageError, OutputError: the output folder is none that can be written to.
        RegraftError: no pair can be fitted; the tables, which say why of each, are there.
    """
    started = perf_counter()
    out = without_slash(out) if out is not None else None
    stem = "forecast" if check else "results"
    with ExitStack() as stack:
        journal: Journal | None = None
        if out is not None:
            check_out(rows, out, overwrite=overwrite)
            stack.enter_context(alone_in(out))
            sweep(rows, out)
            journal = Journal(out, stem)
            # On Ctrl-C, too: what is done is known to the next run.
            stack.callback(journal.put)
        job = _Batch(rows, journal, check)
        found: list[BatchRow] = []
        for row in job.results(executor, out):
            row = lean(_told(row, journal))
            found.append(row)
            if journal is not None:
                journal.note(row)
            tick(len(found), len(rows), row.name)
        if journal is not None:
            journal.close()
        counts = count(found)
        record = BatchReport(
            regraft_version=__version__,
            check=check,
            summary=summary(counts, check=check),
            counts=counts,
            pairs=job.pairs,
            out=out,
            executor=executor.name,
            rows=worst_first(found),
            seconds=perf_counter() - started,
        )
        if out is not None:
            sweep(rows, out)
            record = _written(record, out, stem)
        if job.errors and len(job.errors) == len(job.pairs):
            raise job.errors[0]
        if out is None:
            return record
        return _indexed(record, out, serve_from or out) if any(row.serve for row in rows) else record


def _indexed(record: BatchReport, out: str, root: str) -> BatchReport:
    """The index comes last: what it names is in its place."""
    place = f"{out}/{INDEX}"
    write_text_to(serving_index(record, root.rstrip("/")).to_json() + "\n", place)
    return record.model_copy(update={"tables": [*record.tables, place]})


def _told(result: BatchRow | Known, journal: Journal | None) -> BatchRow:
    if isinstance(result, BatchRow):
        return result
    assert journal is not None
    return reused(journal.row(result.key, result.row.output), row_of(result.row, status="ported"), result.outputs)


def _written(record: BatchReport, out: str, stem: str) -> BatchReport:
    from regraft.report.batch_page import render_batch

    table = parquet(record.rows)
    names = [f"{stem}.jsonl", *([f"{stem}.parquet"] if table is not None else []), f"{stem}.html"]
    record = record.model_copy(update={"tables": [f"{out}/{name}" for name in names]})
    if table is not None:
        write_bytes_to(table, f"{out}/{stem}.parquet")
    write_text_to(render_batch(record), f"{out}/{stem}.html")
    return record


@dataclass
class _Batch:
    """The rows in the order of their pairs, each pair's fit begun while the one before is at work."""

    rows: Sequence[Row]
    journal: Journal | None
    check: bool
    pairs: list[BatchPair] = field(default_factory=list)
    errors: list[RegraftError] = field(default_factory=list)
    _lost: list[BatchRow] = field(default_factory=list)
    _asking: deque[Job] = field(default_factory=deque)

    def results(self, executor: Executor, out: str | None) -> Iterator[BatchRow | Known]:
        with closing(self._jobs()) as fresh:
            for (row, fitted), result in executor.run(Jobs(self._asking, fresh), out):
                if isinstance(result, Asked):
                    assert self.journal is not None
                    self._asking.append((replace(row, done=self.journal.made(result.key)), fitted))
                else:
                    yield result
                yield from self._take_lost()
        yield from self._take_lost()

    def _take_lost(self) -> list[BatchRow]:
        lost, self._lost = self._lost, []
        return lost

    def _jobs(self) -> Generator[Job | Future[Fitted], None, None]:
        shared: dict[PairSpec, PairSpec] = {}
        # One for all rows of a pair, of which there may be a million.
        specs = [
            shared.setdefault(spec, spec) for spec in (PairSpec.of(r.source, r.target, r.options) for r in self.rows)
        ]
        order = {spec: number for number, spec in enumerate(shared)}
        # Sorted by pair, in the order of their first rows.
        paired = sorted(zip(specs, self.rows, strict=True), key=lambda one: order[one[0]])
        groups = [(spec, [row for _, row in group]) for spec, group in groupby(paired, key=lambda one: one[0])]
        known = self.journal.keys() if self.journal is not None else Keys()
        fitter = ThreadPoolExecutor(1)
        try:
            fits: deque[Future[Fitted]] = deque()
            ahead = iter(groups)
            for spec, rows in groups:
                for following, _ in islice(ahead, 2 - len(fits)):
                    fits.append(fitter.submit(fit_pair, following, known, check=self.check))
                yield from self._jobs_of(spec, rows, fits.popleft())
        finally:
            # Where the driver is being stopped, the journal does not wait for a fit that takes minutes.
            fitter.shutdown(wait=False, cancel_futures=True)

    def _jobs_of(self, spec: PairSpec, rows: list[Row], fit: Future[Fitted]) -> Iterator[Job | Future[Fitted]]:
        told = {"source": spec.source, "target": spec.target, "method": spec.options.method, "rows": len(rows)}
        if not fit.done():
            yield fit
        try:
            fitted = fit.result()
        except Exception as found:
            # Every row of it fails by the same, whatever it is; other pairs go on.
            error = plainly(found)
            self.errors.append(error)
            self.pairs.append(BatchPair(**told, shared=False, note=str(error)))
            # The file is the pair's, not the row's: it is told.
            where, remedy = error.told
            lost = type(error)(where, remedy=remedy or None)
            self._lost += [failed(row, lost) for row in rows]
            return
        shared = fitted.migration is not None
        used = fitted.migration.used if fitted.migration is not None else spec.options.method
        told |= {"method": used, "old": fitted.old, "new": fitted.new, "seconds": fitted.seconds}
        self.pairs.append(BatchPair(**told, shared=shared, note=fitted.note))
        for row in rows:
            done = self.journal.placed(row.output) if self.journal is not None else None
            yield replace(row, done=done), fitted
