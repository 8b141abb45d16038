"""The old base twice over the same tensors: as it is, and with an adapter in it for as long as it is held."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from regraft.adapter import Adapter
from regraft.errors import InputError
from regraft.formats import load_adapter
from regraft.probes.pictures import makes_pictures
from regraft.runtime.applied import applied
from regraft.runtime.both import twin
from regraft.runtime.load import Kind, Loaded


class Adapted:
    """A model with an adapter at work in it; the model that it was made of stays as it is.

    Attributes:
        model: with the adapter.
    """

    def __init__(self, old: Loaded, adapter: Adapter) -> None:
        """Merge the adapter into a twin, whose other tensors are the model's own.

        Raises:
            InputError: the model lacks a module of the adapter, or the adapter adds tokens or changes no weights.
        """
        if adapter.tokens:
            raise InputError("the adapter adds tokens, which a bridge does not run", file=adapter.path)
        if not adapter.updates:
            raise InputError("the adapter changes no weights, so there is nothing to add", file=adapter.path)
        self.model = twin(old)
        # Entered for good: closing it, or losing the last reference to it, would put the old tensors back.
        self._held = ExitStack()
        self._held.enter_context(applied(self.model.components, adapter))


class PlugIns:
    """What pipelines have in common whose old base may have an adapter at work in it.

    Attributes:
        old: the base that the adapter was trained on; as it is.
    """

    old: Loaded
    _adapted: Adapted | None = None

    def load_lora_weights(self, adapter: Adapter | str | Path) -> None:
        """Have the old base run with an adapter, of any kind that changes weights.

        Args:
            adapter: read, or the file or folder to read.

        Raises:
            InputError: it can't be read, does not fit the old base, or another one is at work.
        """
        read = adapter if isinstance(adapter, Adapter) else load_adapter(Path(adapter))
        if self._adapted is not None:
            raise InputError(
                "another adapter is at work in the old base already",
                file=read.path,
                remedy="Call unload_lora_weights() first; `regraft merge` makes one of two.",
            )
        self._adapted = Adapted(self.old, read)

    def unload_lora_weights(self) -> None:
        """Have the old base run as it is."""
        self._adapted = None


def check_kinds(old: Loaded, new: Loaded, kind: Kind, what: str) -> None:
    """Fail where one of two models is not of the kind that a bridge is for.

    Args:
        old: the base that the adapter was trained on.
        new: the base that is bridged to.
        kind: that both must have.
        what: the kind, in words.

    Raises:
        InputError: one has another.
    """
    for model in (old, new):
        if model.kind != kind:
            raise InputError(f"is no {what} but of kind {model.kind} ({model.name})", file=model.path)


def check_drawing(old: Loaded, new: Loaded) -> None:
    """Fail where one of two models is no pipeline from prompts to pictures.

    Args:
        old: the base that plug-ins are for.
        new: the base that is bridged to.

    Raises:
        InputError: one is not.
    """
    check_kinds(old, new, "denoiser", "diffusion model")
    for model in (old, new):
        if not makes_pictures(model):
            raise InputError(f"a {model.name} makes no pictures of prompts", file=model.path)
