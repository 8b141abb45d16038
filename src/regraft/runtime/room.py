"""Whether models fit into memory, told before they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import psutil
import torch

from regraft.base import Base
from regraft.errors import InputError

# Models are loaded in float32.
_BYTES = 4
# Beside the weights: activations, and one tensor twice while it is read.
_MORE = 1.15


def needed(bases: Sequence[Base]) -> int:
    """Bytes that the weights of some bases take when they are loaded."""
    shapes = (ref.shape for base in bases for part in base.components.values() for ref in part.values())
    return sum(prod(shape) for shape in shapes) * _BYTES


def free_bytes(device: str) -> int:
    """Memory that is free on a device."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def check_room(bases: Sequence[Base], device: str) -> None:
    """Fail before the loading where it can't end well.

    Args:
        bases: all that are to be held at once.
        device: where.

    Raises:
        InputError: they need more than is free.
    """
    need, free = _MORE * needed(bases), free_bytes(device)
    if need <= free:
        return
    each = ", ".join(f"{base.path.name} {_gb(needed([base]))}" for base in bases)
    raise InputError(
        f"needs about {_gb(need)} of memory beside the other base ({each}), and {_gb(free)} are free on {device}",
        file=bases[-1].path,
        remedy="Free some, take a device or a machine with more, or a method that runs no model (--weights-only).",
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
