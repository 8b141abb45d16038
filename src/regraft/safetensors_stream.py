"""A safetensors file written one tensor after the other; the library's own writer wants all of them in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from typing import BinaryIO

import torch
from torch import Tensor

from regraft.tensors import Shape
from regraft.waiting import raw

# In the library's order: wider ones first, so that each tensor begins at a multiple of its width.
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


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
    order = list(_NAMES)
    names = sorted(kinds, key=lambda name: (order.index(kinds[name][0]), name))
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
        stream.write(raw(tensor(name).contiguous()))
