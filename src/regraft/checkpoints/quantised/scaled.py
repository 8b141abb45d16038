"""8-bit weights with scales: ComfyUI's scaled fp8, transformers' fine-grained fp8, compressed-tensors' fp8 and int8.

``weight`` (out, in) times ``scale_weight`` (ComfyUI, beside a tensor ``scaled_fp8``), ``weight_scale`` (ComfyUI since
0.3.7x, compressed-tensors: one number, or one for each row) or ``weight_scale_inv`` (DeepSeek, transformers' ``fp8``:
one for each block of 128 × 128, or as ``weight_block_size`` says). ``weight_zero_point`` is taken off first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from regraft.checkpoints.quantised._common import Dequantised, Found, Scheme, need, odd
from regraft.tensors import TensorRef, read_rows

_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
# Scales of the layer's input, and notes of the tools: they say nothing about the weight.
_NOTES = (".scale_input", ".input_scale", ".input_zero_point", ".output_scale", ".comfy_quant")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Scaled(Dequantised):
    """A weight of 8 bits: (weight − zero) · scale.

    Attributes:
        block: rows and columns that one scale is for; 0: all of them.
    """

    values: TensorRef
    scales: TensorRef
    zeros: TensorRef | None
    block: tuple[int, int]

    def reader(self) -> Callable[[range], Tensor]:
        scales = self._matrix(self.scales)
        zeros = None if self.zeros is None else self._matrix(self.zeros)

        def read(rows: range) -> Tensor:
            values = read_rows(self.values, [rows]).float().flatten(1)
            if zeros is not None:
                values = values - self._spread(zeros, rows, values.shape[1])
            return values * self._spread(scales, rows, values.shape[1])

        return read

    @staticmethod
    def _matrix(ref: TensorRef) -> Tensor:
        tensor = ref.load().float()
        return tensor if tensor.dim() == 2 else tensor.reshape(-1, 1)

    def _spread(self, small: Tensor, rows: range, columns: int) -> Tensor:
        """The numbers for these rows, (rows or 1, columns or 1)."""
        tall, wide = self.block
        if tall:
            small = small[torch.arange(rows.start, rows.stop) // tall]
        return small if not wide else small[:, torch.arange(columns) // wide]


def _block(module: str, values: TensorRef, scales: TensorRef, config: Mapping[str, Any]) -> tuple[int, int]:
    """Size of the block that one scale is for, by the scales' shape."""
    out, columns = values.shape[0], prod(values.shape[1:])
    if 0 in scales.shape or not columns:
        raise odd(module, values, "is empty, or has no scales")
    tall, wide = scales.shape if len(scales.shape) == 2 else (prod(scales.shape), 1)
    if (tall, wide) == (1, 1):
        return 0, 0
    if tall == out and columns % max(wide, 1) == 0:
        return 1, 0 if wide == 1 else columns // wide
    stated = config.get("weight_block_size")
    size = stated if isinstance(stated, (list, tuple)) and len(stated) == 2 else (128, 128)
    if all(isinstance(s, int) and s > 0 for s in size) and (-(-out // size[0]), -(-columns // size[1])) == (tall, wide):
        return int(size[0]), int(size[1])
    raise odd(module, values, f"has scales of shape {list(scales.shape)}, which do not fit {list(values.shape)}")


def _read(module: str, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Found | None:
    suffix = next(s for s in _SCALES if s in parts)
    if ".weight" not in parts and ".weight_packed" in parts:
        return None
    values, scales = need(module, parts, ".weight"), parts[suffix]
    used = (".weight", suffix, *(note for note in _NOTES if note in parts))
    kind = {torch.int8: "int8", **dict.fromkeys(_FLOAT8, "fp8")}.get(values.dtype)
    if kind is None or ".weight_scale_2" in parts or len(values.shape) < 2:
        if values.dtype in (torch.float32, torch.float16, torch.bfloat16):
            # ComfyUI's own files keep a scale of 1 beside layers that they left in half precision.
            return Found(values, used, "") if bool((scales.load().float() == 1).all()) else None
        raise odd(module, values, "is quantised in a way that is not known (NVFP4 or another packing of 4 bits)")
    zeros = parts.get(".weight_zero_point")
    if zeros is not None:
        used += (".weight_zero_point",)
        if zeros.shape != scales.shape:
            raise odd(module, values, "has zero points that do not fit its scales")
    weight = Scaled(values.shape, values, scales, zeros, _block(module, values, scales, config))
    return Found(weight, used, f"scaled {kind}")


SCHEMES = (Scheme("scaled 8-bit", _SCALES, _read, ("scaled_fp8",)),)
