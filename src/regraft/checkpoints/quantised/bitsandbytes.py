"""bitsandbytes: 4-bit (nf4, fp4) with plain or nested scales, and LLM.int8.

Layout by bitsandbytes 0.50's state dicts. 4 bits: ``weight`` (n / 2, 1) bytes, the first value in the high half;
value = quant_map[code] · absmax[i // blocksize] over the flattened weight; ``weight.quant_state.bitsandbytes__nf4``
is JSON in bytes (shape, blocksize, nested_…). Nested: absmax = nested_quant_map[absmax] · nested_absmax + offset.
8 bits: ``weight`` (out, in) int8, value = weight · SCB[row] / 127.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from regraft.checkpoints._views import Reshaped
from regraft.checkpoints.quantised._common import Dequantised, Found, Scheme, need, odd
from regraft.tensors import TensorRef, n_bytes, read_rows

_STATE = ".weight.quant_state.bitsandbytes__"
# A state is a line of JSON.
_LARGEST_STATE = 1 << 16
_NESTED = (".weight.nested_absmax", ".weight.nested_quant_map")


@dataclass(frozen=True)
class FourBit(Dequantised):
    """A weight in 4 bits.

    Attributes:
        packed: bytes, (n / 2, 1).
        scales: absmax: float32, or codes of nested scales, (n / block,).
        codes: float32, (16,).
        nested: scales and codes of the scales, where these are quantised too.
    """

    packed: TensorRef
    scales: TensorRef
    codes: TensorRef
    block: int
    nested: tuple[TensorRef, TensorRef] | None
    nested_block: int
    offset: float

    def _absmax(self) -> Tensor:
        scales = self.scales.load().flatten()
        if self.nested is None:
            return scales.float()
        absmax, codes = (part.load().float().flatten() for part in self.nested)
        return codes[scales.long()] * absmax.repeat_interleave(self.nested_block)[: len(scales)] + self.offset

    def reader(self) -> Callable[[range], Tensor]:
        absmax, codes, width = self._absmax(), self.codes.load().float(), prod(self.shape[1:])

        def read(rows: range) -> Tensor:
            start, stop = rows.start * width, rows.stop * width
            data = read_rows(self.packed, [range(start // 2, (stop + 1) // 2)]).flatten()
            both = torch.stack([data >> 4, data & 15], dim=1).flatten()[start % 2 :][: stop - start]
            return codes[both.long()] * absmax[torch.arange(start, stop) // self.block]

        return read


@dataclass(frozen=True)
class EightBit(Dequantised):
    """A weight in LLM.int8: (out, in) int8, one scale for each row."""

    values: TensorRef
    scales: TensorRef

    def reader(self) -> Callable[[range], Tensor]:
        scales = self.scales.load().float().flatten()

        def read(rows: range) -> Tensor:
            values = read_rows(self.values, [rows]).float()
            return values * (scales[rows.start : rows.stop] / 127).reshape(-1, *[1] * (values.dim() - 1))

        return read


def _state(ref: TensorRef) -> dict[str, Any]:
    if n_bytes(ref) > _LARGEST_STATE:
        raise ValueError("too large")
    state = json.loads(ref.load().numpy().tobytes())
    if not isinstance(state, dict):
        raise TypeError("no table")
    return state


def _four_bit(module: str, parts: Mapping[str, TensorRef], _: Mapping[str, Any]) -> Found | None:
    mark = next(suffix for suffix in parts if suffix.startswith(_STATE))
    packed, scales = need(module, parts, ".weight"), need(module, parts, ".weight.absmax")
    codes = need(module, parts, ".weight.quant_map")
    try:
        state = _state(parts[mark])
        shape, block = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
        nested_block, offset = int(state.get("nested_blocksize", 1)), float(state.get("nested_offset", 0))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        raise odd(f"{module}{mark}", packed, "is no description of a 4-bit weight") from None
    nested = None
    used = [".weight", ".weight.absmax", ".weight.quant_map", mark]
    if _NESTED[0] in parts:
        nested = (parts[_NESTED[0]], need(module, parts, _NESTED[1]))
        used += _NESTED
    count = prod(shape)
    blocks = -(-count // block) if block > 0 else -1
    fits = prod(packed.shape) == -(-count // 2) and prod(scales.shape) == blocks and codes.shape == (16,)
    if nested is not None:
        fits = fits and nested_block > 0 and prod(nested[0].shape) == -(-blocks // nested_block)
        fits = fits and nested[1].shape == (256,) and scales.dtype == torch.uint8
    if not fits or packed.dtype != torch.uint8 or min(shape, default=-1) < 0:
        raise odd(module, packed, "has 4-bit parts that do not fit together")
    flat = packed if packed.shape[:1] == (prod(packed.shape),) else Reshaped(packed, (prod(packed.shape), 1))
    weight = FourBit(shape, flat, scales, codes, block, nested, nested_block, offset)
    return Found(weight, tuple(used), f"bnb {mark.removeprefix(_STATE)}")


def _eight_bit(module: str, parts: Mapping[str, TensorRef], _: Mapping[str, Any]) -> Found | None:
    values, scales = need(module, parts, ".weight"), parts[".SCB"]
    used = [".weight", ".SCB"]
    if ".weight_format" in parts:
        used.append(".weight_format")
        # 0 is plain rows; the others are orders of a card's own.
        if bool((parts[".weight_format"].load() != 0).any()):
            raise odd(module, values, "is stored in a GPU's own order of columns, which is not known")
    if values.dtype != torch.int8 or not values.shape or prod(scales.shape) != values.shape[0]:
        raise odd(module, values, "has 8-bit parts that do not fit together")
    return Found(EightBit(values.shape, values, scales), tuple(used), "bnb int8")


SCHEMES = (
    Scheme("bitsandbytes 4-bit", tuple(f"{_STATE}{kind}" for kind in ("nf4", "fp4")), _four_bit),
    Scheme("bitsandbytes int8", (".SCB",), _eight_bit),
)
