"""One row in a worker: bring the adapter, carry it or forecast it, put the result in its place. Never raises."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from regraft._version import __version__
from regraft.adapter import MODEL, Adapter
from regraft.batch.done import Done
from regraft.batch.pairs import Fitted, OpenPair
from regraft.batch.places import digest, fetch, is_url, path_of, place
from regraft.batch.rows import Row
from regraft.batch.serving import ServedModel, for_servers, uniform
from regraft.check import check_migration
from regraft.errors import Refused, RegraftError, first_line
from regraft.experts import experts, labelled
from regraft.formats import Written, load_adapter, open_adapter_file, rendered
from regraft.hardware import said_of
from regraft.output import write_whole
from regraft.pairing import names_of
from regraft.port import apply_migration
from regraft.prepare import check_understood
from regraft.report.batch_schema import BatchRow
from regraft.report.schema import CheckReport, PortReport
from regraft.report.serving_schema import ServingFacts


@dataclass(frozen=True)
class Known:
    """An earlier run has made this very thing.

    Attributes:
        row: that asked for it.
        key: of what it made.
        outputs: that are in this row's place now.
    """

    row: Row
    key: str
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """An earlier run has made this somewhere else: the driver is asked what, and gives the row again.

    Attributes:
        row: that asks.
        key: of what it would make.
    """

    row: Row
    key: str


def row_of(row: Row, **found: Any) -> BatchRow:
    """The record of a row."""
    given = {"source": row.source, "target": row.target, "options": row.options.given()}
    return BatchRow(adapter=row.adapter, name=row.name, output=row.output, **given, **found)


def failed(row: Row, error: BaseException, **found: Any) -> BatchRow:
    """The record of a row that came to an error."""
    error = plainly(error)
    # The file is the row's own; the key within it is not.
    reason = f"{error.key}: {error.what}" if error.key is not None else error.what
    status, verdict = ("refused", "refused") if isinstance(error, Refused) else ("failed", None)
    return row_of(row, status=status, verdict=verdict, reason=reason, remedy=error.remedy or "", **found)


def plainly(error: BaseException) -> RegraftError:
    """Any error as one that can be told in a line."""
    if isinstance(error, RegraftError):
        return error
    known = said_of(error) if isinstance(error, (MemoryError, RuntimeError)) else None
    if isinstance(error, OSError) and error.strerror:
        known = f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return RegraftError(known or f"{type(error).__name__}: {first_line(error)}")


def key_of(content: str, row: Row, fitted: Fitted) -> str:
    """What a result depends on, and on no name."""
    verb = "check" if fitted.check else "port"
    given = row.options.given()
    read = given.pop("migration", None)
    told: list[Any] = [__version__, verb, content, fitted.old.fingerprint, fitted.new.fingerprint, given]
    # Without the words an older key stays what it was.
    told += ["serve", ServedModel.of(row.target).name] if row.serve else []
    told += ["migration", fitted.migration.file_hash] if read is not None and fitted.migration is not None else []
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


#: What work on a row comes to.
Found = BatchRow | Known | Asked


@dataclass
class _Job:
    row: Row
    fitted: Fitted
    out: str | None
    started: float = field(default_factory=perf_counter)
    found: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Found:
        with tempfile.TemporaryDirectory(prefix="regraft-") as folder:
            stage = Path(folder)
            local = fetch(self.row.adapter, stage) if is_url(self.row.adapter) else path_of(self.row.adapter)
            # A hub id leads to the hub's cache; a folder with one adapter in it, to that.
            local = open_adapter_file(local).path
            content, self.found["bytes_in"] = digest(local)
            self.found["key"] = key_of(content, self.row, self.fitted)
            done = self.row.done
            if done is None or done.key != self.found["key"]:
                if self.found["key"] in self.fitted.known:
                    return Asked(self.row, self.found["key"])
            elif (known := self._known(done, stage / "known")) is not None:
                return known
            pair = _opened(self.fitted)
            adapter = load_adapter(local, names=names_of(pair.old), base_config=pair.old.configs.get(MODEL))
            self.found["format"] = adapter.format
            if self.fitted.check:
                return self._done("forecast", **_of_check(self._checked(adapter, pair)))
            return self._port(adapter, pair, stage)

    def _known(self, done: Done, stage: Path) -> Known | None:
        """What an earlier run made, its outputs brought to this row's names; None where they are not what they were."""
        if done.lost:
            return None
        names = [self.row.output + name.removeprefix(done.stem) for name in done.outputs]
        for name, old, content in zip(names, done.outputs, done.hashes, strict=True):
            try:
                file = self._of_output(old, stage, move=name != old)
                if digest(file)[0] != content:
                    return None
            except (RegraftError, OSError):
                # Not there any more, or being replaced at this moment by another row: it is made anew.
                return None
            if name != old:
                place(file, f"{self.out}/{name}")
        return Known(self.row, done.key, tuple(names))

    def _of_output(self, name: str, stage: Path, *, move: bool) -> Path:
        """An earlier output: itself, or a copy where it is to be placed elsewhere or lies in a store."""
        assert self.out is not None
        if is_url(self.out):
            stage.mkdir(exist_ok=True)
            return fetch(f"{self.out}/{name}", stage)
        file = path_of(self.out) / name
        if not move:
            return file
        stage.mkdir(exist_ok=True)
        place(file, str(stage / file.name))
        return stage / file.name

    def _checked(self, adapter: Adapter, pair: OpenPair) -> CheckReport:
        options = self.row.options
        selection = options.settings().selection
        migration = pair.migration_for(adapter, pair.new, options, selection)
        return check_migration(
            adapter,
            migration,
            selection,
            pair.old,
            pair.new,
            surveyor=pair.survey,
            weights_only=options.weights_only,
        )

    def _port(self, adapter: Adapter, pair: OpenPair, stage: Path) -> BatchRow:
        options = self.row.options
        settings = options.settings(adapter)
        if not options.allow_partial and adapter.updates:
            check_understood(adapter, pair.old, "old", settings.selection)
        apart = experts(adapter, pair.old, pair.new) if options.migration is None else {}
        if self.row.serve:
            # Noted before the port may be refused: the way on is in it.
            report = self._checked(adapter, pair)
            self.found |= {"forecast": report.forecast.port, "tier": report.tier}
        reports: list[PortReport] = []
        facts: list[ServingFacts] = []
        outputs: list[str] = []
        hashes: list[str] = []
        total = 0
        for label, new in (apart or {"": pair.new}).items():
            migration = pair.migration_for(adapter, new, options, settings.selection)
            surveyor = pair.survey if new is pair.new else None
            result = apply_migration(adapter, migration, settings, old=pair.old, new=new, surveyor=surveyor)
            if self.row.serve:
                carried = uniform(result.adapter)
                written, fact = for_servers(rendered(carried, "peft"), carried, new, ServedModel.of(self.row.target))
                facts.append(fact)
            else:
                written = rendered(result.adapter, options.format or result.adapter.format)
            name, content, size = self._write(written, label, adapter.path, stage)
            outputs.append(name)
            hashes.append(content)
            total += size
            reports.append(result.report)
        made = {"outputs": outputs, "output_hashes": hashes, "bytes_out": total, "serving": facts}
        return self._done("ported", **made, **_of_port(reports[0]))

    def _write(self, written: Written, label: str, source: Path | None, stage: Path) -> tuple[str, str, int]:
        """Write one output; returns its name inside of the output folder, the hash of its bytes and their number."""
        assert self.out is not None
        name = Path(written.named(self.row.output))
        name = labelled(name, label) if label else name
        if is_url(self.out):
            local = stage / "out" / name.name
            local.parent.mkdir(exist_ok=True)
            write_whole(written, local, overwrite=True, source=source)
            # Whole here first, so that what goes to the store is one upload.
            place(local, f"{self.out}/{name.as_posix()}")
        else:
            local = path_of(self.out) / name
            local.parent.mkdir(parents=True, exist_ok=True)
            write_whole(written, local, overwrite=True, source=source)
        return name.as_posix(), *digest(local)

    def _done(self, status: str, **more: Any) -> BatchRow:
        return row_of(self.row, status=status, seconds=perf_counter() - self.started, **{**self.found, **more})


def work(row: Row, fitted: Fitted, out: str | None) -> Found:
    """Do one row.

    Args:
        row: which.
        fitted: its pair.
        out: output folder or URL; None for a forecast.
    """
    job = _Job(row, fitted, out)
    try:
        return job.run()
    except Exception as error:
        # One row's error is that row's result, whatever it is: the others go on.
        return failed(row, error, seconds=perf_counter() - job.started, **job.found)


_last: OpenPair | None = None


def _opened(fitted: Fitted) -> OpenPair:
    """The pair, open; rows come sorted by pair, so that keeping one is enough."""
    global _last
    if _last is None or _last.fitted is not fitted:
        _last = OpenPair.of(fitted)
    return _last


def _of_check(report: CheckReport) -> dict[str, Any]:
    counts = {status: sum(module.status == status for module in report.modules) for status in _STATUSES}
    skipped = sum(module.share or 0.0 for module in report.modules if module.status == "skipped")
    return {
        "verdict": report.verdict,
        "tier": report.tier,
        "reason": _joined(report.summary, report.reasons),
        "method": report.method,
        "counts": counts,
        "skipped_share": skipped,
        "forecast": report.forecast.port,
    }


_STATUSES = ("ported", "skipped", "refused")


def _of_port(report: PortReport) -> dict[str, Any]:
    return {
        "verdict": report.verdict,
        "tier": "port" if report.verdict == "survives" else "refine",
        "reason": _joined(report.summary, report.reasons),
        "method": report.method,
        "counts": report.counts,
        "skipped_share": report.skipped_share,
    }


def _joined(summary: str, reasons: Sequence[str]) -> str:
    # A refusal's summary says its first reason.
    told = reasons if reasons and reasons[0] in summary else [summary, *reasons]
    return "; ".join(text.rstrip(".") for text in told)
