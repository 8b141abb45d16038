"""Ways in which a base lies on disk. One file each, with ``READER = Reader(...)``; adding one is adding a file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from regraft.errors import InputError, reading, understanding
from regraft.tensors import TensorRef


@dataclass(frozen=True)
class Checkpoint:
    """A base's tensors by component, still on disk.

    Attributes:
        components: component → parameter name → tensor. One model alone is the component ``model``.
        configs: component → its ``config.json``, where there is one.
        description: how it lies on disk, for people: ``safetensors``, ``gguf Q4_1``, ``safetensors, bnb nf4`` …
        left_out: stored tensors that belong to no shown one: an autoencoder, position numbers, …
    """

    components: Mapping[str, Mapping[str, TensorRef]]
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    description: str = ""
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """One way to lie on disk.

    Attributes:
        name: for messages.
        order: detection order, lowest first.
        detect: whether this path is of that way.
        read: path → checkpoint, from headers alone.
    """

    name: str
    order: int
    detect: Callable[[Path], bool]
    read: Callable[[Path], Checkpoint]


@cache
def readers() -> tuple[Reader, ...]:
    """Every reader, in the order of detection."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return tuple(sorted((m.READER for m in modules if hasattr(m, "READER")), key=lambda reader: reader.order))


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, lazily.

    Raises:
        InputError: there is nothing, or nothing that is a checkpoint.
    """
    with reading(path):
        exists = path.exists()
    if not exists:
        raise InputError("no such file or folder", file=path, remedy="Check the path of the base.")
    for reader in readers():
        with understanding(reader.name, path):
            if reader.detect(path):
                return reader.read(path)
    raise InputError(
        "is no checkpoint",
        file=path,
        remedy="Give a weights file, a shard index, or a transformers / diffusers folder with weights in it.",
    )
