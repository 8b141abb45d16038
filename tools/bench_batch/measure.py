"""One batch, measured from outside: seconds, memory of its workers, and what lies in the output."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

_LOOK = 0.25


def run(
    pair: tuple[Path, Path], loras: Path, out: Path, *, jobs: int, kill_every: float | None = None
) -> dict[str, Any]:
    """Port a library into an empty folder with the command that users type.

    Args:
        pair: old and new base.
        loras: the library.
        out: emptied first.
        jobs: workers.
        kill_every: kill a worker that often, in seconds.
    """
    if out.exists():
        shutil.rmtree(out)
    command = [sys.executable, "-m", "regraft", "batch", str(loras), "--from", str(pair[0]), "--to", str(pair[1])]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--out", str(out), "--jobs", str(jobs), "--quiet"])
    peaks: dict[int, int] = {}
    kills, last = 0, started
    while process.poll() is None:
        time.sleep(_LOOK)
        workers = _workers(process.pid)
        for worker in workers:
            with suppress(psutil.Error):
                peaks[worker.pid] = max(peaks.get(worker.pid, 0), worker.memory_full_info().uss)
        if kill_every is not None and workers and time.perf_counter() - last >= kill_every:
            with suppress(psutil.Error):
                workers[kills % len(workers)].kill()
                kills, last = kills + 1, time.perf_counter()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "seconds_of_rows": round(sum(row["seconds"] for row in rows), 2),
        "worker_mb_own": round(max(peaks.values(), default=0) / 1e6),
        "kills": kills,
        "rows": len(rows),
        "keys": len({row["key"] for row in rows}),
        "content": _content(out),
    }


def _workers(pid: int) -> list[psutil.Process]:
    """The workers: children of the fork server, which is the driver's child."""
    with suppress(psutil.Error):
        return [child for server in psutil.Process(pid).children() for child in server.children()]
    return []


def _content(out: Path) -> str:
    """One hash of every output's name and bytes."""
    digest = hashlib.sha256()
    for file in sorted(out.rglob("*.safetensors")):
        digest.update(f"{file.relative_to(out)}\t{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def floor(loras: Path, out: Path, copied: Path) -> dict[str, Any]:
    """What any port must do at least: read the library's bytes and write the outputs'.

    Args:
        loras: the library.
        out: its outputs.
        copied: a folder to write to; removed afterwards.
    """
    copied.mkdir(exist_ok=True)
    outputs = [(file, file.stat().st_size) for file in sorted(out.rglob("*.safetensors"))]
    read = written = 0
    started = time.perf_counter()
    for file in sorted(loras.rglob("*.safetensors")):
        read += len(file.read_bytes())
    for number, (_, size) in enumerate(outputs):
        (copied / f"{number}").write_bytes(bytes(size))
        written += size
    seconds = time.perf_counter() - started
    shutil.rmtree(copied)
    return {"seconds": round(max(seconds, 1e-3), 3), "mb_read": round(read / 1e6), "mb_written": round(written / 1e6)}
