"""Transfer methods. One registered function each; adding one is adding a file.

A function's keyword parameters are its options. Per module it gets the two weights as float32 matrices and returns
a `Transport`; per pair it gets all of them (see `WeightPairs`) and returns a `Fit`; per adapter it gets the adapter
beside both bases (see `AdapterTask`) and returns what it made of it, a `Carried`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from regraft.adapter import ModuleRef
from regraft.base import Base
from regraft.errors import UsageError
from regraft.nearness import Nearness
from regraft.pairing import Pairing
from regraft.transport import Transport
from regraft.updates import Update

if TYPE_CHECKING:
    from regraft.methods.task import AdapterTask
    from regraft.runtime.record import Statistics

#: Which weights a method reads; "models": both bases are run on inputs that they make themselves; "adapters": it
#: learns from adapters that exist on both bases.
Need = Literal["old", "new", "models", "adapters"]
Per = Literal["module", "pair", "adapter"]
T = TypeVar("T")


@dataclass(frozen=True)
class Skip:
    """A module that the method leaves out.

    Attributes:
        reason: why.
        planned: whether that is the method's own rule (the port succeeds), or a change of shape that it can't carry
            (the port fails, unless partial results are allowed).
    """

    reason: str
    planned: bool = True


Outcome = Transport | Skip


def equal_sizes_only(method: str, old: Tensor, new: Tensor) -> Skip:
    """What is said of a module whose change of shape a method can't carry."""
    sizes = f"{tuple(old.shape)} there, {tuple(new.shape)} in the new base"
    return Skip(f"{method} carries equal sizes only: {sizes}", planned=False)


#: (out, in) of the old weight and (out', in') of the new one, kernels flattened.
Shapes = tuple[tuple[int, int], tuple[int, int]]


class WeightPairs(Protocol):
    """The weights of every paired module, one pair in memory at a time."""

    @property
    def wanted(self) -> Sequence[ModuleRef]:
        """The old base's modules that need a transport."""
        ...

    @property
    def sampled(self) -> bool:
        """Whether the weights are far away, so that a method should do with `nearness` if it can."""
        ...

    def __iter__(self) -> Iterator[ModuleRef]:
        """All paired modules of the old base, in its order: further evidence beside the wanted ones."""
        ...

    def nearness(self, module: ModuleRef) -> Nearness:
        """How near the module's two weights are."""
        ...

    def shapes(self, module: ModuleRef) -> Shapes:
        """Shapes of what `load` gives; nothing is read for it."""
        ...

    def load(self, module: ModuleRef) -> tuple[Tensor, Tensor]:
        """Old and new weight, float32 matrices (out, in) and (out', in')."""
        ...

    def side_by_side(self, function: Callable[[ModuleRef], T]) -> Iterator[T]:
        """What a function of one module gives for each of the wanted ones, in their order; several at once on a CPU."""
        ...

    def statistics(self, module: ModuleRef) -> Statistics | None:
        """Second moments of the module's inputs and outputs in both models on the same inputs.

        None where the models have no such module, or run it more than once. Only for methods that need "models".
        """
        ...

    def for_adapter(self, module: ModuleRef, outcome: Outcome, target: ModuleRef | None = None) -> Outcome:
        """What to keep of a module's transport: of a fit for one adapter alone, what it does to that one.

        A method passes each transport that has maps of its own through this before it makes the next; else it holds
        as much as both bases.

        Args:
            module: of the old base.
            outcome: what was found for it.
            target: the module of the new base that it leads to; by default the paired one.
        """
        ...

    @property
    def pairing(self) -> Pairing:
        """What answers to what, with the modules that were removed and added."""
        ...

    @property
    def bases(self) -> tuple[Base, Base]:
        """The old and the new base, for modules that are not paired, and for configs and tokens."""
        ...

    def weight(self, which: Literal["old", "new"], module: ModuleRef) -> Tensor:
        """Any module's weight in one of the bases, as `load` gives it."""
        ...


@dataclass(frozen=True)
class Fit:
    """What a per-pair method found.

    Attributes:
        transports: old module → transport or skip.
        method: name of the method that was used in the end (`auto` chooses).
        reason: why, in plain words.
        similarity: chance-corrected similarity after the alignment, where the method changes it.
        placed: old module → module of the new base → transport or skip, where the update goes elsewhere than the
            pairing has it, or to several modules.
    """

    transports: Mapping[ModuleRef, Outcome]
    method: str
    reason: str = ""
    similarity: Mapping[ModuleRef, float] = field(default_factory=dict)
    placed: Mapping[ModuleRef, Mapping[ModuleRef, Outcome]] = field(default_factory=dict)


@dataclass(frozen=True)
class Carried:
    """What a method made that depends on the adapter.

    Attributes:
        updates: by the new base's own module names, at strength 1: `LowRank`, or `Diff` by the parameter's whole name.
        method: name of the method that was used in the end (`auto` chooses).
        reason: why, in plain words.
        skipped: the old base's modules that the adapter changes and that have no part in it → why.
        places: old module → new module, where the method pairs them otherwise than by name and depth.
        figures: diagnostics for the report (``pull``, ``strength``, ``held_out``, ``seconds`` …).
        lost: new module → share of its ‖ΔW‖² that the cut to the wanted rank lost.
        wholes: changes of whole parameters (norms, biases) go along, as in a copy; else their effect is in ``updates``.
    """

    updates: Mapping[ModuleRef, Update]
    method: str
    reason: str = ""
    skipped: Mapping[ModuleRef, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    lost: Mapping[ModuleRef, float] = field(default_factory=dict)
    places: Mapping[ModuleRef, ModuleRef] = field(default_factory=dict)
    wholes: bool = True

    def part(self, target: ModuleRef) -> Update | None:
        """The update of a module of the new base, low-rank or dense."""
        whole = ModuleRef(target.component, f"{target.path}.weight")
        return self.updates.get(target) or self.updates.get(whole)


class AfterPair(Protocol):
    """What a method per pair does once there is an adapter."""

    def __call__(self, task: AdapterTask, chosen: Fit) -> Carried | str | None:
        """What it carried, or why it left the pair's own transports as they are; None where there is nothing to say."""
        ...


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: as ``--method`` takes it.
        reference: paper and equation, or tool.
        summary: one line for people.
        needs: which weights it reads; empty for those that need shapes only, and get None and an empty tensor.
        scope: ``pair`` (fits once per base pair, may be saved as a migration) or ``adapter``.
        tier: ``port``, ``refine`` or ``bridge``.
        per: whether ``function`` is called per module, once per pair, or once per adapter.
        resizes: whether it can carry an update onto a weight of another shape.
        function: the method itself.
        options: name → default.
        after: of a method per pair, see `AfterPair`.
        old_for: options that make a method which needs the new weight alone look at the old one, too.
    """

    name: str
    reference: str
    summary: str
    needs: tuple[Need, ...]
    scope: Literal["pair", "adapter"]
    tier: Literal["port", "refine", "bridge"]
    per: Per
    resizes: bool
    function: Callable[..., Any]
    options: Mapping[str, Any]
    after: AfterPair | None = None
    old_for: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        """Whether it can't do without running both models."""
        return "models" in self.needs

    def check_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The method's options with ``given`` laid over the defaults.

        Raises:
            UsageError: the method has no such option, or what is given is of another kind.
        """
        hints = get_type_hints(self.function)
        for name, value in given.items():
            if name not in self.options:
                has = ", ".join(f"--{option.replace('_', '-')}" for option in self.options) or "none"
                raise UsageError(f"method {self.name!r} has no option {name!r}", remedy=f"It has: {has}.")
            try:
                TypeAdapter(hints[name]).validate_python(value)
            except ValidationError as error:
                flag, why = name.replace("_", "-"), error.errors(include_url=False)[0]["msg"]
                raise UsageError(f"--{flag} {value!r} is nothing that {self.name} takes", remedy=f"{why}.") from None
        return {**self.options, **given}


_REGISTRY: dict[str, Method] = {}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def method(
    name: str,
    *,
    reference: str,
    summary: str,
    needs: tuple[Need, ...],
    scope: Literal["pair", "adapter"] = "pair",
    tier: Literal["port", "refine", "bridge"] = "port",
    per: Per = "module",
    resizes: bool = False,
    after: AfterPair | None = None,
    old_for: tuple[str, ...] = (),
) -> Callable[[_Function], _Function]:
    """Register the decorated function; its keyword-only parameters become its options."""

    def register(function: _Function) -> _Function:
        parameters = inspect.signature(function).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        _REGISTRY[name] = Method(
            name, reference, summary, needs, scope, tier, per, resizes, function, options, after, old_for
        )
        return function

    return register


@cache
def _import_all() -> None:
    for info in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{info.name}")


def methods() -> Mapping[str, Method]:
    """Every method by name: this package's, and those that were registered elsewhere."""
    # Sorted anew each time: a notebook registers its method after others have been asked for.
    _import_all()
    return dict(sorted(_REGISTRY.items()))


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in methods():
        raise UsageError(f"no method is named {name!r}", remedy=f"Known methods: {', '.join(methods())}.")
    return methods()[name]
