"""Each update of an adapter, carried by its module's transport."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.changes import by_itself, is_copied, on_weight
from regraft.errors import InputError
from regraft.families import block_of
from regraft.methods import Carried
from regraft.methods.task import AS_IT_IS, Rank, Running
from regraft.migration import Entry
from regraft.orientation import orientation_in
from regraft.plan import Selection
from regraft.prepare import Preparation
from regraft.report.schema import PortedModule, Status
from regraft.tensors import InMemory, Shape, check_finite
from regraft.transport import Transport
from regraft.updates import Diff, Full, LoHa, LoKr, LowRank, Slice, SpectralShift, Tucker, Update
from regraft.updates.columns import widen
from regraft.updates.exact import as_lowrank
from regraft.updates.lowrank import is_per_column
from regraft.wholes import changed, respelled, shifted
from regraft.widening import widens


def matches(glob: str, ref: ModuleRef, family: str | None) -> bool:
    """Whether a glob names a module, the block that it counts to (``IN04``) or a part that holds it (``mid_block``)."""
    names = (f"{ref.component}.{ref.path}", ref.path, block_of(family, ref.path, ref.component) or "")
    inside = any(name.startswith(f"{glob}.") for name in names)
    return inside or any(fnmatchcase(name, glob) for name in names)


@dataclass(frozen=True)
class Settings:
    """How an adapter is to come out.

    Attributes:
        selection: which of its modules.
        strength: factor on every update.
        block_strength: (glob over block or module names, factor), each multiplied in where it matches.
        rank: of the output: a number, a share of ‖ΔW‖² to keep (a float), ``full`` for all of it, or None for the
            adapter's own.
        save_dtype: of the output's tensors; None for the input's own.
        allow_partial: carry on where a key or shape is not understood.
        force: carry on where the verdict is a refusal.
        private: keep paths, names, prompts and tag lists of the header.
        running: how both models are run, by a method that does that.
    """

    selection: Selection = Selection()
    strength: float = 1.0
    block_strength: tuple[tuple[str, float], ...] = ()
    rank: Rank = None
    save_dtype: torch.dtype | None = None
    allow_partial: bool = False
    force: bool = False
    private: bool = True
    running: Running = AS_IT_IS

    def strength_of(self, ref: ModuleRef, family: str | None) -> float:
        """The factor on one module's update."""
        factors = [factor for glob, factor in self.block_strength if matches(glob, ref, family)]
        total = self.strength
        for factor in factors:
            total *= factor
        return total


class Carrier:
    """Carries one update after the other."""

    def __init__(
        self, adapter: Adapter, ready: Preparation, settings: Settings, old: Base | None, new: Base | None
    ) -> None:
        self.adapter, self.ready, self.settings, self.old, self.new = adapter, ready, settings, old, new
        # Modules and whole parameters of the new base, by its own names, whose update `adopt` has taken.
        self.answered: set[ModuleRef] = set()

    def carry(self, ref: ModuleRef, update: Update) -> tuple[PortedModule, ModuleRef | None, Update | None]:
        """Report row, the module's name on the new base, and the update there."""
        ready = self.ready
        for reasons in (ready.left_out, ready.evidence.skipped, ready.located.missing):
            if ref in reasons:
                return self._row(ref, update, "skipped", reasons[ref]), None, None
        if str(ref) in ready.problems:
            return self._row(ref, update, "refused", ready.problems[str(ref)]), None, None
        if ref in ready.wholes:
            return self._carry_whole(ref, update)
        entry = ready.migration.entries[ready.located.modules[ref]]
        assert entry.transport is not None
        assert entry.target is not None
        target = respelled(ref, entry.target)
        factors, how, strength = self._factored(ref, update, entry)
        carried, kept, cut = self._transport(ref, factors, entry, entry.transport, strength)
        row = self._row(ref, update, "ported", entry.reason + how, target=target, entry=entry)
        row = row.model_copy(update={"energy_kept": kept, "cut_loss": cut, "rank_out": carried.rank})
        return row, target, carried

    def copies(self, ref: ModuleRef, update: Update) -> Iterator[tuple[ModuleRef, Update]]:
        """The further modules of the new base that take an update which `carry` has carried, and the update there."""
        entry = self.ready.migration.entries.get(self.ready.located.modules.get(ref, ref))
        for copy in entry.copies if entry is not None else ():
            assert copy.transport is not None
            assert copy.target is not None
            factors, _, strength = self._factored(ref, update, copy)
            yield respelled(ref, copy.target), self._transport(ref, factors, copy, copy.transport, strength)[0]

    def _factored(self, ref: ModuleRef, update: Update, entry: Entry) -> tuple[Update, str, float]:
        """The update itself where a copy does, else the LoRA that it equals; what that is; the strength to be given.

        Raises:
            InputError: it acts on a weight that is not at hand.
        """
        assert entry.transport is not None
        strength = self.settings.strength_of(ref, self.adapter.family)
        if entry.transport.is_identity and self._rank(entry.transport) in (None, update.rank):
            kept = is_copied(update, weakened=strength != 1.0) or (strength == 1.0 and self._unmoved(ref, entry))
            if kept and (update.magnitude is None or not isinstance(update, Slice)):
                return update, "", strength
        found = as_lowrank(update)
        if found is not None:
            same = found.kind == update.kind and not isinstance(update, Slice)
            if same:
                return found, "", strength
            return self._oriented(ref, found), f"; a {update.kind} as the LoRA that it equals", strength
        alone = by_itself(update.scaled(strength))
        if alone is not None:
            return (
                self._oriented(ref, alone),
                f"; a {update.kind} converted: its change, a LoRA of rank {alone.rank}",
                1.0,
            )
        made = self._oriented(ref, self._on_old(ref, update.scaled(strength)))
        return made, f"; a {update.kind} converted: its change of the old weight, a LoRA of rank {made.rank}", 1.0

    def _oriented(self, ref: ModuleRef, made: Update) -> Update:
        """A LoRA that another kind has become, as PEFT's files have one of an embedding or of GPT-2's Conv1D."""
        base, home = self.old or self.new, self.ready.located.modules[ref]
        if self.adapter.format != "peft" or base is None or not isinstance(made, LowRank):
            return made
        if made.orientation != "weight":
            return made
        return replace(made, orientation=orientation_in(base, home, len(made.shape)))

    def _unmoved(self, ref: ModuleRef, entry: Entry) -> bool:
        """Whether the new base has the very weight of the old one."""
        if self.old is None or self.new is None or entry.target is None:
            return False
        home = self.ready.located.modules[ref]
        return torch.equal(self.old.weight(home), self.new.weight(entry.target))

    def _on_old(self, ref: ModuleRef, update: Update) -> LowRank:
        home, old = self.ready.located.modules[ref], self.old
        if old is None:
            what = f"is a {update.kind}, whose change depends on the old base's weight"
            raise InputError(what, file=self.adapter.path, key=str(ref), remedy="Give --from too.")
        bias = old.parameter(ModuleRef(home.component, f"{home.path}.bias"))
        try:
            return on_weight(
                update, old.weight(home), self._fused(update, old), bias.load() if bias is not None else None
            )
        except ValueError as error:
            remedy = "Leave the module out with --exclude."
            raise InputError(str(error), file=self.adapter.path, key=str(ref), remedy=remedy) from None

    def _fused(self, update: Update, old: Base) -> Tensor | None:
        """The old base's fused weight that an update acts across, put together from the adapter's other parts of it."""
        if not isinstance(update, Slice):
            return None
        parts = update.of.parts()
        rows: dict[int, Tensor] = {}
        for ref, other in self.adapter.updates.items():
            same = isinstance(other, Slice) and all(other.of.parts().get(name) is part for name, part in parts.items())
            if not isinstance(other, Slice) or not same or ref not in self.ready.located.modules:
                continue
            weight = old.weight(self.ready.located.modules[ref])
            for start, stop in other.ranges:
                rows[start], weight = weight[: stop - start], weight[stop - start :]
        whole = torch.cat([rows[start] for start in sorted(rows)]) if rows else None
        ends = [start + len(part) for start, part in sorted(rows.items())]
        return whole if sorted(rows) == [0, *ends[:-1]] else None

    def _transport(
        self, ref: ModuleRef, update: Update, entry: Entry, transport: Transport, strength: float
    ) -> tuple[Update, float, float]:
        # Maps that lie in a file are read once, for the factors and all that goes with them.
        transport = transport.held()
        rank = self._rank(transport)
        carried, kept, cut = update, 1.0, 0.0
        if isinstance(update, LowRank) and not (transport.is_identity and rank in (None, update.rank)):
            up, down = update.factors()
            moved = transport.factors(up, down, rank)
            shape = _shape_like(update.shape, entry.shape_new or entry.shape_old)
            carried = update.with_factors(moved.up, moved.down, shape)
            if update.bias is not None and transport.rotates:
                bias = transport.terms[0][0] @ update.bias.load().float()[:, None]
                carried = replace(carried, bias=InMemory(bias[:, 0].to(update.bias.dtype)))
            kept, cut = moved.energy_kept, moved.cut_loss
        carried = carried.scaled(strength)
        if update.magnitude is not None:
            assert isinstance(carried, LowRank | Tucker | LoHa | LoKr)
            norms = self._norms(ref, update.magnitude.shape, entry)
            magnitude = carry_magnitude(update.magnitude.load(), norms, transport, strength)
            if magnitude is None:
                raise InputError(
                    "this DoRA magnitude can't be carried without the norms of both bases' weights",
                    file=self.adapter.path,
                    key=getattr(update.magnitude, "name", str(ref)),
                    remedy="Give --from and --to, or leave the module out with --exclude.",
                )
            carried = replace(carried, magnitude=InMemory(magnitude))
        return carried, kept, cut

    def _rank(self, transport: Transport) -> int | float | None:
        """The wanted rank of what a transport gives; all of a copy is the copy itself."""
        rank = self.settings.rank
        return rank if rank != "full" else None if transport.is_identity else 1.0

    def adopt(
        self, ref: ModuleRef, update: Update, made: Carried
    ) -> tuple[PortedModule, ModuleRef | None, Update | None]:
        """The same as `carry`, with what a method made of the whole adapter."""
        ready = self.ready
        whole = ref in ready.wholes
        if whole and not made.wholes and ready.wholes[ref].fate == "change":
            return (
                self._row(ref, update, "skipped", "its effect goes through other modules of the new base"),
                None,
                None,
            )
        if whole or ref in ready.left_out or ref in ready.located.missing or str(ref) in ready.problems:
            place = ready.wholes[ref].place if ref in ready.wholes else None
            if place is not None:
                self.answered.add(place)
            return self.carry(ref, update)
        home = ready.located.modules[ref]
        entry = ready.migration.entries[home]
        answer = made.places.get(home, entry.target)
        carried = made.part(answer) if answer is not None else None
        if carried is None or answer is None:
            return self._row(ref, update, "skipped", made.skipped.get(home, entry.reason)), None, None
        self.answered.add(answer)
        target = respelled(ref, answer)
        before = update.norm() if update.additive else 0.0
        kept = (carried.norm() / before) ** 2 if before > 0 else None
        row = self._row(ref, update, "ported", f"{entry.reason}; by its effect", target=target, entry=entry)
        row = row.model_copy(update={"energy_kept": kept, "cut_loss": made.lost.get(answer), "rank_out": carried.rank})
        strength = self.settings.strength_of(ref, self.adapter.family)
        name = ModuleRef(target.component, f"{target.path}.weight") if carried.by_parameter else target
        return row, name, carried.scaled(strength)

    def added(self, made: Carried, used: Collection[str]) -> Iterator[tuple[PortedModule, ModuleRef, Update]]:
        """What a method made beside the modules that the adapter changes.

        Args:
            made: all of it.
            used: names of the new base's modules that answer to one of the adapter's.
        """
        entries = self.ready.migration.entries
        # A base of one model alone names its component otherwise than an adapter for a pipeline does.
        spelt = {
            entry.target.component: ref.component
            for ref, home in self.ready.located.modules.items()
            if (entry := entries.get(home)) is not None and entry.target is not None
        }
        for name, update in made.updates.items():
            ref = ModuleRef(spelt.get(name.component, name.component), name.path)
            module = ModuleRef(name.component, name.path.removesuffix(".weight"))
            if module in self.answered or name in self.answered or str(ref) in used:
                continue
            row = PortedModule(
                name=str(ref),
                target=str(ref),
                status="ported",
                reason=f"the adapter leaves it alone; changed by {made.method}",
                energy_kept=None,
                rank_in=None,
                rank_out=update.rank,
                cut_loss=made.lost.get(name),
            )
            yield row, ref, update.scaled(self.settings.strength)

    def _norms(self, ref: ModuleRef, shape: Shape, entry: Entry) -> Sequence[Tensor] | None:
        """Norms of the old and of the new weight along the axis of a magnitude of this shape."""
        axis = 1 if is_per_column(shape) else 0
        if axis == 0 and entry.row_norms is not None:
            return entry.row_norms.unbind()
        if self.old is None or self.new is None or entry.target is None:
            return None
        weights = (self.old.weight(self.ready.located.modules[ref]), self.new.weight(entry.target))
        return [weight.float().transpose(0, axis).flatten(1).norm(dim=1) for weight in weights]

    def _carry_whole(self, ref: ModuleRef, update: Update) -> tuple[PortedModule, ModuleRef | None, Update | None]:
        whole = self.ready.wholes[ref]
        if whole.fate == "skip":
            return self._row(ref, update, "skipped", whole.reason), None, None
        strength = self.settings.strength_of(ref, self.adapter.family)
        if isinstance(update, SpectralShift):
            check_finite(update.shift.load(), self.adapter.path, getattr(update.shift, "name", str(ref)))
            target, shift, how = shifted(update, whole, strength)
            return self._row(ref, update, "ported", how, target=target), target, shift
        assert isinstance(update, Full | Diff)
        check_finite(update.value.load(), self.adapter.path, update.key)
        row = self._row(ref, update, "ported", whole.reason, target=whole.target)
        if isinstance(update, Diff):
            if whole.move is not None:
                moved = whole.move(update.value.load()).to(update.value.dtype).contiguous()
                update = replace(update, value=InMemory(moved))
            wide = whole.after is not None and widens(update.shape, whole.after.shape)
            carried = widen(update, whole.after.shape[1]) if whole.after is not None and wide else update
            assert carried is not None
            return row, whole.target, carried.scaled(strength)
        if whole.fate == "own":
            return row, whole.target, update
        return row, whole.target, changed(update, whole, strength)

    def _row(
        self,
        ref: ModuleRef,
        update: Update,
        status: Status,
        reason: str,
        *,
        target: ModuleRef | None = None,
        entry: Entry | None = None,
    ) -> PortedModule:
        near = entry.nearness if entry is not None else self.ready.evidence.nearness.get(ref)
        return PortedModule(
            name=str(ref),
            target=str(target) if target is not None else None,
            status=status,
            reason=reason,
            energy_kept=None,
            rank_in=update.rank,
            rank_out=None,
            similarity=near.similarity if near is not None else None,
            distance=near.distance if near is not None else None,
            share=self.ready.evidence.shares.get(ref),
        )


def carry_magnitude(
    magnitude: Tensor, norms: Sequence[Tensor] | None, transport: Transport, strength: float
) -> Tensor | None:
    """DoRA's magnitude on the new base: its relative change of every norm, m / ‖W_old‖, carried onto ‖W_new‖.

    Under a rotation, and wherever the sizes differ, the squared relative changes mix by the squared entries of the map
    of the magnitude's own side: L's for norms of rows, Rᵀ's for norms of columns.

    Args:
        magnitude: one per output row, (n,) or (n, 1, …), or per input column, (1, n, …).
        norms: of the old weight, (n,), and of the new, (n',), along the same axis; None where they are not known.
        transport: of the module.
        strength: 0 gives ‖W_new‖ itself, so that nothing changes.

    Returns:
        The magnitude in its own dtype, or None where it can't be carried.
    """
    if norms is None and strength == 1.0 and not transport.rotates:
        # Nothing is known of a drift of the rows: a copy.
        return magnitude
    if norms is None or magnitude.numel() != len(norms[0]):
        return None
    flat, (old, new) = magnitude.float().reshape(-1), norms
    # A row of zeros has no relative change: its magnitude stays.
    relative = torch.where(old > 0, flat / old, torch.ones_like(flat))
    if not transport.rotates and len(old) == len(new):
        carried = torch.where(old > 0, flat * (new / old), flat)
    else:
        weights = _mixing(transport, len(old), len(new), columns=is_per_column(tuple(magnitude.shape)))
        mixed = (weights @ relative.square()) / weights.sum(dim=1).clamp_min(1e-12)
        # A unit that nothing leads to has no change.
        carried = new * torch.where(weights.sum(dim=1) > 1e-6, mixed, torch.ones_like(mixed)).sqrt()
    if strength != 1.0:
        carried = new + strength * (carried - new)
    shape = [len(new) if size == len(old) and size > 1 else size for size in magnitude.shape]
    result: Tensor = carried.reshape(shape).to(magnitude.dtype)
    return result


def _mixing(transport: Transport, old: int, new: int, *, columns: bool) -> Tensor:
    """Squared entries of the map of one side, (new, old); of a flattened kernel, summed over its places."""
    left, right = transport.terms[0]
    map_ = right.T if columns else left
    squared = map_.squared(right.out_features or old if columns else old)
    if squared.shape == (new, old):
        return squared
    return squared.reshape(new, -1, old, squared.shape[1] // old).sum(dim=(1, 3))


def _shape_like(shape: Sequence[int], new: Sequence[int]) -> tuple[int, ...]:
    """The new weight's shape, spelt with as many dimensions as the adapter's own (1 × 1 convolutions).

    A kernel that the adapter flattens (LoHa, LoKr) is spelt as the weight has it.
    """
    if len(shape) > len(new):
        return (*new[:2], *shape[2:])
    return tuple(new) if prod(new[len(shape) :]) > 1 else tuple(new[: len(shape)])
