"""Files of tensors: names, shapes, dtypes and metadata of a safetensors or PyTorch file, checked as a stranger's."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from regraft.errors import InputError, first_line, reading
from regraft.limits import check_dimensions, check_file, check_header, check_kind, check_names, parse_json
from regraft.pickles import check_legacy, check_zip
from regraft.tensors import FileStamp, InMemory, Stored, TensorRef, n_bytes

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
#: Of every file that may hold weights.
WEIGHTS_SUFFIXES = (".safetensors", ".gguf", *TORCH_SUFFIXES)
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


@dataclass(frozen=True)
class TensorFile:
    """Every tensor of one or several files by name, and the header's metadata."""

    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]


_WEIGHTS = "Is it a file of weights? Get another one."
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


def read_tensor_file(path: Path) -> TensorFile:
    """A weights file of any kind, told apart by its suffix; of a GGUF file's pairs the single values are metadata."""
    if path.suffix.lower() == ".gguf":
        # Only then is the gguf package needed.
        from regraft.checkpoints._gguf_file import read_gguf

        content = read_gguf(path)
        told = {key: str(value) for key, value in content.fields.items() if isinstance(value, str | int | float)}
        return TensorFile(content.tensors, told)
    return read_torch(path) if path.suffix.lower() in TORCH_SUFFIXES else read_safetensors(path)
