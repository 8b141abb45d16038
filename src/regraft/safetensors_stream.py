"""A safetensors file written one tensor after the other; the library's own writer wants all of them in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from typing import BinaryIO

import torch
from torch import Tensor

from regraft.tensors import Shape, raw

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
    stream.write(header({name: kinds[name] for name in names}, metadata))
    for name in names:
        stream.write(raw(tensor(name).contiguous()))


def header(kinds: Mapping[str, tuple[torch.dtype, Shape]], metadata: Mapping[str, str]) -> bytes:
    """What stands before the tensors' own bytes.

    Args:
        kinds: name → dtype and shape, in the order that they follow in.
        metadata: of the file.
    """
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in kinds.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        fields[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
