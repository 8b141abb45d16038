"""Adapter file formats. One file each, with the facts about it at its top; adding one is adding a file.

A format file defines ``FORMAT = Format(...)``. The order of detection is by ``specificity``, highest first.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from regraft.adapter import Adapter
from regraft.errors import InputError, UsageError, reading, understanding
from regraft.hub import hub_id_of
from regraft.limits import read_json_object
from regraft.output import ADAPTER_CONFIG, write_whole
from regraft.tensor_files import TORCH_SUFFIXES, read_tensor_file
from regraft.tensors import TensorRef


@dataclass(frozen=True)
class AdapterFile:
    """What lies on disk, before any format's rules are applied.

    Attributes:
        path: what the user named: a file or a PEFT folder.
        tensors: by key, in the order of the header.
        metadata: the safetensors header's metadata.
        config: ``adapter_config.json`` beside the weights, if there is one.
        sidecars: other files of the folder (tokenizer, README), by name.
        left_behind: names of the folder's other weights files.
        base_config: ``config.json`` of the base, where the caller knows it.
    """

    path: Path
    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None
    sidecars: Mapping[str, Path] = field(default_factory=dict)
    left_behind: tuple[str, ...] = ()
    base_config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Written:
    """What a format's writer wants on disk.

    Attributes:
        tensors: key → tensor, contiguous, on the CPU.
        metadata: the safetensors header's metadata.
        files: further files by name: text, or a file to copy. If there are any, or ``folder`` is set, the
            output is a folder.
        beside: further weights files of such a folder by name: key → tensor.
        weights_name: name of the weights file inside of such a folder.
        save: writes the weights file, where that is no safetensors file.
        suffix: that such a file must have.
        notes: what had to be changed on the way, for the user.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    files: Mapping[str, str | Path] = field(default_factory=dict)
    beside: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    folder: bool = False
    weights_name: str = "adapter_model.safetensors"
    save: Callable[[Path], None] | None = None
    suffix: str = ".safetensors"
    notes: tuple[str, ...] = ()

    @property
    def in_folder(self) -> bool:
        """Whether the output is a folder."""
        return self.folder or bool(self.files)

    def named(self, stem: str) -> str:
        """The name of the output, file or folder."""
        return stem if self.in_folder else f"{stem}{self.suffix}"


#: Component → every module or parameter path of the base, to un-flatten underscored names by.
BaseNames = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Format:
    """One adapter file format.

    Attributes:
        name: as ``inspect`` prints and ``--format`` takes it.
        summary: one line for people.
        specificity: detection order, highest first.
        detect: whether these keys are of this format.
        read: keys → adapter. Gets the base's names where the caller knows them.
        write: adapter → keys; None where the format is only read.
    """

    name: str
    summary: str
    specificity: int
    detect: Callable[[AdapterFile], bool]
    read: Callable[[AdapterFile, BaseNames | None], Adapter]
    write: Callable[[Adapter], Written] | None = None


@cache
def formats() -> dict[str, Format]:
    """Every format by name, in the order of detection."""
    found = [
        module.FORMAT
        for info in pkgutil.iter_modules(__path__)
        if hasattr(module := importlib.import_module(f"{__name__}.{info.name}"), "FORMAT")
    ]
    return {format.name: format for format in sorted(found, key=lambda f: (-f.specificity, f.name))}


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in formats():
        raise UsageError(f"no format is named {name!r}", remedy=f"Known formats: {', '.join(sorted(formats()))}.")
    return formats()[name]


_WEIGHTS_NAMES = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
    "learned_embeds.safetensors",
    "learned_embeds.bin",
    "spectral_shifts.safetensors",
)
_NOT_CARRIED = (".safetensors", *TORCH_SUFFIXES)


def _weights_in(folder: Path) -> Path:
    for name in _WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    single = sorted(folder.glob("*.safetensors"))
    if len(single) == 1:
        return single[0]
    raise InputError(
        "this folder holds no adapter weights" if not single else "this folder holds several weights files",
        file=folder,
        remedy=f"Expected {_WEIGHTS_NAMES[0]} in it, or name the file itself.",
    )


def _adapter_in(folder: Path) -> Path:
    """The folder itself, or the one adapter in it: PEFT saves an adapter with a name into a folder of that name."""
    if (folder / ADAPTER_CONFIG).is_file() or any(folder.glob("*.safetensors")):
        return folder
    inside = sorted(file.parent for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if len(inside) > 1:
        names = ", ".join(found.name for found in inside)
        raise InputError(f"this folder holds several adapters: {names}", file=folder, remedy="Name one of them.")
    return inside[0] if inside else folder


def open_adapter_file(path: Path, *, whole: bool = True) -> AdapterFile:
    """Header, PEFT config and companions of an adapter file, folder or hub id; no tensor is read.

    Args:
        path: of it, or its id on the hub (see `regraft.hub`).
        whole: download an adapter on the hub; else its tensors are fetched as they are used.

    Raises:
        InputError: it is missing, damaged or empty, or the hub refuses.
    """
    hub_id = hub_id_of(path)
    if hub_id is None:
        return _open_local(path)
    from regraft.hub.repository import read_from_hub

    file, place = read_from_hub(hub_id, _open_local, whole=whole, companions=True)
    return replace(file, path=place or Path(str(hub_id)))


def _open_local(path: Path) -> AdapterFile:
    with reading(path):
        path = _adapter_in(path) if path.is_dir() else path
        weights = _weights_in(path) if path.is_dir() else path
    content = read_tensor_file(weights)
    if not content.tensors:
        raise InputError("holds no tensors", file=weights, remedy="Get it again, or save it again from its trainer.")
    config_file, config = weights.parent / ADAPTER_CONFIG, None
    # A bare file may lie beside another adapter's config: only PEFT's own name ties them.
    if config_file.is_file() and (path.is_dir() or weights.stem == "adapter_model"):
        config = read_json_object(config_file)
    with reading(path):
        beside = sorted(file for file in weights.parent.iterdir() if file.is_file()) if config is not None else []
    others = [file for file in beside if file.name not in (ADAPTER_CONFIG, weights.name)]
    sidecars = {file.name: file for file in others if file.suffix not in _NOT_CARRIED and _stays_inside(file)}
    left_behind = tuple(file.name for file in others if file.name not in sidecars)
    return AdapterFile(path, content.tensors, content.metadata, config, sidecars, left_behind)


def _stays_inside(file: Path) -> bool:
    """Whether a file that may be a link lies in its own folder, or where the hub's cache keeps such a folder's files.

    A stranger's folder with a link to a private file must not put a copy of it into what is published next.
    """
    true, folder = file.resolve(), file.parent.resolve()
    return true.is_relative_to(folder) or true.parent == folder.parent.parent / "blobs"


def load_adapter(
    path: str | Path,
    *,
    names: BaseNames | None = None,
    base_config: Mapping[str, Any] | None = None,
    whole: bool = True,
) -> Adapter:
    """Read an adapter of any known format; tensors stay on disk until they are used.

    Args:
        path: a weights file, a PEFT folder, or a hub id.
        names: component → module names of the base, needed only for underscored names of unknown families.
        base_config: ``config.json`` of the base, needed only for the values of a GGUF LoRA of Llama.
        whole: download an adapter on the hub; else its tensors are fetched as they are used.

    Raises:
        InputError: it can't be read, no format knows it, or a tensor pair is broken.
    """
    file = replace(open_adapter_file(Path(path).expanduser(), whole=whole), base_config=base_config)
    for format in formats().values():
        with understanding(f"{format.name} file", file.path):
            if format.detect(file):
                return replace(format.read(file, names), left_behind=file.left_behind, base_config=base_config)
    some = ", ".join(list(file.tensors)[:3])
    raise InputError(
        f"no known adapter format has keys like {some}",
        file=path,
        remedy="Is it an adapter? `regraft inspect` lists what is known; a whole checkpoint goes to --from or --to.",
    )


def rendered(adapter: Adapter, format: str) -> Written:
    """The file of an adapter in a format, its lineage true of this very file.

    Raises:
        UsageError: the format is only read.
        OutputError: it can't hold this adapter.
    """
    writer = get_format(format).write
    if writer is None:
        raise UsageError(f"format {format!r} can be read, not written", remedy="Choose another with --format.")
    from regraft.lineage.updates import restated

    written = writer(adapter)
    return replace(written, metadata=restated(adapter, written))


def save_adapter(adapter: Adapter, path: Path, *, format: str | None = None, overwrite: bool = False) -> list[Path]:
    """See `Adapter.save`."""
    written = rendered(adapter, format or adapter.format)
    return write_whole(written, path, overwrite=overwrite, source=adapter.path)
