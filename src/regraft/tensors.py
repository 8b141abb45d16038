"""Tensors by reference: name, shape and dtype from a header, the values only when asked for."""

from __future__ import annotations

import os
import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from regraft.errors import InputError, first_line, reading
from regraft.limits import check_dimensions, check_file, check_header, check_kind, check_names, parse_json
from regraft.pickles import check_legacy, check_zip

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


@runtime_checkable
class ByRows(Protocol):
    """A `TensorRef` that can read some of its rows without the rest."""

    def rows(self, ranges: Sequence[range]) -> Tensor:
        """Ranges of rows of dimension 0, one below the other; what lies beyond the last row is left out."""
        ...


@runtime_checkable
class ByElements(Protocol):
    """A `TensorRef` that can read some of its elements without the rest."""

    def elements(self, runs: Sequence[range]) -> Tensor:
        """Runs of elements in the order of the flattened tensor, one after the other."""
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
class FileStamp:
    """What a file is known again by: offsets out of one header must not be used on another file of its name."""

    size: int
    modified_ns: int

    @classmethod
    def of(cls, stream: IO[bytes] | RawIOBase) -> FileStamp:
        status = os.fstat(stream.fileno())
        return cls(status.st_size, status.st_mtime_ns)


class InBytes(ABC):
    """A `TensorRef` to a run of bytes somewhere, of which any part can be read."""

    shape: Shape
    dtype: torch.dtype

    @abstractmethod
    def _read(self, parts: Sequence[tuple[int, int]]) -> Tensor:
        """Bytes of the tensor's data by (start, size), one after the other, as one row of its dtype."""

    def load(self) -> Tensor:
        return self._read([(0, n_bytes(self))]).reshape(self.shape)

    def rows(self, ranges: Sequence[range]) -> Tensor:
        """See `ByRows`."""
        row = n_bytes(self) // max(1, self.shape[0])
        inside = [range(self.shape[0])[part.start : part.stop] for part in ranges]
        data = self._read([(part.start * row, len(part) * row) for part in inside])
        return data.reshape(sum(map(len, inside)), *self.shape[1:])

    def elements(self, runs: Sequence[range]) -> Tensor:
        """See `ByElements`."""
        return self._read([(run.start * self.dtype.itemsize, len(run) * self.dtype.itemsize) for run in runs])


@dataclass(frozen=True)
class Stored(InBytes):
    """A `TensorRef` into a safetensors file.

    The bytes are read at their offset: opening the file anew with ``safe_open`` would parse the whole header for
    every tensor, and holding one handle would count every page that was ever read as this process's memory.
    """

    file: Path
    name: str
    shape: Shape
    dtype: torch.dtype
    offset: int = field(repr=False)
    stamp: FileStamp = field(repr=False)

    def _read(self, parts: Sequence[tuple[int, int]]) -> Tensor:
        """Bytes of the tensor's data by (start, size), one after the other."""
        data = torch.empty(sum(size for _, size in parts), dtype=torch.uint8)
        left = memoryview(data.numpy())  # type: ignore[arg-type]
        with reading(self.file, self.name), self.file.open("rb", buffering=0) as stream:
            if FileStamp.of(stream) != self.stamp:
                raise InputError("has changed since it was opened", file=self.file, remedy="Run it again.")
            for start, size in parts:
                stream.seek(self.offset + start)
                _fill(left[:size], stream)
                left = left[size:]
        return data.view(self.dtype)


def _fill(buffer: memoryview, stream: RawIOBase) -> None:
    # One call reads 2 GiB at most.
    while buffer:
        got = stream.readinto(buffer)
        if not got:
            raise EOFError("the file ends within this tensor")
        buffer = buffer[got:]


def read_rows(ref: TensorRef, ranges: Sequence[range]) -> Tensor:
    """Ranges of rows of dimension 0, without the rest where ``ref`` can do that."""
    if isinstance(ref, ByRows):
        return ref.rows(ranges)
    whole = ref.load()
    return torch.cat([whole[part.start : part.stop] for part in ranges])


def read_elements(ref: TensorRef, runs: Sequence[range]) -> Tensor:
    """Runs of elements of the flattened tensor, one after the other, without the rest where ``ref`` can do that."""
    if isinstance(ref, ByElements):
        return ref.elements(runs)
    if isinstance(ref, ByRows) and ref.shape:
        width = prod(ref.shape[1:])
        return torch.cat([_within_rows(ref, run, width) for run in runs])
    whole = ref.load().reshape(-1)
    return torch.cat([whole[run.start : run.stop] for run in runs])


def _within_rows(ref: ByRows, run: range, width: int) -> Tensor:
    first = run.start // width
    rows = ref.rows([range(first, (run.stop - 1) // width + 1)]).reshape(-1)
    return rows[run.start - first * width :][: len(run)]


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
    "overflow": ("has a tensor whose shape and size disagree", "Download or copy it again."),
    "metadata": _DAMAGED,
}


#: Empty files on disk that stand for files elsewhere (see `regraft.hub`) → what opens those.
STAND_INS: dict[Path, Callable[[], TensorFile]] = {}


def read_safetensors(path: Path) -> TensorFile:
    """Names, shapes, dtypes and metadata of a safetensors file, from its header alone.

    Raises:
        InputError: the file is missing, truncated or no safetensors file.
    """
    if path in STAND_INS:
        return STAND_INS[path]()
    check_file(path)
    check_header(path)
    with reading(path):
        try:
            with safe_open(path, framework="pt") as handle:
                tensors: dict[str, TensorRef] = {}
                names = handle.keys()
                check_names(names, path)
                offsets, stamp = _offsets(path)
                for name in names:
                    part = handle.get_slice(name)
                    check_dimensions(part.get_shape(), path, name)
                    dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise InputError(
                            f"dtype {part.get_dtype()} is not supported",
                            file=path,
                            key=name,
                            remedy="Save it as float32, float16 or bfloat16.",
                        )
                    tensors[name] = Stored(path, name, tuple(part.get_shape()), dtype, offsets[name], stamp)
                return TensorFile(tensors, dict(handle.metadata() or {}))
        except SafetensorError as error:
            check_kind(path)
            text = str(error)
            for words, (what, remedy) in _HEADER_REMEDIES.items():
                if words in text.lower():
                    raise InputError(what, file=path, remedy=remedy) from None
            what, remedy = f"can't be read as safetensors ({text})", "Download or copy it again."
            raise InputError(what, file=path, remedy=remedy) from None


def _offsets(path: Path) -> tuple[dict[str, int], FileStamp]:
    """Where in the file each tensor's data begins. The header has passed safetensors' own checks."""
    with path.open("rb") as stream:
        stamp = FileStamp.of(stream)
        length = int.from_bytes(stream.read(8), "little")
        header = parse_json(stream.read(length), path)
    begins = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    return {name: 8 + length + begin for name, begin in begins.items()}, stamp


def read_torch(path: Path) -> TensorFile:
    """A ``.bin`` / ``.pt`` state dict, by ``torch.load(weights_only=True)``: no code in it can run.

    Raises:
        InputError: the file is missing, damaged, or holds more than tensors.
    """
    if path in STAND_INS:
        return STAND_INS[path]()
    check_file(path)
    check_kind(path, zipped=True)
    with reading(path):
        content = _unpickled(path)
    # Training code keeps the weights beside its own state: Lightning's "state_dict", DeepSpeed's "module".
    for inner in ("state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(inner), dict):
            content = content[inner]
    if not isinstance(content, dict):
        raise InputError("holds no state dict (name to tensor)", file=path, remedy=_WEIGHTS)
    named = {name: value for name, value in _flattened(content) if isinstance(value, Tensor)}
    check_names(named, path)
    tensors = {name: InMemory(_plain(value, path, name)) for name, value in named.items()}
    _check_sum(tensors, path)
    if not tensors:
        raise InputError("holds no tensors", file=path, remedy=_WEIGHTS)
    told = {str(name): str(value) for name, value in content.items() if isinstance(value, str | int | float)}
    return TensorFile(tensors, told)


def _flattened(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values; those of a dict inside (an embedding's ``string_to_param``) as ``string_to_param.*``."""
    for name, value in content.items():
        if isinstance(value, torch.nn.ParameterDict):
            # An old torch's lacks attributes that its mapping methods now need.
            value = value.__dict__.get("_parameters", {})
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", it) for inner, it in value.items())
        else:
            yield str(name), value


def _plain(value: Tensor, path: Path, name: str) -> Tensor:
    """The tensor, made sure to be an ordinary one with all of its values in the file."""
    check_dimensions(value.shape, path, name)
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
        kind = next((word for word in ("quantized", "nested", "meta") if getattr(value, f"is_{word}")), "sparse")
        raise InputError(f"is a {kind} tensor", file=path, key=name, remedy="Save it as an ordinary (dense) tensor.")
    # A view may repeat one stored value a billion times: small here, and large as soon as it is computed with.
    if value.nbytes > value.untyped_storage().nbytes():
        what = f"claims {value.nbytes} bytes, of which the file holds {value.untyped_storage().nbytes()}"
        raise InputError(what, file=path, key=name, remedy="Save it again after .contiguous().")
    return value.detach()


def _check_sum(tensors: Mapping[str, TensorRef], path: Path) -> None:
    # Tied weights are two views of one storage; a thousand views of it are a way to fill the memory.
    claimed, size = sum(map(n_bytes, tensors.values())), path.stat().st_size
    if claimed > 8 * size:
        what = f"has tensors of {claimed} bytes in all, but only {size} bytes itself"
        raise InputError(what, file=path, remedy="Save it again without shared storages.")


def _unpickled(path: Path) -> object:
    # The first textual inversions hold one; it is filled by attribute, so that nothing of the file's runs.
    torch.serialization.add_safe_globals([torch.nn.ParameterDict])
    with path.open("rb") as stream:
        zipped = stream.read(4) == b"PK\x03\x04"
    if zipped:
        check_zip(path)
    else:
        check_legacy(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Files written before torch 1.6 are no zip archives and can't be mapped. An archive must be: two of its
            # entries may be the same bytes, which read twice would take more memory than the file has.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise InputError(
            "holds more than tensors, or is no PyTorch file; other objects could run code when loaded",
            file=path,
            remedy="Convert it to safetensors on a machine that you trust it on.",
        ) from None
    except (MemoryError, OSError):
        raise
    except Exception as error:
        # The unpickler obeys whatever the bytes say: on a damaged file any error at all may come out of it.
        raise InputError(
            f"is damaged, or is no PyTorch file ({first_line(error)})", file=path, remedy="Download or copy it again."
        ) from None


_WEIGHTS = "Is it a file of weights? Get another one."
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def read_tensor_file(path: Path) -> TensorFile:
    """A weights file of any kind, told apart by its suffix; of a GGUF file's pairs the single values are metadata."""
    if path.suffix.lower() == ".gguf":
        # Only then is the gguf package needed.
        from regraft.checkpoints._gguf_file import read_gguf

        content = read_gguf(path)
        told = {key: str(value) for key, value in content.fields.items() if isinstance(value, str | int | float)}
        return TensorFile(content.tensors, told)
    return read_torch(path) if path.suffix.lower() in TORCH_SUFFIXES else read_safetensors(path)


def n_bytes(ref: TensorRef) -> int:
    """Size of the tensor's data in bytes."""
    return prod(ref.shape) * ref.dtype.itemsize


def check_finite(tensor: Tensor, file: str | Path | None, key: str) -> Tensor:
    """``tensor`` itself, or an `InputError` where it holds NaN or Inf."""
    # torch.isfinite knows no 8-bit floats.
    known = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    if tensor.is_floating_point() and not bool(torch.isfinite(known).all()):
        raise InputError(
            "holds NaN or Inf",
            file=file,
            key=key,
            remedy="The file is damaged, or its training diverged: get another one.",
        )
    return tensor
