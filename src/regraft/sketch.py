"""A sketch: a fixed sample of every tensor's values, small enough to travel with an adapter.

`regraft.fingerprint` specifies it, MUST by MUST; this file takes it and packs it.
"""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from regraft.tensor_files import SAFETENSORS_DTYPES
from regraft.tensors import Shape, TensorRef, read_elements

# Elements of the sample: of a weight with two dimensions or more, of a bias or norm. Each in this many runs.
_OF_WEIGHT, _OF_VECTOR, _RUNS = 32, 8, 4
# 2^32 / golden ratio: its odd multiples mod 2^32 spread evenly, and at no simple fraction of a tensor.
_STEP = 2654435769
# Tensors of a brief sketch: with base64 it stays under 4 KB.
_BRIEF = 32
_RECORD = struct.Struct("<6sBBhQ")
_ID_BYTES = 6

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def plain_shape(shape: Shape) -> Shape:
    """The shape without the ones of a 1 × 1 convolution: (out, in, 1, 1) is (out, in)."""
    return shape[:2] if len(shape) > 2 and prod(shape[2:]) == 1 else shape


def kind_of(ref: TensorRef) -> str:
    """How the values are stored: a safetensors dtype such as ``F16``, or a quantisation's name (``q4_k``, ``nf4``).

    Readers of quantised files say it in ``kind``; a view of a tensor is stored as that one is.
    """
    while not hasattr(ref, "kind") and hasattr(ref, "of"):
        ref = ref.of
    kind = str(getattr(ref, "kind", None) or DTYPE_NAMES.get(ref.dtype) or ref.dtype)
    return kind if kind in SAFETENSORS_DTYPES else kind.lower()


def is_quantised(kind: str) -> bool:
    """Whether values stored in this way are computed, not read."""
    return kind not in SAFETENSORS_DTYPES


def sample_runs(shape: Shape) -> list[range]:
    """Which elements of the flattened tensor are its sample.

    >>> sample_runs((4,)), sample_runs((100,))
    ([range(0, 4)], [range(61, 63), range(84, 86), range(8, 10), range(32, 34)])
    """
    size = prod(shape)
    wanted = _OF_WEIGHT if len(plain_shape(shape)) >= 2 else _OF_VECTOR
    if size <= wanted:
        return [range(size)]
    return spread_runs(size, _RUNS, wanted // _RUNS)


def spread_runs(size: int, count: int, length: int) -> list[range]:
    """``count`` runs of ``length`` numbers below ``size``, evenly spread and at no simple fraction of it."""
    starts = [((2 * j + 1) * _STEP % 2**32) * (size - length + 1) >> 32 for j in range(count)]
    return [range(start, start + length) for start in starts]


def tensor_id(name: str, shape: Shape) -> bytes:
    """Six bytes that stand for a tensor's canonical name and shape."""
    return hashlib.sha256(line_of(name, shape).encode()).digest()[:_ID_BYTES]


def line_of(name: str, shape: Shape) -> str:
    """``name``, a tab, the plain shape as ``320x4x3x3``, a newline."""
    return f"{name}\t{'x'.join(map(str, plain_shape(shape)))}\n"


@dataclass(frozen=True)
class Sample:
    """The sample of one tensor.

    Attributes:
        kind: how it is stored (see `kind_of`).
        size: number of its elements.
        values: float32, (n,).
    """

    kind: str
    size: int
    values: Tensor = field(repr=False)


@dataclass(frozen=True)
class Sketch:
    """Tensor's id → its sample, in the order of the canonical names."""

    samples: Mapping[bytes, Sample]

    def to_json(self) -> dict[str, Any]:
        """``{"tensors": …, "kinds": […], "data": base64}``; see `regraft.fingerprint`."""
        kinds = sorted({sample.kind for sample in self.samples.values()})
        packed = b"".join(_pack(id_, sample, kinds) for id_, sample in self.samples.items())
        return {"tensors": len(self.samples), "kinds": kinds, "data": base64.b64encode(packed).decode()}

    def brief(self) -> Sketch:
        """The part of it that goes into a line of text: 32 weights, evenly spread."""
        weights = [id_ for id_, sample in self.samples.items() if len(sample.values) == _OF_WEIGHT]
        count = min(len(weights), _BRIEF)
        chosen = [weights[(2 * i + 1) * len(weights) // (2 * count)] for i in range(count)]
        return Sketch({id_: self.samples[id_] for id_ in chosen})

    @property
    def size(self) -> int:
        """Elements of all its tensors."""
        return sum(sample.size for sample in self.samples.values())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sketch:
        """The inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: it is damaged.
        """
        sketch = cls.unpack(list(map(str, data["kinds"])), data["data"])
        if len(sketch.samples) != data["tensors"]:
            raise ValueError("the sketch does not hold as many tensors as it says")
        return sketch

    @classmethod
    def unpack(cls, kinds: Sequence[str], data: str) -> Sketch:
        """The sketch out of its kinds and its records in base64.

        Raises:
            ValueError: it is damaged.
        """
        packed = base64.b64decode(data, validate=True)
        samples: dict[bytes, Sample] = {}
        at = 0
        while at < len(packed):
            id_, kind, count, exponent, size = _RECORD.unpack(packed[at : at + _RECORD.size].ljust(_RECORD.size, b"\0"))
            at += _RECORD.size
            values = bytearray(packed[at : at + 2 * count])
            at += 2 * count
            if at > len(packed) or kind >= len(kinds) or count > size:
                raise ValueError("a record of the sketch is cut or out of range")
            samples[id_] = Sample(kinds[kind], size, _from_half(values, exponent))
        return cls(samples)


def _pack(id_: bytes, sample: Sample, kinds: Sequence[str]) -> bytes:
    finite = sample.values[sample.values.isfinite()].abs()
    largest = float(finite.max()) if len(finite) else 0.0
    exponent = math.frexp(largest)[1] - 1 if largest > 0 else 0
    half = torch.ldexp(sample.values.double(), torch.tensor(-exponent)).half()
    head = _RECORD.pack(id_, kinds.index(sample.kind), len(half), exponent, sample.size)
    return head + half.view(torch.uint8).numpy().tobytes()


def _from_half(data: bytearray, exponent: int) -> Tensor:
    half = torch.frombuffer(data, dtype=torch.float16) if data else torch.empty(0, dtype=torch.float16)
    return torch.ldexp(half.double(), torch.tensor(exponent)).float()


def take_sample(ref: TensorRef) -> Tensor:
    """The sampled elements in their stored dtype, (n,)."""
    runs = [run for run in sample_runs(ref.shape) if len(run)]
    if not runs:
        return torch.empty(0, dtype=ref.dtype)
    return read_elements(ref, runs)
