"""An adapter on real models for a while: merged into their weights, and taken off again bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.errors import InputError
from regraft.names import resolve_names
from regraft.residual import check_whole
from regraft.tensors import Shape
from regraft.updates import ByShape, Full, Ia3, LowRank, Update, with_shapes
from regraft.updates.vera import UNDRAWN

_NOT_THERE = "no such module"


@dataclass(frozen=True)
class Place:
    """Where one update goes: ``module``'s parameter (or buffer) ``name``."""

    module: nn.Module
    name: str
    update: Update

    @property
    def tensor(self) -> Tensor:
        value = getattr(self.module, self.name)
        assert isinstance(value, Tensor)
        return value

    def merged(self) -> Tensor:
        """The changed tensor, in the dtype, shape and place of the present one (a `Full` one may have more rows)."""
        old = self.tensor
        return self.update.merged(old.detach().cpu()).reshape(self.shape).to(device=old.device, dtype=old.dtype)

    @property
    def shape(self) -> Shape:
        """The shape that the tensor will have."""
        return self.update.shape if isinstance(self.update, Full) else tuple(self.tensor.shape)

    def change(self) -> float:
        """‖W' − W‖_F: DoRA's magnitude and whole values included; rows that the base lacks are not counted."""
        old = self.tensor.detach().cpu().float()
        new = self.update.merged(old).reshape(self.shape)
        return float((new[: len(old)] if self.shape != tuple(old.shape) else new).sub(old).double().norm())


@contextmanager
def applied(components: Mapping[str, nn.Module], adapter: Adapter | None) -> Iterator[None]:
    """Merge ``adapter`` into the models; on leaving, the very tensors that were there are back.

    Parameters are exchanged, not written to, so that a tied weight changes only where the adapter names it.

    Args:
        components: component → model.
        adapter: None applies nothing.

    Raises:
        InputError: a model lacks a module of the adapter, or has it in another shape; or the adapter is no update of
            the model as it is, see `regraft.residual`.
    """
    if adapter is not None:
        check_whole(adapter)
    found, lost = find_places(components, adapter) if adapter is not None else ({}, {})
    if lost:
        raise _lacking(lost, adapter)
    undo: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
    try:
        for place in found.values():
            _exchange(place.module, place.name, place.merged(), undo)
            _add_bias(place, undo)
        yield
    finally:
        for table, name, old in reversed(undo):
            table[name] = old


def fitting(components: Mapping[str, nn.Module], adapter: Adapter) -> Adapter:
    """The part of ``adapter`` that has a place in these models, by name and shape; it may be empty."""
    found, _ = find_places(components, adapter)
    return replace(adapter, updates={ref: update for ref, update in adapter.updates.items() if ref in found})


def find_places(
    components: Mapping[str, nn.Module], adapter: Adapter
) -> tuple[dict[ModuleRef, Place], dict[ModuleRef, str]]:
    """Where each update goes, and why the others have no place."""
    found: dict[ModuleRef, Place] = {}
    lost: dict[ModuleRef, str] = {}
    grouped = adapter.components()
    for component, updates in grouped.items():
        tries = [
            _places_in(components[name], component, updates) for name in _candidates(component, grouped, components)
        ]
        if not tries:
            lost.update({ModuleRef(component, path): f"there is no {component}" for path in updates})
            continue
        # A single model's adapter has no component's name: it belongs where most of it fits, or at least is named.
        here, left = max(tries, key=lambda t: (len(t[0]), -sum(why == _NOT_THERE for why in t[1].values())))
        found |= here
        lost |= left
    return found, lost


def _candidates(component: str, wanted: Mapping[str, object], there: Mapping[str, nn.Module]) -> list[str]:
    if component in there:
        return [component]
    return list(there) if len(wanted) == 1 and (len(there) == 1 or component == MODEL) else []


def _places_in(
    model: nn.Module, component: str, updates: Mapping[str, Update]
) -> tuple[dict[ModuleRef, Place], dict[ModuleRef, str]]:
    found: dict[ModuleRef, Place] = {}
    lost: dict[ModuleRef, str] = {}
    tensors = _tensors(model)
    parameters = {path: path if u.by_parameter else f"{path}.weight" for path, u in updates.items()}
    names = resolve_names(parameters.values(), tensors.keys())
    there = {path: tensors[name] for path in updates if (name := names[parameters[path]]) is not None}
    updates = with_shapes(updates, {path: tuple(getattr(*place).shape) for path, place in there.items()})
    for path, update in updates.items():
        ref, target = ModuleRef(component, path), names[parameters[path]]
        if target is None:
            lost[ref] = _NOT_THERE
            continue
        place = Place(*there[path], update)
        why = _misfit(place)
        if why is None:
            found[ref] = place
        else:
            lost[ref] = why
    return found, lost


def _tensors(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name → (owner, attribute) of every parameter and buffer; tied ones under each of their names."""
    return {
        f"{path}.{name}" if path else name: (module, name)
        for path, module in model.named_modules(remove_duplicate=False)
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    }


def _misfit(place: Place) -> str | None:
    have, want = tuple(place.tensor.shape), place.update.shape
    if isinstance(place.update, Full):
        # An embedding with added tokens is saved whole, with more rows than the base's.
        longer = len(want) == 2 and want[1:] == have[1:] and want[0] > have[0] and place.name == "weight"
        return None if want == have or longer else f"its shape is {have}, the adapter's {want}"
    if not place.update.fits(have):
        return f"its shape is {have}, the adapter's {want}"
    return UNDRAWN if isinstance(place.update, ByShape) and not place.update.additive else None


def _exchange(
    module: nn.Module, name: str, new: Tensor, undo: list[tuple[dict[str, Tensor | None], str, Tensor | None]]
) -> None:
    table: dict[str, Tensor | None]
    if name in module._buffers:
        table = module._buffers
    else:
        table, new = module._parameters, nn.Parameter(new, requires_grad=False)  # type: ignore[assignment]
    undo.append((table, name, table.get(name)))
    table[name] = new


def _add_bias(place: Place, undo: list[tuple[dict[str, Tensor | None], str, Tensor | None]]) -> None:
    update, weight, old = place.update, place.tensor, getattr(place.module, "bias", None)
    if isinstance(update, LowRank) and update.bias is not None:
        added = update.scale * update.bias.load().float()
        new = added if old is None else old.detach().float().cpu() + added
    elif isinstance(update, Ia3) and old is not None:
        new = update.merged_bias(old.detach().cpu())
    else:
        return
    _exchange(place.module, "bias", new.to(device=weight.device, dtype=weight.dtype), undo)


def _lacking(lost: Mapping[ModuleRef, str], adapter: Adapter | None) -> InputError:
    some = "; ".join(f"{ref}: {why}" for ref, why in list(lost.items())[:3]) + ("; …" if len(lost) > 3 else "")
    total = 0 if adapter is None else len(adapter.updates)
    return InputError(
        f"the model has no place for {len(lost)} of the adapter's {total} modules ({some})",
        file=None if adapter is None else adapter.path,
        remedy="Is the adapter for this base? One for several components needs the whole pipeline's folder.",
    )
