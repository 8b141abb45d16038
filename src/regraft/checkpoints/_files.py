"""Weights files: what kind they are, which a folder may lead to, and their tensors with quantisation undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from regraft.checkpoints.quantised import Plain, plain_weights
from regraft.errors import InputError, reading
from regraft.tensor_files import TORCH_SUFFIXES, read_tensor_file


def container(file: Path) -> str:
    """The kind of a weights file, for people."""
    return "PyTorch" if file.suffix.lower() in TORCH_SUFFIXES else "safetensors"


def describe(*parts: str | Iterable[str]) -> str:
    """``safetensors, bnb nf4``: each part once, in their order."""
    flat = [item for part in parts for item in ([part] if isinstance(part, str) else part)]
    return ", ".join(dict.fromkeys(item for item in flat if item))


def kept_inside(file: Path, folder: Path) -> Path:
    """``file`` itself, where it lies in ``folder`` once links are followed.

    A folder from a stranger must not lead the reader to other places on the disk by a link. The hub's cache is let
    through: there, the files of a snapshot are links to ``../../blobs``.

    Raises:
        InputError: the file is a link that leaves the folder.
    """
    with reading(file):
        target, home = file.resolve(), folder.resolve()
    if target.is_relative_to(home):
        return file
    for snapshot in (home, *home.parents):
        if snapshot.parent.name == "snapshots" and target.parent == snapshot.parent.parent / "blobs":
            return file
    raise InputError(
        "is a link that leaves its folder",
        file=file,
        remedy="Put the file itself there, or give the base by the file's own path.",
    )


def read_plain(file: Path, config: Mapping[str, Any] | None = None) -> tuple[Plain, str]:
    """A weights file's tensors with quantisation undone, and its description."""
    plain = plain_weights(read_tensor_file(file).tensors, config)
    return plain, describe(container(file), plain.kinds)
