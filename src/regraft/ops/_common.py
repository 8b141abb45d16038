"""What the verbs on adapters share: reading without loss, the base's weight beside an update, writing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.base import Base
from regraft.errors import InputError, OutputError
from regraft.families import get_family, without_text_model
from regraft.formats import load_adapter
from regraft.formats._common import check_values
from regraft.formats._peft_config import with_saved
from regraft.formats.peft import PREFIX
from regraft.names import resolve_names
from regraft.pairing import find_component
from regraft.tensors import TensorRef
from regraft.updates import ByShape, Full, LoHa, LoKr, LowRank, Update, with_shapes
from regraft.updates.exact import as_lowrank, refactor

#: Called with (modules done, modules in all, module's name).
Ticker = Callable[[int, int, str], None]


def no_ticker(done: int, total: int, what: str) -> None:
    """Of a caller that wants to hear nothing."""


def read_whole(path: str | Path, base: Base | None = None) -> Adapter:
    """An adapter of which every key is understood and every value is a number.

    Args:
        path: of it.
        base: its names un-flatten underscored ones, its config says how GGUF orders rows.

    Raises:
        InputError: it can't be read, or holds NaN or Inf.
        OutputError: keys are not understood, which a result would lose.
    """
    adapter = read(path, base)
    if adapter.unrecognised:
        count = len(adapter.unrecognised)
        raise OutputError(
            f"{count} key{'s are' if count > 1 else ' is'} not understood and would be lost",
            file=path,
            key=adapter.unrecognised[0],
            remedy="If they are plain LoRA keys with underscored names, give the base with --base.",
        )
    return adapter


def read(path: str | Path, base: Base | None) -> Adapter:
    """An adapter, read with what its base tells of names, layouts and shapes.

    Raises:
        InputError: it can't be read, or holds NaN or Inf.
    """
    names = names_in(base) if base is not None else None
    adapter = load_adapter(path, names=names, base_config=base.configs.get(MODEL) if base is not None else None)
    check_values(adapter)
    return shaped(adapter, base)


def names_in(base: Base) -> dict[str, tuple[str, ...]]:
    """Component → parameter names, to un-flatten underscored names by."""
    return {component: tuple(tensors) for component, tensors in base.components.items()}


class BaseWeights:
    """The base's parameter that each update of an adapter changes."""

    def __init__(self, base: Base, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter

    @cached_property
    def _homes(self) -> dict[ModuleRef, ModuleRef]:
        homes: dict[ModuleRef, ModuleRef] = {}
        for component, updates in self.adapter.components().items():
            wanted = {parameter_of(path, update): path for path, update in updates.items()}
            home = self._component(component, wanted)
            if home is None:
                continue
            for name, found in resolve_names(wanted, set(self.base.components[home])).items():
                if found is not None:
                    homes[ModuleRef(component, wanted[name])] = ModuleRef(home, found)
        return homes

    def _component(self, component: str, names: Iterable[str]) -> str | None:
        found = find_component(self.base, component, [name.rpartition(".")[0] for name in names])
        # Norms and biases alone name no module that it knows.
        alone = component == MODEL and len(self.base.components) == 1
        return next(iter(self.base.components)) if found is None and alone else found

    def home(self, ref: ModuleRef) -> ModuleRef | None:
        """The parameter's component and name in the base, or None."""
        return self._homes.get(ref)

    def find(self, ref: ModuleRef) -> TensorRef | None:
        """The parameter in the base, still on disk, or None."""
        home = self._homes.get(ref)
        return self.base.parameter(home) if home is not None else None

    def load(self, ref: ModuleRef) -> Tensor:
        """The parameter, float32.

        Raises:
            InputError: the base has none of that name.
        """
        found = self.find(ref)
        if found is None:
            raise InputError(
                "the base has no such parameter",
                file=self.base.path,
                key=str(ref),
                remedy="Give the base that the adapter was made for.",
            )
        return found.load().float()

    def bias(self, ref: ModuleRef) -> TensorRef | None:
        """The bias beside a module's weight in the base, or None."""
        home = self._homes.get(ref)
        if home is None:
            return None
        return self.base.parameter(ModuleRef(home.component, home.path.removesuffix("weight") + "bias"))


def shaped(adapter: Adapter, base: Base | None) -> Adapter:
    """The adapter, its updates told the shapes of the base's weights; see `regraft.updates.with_shapes`."""
    if base is None or not any(isinstance(update, ByShape) for update in adapter.updates.values()):
        return adapter
    weights = BaseWeights(base, adapter)
    found = {ref: weights.find(ref) for ref in adapter.updates}
    shapes = {ref: weight.shape for ref, weight in found.items() if weight is not None}
    return replace(adapter, updates=with_shapes(adapter.updates, shapes))


def parameter_of(path: str, update: Update) -> str:
    """Name of the parameter that an update changes."""
    return path if update.by_parameter else f"{path}.weight"


class Factors:
    """Updates of an adapter as the LoRA that they equal.

    LoHa and LoKr files flatten a convolution's kernel: what shape its factors are to have, the family's table has told,
    or the base tells. An adapter of unknown family without a base has no such LoRA.
    """

    def __init__(self, adapter: Adapter, base: BaseWeights | None = None) -> None:
        self.adapter, self.base = adapter, base

    def _has_kernels(self) -> bool:
        family = get_family(self.adapter.family)
        return family is None or family.main == "unet"

    def of(self, ref: ModuleRef, update: Update) -> LowRank | None:
        """The same change as factors, or None where there are none."""
        if isinstance(update, LoHa | LoKr) and update.weight_shape is None:
            found = self.base.find(ref) if self.base is not None else None
            if found is not None and prod(found.shape) == prod(update.shape):
                update = replace(update, weight_shape=found.shape)
            elif len(update.shape) == 2 and self._has_kernels():
                return None
        return as_lowrank(update)


def saving_norms(adapter: Adapter, base: Base, made: Collection[ModuleRef]) -> Adapter:
    """A PEFT adapter whose config names the norms of which it holds the weight, with their biases beside it.

    PEFT finds a weight's key without that, but puts the value into the base itself, where it stays when the adapter is
    off. Of a module that is named it needs every parameter.

    Args:
        adapter: with a config of a LoRA.
        base: that it is for.
        made: names of weights that it holds whole.
    """
    weights, updates, named = BaseWeights(base, adapter), dict(adapter.updates), list[str]()
    for ref in made:
        home, found = weights.home(ref), weights.find(ref)
        if home is None or found is None or len(found.shape) != 1 or not ref.path.endswith(".weight"):
            continue
        there, stem = home.path.removesuffix("weight"), ref.path.removesuffix("weight")
        own = {name.removeprefix(there) for name in base.components[home.component] if name.startswith(there)}
        if not own <= {"weight", "bias"}:
            continue
        bias, value = ModuleRef(ref.component, f"{stem}bias"), base.parameter(ModuleRef(home.component, f"{there}bias"))
        if value is not None and bias not in updates:
            updates[bias] = Full(value, f"{PREFIX}{bias.path}")
        named.append(stem.removesuffix("."))
    return replace(adapter, updates=updates, config=with_saved(adapter.config or {}, named))


def change_on(base: BaseWeights, ref: ModuleRef, update: Update) -> Tensor:
    """What the update does to its base's weight, magnitude and all: merged − W, float32, of the weight's shape."""
    weight = base.load(ref)
    try:
        if isinstance(update, ByShape):
            return update.delta(weight)
        return update.merged(weight).reshape(weight.shape) - weight
    except ValueError as error:
        remedy = "Give the base that the adapter was made for."
        raise InputError(str(error), file=base.adapter.path, key=str(ref), remedy=remedy) from None
    except RuntimeError:
        raise InputError(
            f"does not fit the base's weight of shape {list(weight.shape)}",
            file=base.adapter.path,
            key=str(ref),
            remedy="Give the base that the adapter was made for.",
        ) from None


def factored(delta: Tensor, *, energy: float | None, rank: int | None) -> tuple[LowRank, float]:
    """ΔW as factors, and the share of ‖ΔW‖² that they keep."""
    found, kept = refactor(delta, energy=energy, rank=rank)
    return found, min(1.0, kept)


def aligned_names(adapters: Iterable[Adapter]) -> list[dict[ModuleRef, ModuleRef]]:
    """For each adapter: its modules → one common name.

    A PEFT adapter of one model is the pipeline's component of that family where the others name components, and the
    level ``text_model.`` of text encoders does not count.
    """
    adapters = list(adapters)
    components = {component for adapter in adapters for component in adapter.components()}
    known = next((adapter.family for adapter in adapters if adapter.family is not None), None)
    aligned = []
    for adapter in adapters:
        family = get_family(adapter.family or known)
        main = MODEL
        if components != {MODEL}:
            # Of an unknown family, the one component that the others name.
            others = components - {MODEL}
            main = family.main if family is not None else next(iter(others)) if len(others) == 1 else MODEL
        named: dict[ModuleRef, ModuleRef] = {}
        for ref in adapter.updates:
            component = main if ref.component == MODEL else ref.component
            path = without_text_model(ref.path) if component.startswith("text_encoder") else ref.path
            named[ref] = ModuleRef(component, path)
        aligned.append(named)
    return aligned


def cast(adapter: Adapter, dtype: torch.dtype | None) -> Adapter:
    """The adapter with all its updates in one dtype; as it is for None."""
    if dtype is None:
        return adapter
    return replace(adapter, updates={ref: update.cast(dtype) for ref, update in adapter.updates.items()})


def for_target(adapter: Adapter, target: Path, format: str) -> Adapter:
    """The adapter as the kind of its output wants it: PEFT is a folder, or by its suffix a bare file."""
    if format == "peft" and adapter.format == "peft":
        return replace(adapter, layout={**adapter.layout, "bare": target.suffix == ".safetensors"})
    return adapter


def same_tensors(one: Mapping[str, TensorRef], two: Mapping[str, TensorRef]) -> bool:
    """Whether two updates hold the same tensors, byte for byte."""
    return one.keys() == two.keys() and all(
        ref.dtype == two[role].dtype and ref.shape == two[role].shape and torch.equal(ref.load(), two[role].load())
        for role, ref in one.items()
    )


def beside(update: Update) -> tuple[object, ...]:
    """What ΔW depends on beside the stored tensors: a scale, the seed of what is drawn."""
    return getattr(update, "scale", None), getattr(update, "seed", None)


def spelt(value: float | int | None, otherwise: str = "–") -> str:
    """A number for a table."""
    return otherwise if value is None else f"{value:.4g}"
