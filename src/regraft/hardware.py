"""Where and with how many threads tensors are computed, and what is said when there is no room for it."""

from __future__ import annotations

import os
from typing import Any

import torch

from regraft.errors import RegraftError, UsageError, first_line, is_full

_NO_MEMORY = "not enough memory for this; close other programs, or leave modules out with --exclude"


def use_hardware(device: str, compute: str, threads: int | None) -> dict[str, Any]:
    """Check ``--device`` and ``--dtype``, set the thread count, and return what the methods are to compute with.

    Two programs with a thread for every core spin each other to a standstill: by default the threads are the
    processors that other programs leave free.

    Raises:
        UsageError: no such device here, or a dtype that can't be computed in.
    """
    if device not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {device!r} is not known", remedy="Known: cpu, cuda, mps.")
    if (device == "cuda" and not torch.cuda.is_available()) or (
        device == "mps" and not torch.backends.mps.is_available()
    ):
        raise RegraftError(f"this machine (or its torch) has no {device} device", remedy="Leave --device out.")
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = free_processors()
    if threads is not None:
        torch.set_num_threads(threads)
    known = {"float32": torch.float32, "float64": torch.float64}
    if compute not in known:
        raise UsageError(f"--dtype {compute!r} is not known", remedy=f"Known: {', '.join(known)}.")
    return {"device": device, "dtype": known[compute]}


def free_processors() -> int:
    """Processors of this process that others leave free, by the load of the last minute; at least 1."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, mine - round(load))


def said_of(error: MemoryError | RuntimeError) -> str | None:
    """One line for an error that a user can do something about; None for any other, which is a bug."""
    if is_full(error):
        return _NO_MEMORY
    if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # public, by torch's docs
        return f"the weights could not be decomposed ({first_line(error)}): is a base damaged? --exclude leaves it out"
    return None
