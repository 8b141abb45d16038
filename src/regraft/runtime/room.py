"""What a machine has room and speed for, told before models are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import psutil
import torch

from regraft.base import Base
from regraft.errors import InputError

# Which models are loaded in unless told otherwise.
_BYTES = torch.float32.itemsize
# Beside the weights: activations, and one tensor twice while it is read.
_MORE = 1.15


def needed(bases: Sequence[Base], each: int = _BYTES) -> int:
    """Bytes that the weights of some bases take when they are loaded, with so many for each number."""
    shapes = (ref.shape for base in bases for part in base.components.values() for ref in part.values())
    return sum(prod(shape) for shape in shapes) * each


def bytes_of(dtype: str) -> int:
    """Of a number, by the name of torch's dtype."""
    named: torch.dtype = getattr(torch, dtype)
    return named.itemsize


def fast_half() -> bool:
    """Whether the processor computes in bfloat16; elsewhere that is emulated, many times slower than float32."""
    known = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name)()) for name in known if hasattr(torch.cpu, name))


def free_bytes(device: str) -> int:
    """Memory that is free on a device."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


#: Of a method that can do without running models.
REMEDY = "Free some, take a device or a machine with more, or a method that runs no model (--weights-only)."
#: Of a training.
TRAINING = "Free some, take --dtype bfloat16, or a device or a machine with more."


def check_room(bases: Sequence[Base], device: str, *, each: int = _BYTES, remedy: str = REMEDY) -> None:
    """Fail before the loading where it can't end well.

    Args:
        bases: all that are to be held at once.
        device: where.
        each: bytes of a number.
        remedy: what else can be done.

    Raises:
        InputError: they need more than is free.
    """
    need, free = _MORE * needed(bases, each), free_bytes(device)
    if need <= free:
        return
    told = ", ".join(f"{base.path.name} {_gb(needed([base], each))}" for base in bases)
    beside = f" for both bases ({told})" if len(bases) > 1 else ""
    raise InputError(
        f"needs about {_gb(need)} of memory{beside}, and {_gb(free)} are free on {device}",
        file=bases[-1].path,
        remedy=remedy,
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
