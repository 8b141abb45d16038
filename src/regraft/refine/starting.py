"""What a refine begins from: a given port, the one that `auto` picks, or nothing but the adapter's kind of modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.carry import Settings
from regraft.errors import InputError, Refused
from regraft.lineage import with_port
from regraft.methods._layers import role_of
from regraft.methods.task import Running
from regraft.migration import summarise
from regraft.migrations.base_id import from_summary
from regraft.plan import check_families
from regraft.port import port
from regraft.settling import for_factors
from regraft.tensors import InMemory, Shape
from regraft.updates import LowRank, Update

#: The name of the start without effect.
ZERO: Literal["zero"] = "zero"
#: The method of a start where no map of weights works.
STREAM = "stream"
# Of modules that begin without effect where the adapter is no LoRA.
_RANK = 16

Tick = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Start:
    """An adapter by the new base's own names.

    Attributes:
        adapter: to train.
        how: the method that ported it, or the file that it was read from.
        reason: why that one.
    """

    adapter: Adapter
    how: str
    reason: str


def start_of(adapter: Adapter, old: Base, new: Base, running: Running, tick: Tick | None = None) -> Start:
    """The port by `auto`; where it is refused, `stream`'s, on the adapter's kinds of modules in the whole new base.

    Args:
        adapter: as it was trained on ``old``.
        old: the old base.
        new: the new base.
        running: how the models are run.
        tick: as `port` takes it.

    Raises:
        Refused: the adapter is for another family than ``old``.
    """
    settings = Settings(allow_partial=True, running=running)
    try:
        result = port(adapter, old, new, "auto", settings=settings, tick=tick)
    except (Refused, InputError) as error:
        return _from_afar(adapter, old, new, settings, error.what)
    return Start(_fully_named(result.adapter, adapter, old, new), result.report.method, result.report.method_reason)


def from_zero(adapter: Adapter, old: Base, new: Base) -> Start:
    """An adapter without effect, on the adapter's kinds of modules in the whole new base: all is left to the training.

    Args:
        adapter: as it was trained on ``old``.
        old: the old base.
        new: the new base.

    Raises:
        Refused: the adapter is for another family than ``old``.
        InputError: the new base has no modules of those kinds.
    """
    check_families(adapter, old, new)
    zero = _of_kind(adapter, old, new)
    if not zero:
        raise InputError(
            "changes no kind of module throughout the old base that the new one has, too",
            file=adapter.path,
            remedy="Let it begin from a port: leave out --start zero.",
        )
    metadata = with_port(adapter, refine_entry(old, new))
    return Start(replace(for_factors(adapter), updates=zero, metadata=metadata), ZERO, "as asked")


def _from_afar(adapter: Adapter, old: Base, new: Base, settings: Settings, why: str) -> Start:
    """Where no map of weights works."""
    zero = _of_kind(adapter, old, new)
    try:
        result = port(adapter, old, new, STREAM, settings=replace(settings, force=True))
    except InputError as error:
        if not zero:
            raise
        metadata = with_port(adapter, refine_entry(old, new))
        empty = replace(for_factors(adapter), updates=zero, metadata=metadata)
        return Start(empty, ZERO, f"{why}; stream: {error.what}")
    return Start(_fully_named(result.adapter, adapter, old, new), STREAM, why)


def refine_entry(old: Base, new: Base) -> dict[str, object]:
    """The lineage's port of what was not ported by any method, and is refined at once."""
    return {
        "from": from_summary(summarise(old)),
        "to": from_summary(summarise(new)),
        "method": "refine",
    }


def _fully_named(ported: Adapter, adapter: Adapter, old: Base, new: Base) -> Adapter:
    """A port; where the new base has blocks that nothing was carried to, those begin at zero."""
    # The change of a layer's whole weight is named after the weight.
    there = {ref.path.removesuffix(".weight") for ref in ported.updates}
    more = {ref: update for ref, update in _of_kind(adapter, old, new).items() if ref.path not in there}
    return replace(ported, updates={**ported.updates, **more})


def _of_kind(adapter: Adapter, old: Base, new: Base) -> dict[ModuleRef, LowRank]:
    """Empty updates of every module of the new base whose role the adapter changes in every block of the old one."""
    like: dict[tuple[str, str], list[tuple[Update, int]]] = {}
    modules = {component: set(old.modules(component)) for component in old.components}
    for ref, update in adapter.updates.items():
        if not update.by_parameter:
            home = _home(ref.component, old)
            there = ref.path in modules.get(home, ())
            dims = len(old.shape(ModuleRef(home, ref.path)) if there else update.shape)
            like.setdefault((_home(ref.component, new), role_of(ref)[1]), []).append((update, dims))
    found: dict[ModuleRef, LowRank] = {}
    for component in new.components:
        before = [role_of(ModuleRef(component, path))[1] for path in old.modules(_home(component, old))]
        for path in new.modules(component):
            ref = ModuleRef(component, path)
            role, shape = role_of(ref)[1], new.shape(ref)
            own = like.get((component, role), [])
            if own and len(own) >= before.count(role) and len(shape) == own[0][1]:
                found[ref] = _empty(own[0][0], shape)
    return found


def _empty(like: Update, shape: Shape) -> LowRank:
    """A LoRA without effect, of an update's own rank and scale where that has them."""
    rank = like.rank if isinstance(like, LowRank) else min(_RANK, shape[0], prod(shape[1:]))
    up, down = torch.zeros(shape[0], rank), torch.zeros(rank, prod(shape[1:]))
    if isinstance(like, LowRank):
        return replace(like, magnitude=None, bias=None).with_factors(up, down, shape)
    return LowRank(InMemory(up), InMemory(down), 1.0).with_factors(up, down, shape)


def _home(component: str, base: Base) -> str:
    """A component by the base's name: a single model may have another in the adapter."""
    return component if component in base.components or len(base.components) != 1 else next(iter(base.components))
