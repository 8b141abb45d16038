"""What a file from a stranger may claim before anything of it is believed: each limit lies far above real files."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from regraft.errors import InputError, reading

#: The largest adapter of an expert model (384 experts, 60 layers) has 138,000 tensors.
MOST_TENSORS = 1 << 18
#: The longest real name, an LCM adapter's of a video model, has 150 characters.
LONGEST_NAME = 1024
#: A convolution over a video has 5 dimensions.
MOST_DIMENSIONS = 16
#: A shard index of 180,000 tensors has 15 MB.
LARGEST_JSON = 64 << 20
# Weights are noise: a file system that compresses saves a half of them, not fifteen sixteenths.
_SPARSE_FROM, _SPARSEST = 1 << 28, 16
_HOSTILE = "No tool writes such files: don't use it."


def check_file(path: Path) -> None:
    """Make sure that ``path`` is a regular file with its data on the disk, before it is opened.

    Opening a pipe waits for ever, and reading a file with holes asks for memory that its author never wrote.

    Raises:
        InputError: it is a folder, a pipe, a device or a socket, or almost all of it is a hole.
    """
    with reading(path):
        status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise InputError("is a folder, not a file", file=path, remedy="Name a file in it.")
    if not stat.S_ISREG(status.st_mode):
        raise InputError("is no regular file (a pipe or a device)", file=path, remedy="Copy its content to a file.")
    # Some network disks don't count blocks, and Windows has none.
    held = getattr(status, "st_blocks", 0) * 512
    if held and status.st_size >= _SPARSE_FROM and held * _SPARSEST < status.st_size:
        what = f"claims {status.st_size} bytes, of which the disk holds {held}: the rest was never written"
        raise InputError(what, file=path, remedy="Is a download incomplete? Get it again.")
    # safetensors calls a file without permission a missing one.
    with reading(path), path.open("rb"):
        pass


# Headers of up to this size cost less to parse than to look through first.
_SHORT_HEADER, _CHUNK = 8 << 20, 1 << 20


def check_header(path: Path) -> None:
    """Count the tensors of a long safetensors header before it is parsed, which takes ten times its size.

    Raises:
        InputError: there are more than any model has.
    """
    entry = b'"data_offsets"'
    with reading(path), path.open("rb") as stream:
        left = int.from_bytes(stream.read(8), "little")
        if not _SHORT_HEADER < left <= 100 << 20:
            return
        count, tail = 0, b""
        while left > 0 and (chunk := stream.read(min(left, _CHUNK))):
            left -= len(chunk)
            # Within a string its quotes would be escaped.
            count += (tail + chunk).count(entry)
            tail = chunk[1 - len(entry) :]
    if count > MOST_TENSORS:
        raise InputError(f"holds {count} tensors, more than any model has", file=path, remedy=_HOSTILE)


# What the first bytes of a file tell of it, where its name says otherwise.
_KINDS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "Run `git lfs pull`, or download it."),
    (b"<!doctype html", "is a web page, not weights", "Download the file itself; its site may want a login."),
    (b"<html", "is a web page, not weights", "Download the file itself; its site may want a login."),
    (b"pk\x03\x04", "is a zip archive", "A PyTorch file needs its .pt or .bin suffix; another must be unpacked."),
    (b"gguf", "is a GGUF file", "Give it the suffix .gguf."),
    (b"\x1f\x8b", "is packed with gzip", "Unpack it first."),
)


def check_kind(path: Path, *, zipped: bool = False) -> None:
    """Say what a file is that is not what its name says.

    Args:
        path: the file.
        zipped: whether a zip archive is right.

    Raises:
        InputError: it is of a known other kind.
    """
    with reading(path), path.open("rb") as stream:
        begin = stream.read(32).lstrip().lower()
    for magic, what, remedy in _KINDS:
        if begin.startswith(magic) and not (zipped and magic.startswith(b"pk")):
            raise InputError(what, file=path, remedy=remedy)


def check_names(names: Collection[str], path: Path) -> None:
    """Refuse names that no model has, before each costs memory.

    Raises:
        InputError: there are too many of them, or one is too long.
    """
    if len(names) > MOST_TENSORS:
        raise InputError(f"holds {len(names)} tensors, more than any model has", file=path, remedy=_HOSTILE)
    for name in names:
        if len(name) > LONGEST_NAME:
            what = f"is a name of {len(name)} characters"
            raise InputError(what, file=path, key=f"{name[:60]}…", remedy=_HOSTILE)


def check_dimensions(shape: Collection[int], path: Path, name: str) -> None:
    """Refuse shapes that torch can't hold.

    Raises:
        InputError: too many dimensions, or a size beyond 63 bits.
    """
    if len(shape) > MOST_DIMENSIONS or any(not 0 <= size < 1 << 63 for size in shape):
        told = f"{len(shape)} dimensions" if len(shape) > MOST_DIMENSIONS else f"shape {list(shape)}"
        raise InputError(f"has {told}, which no tensor can have", file=path, key=name, remedy=_HOSTILE)


def parse_json(text: str | bytes, file: Path, key: str | None = None) -> Any:
    """JSON from a stranger's file.

    Raises:
        InputError: it is not valid, too deep, or has a key twice in one object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            # Readers differ in which of the two they take, so that one tool may see another file than the next.
            where = f"{key}: {twice}" if key else twice
            raise InputError("is there twice", file=file, key=where, remedy="Keep one of them.")
        return table

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise InputError("is JSON too deep to be read", file=file, key=key, remedy=_HOSTILE) from None
    except ValueError as error:
        raise InputError(f"can't be read as JSON ({error})", file=file, key=key, remedy="Get it again.") from None


def read_json(path: Path) -> Any:
    """A JSON file beside the weights (a config, a shard index).

    Raises:
        InputError: it can't be read, is no JSON, or is larger than any such file.
    """
    check_file(path)
    size = os.path.getsize(path)
    if size > LARGEST_JSON:
        raise InputError(f"has {size} bytes, too many for a JSON file of settings", file=path, remedy=_HOSTILE)
    with reading(path):
        text = path.read_bytes()
    # Editors on Windows put a mark of byte order in front.
    return parse_json(text.removeprefix(b"\xef\xbb\xbf"), path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The same, of a file that must hold a JSON object.

    Raises:
        InputError: see `read_json`; or it holds something else.
    """
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise InputError("is not a JSON object", file=path, remedy="Get it again.")
    return dict(content)
