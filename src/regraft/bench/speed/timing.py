"""Seconds and peak memory of a command of its own, with its files out of the page cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from regraft.errors import RegraftError, shortened

_BUFFER = 16 << 20
_LAUNCHER = """
import json, os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
try:
    _, status, usage = os.wait4(process.pid, 0)
except BaseException:
    process.kill()
    raise
seconds = time.perf_counter() - started
print(json.dumps([seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
code = os.waitstatus_to_exitcode(status)
sys.exit(code if code >= 0 else 128 - code)
"""


@dataclass(frozen=True)
class Spent:
    """What one process took.

    Attributes:
        seconds: on the clock.
        processor_s: of the processor, all threads together.
        peak_mb: resident memory at its peak, 10⁶ bytes.
    """

    seconds: float
    processor_s: float
    peak_mb: float

    def beyond(self, start: Spent) -> Spent:
        """What it took over another, such as the start of the interpreter."""
        return Spent(
            max(0.0, self.seconds - start.seconds),
            max(0.0, self.processor_s - start.processor_s),
            max(0.0, self.peak_mb - start.peak_mb),
        )


def can_forget(folder: Path) -> bool:
    """Whether files of a folder can be dropped from the page cache: on Linux, where they don't lie in memory."""
    if not sys.platform.startswith("linux"):
        return False
    mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    place = folder.resolve()
    over = [(len(words[1]), words[2]) for words in mounts if place.is_relative_to(words[1])]
    return not over or max(over)[1] not in ("tmpfs", "ramfs")


def forget(files: Iterable[Path]) -> None:
    """Have the system drop files from its page cache, so that reading them is reading the disk, where it can."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        with suppress(OSError), file.open("rb") as stream:
            # What is not on the disk yet can't be dropped.
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def environment(threads: int) -> dict[str, str]:
    """Of a process that is measured: with so many threads, and no network."""
    found = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    # An installed package has its bytecode; to compile it at each start is no part of a port.
    found.pop("PYTHONDONTWRITEBYTECODE", None)
    return found


def median_of(found: Sequence[Spent]) -> Spent:
    """The one with the median of the seconds, the upper one of two."""
    return sorted(found, key=lambda one: one.seconds)[len(found) // 2]


def spent(arguments: Sequence[str], *, threads: int, cold: Iterable[Path] = ()) -> Spent:
    """Run ``python ARGUMENTS`` once and wait for it.

    Args:
        arguments: of the interpreter.
        threads: that torch may use.
        cold: files to drop from the page cache first.

    Raises:
        RegraftError: the command failed; says its last line.
    """
    forget(cold)
    with tempfile.TemporaryFile() as said:
        # A process begins with the peak of the one that it was split off from, which a small one in between keeps low.
        launched = [sys.executable, "-I", "-S", "-c", _LAUNCHER, sys.executable, *arguments]
        launcher = subprocess.Popen(launched, stdout=subprocess.PIPE, stderr=said, env=environment(threads))
        try:
            told = launcher.communicate()[0]
        except BaseException:
            # It takes what it has begun with it.
            launcher.terminate()
            launcher.wait()
            raise
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines() or ["nothing was said"]
    if launcher.returncode:
        raise RegraftError(f"`{shortened(' '.join(arguments), 200)}` ended with {launcher.returncode}: {lines[-1]}")
    seconds, processor_s, peak = json.loads(told)
    return Spent(seconds, processor_s, (peak if sys.platform == "darwin" else peak * 1024) / 1e6)


def reading(files: Sequence[Path], *, cold: bool = True) -> float:
    """Seconds to read files from beginning to end, once, into one small buffer: no program can read them in less."""
    if cold:
        forget(files)
    buffer = memoryview(bytearray(_BUFFER))
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - started


def writing(source: Path, target: Path) -> float:
    """Seconds to write a file's bytes to another and see them on the disk."""
    content = source.read_bytes()
    started = time.perf_counter()
    with target.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds
