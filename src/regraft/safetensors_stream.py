"""A safetensors file written one tensor after the other; the library's own writer wants all of them in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from typing import BinaryIO

import torch
from torch import Tensor

from regraft.tensors import Shape

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_stream(
    stream: BinaryIO,
    kinds: Mapping[str, tuple[torch.dtype, Shape]],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """The bytes that ``safetensors.torch.save`` makes of the same tensors.

    Args:
        stream: open for writing.
        kinds: name → dtype and shape of every tensor.
        tensor: gives one by its name, once for each.
        metadata: of the header.
    """
    # Wider ones first, so that each begins at a multiple of its width.
    names = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        dtype, shape = kinds[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        stream.write(memoryview(tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
