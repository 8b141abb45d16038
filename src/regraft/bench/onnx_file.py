"""The weights in an ONNX file, read without the onnx package: initializers alone, no graph is run.

Field numbers are those of onnx.proto3 (ONNX 1.17): ModelProto.graph = 7; GraphProto.node = 1, initializer = 5;
NodeProto.input = 1, output = 2, op_type = 4; TensorProto.dims = 1, data_type = 2, name = 8, raw_data = 9.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regraft.errors import InputError

_DTYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 10: "<f2", 11: "<f8"}


@dataclass(frozen=True)
class OnnxNode:
    """One operation: what it is, and the names of what goes in and comes out."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class OnnxFile:
    """Initializers by name, and the nodes that use them."""

    tensors: dict[str, Tensor]
    nodes: tuple[OnnxNode, ...]


def read_onnx(file: Path) -> OnnxFile:
    """Read a file's initializers with their values in it.

    Raises:
        InputError: it is cut off, or no ONNX file.
    """
    try:
        graphs = [value for number, value in _fields(memoryview(file.read_bytes())) if number == 7]
        tensors: dict[str, Tensor] = {}
        nodes = []
        for number, value in _fields(_bytes(graphs[0])):
            if number == 5:
                name, tensor = _tensor(_bytes(value))
                if tensor is not None:
                    tensors[name] = tensor
            elif number == 1:
                nodes.append(_node(_bytes(value)))
    except (IndexError, ValueError, KeyError) as error:
        raise InputError(f"is no whole ONNX file ({error})", file=file) from None
    return OnnxFile(tensors, tuple(nodes))


def named_weights(file: OnnxFile) -> dict[str, Tensor]:
    """The initializers under their modules' names, matrices as torch has them, (out, in).

    An exporter keeps the names of biases and embeddings, and gives matrices a number and the transposed shape. A matrix
    is known by the bias that is added to its product. A quantised tensor is what ``Cast`` and ``Mul`` make of it.
    """
    found = dict(file.tensors)
    made: dict[str, OnnxNode] = {name: node for node in file.nodes for name in node.outputs}
    for node in file.nodes:
        cast = made.get(node.inputs[0]) if node.kind == "Mul" else None
        if cast is not None and cast.kind == "Cast" and cast.inputs[0] in found and node.inputs[1] in found:
            found[node.outputs[0]] = found.pop(cast.inputs[0]).float() * found.pop(node.inputs[1])
    for node in file.nodes:
        if node.kind != "Add":
            continue
        for bias, product in (node.inputs, node.inputs[::-1]):
            factor = made.get(product)
            if bias in found and bias.endswith(".bias") and factor is not None and factor.kind == "MatMul":
                matrix = found.pop(factor.inputs[1])
                found[f"{bias.removesuffix('.bias')}.weight"] = matrix.T.contiguous()
    return found


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Protocol buffers' wire format: (field number, varint or bytes)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + size > len(data):
            raise ValueError("it is cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a field is of another type")
    return value


def _tensor(data: memoryview) -> tuple[str, Tensor | None]:
    dims: list[int] = []
    name, kind, raw = "", 0, None
    for number, value in _fields(data):
        if number == 1:
            # One by one, or packed into bytes.
            dims += [value] if isinstance(value, int) else _packed(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = bytes(_bytes(value)).decode()
        elif number == 9:
            raw = _bytes(value)
    if raw is None or kind not in _DTYPES:
        return name, None
    values = np.frombuffer(raw, dtype=_DTYPES[kind]).reshape(dims)
    return name, torch.from_numpy(values.copy())


def _packed(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _node(data: memoryview) -> OnnxNode:
    found: dict[int, list[str]] = {1: [], 2: [], 4: []}
    for number, value in _fields(data):
        if number in found:
            found[number].append(bytes(_bytes(value)).decode())
    return OnnxNode("".join(found[4]), tuple(found[1]), tuple(found[2]))
