"""Two bases loaded side by side, and second models of the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from torch import nn

from regraft.adapter import ModuleRef
from regraft.base import Base
from regraft.errors import InputError
from regraft.names import resolve_names
from regraft.runtime.libraries import quiet_libraries
from regraft.runtime.load import Loaded, load_model
from regraft.runtime.room import REMEDY, bytes_of, check_room

#: Which of two bases.
Side = Literal["old", "new"]


@dataclass(frozen=True, eq=False)
class BothModels:
    """The old and the new base, ready to run.

    Attributes:
        old, new: the models.
        turns: the device that they take turns on, so that it never holds both; None: they stay where they are.
    """

    old: Loaded
    new: Loaded
    turns: str | None = None

    @classmethod
    def load(
        cls,
        old: Base,
        new: Base,
        config: Path | None = None,
        device: str = "cpu",
        *,
        in_turns: bool = False,
        dtype: str = "float32",
        remedy: str = REMEDY,
    ) -> BothModels:
        """Load both; see `regraft.runtime.load_model`.

        Args:
            old: the base that adapters were trained on.
            new: the base that they are to run on.
            config: of bare weights files.
            device: where they are run.
            in_turns: keep them in the machine's memory, and bring each to the device for its `turn` alone.
            dtype: name of the dtype that they run in.
            remedy: what can be done where there is no room for them.

        Raises:
            InputError: they don't fit into memory, one can't be loaded, or one is a diffusion model and the other is
                not.
        """
        in_turns = in_turns and device != "cpu"
        place = "cpu" if in_turns else device
        check_room((old, new), place, each=bytes_of(dtype), remedy=remedy)
        for base in (old, new) if in_turns else ():
            check_room((base,), device, each=bytes_of(dtype), remedy=remedy)
        with quiet_libraries():
            first, second = (load_model(base.path, config=config, device=place, dtype=dtype) for base in (old, new))
        if first.kind != second.kind:
            what = f"is a model of another kind ({second.kind}) than the old base ({first.kind})"
            raise InputError(what, file=new.path)
        return cls(first, second, device if in_turns else None)

    @contextmanager
    def turn(self, which: Side) -> Iterator[None]:
        """Only this model is run inside."""
        if self.turns is not None:
            self.side("new" if which == "old" else "old").to("cpu")
            self.side(which).to(self.turns)
        yield

    def side(self, which: Side) -> Loaded:
        return self.old if which == "old" else self.new


def twin(model: Loaded) -> Loaded:
    """A second model (or pipeline) of the very same tensors: what is exchanged in one leaves the other as it was."""
    # Known to the copier beforehand, parameters and buffers are shared, not copied.
    memo: dict[int, Any] = {}
    for part in model.components.values():
        memo |= {id(tensor): tensor for tensor in chain(part.parameters(), part.buffers())}
    components = {name: copy.deepcopy(part, memo) for name, part in model.components.items()}
    pipeline = model.pipeline
    if pipeline is not None:
        pipeline = copy.copy(pipeline)
        for name, part in components.items():
            object.__setattr__(pipeline, name, part)
        # A scheduler counts its steps.
        if hasattr(pipeline, "scheduler"):
            object.__setattr__(pipeline, "scheduler", copy.deepcopy(pipeline.scheduler))
    return replace(model, components=components, pipeline=pipeline)


def modules_of(model: Loaded, refs: Iterable[ModuleRef]) -> dict[ModuleRef, nn.Module]:
    """A base's modules in the loaded model, by name up to a common prefix; those that it lacks are left out."""
    grouped: dict[str, list[str]] = {}
    for component, path in refs:
        grouped.setdefault(component, []).append(path)
    found: dict[ModuleRef, nn.Module] = {}
    for component, paths in grouped.items():
        here = model.components.get(component)
        if here is None and len(model.components) == 1:
            here = next(iter(model.components.values()))
        if here is None:
            continue
        there = dict(here.named_modules(remove_duplicate=False))
        for path, name in resolve_names(paths, there.keys()).items():
            if name is not None:
                found[ModuleRef(component, path)] = there[name]
    return found
