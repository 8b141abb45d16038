"""What a method that depends on the adapter is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.pairing import Pairing
from regraft.runtime.both import BothModels
from regraft.tensors import InMemory
from regraft.transport import Transport
from regraft.updates import Diff, Full, LowRank, Update
from regraft.updates.exact import refactor

#: Of the output: a number, a share of ‖ΔW‖² to keep, dense, or None for the adapter's own, module by module.
Rank = int | float | Literal["full"] | None

#: Formats whose tools read a whole ΔW (`diff` keys); elsewhere a LoRA of full rank says the same.
HOLD_DIFF = ("kohya", "lycoris", "comfyui", "onetrainer", "musubi")


@dataclass(frozen=True)
class Running:
    """How both models are run, where a method does that.

    Attributes:
        n_inputs: self-made inputs to fit on; None for the method's own number.
        seed: of the inputs.
        prompts: texts to use instead of made ones.
        config: of bare weights files; see `regraft.runtime.load_model`.
        device: ``cpu``, ``cuda`` or ``mps``.
        weights_only: run no model, where the method can do without.
    """

    n_inputs: int | None = None
    seed: int = 0
    prompts: tuple[str, ...] | None = None
    config: Path | None = None
    device: str = "cpu"
    weights_only: bool = False


#: Nothing asked for.
AS_IT_IS = Running()


def _no_tick(done: int, total: int, what: str) -> None:
    pass


@dataclass(frozen=True, eq=False)
class AdapterTask:
    """One adapter, to be brought from one base to another.

    Attributes:
        adapter: what is to be carried of it.
        old: the base that it was trained on.
        new: the base that it is to run on.
        pairing: which module answers to which.
        modules: the old base's modules that the adapter changes → its update there (whole parameters are not here).
        copy: what the migration's transports make of it, by the new base's names: the plain copy, or a grown one.
        running: how to run the models.
        rank: wanted of the result.
        tick: called with (done, in all, what).
        similarity: of the two bases' weights under the adapter (see `regraft.nearness`), by share of ‖ΔW‖².
        distance: likewise, their relative drift.
        given: both models, where they are loaded already.
    """

    adapter: Adapter
    old: Base
    new: Base
    pairing: Pairing
    modules: Mapping[ModuleRef, Update]
    copy: Callable[[], Adapter]
    running: Running = AS_IT_IS
    rank: Rank = None
    tick: Callable[[int, int, str], None] = _no_tick
    similarity: float | None = None
    distance: float | None = None
    given: BothModels | None = field(default=None, repr=False)

    @cached_property
    def models(self) -> BothModels:
        """Both bases, loaded on first use.

        Raises:
            InputError: one of them can't be loaded.
            RegraftError: transformers or diffusers is not installed.
        """
        if self.given is not None:
            return self.given
        return BothModels.load(self.old, self.new, self.running.config, self.running.device)

    @cached_property
    def _copied(self) -> Adapter:
        return self.copy()

    def copied(self) -> Adapter:
        """What the migration's transports make of it, by the new base's own names: the plain copy, or a grown one."""
        return self._copied

    @property
    def seed(self) -> int:
        return self.running.seed

    @property
    def prompts(self) -> tuple[str, ...] | None:
        return self.running.prompts

    @property
    def holds_diff(self) -> bool:
        """Whether the adapter's format has keys for a whole ΔW."""
        return self.adapter.format in HOLD_DIFF

    def target(self, module: ModuleRef) -> ModuleRef | None:
        """The new base's module that answers to one of the old base."""
        return self.pairing[module].module

    def delta(self, module: ModuleRef) -> Tensor:
        """ΔW on the old base as a float32 matrix (out, in · kh · kw), DoRA's magnitude and multiplications included.

        What the update does to the layer's bias is not in it: see `bias`.
        """
        weight = self.old.weight(module).float()
        return (self.modules[module].merged(weight).reshape(weight.shape) - weight).flatten(1)

    def bias(self, module: ModuleRef) -> Tensor | None:
        """The copy's change of the new module's bias (PEFT's ``lora_bias``), (out',) float32; None without one."""
        own, target = self.modules.get(module), self.target(module)
        if not isinstance(own, LowRank) or own.bias is None or target is None:
            return None
        copy = self.copied().updates.get(target)
        return copy.scale * copy.bias.load().float() if isinstance(copy, LowRank) and copy.bias is not None else None

    def rank_of(self, module: ModuleRef) -> int | float | None:
        """The wanted rank of one of the old base's modules; None for a dense result."""
        if self.rank == "full":
            return None
        own = self.modules[module].rank if module in self.modules else None
        return self.rank if self.rank is not None else own

    def made(self, module: ModuleRef, up: Tensor, down: Tensor) -> LowRank:
        """A `LowRank` of new factors, in dtype, scale and spelling of the adapter's own update, with the copy's bias.

        Args:
            module: of the old base.
            up: (out', r).
            down: (r, in' · kh · kw).
        """
        shape = self._new_shape(module)
        like = self.modules.get(module)
        plain = LowRank(InMemory(up), InMemory(down), 1.0)
        if not isinstance(like, LowRank):
            return plain.with_factors(up, down, shape)
        scale = like.scale if like.scale else 1.0
        # Even norms of both factors, and the file's own alpha.
        up = up / scale
        if len(like.shape) == 2 and len(shape) > 2 and prod(shape[2:]) == 1:
            shape = shape[:2]
        change = self.bias(module)
        bias = None if change is None else InMemory((change / scale).to(like.up.dtype))
        return replace(like, magnitude=None, bias=bias, scale=scale).with_factors(up, down, shape)

    def dense(self, module: ModuleRef, delta: Tensor) -> tuple[ModuleRef, Update]:
        """A whole ΔW (out', in' · kh · kw) as the format can hold it, by its name on the new base.

        ``diff`` keys, or a LoRA of full rank, which says the same.
        """
        target = self.target(module)
        assert target is not None
        if not self.holds_diff:
            factors = refactor(delta).update.factors()
            return target, self.made(module, *factors)
        name = f"{target.path}.weight"
        value = delta.reshape(self._new_shape(module)).to(self._dtype(module)).contiguous()
        return ModuleRef(target.component, name), Diff(InMemory(value), f"{target.path}.diff")

    def as_wanted(self, updates: Mapping[ModuleRef, Update]) -> dict[ModuleRef, Update]:
        """Updates that were carried as they are, cut (or filled up) to the wanted rank."""
        if self.rank is None or self.rank == "full":
            return dict(updates)
        cut: dict[ModuleRef, Update] = {}
        for ref, update in updates.items():
            cut[ref] = update
            if isinstance(update, LowRank) and update.rank != self.rank:
                moved = Transport().factors(*update.factors(), self.rank)
                cut[ref] = update.with_factors(moved.up, moved.down)
        return cut

    def _dtype(self, module: ModuleRef) -> torch.dtype:
        like = self.modules.get(module)
        return like.down.dtype if isinstance(like, LowRank) else torch.float32

    def _new_shape(self, module: ModuleRef) -> tuple[int, ...]:
        target = self.target(module)
        assert target is not None
        return self.new.shape(target)

    def whole_parameters(self) -> dict[ModuleRef, Update]:
        """The copy's changes of whole parameters: norms, biases, heads."""
        return {ref: update for ref, update in self.copied().updates.items() if isinstance(update, Diff | Full)}
