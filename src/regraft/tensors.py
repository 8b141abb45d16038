"""Tensors by reference: name, shape and dtype from a header, the values only when asked for."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from regraft.errors import InputError, reading

Shape = tuple[int, ...]

# The names that the safetensors format gives to dtypes.
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class TensorRef(Protocol):
    """A tensor that may still lie on disk."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def load(self) -> Tensor:
        """The tensor itself, in its stored dtype, on the CPU."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A `TensorRef` for a tensor that is already here."""

    tensor: Tensor = field(repr=False)

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def load(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Stored:
    """A `TensorRef` into a safetensors file."""

    file: Path
    name: str
    shape: Shape
    dtype: torch.dtype

    def load(self) -> Tensor:
        with reading(self.file, self.name), safe_open(self.file, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(self.name)
            return tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)`` of dimension 0, read without the rest."""
        with reading(self.file, self.name), safe_open(self.file, framework="pt") as handle:
            tensor: Tensor = handle.get_slice(self.name)[start:stop]
            return tensor


@dataclass(frozen=True)
class Transposed:
    """A `TensorRef` to the transpose of a matrix."""

    of: TensorRef

    @property
    def shape(self) -> Shape:
        return tuple(reversed(self.of.shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def load(self) -> Tensor:
        return self.of.load().T.contiguous()


@dataclass(frozen=True)
class TensorFile:
    """Every tensor of one or several files by name, and the header's metadata."""

    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]


_TRUNCATED = ("is truncated", "Download or copy it again.")
_DAMAGED = ("has a damaged header", "Download or copy it again.")
# What to tell a user about each way in which safetensors' own parser rejects a header (by its words, in lower case).
_HEADER_REMEDIES = {
    "header too small": _TRUNCATED,
    "invalid header length": _TRUNCATED,
    "not fully covered": _TRUNCATED,
    "header too large": (
        "is no safetensors file, or its header is damaged (wrong magic)",
        "Give a .safetensors file; a PyTorch pickle needs its .pt or .bin suffix.",
    ),
    "invalid start": ("is no safetensors file (wrong magic)", "Give a .safetensors file."),
    "invalid json": ("has a header that is not valid JSON", "Download or copy it again."),
    "invalid utf-8": ("has a header that is not UTF-8", "Download or copy it again."),
    "invalid offset": ("has a tensor whose data lies outside of the file", "Download or copy it again."),
    "invalid shape, data type, or offset": ("has a tensor whose shape and size disagree", "Download or copy it again."),
    "metadata": _DAMAGED,
}


def read_safetensors(path: Path) -> TensorFile:
    """Names, shapes, dtypes and metadata of a safetensors file, from its header alone.

    Raises:
        InputError: the file is missing, truncated or no safetensors file.
    """
    with reading(path):
        try:
            with safe_open(path, framework="pt") as handle:
                tensors: dict[str, TensorRef] = {}
                for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = handle.get_slice(name)
                    dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise InputError(
                            f"dtype {part.get_dtype()} is not supported",
                            file=path,
                            key=name,
                            remedy="Save it as float32, float16 or bfloat16.",
                        )
                    tensors[name] = Stored(path, name, tuple(part.get_shape()), dtype)
                return TensorFile(tensors, dict(handle.metadata() or {}))
        except SafetensorError as error:
            text = str(error)
            for words, (what, remedy) in _HEADER_REMEDIES.items():
                if words in text.lower():
                    raise InputError(what, file=path, remedy=remedy) from None
            raise InputError(f"can't be read as safetensors ({text})", file=path) from None


def read_torch(path: Path) -> TensorFile:
    """A ``.bin`` / ``.pt`` state dict, by ``torch.load(weights_only=True)``: no code in it can run.

    Raises:
        InputError: the file is missing, damaged, or holds more than tensors.
    """
    with reading(path):
        if not path.is_file():
            raise FileNotFoundError(path)
        content = _unpickled(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise InputError("holds no state dict (name to tensor)", file=path)
    tensors = {str(name): InMemory(value) for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError("holds no tensors", file=path)
    return TensorFile(tensors, {})


def _unpickled(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:
                # Files written before torch 1.6 are no zip archives and can't be mapped.
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            "holds more than tensors, or is no PyTorch file; other objects could run code when loaded",
            file=path,
            remedy="Convert it to safetensors on a machine that you trust it on.",
        ) from None


TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def read_tensor_file(path: Path) -> TensorFile:
    """A weights file of either kind, told apart by its suffix."""
    return read_torch(path) if path.suffix.lower() in TORCH_SUFFIXES else read_safetensors(path)


def n_bytes(ref: TensorRef) -> int:
    """Size of the tensor's data in bytes."""
    return prod(ref.shape) * ref.dtype.itemsize


def check_finite(tensor: Tensor, file: str | Path | None, key: str) -> Tensor:
    """``tensor`` itself, or an `InputError` where it holds NaN or Inf."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise InputError(
            "holds NaN or Inf",
            file=file,
            key=key,
            remedy="The file is damaged, or its training diverged: get another one.",
        )
    return tensor
