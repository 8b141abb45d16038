"""A GGUF file out of tensors and key-value pairs, through the gguf package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.checkpoints._gguf_file import gguf_package

#: dtype → ggml's name. Quantised types are for weights of a base; a LoRA's factors are too small to gain by them.
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_gguf(path: Path, arch: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file whose tensors are of the dtypes in `KINDS`.

    Args:
        path: of the new file.
        arch: ``general.architecture``.
        fields: further pairs, in this order. A float is stored as float32, a whole number as unsigned where it can be.
        tensors: by name; the last dimension becomes ggml's first.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, arch)
    kinds = gguf.GGUFValueType
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, kinds.ARRAY, _kind(kinds, value[0]) if value else kinds.UINT32)
        else:
            writer.add_key_value(key, value, _kind(kinds, value))
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[KINDS[tensor.dtype]]
        # numpy has no bfloat16: its bytes are handed over with the type beside them.
        data = tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor
        writer.add_tensor(name, data.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind(kinds: Any, value: Any) -> Any:
    if isinstance(value, bool):
        return kinds.BOOL
    if isinstance(value, int):
        if value < 0:
            return kinds.INT32 if value >= -(1 << 31) else kinds.INT64
        return kinds.UINT32 if value < 1 << 32 else kinds.UINT64
    return kinds.FLOAT32 if isinstance(value, float) else kinds.STRING
