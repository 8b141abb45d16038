"""Memory that is let go of goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from regraft.memory import _glibc

_MAPPED = """
import ctypes
import torch
from regraft.memory import weights_given_back

class Found(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Found

def mapped(size):
    # What lies free on a heap is taken first, whatever the threshold.
    libc.malloc_trim(0)
    before = libc.mallinfo2().hblkhd
    held = torch.empty(size, dtype=torch.uint8)
    return libc.mallinfo2().hblkhd - before >= held.numel()

size = 16 << 20
# Freeing a large block has glibc keep such blocks on its heaps from then on.
del_me = torch.empty(30 << 20, dtype=torch.uint8)
del del_me
outside = mapped(size)
with weights_given_back():
    within = mapped(size)
print(outside, within, mapped(size))
"""


@pytest.mark.skipif(_glibc() is None, reason="mallopt is glibc's: elsewhere nothing is changed")
def test_a_weight_is_on_no_heap_within_and_only_there() -> None:
    ran = subprocess.run([sys.executable, "-c", _MAPPED], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "True", "False"]


def test_it_works_where_there_is_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    from regraft import memory

    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with memory.weights_given_back():
        assert torch.ones(2).sum() == 2
