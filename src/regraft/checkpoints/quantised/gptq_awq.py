"""GPTQ and AWQ (GEMM): integers of 2, 4 or 8 bits in int32 words, scales and zero points for groups of inputs.

GPTQ (AutoGPTQ, GPTQModel): ``qweight`` (in · bits / 32, out) packed along the inputs, ``qzeros``
(groups, out · bits / 32), ``scales`` (groups, out), ``g_idx`` (in,) the group of each input;
value = scale · (q − zero). The first version of the format stores zero − 1; ``checkpoint_format: gptq_v2`` stores zero.
AWQ, GEMM (AutoAWQ): ``qweight`` (in, out / 8) packed along the outputs in the order 0 2 4 6 1 3 5 7, ``qzeros``
(groups, out / 8) likewise, zero points as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regraft.checkpoints.quantised._common import Dequantised, Found, Scheme, groups_of, need, odd, unpack
from regraft.tensors import TensorRef

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Gptq(Dequantised):
    """A weight (out, in) in GPTQ's layout."""

    qweight: TensorRef
    qzeros: TensorRef
    scales: TensorRef
    groups: TensorRef | None
    bits: int
    #: What is added to a stored zero point.
    zero: int

    def reader(self) -> Callable[[range], Tensor]:
        packed, scales = self.qweight.load(), self.scales.load().float()
        # The sum stays within the bits: 15 + 1 is 0 again, as AutoGPTQ has it.
        zeros = torch.bitwise_and(unpack(self.qzeros.load(), self.bits, 1) + self.zero, 2**self.bits - 1)
        inputs = self.shape[1]
        group = groups_of(inputs, len(scales), self.groups)

        def read(rows: range) -> Tensor:
            part = slice(rows.start, rows.stop)
            values = unpack(packed[:, part], self.bits, 0)[:inputs] - zeros[:, part][group]
            return (values * scales[:, part][group]).T

        return read


@dataclass(frozen=True)
class Awq(Dequantised):
    """A weight (out, in) in AWQ's layout."""

    qweight: TensorRef
    qzeros: TensorRef
    scales: TensorRef

    def reader(self) -> Callable[[range], Tensor]:
        packed, scales = self.qweight.load(), self.scales.load().float()
        zeros = unpack(self.qzeros.load(), 4, 1, _AWQ_ORDER)
        size = self.shape[1] // len(scales)

        def read(rows: range) -> Tensor:
            words = slice(rows.start // 8, -(-rows.stop // 8))
            values = unpack(packed[:, words], 4, 1, _AWQ_ORDER)[:, rows.start % 8 :][:, : len(rows)]
            part = slice(rows.start, rows.stop)
            values = values - zeros[:, part].repeat_interleave(size, 0)
            return (values * scales[:, part].repeat_interleave(size, 0)).T

        return read


def _read(module: str, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Found | None:
    qweight = parts[".qweight"]
    qzeros, scales = need(module, parts, ".qzeros"), need(module, parts, ".scales")
    if any(len(ref.shape) != 2 for ref in (qweight, qzeros, scales)) or 0 in scales.shape:
        raise odd(module, qweight, "has packed parts that are no matrices")
    (groups, out), words = scales.shape, qzeros.shape[1]
    used: tuple[str, ...] = (".qweight", ".qzeros", ".scales")
    whole = qweight.dtype == torch.int32 == qzeros.dtype and qzeros.shape[0] == groups
    if whole and qweight.shape[1] * 8 == out == words * 8 and qweight.shape[0] % groups == 0:
        return Found(Awq((out, qweight.shape[0]), qweight, qzeros, scales), used, "awq int4")
    bits = 32 * words // out
    if not whole or qweight.shape[1] != out or bits not in (2, 4, 8) or bits * out != 32 * words:
        raise odd(module, qweight, "is packed in a way that is not known (neither GPTQ in 2, 4, 8 bits nor AWQ GEMM)")
    inputs, order = qweight.shape[0] * 32 // bits, parts.get(".g_idx")
    if order is not None:
        if order.shape != (inputs,):
            raise odd(module, qweight, "has a g_idx that does not fit its weight")
        used += (".g_idx",)
    zero = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    return Found(Gptq((out, inputs), qweight, qzeros, scales, order, bits, zero), used, f"gptq int{bits}")


SCHEMES = (Scheme("GPTQ or AWQ", (".qweight",), _read),)
