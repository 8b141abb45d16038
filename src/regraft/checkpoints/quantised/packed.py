"""compressed-tensors' ``pack-quantized``: integers of 4 or 8 bits in int32 words.

``weight_packed`` (out, ⌈in · bits / 32⌉), the lowest bits first, each value plus 2^(bits − 1); ``weight_shape``;
``weight_scale`` (out, groups) or (1,); ``weight_zero_point`` packed along the outputs in the same way, where the
scheme is asymmetric; ``weight_g_idx`` (in,). value = (q − zero) · scale. By compressed-tensors 0.10's compressor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from regraft.checkpoints.quantised._common import Dequantised, Found, Scheme, groups_of, need, odd, unpack
from regraft.tensors import TensorRef, read_rows


@dataclass(frozen=True)
class Packed(Dequantised):
    """A weight (out, in) in compressed-tensors' packing."""

    packed: TensorRef
    scales: TensorRef
    zeros: TensorRef | None
    groups: TensorRef | None
    bits: int

    def reader(self) -> Callable[[range], Tensor]:
        out, inputs = self.shape
        half = 2 ** (self.bits - 1)
        scales = self.scales.load().float().reshape(-1, self.scales.shape[-1]).expand(out, -1)
        zeros = None
        if self.zeros is not None:
            zeros = self.zeros.load()
            if zeros.dtype == torch.int32:
                zeros = unpack(zeros, self.bits, 0)[:out] - half
        group = groups_of(inputs, scales.shape[1], self.groups)

        def read(rows: range) -> Tensor:
            values = unpack(read_rows(self.packed, [rows]), self.bits, 1)[:, :inputs] - half
            part = slice(rows.start, rows.stop)
            if zeros is not None:
                values = values - zeros[part][:, group]
            return torch.mul(values, scales[part][:, group])

        return read


def _read(module: str, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Found | None:
    packed, scales = parts[".weight_packed"], need(module, parts, ".weight_scale")
    shape = need(module, parts, ".weight_shape")
    if len(packed.shape) != 2 or shape.shape != (2,) or scales.shape == () or packed.dtype != torch.int32:
        raise odd(module, packed, "has packed parts that do not fit together")
    out, inputs = (int(size) for size in shape.load().double().nan_to_num().tolist())
    bits = next((b for b in (4, 8) if packed.shape[1] == -(-inputs * b // 32)), 0)
    used: tuple[str, ...] = (".weight_packed", ".weight_scale", ".weight_shape")
    fits = packed.shape[0] == out > 0 and inputs > 0
    if not fits or not bits or prod(scales.shape[:-1]) not in (1, out) or not 0 < scales.shape[-1] <= inputs:
        raise odd(module, packed, "has packed parts that do not fit together")
    zeros, groups = parts.get(".weight_zero_point"), parts.get(".weight_g_idx")
    if zeros is not None:
        used += (".weight_zero_point",)
        rows = -(-out * bits // 32) if zeros.dtype == torch.int32 else out
        if zeros.shape != (rows, scales.shape[-1]):
            raise odd(module, packed, "has zero points that do not fit its scales")
    if groups is not None:
        used += (".weight_g_idx",)
        if groups.shape != (inputs,):
            raise odd(module, packed, "has a weight_g_idx that does not fit its weight")
    return Found(Packed((out, inputs), packed, scales, zeros, groups, bits), used, f"packed int{bits}")


SCHEMES = (Scheme("compressed-tensors", (".weight_packed",), _read),)
