"""Transports folded onto one adapter: of a map, only what it does to that adapter's own few directions.

A fitted map of a weight (m, n) takes about as much memory as the weight. Of a LoRA ΔW = B A of rank r it meets no more
than the columns of B and the rows of A. With orthonormal Q (m, r) over the columns of B, L B = (L Q) (Qᵀ B): L Q
(m', r) stands for L, and likewise on the right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.errors import UsageError
from regraft.plan import locate
from regraft.tensors import Shape
from regraft.tokens import tables_in
from regraft.transport import Chained, Deferred, LinearMap, Terms, Transport
from regraft.updates import ByShape, LowRank, Slice, Update
from regraft.updates.exact import as_lowrank, is_factored

if TYPE_CHECKING:
    from regraft.migration import Migration


class Folded(Deferred):
    """A transport of one update alone: it carries that one as the transport did which it was folded from.

    Args:
        update: a LoRA, or what equals one.
        terms: as a transport's, a folded map by what it makes of Q: L Q, (m', r), and Qᵀ R, (r, n').
        rotates: see `Transport`.
    """

    def __init__(
        self, update: Update, terms: tuple[tuple[LinearMap | Tensor, LinearMap | Tensor], ...], rotates: bool
    ) -> None:
        super().__init__(rotates)
        object.__setattr__(self, "update", update)
        object.__setattr__(self, "parts", terms)

    update: Update
    parts: tuple[tuple[LinearMap | Tensor, LinearMap | Tensor], ...]

    @property
    def terms(self) -> Terms:
        # The adapter has its factors anyway: Q is made anew of them in place of being kept.
        found = as_lowrank(self.update)
        assert found is not None
        q_up, q_down = _bases(found)
        return tuple(
            (
                LinearMap(0.0, left, q_up.T) if isinstance(left, Tensor) else left,
                LinearMap(0.0, q_down, right) if isinstance(right, Tensor) else right,
            )
            for left, right in self.parts
        )

    def to_cpu(self, seen: dict[int, Tensor]) -> Transport:
        return self


class Narrowing:
    """Folds the transports of one adapter's modules, where nothing else goes through their maps.

    Args:
        updates: module of the old base → the one update that its maps are to carry.

    Attributes:
        folded: whether a transport has been folded.
    """

    def __init__(self, updates: Mapping[ModuleRef, Update]) -> None:
        self.updates, self.folded = updates, False

    @classmethod
    def to(cls, adapter: Adapter, base: Base, without: Collection[ModuleRef] = ()) -> Narrowing:
        """Of the modules whose maps carry nothing but one update of a low rank.

        None are where whole parameters go along (a norm, a bias, a trained head): these move by the maps of the modules
        around them. Nor are the tables of added tokens' embeddings.

        Args:
            adapter: what is going to be carried.
            base: whose modules the migration names; the new one where no old one is given.
            without: modules through whose maps anything else goes.
        """
        located = locate(adapter, base, "old")
        if located.vectors or any(update.by_parameter for update in adapter.updates.values()):
            return cls({})
        named = located.modules
        users, others = Counter(named.values()), {*tables_in(adapter, base), *without}
        single = {home: adapter.updates[ref] for ref, home in named.items() if users[home] == 1 and home not in others}
        return cls({home: update for home, update in single.items() if _is_low(update)})

    def __call__(self, module: ModuleRef, transport: Transport, old: Shape, new: Shape) -> Transport:
        """The transport, folded where that holds less; else with its maps in memory.

        Args:
            module: of the old base.
            transport: on any device; what is folded lies on the CPU, in float32.
            old: shape of the weight in the old base.
            new: in the new base.
        """
        update = self.updates.get(module)
        found = as_lowrank(update) if update is not None and not transport.is_identity else None
        if update is None or found is None or _moves_more(found, transport, old, new):
            return transport.held()
        out, inp = old[0], prod(old[1:])
        if (found.shape[0], prod(found.shape[1:])) != (out, inp):
            return transport.held()
        if isinstance(transport, Chained) and found.rank < min(out, inp):
            q_up, q_down = _bases(found)
            self.folded = True
            return Folded(update, transport.images(q_up, q_down.T), transport.rotates)
        # Addresses of tensors that are freed come back: what is moved is known within this transport alone.
        terms = transport.to_cpu({}).terms
        thin = [(_shrinks(left, out, found.rank), _shrinks(right.T, inp, found.rank)) for left, right in terms]
        if not any(map(any, thin)):
            return transport.held()
        q_up, q_down = _bases(found)
        parts = tuple(
            (left @ q_up if here else left, right.on_the_right(q_down.T) if there else right)
            for (left, right), (here, there) in zip(terms, thin, strict=True)
        )
        self.folded = True
        return Folded(update, parts, transport.rotates)


def check_own(adapter: Adapter, migration: Migration, modules: Mapping[ModuleRef, ModuleRef]) -> None:
    """Whether a narrowed migration is carrying the adapter that it was fitted for.

    Args:
        adapter: about to be carried.
        migration: narrowed or not.
        modules: module of the adapter → of the old base.

    Raises:
        UsageError: it is another adapter, which would come out wrong.
    """
    for ref, home in modules.items():
        entry, update = migration.entries.get(home), adapter.updates.get(ref)
        transport = entry.transport if entry is not None else None
        if isinstance(transport, Folded) and update is not None and not _same(transport.update, update):
            raise UsageError(
                "the migration is narrowed to another adapter",
                file=adapter.path,
                key=str(ref),
                remedy="Fit it without narrow=True: it is then for every adapter of these modules.",
            )


def _same(one: Update, other: Update) -> bool:
    if one is other or (
        isinstance(one, LowRank) and isinstance(other, LowRank) and one.up is other.up and one.down is other.down
    ):
        return True
    first, second = as_lowrank(one), as_lowrank(other)
    if first is None or second is None:
        return False
    return all(torch.equal(a, b) for a, b in zip(first.factors(), second.factors(), strict=True))


def _is_low(update: Update) -> bool:
    """Whether the update alone gives its factors; told without reading a tensor."""
    whole = update.of if isinstance(update, Slice) else update
    return is_factored(update) and not isinstance(whole, ByShape)


def _moves_more(update: LowRank, transport: Transport, old: Shape, new: Shape) -> bool:
    """Whether maps carry more of an update than its factors: a bias, or a magnitude whose units mix."""
    mixes = update.magnitude is not None and (transport.rotates or old != new)
    return mixes or (update.bias is not None and transport.rotates)


def _bases(update: LowRank) -> tuple[Tensor, Tensor]:
    """Orthonormal columns over those of B, (m, r), and over the rows of A, (n, r); float32."""
    up, down = update.factors()
    return torch.linalg.qr(up.double())[0].float(), torch.linalg.qr(down.double().T)[0].float()


def _shrinks(map_: LinearMap, size: int, rank: int) -> bool:
    """Whether a map (m', m) from the whole of a side, of m = ``size``, holds more than its images of r directions do.

    A map of a convolution's input channels, which moves every place of the kernel alike, is of a smaller space.
    """
    if map_.left is None:
        return False
    inner = map_.left if map_.right is None else map_.right
    # U and its transpose are one storage.
    held = {t.untyped_storage().data_ptr(): t.numel() for t in (map_.left, map_.right) if t is not None}
    return inner.shape[1] == size and map_.left.shape[0] * min(size, rank) < sum(held.values())
