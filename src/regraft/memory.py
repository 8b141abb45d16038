"""How much memory this process has used at most, and how what it lets go of goes back to the system."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# Of glibc's malloc.h. From the threshold on, a block is mapped for itself, and goes back when it is freed. Left alone,
# the threshold moves up to the largest with the blocks that are freed.
_M_MMAP_THRESHOLD, _LARGEST = -3, 32 << 20
# A million numbers of float32 are the least that lies above it: a weight as it is computed with, or its Gram matrix.
_WEIGHTS = 4_000_000


def peak_mb() -> float:
    """Peak resident memory of the process, in MB (10⁶ bytes)."""
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kibibytes.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


@contextmanager
def weights_given_back() -> Iterator[None]:
    """Within, a large weight's memory goes back to the system as soon as nothing holds it.

    glibc would put blocks of up to 32 MiB on its heaps as soon as one has been freed, and a heap can't shrink below the
    last small block on it: of weights that come and go beside results that stay, most would be kept. Elsewhere nothing
    is changed.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _WEIGHTS)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    found = ctypes.CDLL(None)
    return found if hasattr(found, "gnu_get_libc_version") else None
