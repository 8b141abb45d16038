"""One version of a base model: its tensors, read lazily, and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.adapter import MODEL, ModuleRef
from regraft.checkpoints import open_checkpoint
from regraft.errors import InputError, reading
from regraft.tensors import Shape, TensorRef, check_finite, n_bytes, read_rows

# A tensor up to this size goes into the fingerprint whole; of a larger one, this many rows, evenly spread.
_WHOLE_BYTES, _SAMPLE_ROWS = 1 << 16, 8


@dataclass(frozen=True)
class Base:
    """A base model on disk.

    Attributes:
        path: file or folder.
        components: component → parameter name → tensor.
        configs: component → its ``config.json``.
    """

    path: Path
    components: Mapping[str, Mapping[str, TensorRef]]
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def modules(self, component: str) -> Iterator[str]:
        """Paths of the modules with a weight of two or more dimensions."""
        for name, ref in self.components[component].items():
            if name.endswith(".weight") and len(ref.shape) >= 2:
                yield name.removesuffix(".weight")

    def shape(self, module: ModuleRef) -> Shape:
        """Shape of the module's weight, from the header."""
        return self._ref(module).shape

    def weight(self, module: ModuleRef) -> Tensor:
        """The module's weight, in its stored dtype.

        Raises:
            InputError: the file is damaged, or the weight holds NaN or Inf.
        """
        key = f"{module.path}.weight"
        return check_finite(self._ref(module).load(), self.path, key)

    def corner(self, module: ModuleRef, rows: int, columns: int) -> Tensor:
        """The first rows and columns of the module's weight as a matrix, in its stored dtype.

        Raises:
            InputError: the file is damaged, or the corner holds NaN or Inf.
        """
        part = read_rows(self._ref(module), [range(rows)]).flatten(1)[:, :columns]
        return check_finite(part, self.path, f"{module.path}.weight")

    def parameter(self, module: ModuleRef) -> TensorRef | None:
        """A parameter by its whole name (``module.path``), or None."""
        return self.components.get(module.component, {}).get(module.path)

    def _ref(self, module: ModuleRef) -> TensorRef:
        return self.components[module.component][f"{module.path}.weight"]

    @cached_property
    def structure(self) -> str:
        """Hash of every tensor's component, name and shape: alike for all versions of one architecture."""
        digest = hashlib.sha256()
        for component, tensors in sorted(self.components.items()):
            for name, ref in sorted(tensors.items()):
                digest.update(f"{component}/{name}:{list(ref.shape)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """``v0:`` + a hash of the structure and of stored bytes.

        Small tensors enter whole, larger ones by evenly spread rows, so that it takes a fraction of a read.
        """
        digest = hashlib.sha256(self.structure.encode())
        for _, tensors in sorted(self.components.items()):
            for name, ref in sorted(tensors.items()):
                with reading(self.path, name):
                    digest.update(_sample(ref).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return f"v0:{digest.hexdigest()[:32]}"


def _sample(ref: TensorRef) -> Tensor:
    if n_bytes(ref) <= _WHOLE_BYTES or not ref.shape or ref.shape[0] <= _SAMPLE_ROWS:
        return ref.load()
    rows = [round(i * (ref.shape[0] - 1) / (_SAMPLE_ROWS - 1)) for i in range(_SAMPLE_ROWS)]
    return read_rows(ref, [range(row, row + 1) for row in rows])


def open_base(path: str | Path) -> Base:
    """Open a base by its headers: a weights file, a shard index, or a transformers / diffusers folder.

    Raises:
        InputError: there is nothing that can be read as a checkpoint.
    """
    path = Path(path).expanduser()
    checkpoint = open_checkpoint(path)
    components = {name: tensors for name, tensors in checkpoint.components.items() if tensors}
    if not components:
        raise InputError("holds no tensors", file=path, remedy="Is it a model? Get another one.")
    return Base(path, components, checkpoint.configs)


__all__ = ["MODEL", "Base", "open_base"]
