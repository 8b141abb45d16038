"""PyTorch files: pickles that would run code, archives that would fill the memory, tensors that are no plain ones."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attack_cases import DOWN, UP, attack, content, good, numbers

NAME = "lora.pt"
MORE = rf"{NAME}: holds more than tensors \(%s\); other objects could run code when loaded. Convert"
DAMAGED = f"{NAME}: .*(damaged|can't be read|no PyTorch file).*(Download|Convert)"


def pickled(value: object, protocol: int = 2) -> Callable[[Path], str]:
    return content(pickle.dumps(value, protocol), NAME)


def zipped(value: object, *, packing: int = zipfile.ZIP_STORED, pkl: bytes | None = None) -> Callable[[Path], str]:
    """As `torch.save` writes it; optionally deflated, or with another pickle inside."""

    def build(place: Path) -> str:
        stream = io.BytesIO()
        torch.save(value, stream)
        if packing == zipfile.ZIP_STORED and pkl is None:
            (place / NAME).write_bytes(stream.getvalue())
            return NAME
        with zipfile.ZipFile(stream) as old, zipfile.ZipFile(place / NAME, "w", packing) as new:
            for name in old.namelist():
                new.writestr(name, pkl if pkl is not None and name.endswith("data.pkl") else old.read(name))
        return NAME

    return build


class Calls:
    """A pickle that calls something when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.call


TOUCH = "touch exploded"
for _name, _bomb, _what in (
    ("os.system", Calls(os.system, TOUCH), r"(posix|nt)\.system"),
    ("eval", Calls(builtins.eval, f"__import__('os').system('{TOUCH}')"), r"(__builtin__|builtins)\.eval"),
    ("exec", Calls(builtins.exec, "open('exploded', 'w')"), r"(__builtin__|builtins)\.exec"),
    ("subprocess", Calls(subprocess.check_output, ["touch", "exploded"]), r"(subprocess|commands)\.check_output"),
    ("getattr", Calls(builtins.getattr, "", "join"), r"(__builtin__|builtins)\.getattr"),
    ("open", Calls(io.open, "exploded", "w"), r"(io|_io)\.open"),
    ("a module of the caller's folder", Calls(Calls, os.system), r".*Calls"),
    ("torch.load within", Calls(torch.hub.load, "x", "y"), r"torch\.hub\.load"),
    ("10 GB of zeros", Calls(bytearray, 10 << 30), r"(__builtin__|builtins)\.bytearray"),
):
    attack(f"a pickle that calls {_name}", pickled({"a": _bomb}), MORE % _what)
    if _name in ("os.system", "10 GB of zeros"):
        attack(f"an archive whose pickle calls {_name}", zipped({UP: numbers(2, 2), "a": _bomb}), MORE % _what)
        attack(f"a pickle of protocol 4 that calls {_name}", pickled({"a": _bomb}, 4), MORE % _what)
attack(
    "a pickle of protocol 0 that calls os.system",
    pickled({"a": Calls(os.system, TOUCH)}, 0),
    MORE % r"(posix|nt)\.system",
)
attack("an INST opcode", content(b"(S'" + TOUCH.encode() + b"'\nios\nsystem\n.", NAME), MORE % "opcode INST")
attack("numpy arrays in a pickle", pickled({"a": np.ones(3)}), MORE % r"numpy.*")
attack("a whole model", zipped(torch.nn.Linear(2, 2)), MORE % r"torch\.nn\.modules\.linear\.Linear")


def _nested(depth: int) -> bytes:
    """{nested tuple: 0}: each level holds the one below twice, so that hashing it takes 2^depth steps."""
    levels = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(depth))
    return b"\x80\x02}(" + b")q\x00" + levels + b"K\x00u."


attack("a tuple that hashes for years", content(_nested(60), NAME), MORE % "one object within another, over and over")
attack("the same in an archive", zipped(good(), pkl=_nested(60)), MORE % "one object within another, over and over")

attack(
    "a deflated archive",
    zipped({UP: torch.zeros(1 << 20)}, packing=zipfile.ZIP_DEFLATED),
    "is compressed: .*PyTorch compresses",
)
attack("an archive packed with LZMA", zipped(good(), packing=zipfile.ZIP_LZMA), "is compressed: .*PyTorch compresses")
attack(
    "a pickle of 200 MB deflated to nothing",
    zipped(good(), packing=zipfile.ZIP_DEFLATED, pkl=bytes(200 << 20)),
    "is compressed: .*PyTorch",
)


def _cut(place: Path) -> str:
    zipped(good())(place)
    data = (place / NAME).read_bytes()
    (place / NAME).write_bytes(data[: len(data) // 2])
    return NAME


attack("a truncated archive", _cut, DAMAGED)


def _archive(entries: dict[str, bytes]) -> Callable[[Path], str]:
    def build(place: Path) -> str:
        with zipfile.ZipFile(place / NAME, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        return NAME

    return build


attack("an archive without a pickle", _archive({"archive/data/0": b"x"}), DAMAGED)
attack("an archive of a picture", _archive({"photo.jpg": b"\xff\xd8"}), DAMAGED)
attack("an archive whose names climb out", _archive({"../../exploded": b"x", "a/data.pkl": b"\x80\x02}."}), f"{NAME}: ")
attack("an archive of nothing", content(b"PK\x05\x06" + bytes(18), NAME), DAMAGED)
attack("an archive whose entry claims 4 GB", lambda place: _claims(place), f"{NAME}: .*(claims|damaged).*Download")


def _claims(place: Path) -> str:
    zipped(good())(place)
    data = bytearray((place / NAME).read_bytes())
    at = data.find(b"PK\x01\x02")
    data[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFF00, 0xFFFFFF00)
    (place / NAME).write_bytes(data)
    return NAME


attack("a TorchScript archive", lambda place: _script(place), f"{NAME}: ")


def _script(place: Path) -> str:
    torch.jit.save(torch.jit.script(torch.nn.Identity()), place / NAME)
    return NAME


def _tar(place: Path) -> str:
    with tarfile.open(place / NAME, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return NAME


attack("a tar of the first torch", _tar, DAMAGED)
attack("an empty .pt", content(b"", NAME), DAMAGED)
attack("text in a .pt", content(b"hello", NAME), DAMAGED)
attack("a web page in a .pt", content(b"<html>404</html>", NAME), f"{NAME}: is a web page, not weights. Download")
attack(
    "a git-lfs pointer in a .pt", content(b"version https://git-lfs.github.com/spec/v1\n", NAME), "is a Git LFS pointer"
)
attack("bytes at random in a .pt", content(bytes(range(256)) * 8, NAME), DAMAGED)

attack("a list of tensors", zipped([numbers(2)]), f"{NAME}: holds no state dict")
attack("one tensor alone", zipped(numbers(2)), f"{NAME}: holds no state dict")
attack("a table without tensors", zipped({"a": 1}), f"{NAME}: holds no tensors")
attack("an empty table", zipped({}), f"{NAME}: holds no tensors")
_SPARSE = numbers(8, 2).to_sparse()
attack("a sparse factor", zipped({**good(), UP: _SPARSE}), f"{NAME}: {UP}: is a sparse tensor. Save it")
attack(
    "a tensor on the meta device",
    zipped({**good(), UP: torch.empty(8, 2, device="meta")}),
    f"{UP}: (is a meta tensor|claims). ?",
)
attack(
    "one number seen as a terabyte",
    zipped({**good(), UP: torch.zeros(1).expand(1 << 38)}),
    f"{UP}: claims .* the file holds 4",
)
_SHARED = torch.zeros(256)
attack(
    "a thousand views of one storage",
    zipped({f"a{i}": _SHARED.view(16, 16) for i in range(3000)}),
    "has tensors of .* in all, but only",
)
attack(
    "tensors under numbers",
    zipped({1: numbers(2, 2), None: numbers(2)}),
    "no known adapter format has keys like 1, None",
)
attack("a good state dict", zipped(good()), verbs=(), fine=("inspect", "check", "port"))
attack(
    "a good state dict of before torch 1.6", lambda place: _legacy(place), verbs=(), fine=("inspect", "check", "port")
)


def _legacy(place: Path) -> str:
    torch.save(good(), place / NAME, _use_new_zipfile_serialization=False)
    return NAME


attack(
    "factors that are parameters",
    zipped({UP: torch.nn.Parameter(numbers(8, 2)), DOWN: numbers(2, 8)}),
    verbs=(),
    fine=("inspect",),
)
attack("a step count within", zipped({"state_dict": good(), "step": 5}), verbs=(), fine=("inspect", "check", "port"))
