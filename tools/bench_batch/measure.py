"""One batch, measured from outside: seconds, memory of its processes, and what lies in the output."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

# Seconds between two looks: short until the first row is there, for its time tells what the start took.
_LOOK_FIRST, _LOOK = 0.05, 0.25


@dataclass(frozen=True)
class _Driver:
    """The driver at one look: bytes that it has for itself, seconds of processors that it has taken."""

    own: int = 0
    processor: float = 0.0


@dataclass
class _Seen:
    """What was seen of a batch while it ran: its driver at the first row, the last one, and the end."""

    first_row: float | None = None
    rows_by_then: int = 0
    at_first: _Driver = _Driver()
    at_last: _Driver = _Driver()
    peak: int = 0
    peak_since: int = 0
    workers: dict[int, int] = field(default_factory=dict)
    kills: int = 0
    _journal: int = 0

    def look(self, driver: psutil.Process, workers: list[psutil.Process], journal: Path) -> None:
        for worker in workers:
            with suppress(psutil.Error):
                self.workers[worker.pid] = max(self.workers.get(worker.pid, 0), worker.memory_full_info().uss)
        with suppress(psutil.Error, FileNotFoundError):
            times = driver.cpu_times()
            now = _Driver(driver.memory_full_info().uss, times.user + times.system)
            self.peak = max(self.peak, now.own)
            size = journal.stat().st_size
            if size and self.first_row is None:
                self.first_row, self.at_first = time.time(), now
                self.rows_by_then = journal.read_bytes().count(b"\n")
            if size:
                self.peak_since = max(self.peak_since, now.own)
            if size > self._journal:
                self._journal, self.at_last = size, now

    def driver(self, rows: int) -> dict[str, Any]:
        """The driver's peak; what each row costs it while rows come; what it takes at the end, for the tables."""
        more = max(rows - self.rows_by_then, 1)
        return {
            "driver_mb_own": round(self.peak / 1e6),
            "driver_kb_a_row": round((self.at_last.own - self.at_first.own) / more / 1e3, 3),
            "driver_ms_a_row": round((self.at_last.processor - self.at_first.processor) / more * 1e3, 3),
            "closing_mb": round(max(self.peak_since - self.at_last.own, 0) / 1e6, 3),
        }


def run(
    pair: tuple[Path, Path], loras: Path, out: Path, *, jobs: int, kill_every: float | None = None
) -> dict[str, Any]:
    """Port a library into an empty folder with the command that users type.

    Args:
        pair: old and new base.
        loras: the library.
        out: emptied first.
        jobs: workers.
        kill_every: kill a worker that often, in seconds. What is then given up is counted, and ends nothing.
    """
    if out.exists():
        shutil.rmtree(out)
    command = [sys.executable, "-m", "regraft", "batch", str(loras), "--from", str(pair[0]), "--to", str(pair[1])]
    command += ["--out", str(out), "--jobs", str(jobs), "--quiet", "--json"]
    journal, load = out / "results.jsonl", os.getloadavg()[0]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as told:
        # By the clock that files are dated by.
        started = time.time()
        process = subprocess.Popen(command, stdout=told)
        seen = _watched(process, journal, kill_every)
        ended = time.time()
        told.seek(0)
        text = told.read()
    failed = json.loads(text)["counts"]["failed"] if text else 0
    if process.returncode and not (kill_every is not None and failed):
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    rows = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    fit = sum(pair["seconds"] for pair in json.loads(text)["pairs"])
    return {
        "load_before": round(load, 2),
        **phases(started, seen.first_row or ended, journal.stat().st_mtime, ended, fit=fit, first=rows[0]["seconds"]),
        "seconds_in_rows": round(sum(row["seconds"] for row in rows), 2),
        "worker_mb_own": round(max(seen.workers.values(), default=0) / 1e6),
        **seen.driver(len(rows)),
        "kills": seen.kills,
        "begun_again": sum(row["attempts"] > 1 for row in rows),
        "given_up": failed,
        "rows": len(rows),
        "keys": len({row["key"] for row in rows}),
        "content": _content(out),
    }


def phases(
    started: float, first_row: float, last_row: float, ended: float, *, fit: float, first: float
) -> dict[str, float]:
    """Seconds in all, and apart: until the first row began, without the fit; the fit; the rows; what came after them.

    Args:
        started: when the command was begun.
        first_row: when the first row was done.
        last_row: when the last one was.
        ended: when the command had ended.
        fit: seconds that the pairs' fits took; a library of one pair has all of them before its first row.
        first: seconds that the first row took.
    """
    start_up = max(first_row - started - fit - first, 0.0)
    told = {
        "seconds": ended - started,
        "start_up_seconds": start_up,
        "fit_seconds": fit,
        "rows_seconds": max(last_row - started - start_up - fit, 1e-3),
        "closing_seconds": ended - last_row,
    }
    return {name: round(seconds, 3) for name, seconds in told.items()}


def _watched(process: subprocess.Popen[bytes], journal: Path, kill_every: float | None) -> _Seen:
    """Look at a batch until it ends; kill its workers in turn, from when there are any."""
    seen, driver = _Seen(), psutil.Process(process.pid)
    last: float | None = None
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_FIRST if seen.first_row is None else _LOOK)
        workers = _workers(driver)
        seen.look(driver, workers, journal)
        if kill_every is None or not workers:
            continue
        last = last or time.time()
        if time.time() - last >= kill_every:
            with suppress(psutil.Error):
                workers[seen.kills % len(workers)].kill()
                seen.kills, last = seen.kills + 1, time.time()
    return seen


def _workers(driver: psutil.Process) -> list[psutil.Process]:
    """The workers: children of the fork server, which is the driver's child."""
    with suppress(psutil.Error):
        return [child for server in driver.children() for child in server.children()]
    return []


def adapter_files(folder: Path) -> Iterator[Path]:
    """Weights and the configs of PEFT folders, in order; no tables."""
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors" or file.name == "adapter_config.json":
            yield file


def _content(out: Path) -> str:
    """One hash of every output's name and bytes."""
    digest = hashlib.sha256()
    for file in adapter_files(out):
        digest.update(f"{file.relative_to(out)}\t{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def floor(loras: Path, out: Path, copied: Path) -> dict[str, Any]:
    """What any port must do at least: read the library's bytes and write the outputs', one file after the other.

    Args:
        loras: the library.
        out: its outputs.
        copied: a folder to write to; removed afterwards.
    """
    copied.mkdir(exist_ok=True)
    sizes = [file.stat().st_size for file in adapter_files(out)]
    started = time.perf_counter()
    read = sum(len(file.read_bytes()) for file in adapter_files(loras))
    for number, size in enumerate(sizes):
        (copied / f"{number}").write_bytes(bytes(size))
    seconds = time.perf_counter() - started
    shutil.rmtree(copied)
    return {
        "seconds": round(max(seconds, 1e-3), 3),
        "mb_read": round(read / 1e6, 3),
        "mb_written": round(sum(sizes) / 1e6, 3),
    }
