"""One version of a base model: its tensors, read lazily, and its fingerprint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from regraft.adapter import MODEL, ModuleRef
from regraft.checkpoints import open_checkpoint
from regraft.errors import InputError
from regraft.fingerprint import ComponentPrint, Fingerprint, canonical, fingerprint_component, structure_of
from regraft.hub import hub_id_of
from regraft.sketch import take_sample
from regraft.tensors import Shape, TensorRef, announce, check_finite, read_rows


@dataclass(frozen=True)
class Base:
    """A base model on disk.

    Attributes:
        path: file or folder.
        components: component → parameter name → tensor.
        configs: component → its ``config.json``.
        description: how it lies on disk, for people (``safetensors``, ``gguf Q4_1``).
        left_out: stored tensors that belong to no shown one.
        partial: its values lie on the hub and are read in part: a weight's sample of rows stands for it.
    """

    path: Path
    components: Mapping[str, Mapping[str, TensorRef]]
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    description: str = ""
    left_out: tuple[str, ...] = ()
    partial: bool = False

    def modules(self, component: str) -> Iterator[str]:
        """Paths of the modules with a weight of two or more dimensions."""
        for name, ref in self.components[component].items():
            if name.endswith(".weight") and len(ref.shape) >= 2:
                yield name.removesuffix(".weight")

    def vectors(self, component: str) -> Iterator[str]:
        """Paths of the modules with a weight of one dimension: norms."""
        for name, ref in self.components[component].items():
            if name.endswith(".weight") and len(ref.shape) == 1:
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

    def announce(self, module: ModuleRef) -> None:
        """Say that the module's weight will be read soon."""
        announce(self._ref(module))

    def corner(self, module: ModuleRef, rows: int, columns: int) -> Tensor:
        """The first rows and columns of the module's weight as a matrix, in its stored dtype.

        Raises:
            InputError: the file is damaged, or the corner holds NaN or Inf.
        """
        part = read_rows(self._ref(module), [range(rows)]).flatten(1)[:, :columns]
        return check_finite(part, self.path, f"{module.path}.weight")

    def rows(self, module: ModuleRef, ranges: Sequence[range]) -> Tensor:
        """Rows of the module's weight, in its stored dtype.

        Raises:
            InputError: the file is damaged, or the rows hold NaN or Inf.
        """
        return check_finite(read_rows(self._ref(module), ranges), self.path, f"{module.path}.weight")

    def parameter(self, module: ModuleRef) -> TensorRef | None:
        """A parameter by its whole name (``module.path``), or None."""
        return self.components.get(module.component, {}).get(module.path)

    def _ref(self, module: ModuleRef) -> TensorRef:
        return self.components[module.component][f"{module.path}.weight"]

    @cached_property
    def structure(self) -> str:
        """Hash of every tensor's component, name and shape: alike for all versions of one architecture."""
        return Fingerprint({name: ComponentPrint(structure_of(t), "") for name, t in self.components.items()}).structure

    @cached_property
    def fingerprint(self) -> str:
        """The short form of `prints`, such as ``v1:`` + 24 digits + ``-`` + 8."""
        return str(self.prints)

    @cached_property
    def prints(self) -> Fingerprint:
        """The fingerprint of each component, by a fixed sample of its values: a small part of a read."""
        return self._prints(content=False)

    def exact_prints(self) -> Fingerprint:
        """The same with the hash of every stored byte: a whole read, one tensor at a time."""
        return self._prints(content=True)

    def _prints(self, *, content: bool) -> Fingerprint:
        if self.partial:
            self._fetch_samples()
        parts = {
            name: fingerprint_component(tensors, content=content, file=self.path)
            for name, tensors in self.components.items()
        }
        return Fingerprint(parts)

    def _fetch_samples(self) -> None:
        from regraft.hub.remote import ahead

        with ahead():
            for tensors in self.components.values():
                for _, ref in canonical(tensors):
                    take_sample(ref)


def open_base(path: str | Path, *, whole: bool = True) -> Base:
    """Open a base by its headers: a weights file, a shard index, a transformers / diffusers folder, or a hub id.

    Args:
        path: of it, or its id on the hub (see `regraft.hub`).
        whole: of a base on the hub, download the weights; else they are read in part as they are used.

    Raises:
        InputError: there is nothing that can be read as a checkpoint, or the hub refuses.
    """
    hub_id = hub_id_of(path)
    if hub_id is None:
        return _open_local(Path(path).expanduser())
    # Imported here: a local base needs no huggingface_hub.
    from regraft.hub.remote import is_remote
    from regraft.hub.repository import read_from_hub

    base, place = read_from_hub(hub_id, _open_local, whole=whole)
    partial = any(is_remote(ref) for tensors in base.components.values() for ref in tensors.values())
    return replace(base, path=place or Path(str(hub_id)), partial=partial)


def _open_local(path: Path) -> Base:
    checkpoint = open_checkpoint(path)
    components = {name: tensors for name, tensors in checkpoint.components.items() if tensors}
    if not components:
        raise InputError("holds no tensors", file=path, remedy="Is it a model? Get another one.")
    return Base(path, components, checkpoint.configs, checkpoint.description, checkpoint.left_out)


__all__ = ["MODEL", "Base", "open_base"]
