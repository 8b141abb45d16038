"""An adapter: which module gets which update, independent of the file format it came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from regraft.tensors import TensorRef
from regraft.updates import Update

#: Component name of an adapter or base that is one model alone (a PEFT adapter, a transformers folder).
MODEL = "model"


class ModuleRef(NamedTuple):
    """A module by component and by the base's own dotted name.

    For a `Full` update the path is the parameter's whole name, such as ``classifier.weight``.
    """

    component: str
    path: str

    def __str__(self) -> str:
        return self.path if self.component == MODEL else f"{self.component}.{self.path}"


class TokenRef(NamedTuple):
    """An added token, and the text encoder that its embedding belongs to.

    Attributes:
        component: the text encoder; ``model`` where the file names none and has one alone.
        token: as prompts spell it.
        output: the vector replaces what the encoder gives out, not what goes in (OneTrainer's ``_out``).
    """

    component: str
    token: str
    output: bool = False

    def __str__(self) -> str:
        where = "" if self.component in (MODEL, "text_encoder") else f"{self.component}."
        return f"{where}{self.token}{' (output)' if self.output else ''}"


@dataclass(frozen=True)
class Adapter:
    """Module → update, plus what is needed to write the file again.

    Attributes:
        updates: in the order of the file.
        format: name of the format that it was read from, as ``regraft inspect`` prints it.
        layout: what the format's writer needs to give the same keys back (generation of names, prefixes).
        metadata: the safetensors header's metadata.
        config: PEFT's ``adapter_config.json``.
        family: name of the base model's family, where the keys tell it.
        tokens: embeddings of added tokens, (width,) or (vectors, width), by token.
        unrecognised: keys that the format's reader did not understand.
        sidecars: files beside the weights that belong to the adapter (tokenizer, README), by name.
        path: where it was read from.
        left_behind: names of further weights files of its folder (optimizer state, another adapter), not carried.
        base_config: ``config.json`` of the base, where the caller knew it.
    """

    updates: Mapping[ModuleRef, Update]
    format: str
    layout: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    family: str | None = None
    tokens: Mapping[TokenRef, TensorRef] = field(default_factory=dict)
    unrecognised: tuple[str, ...] = ()
    sidecars: Mapping[str, Path] = field(default_factory=dict)
    path: Path | None = None
    left_behind: tuple[str, ...] = ()
    base_config: Mapping[str, Any] | None = None

    def components(self) -> dict[str, dict[str, Update]]:
        """The updates grouped: component → module path → update."""
        grouped: dict[str, dict[str, Update]] = {}
        for (component, path), update in self.updates.items():
            grouped.setdefault(component, {})[path] = update
        return grouped

    def save(self, path: str | Path, *, format: str | None = None, overwrite: bool = False) -> list[Path]:
        """Write the adapter, whole or not at all; returns the files written.

        Args:
            path: a ``.safetensors`` file, or a folder for PEFT.
            format: name of another format; by default the one it was read from.
            overwrite: replace what is there.

        Raises:
            OutputError: ``path`` exists, can't be written, or the format can't hold this adapter.
        """
        from regraft.formats import save_adapter

        return save_adapter(self, Path(path), format=format, overwrite=overwrite)
