"""Procrustes: orthogonal maps between the two bases' hidden spaces, found from their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from zlib import crc32

import torch
from torch import Tensor

from regraft.adapter import ModuleRef
from regraft.methods import Fit, Shapes, WeightPairs, method
from regraft.nearness import cosine
from regraft.spaces import Sides, Space, named_sides, sides_of
from regraft.transport import IDENTITY, LinearMap, Transport

Load = Callable[[ModuleRef], tuple[Tensor, Tensor]]
"""Module → its old and new weight."""

_SWEEPS = 3


class _Alignment:
    """The maps of all spaces, solved in the order in which evidence reaches them from the fixed ones."""

    def __init__(self, load: Load, modules: Mapping[ModuleRef, Shapes], keep_identity: float) -> None:
        self.load, self.keep_identity = load, keep_identity
        self.maps: dict[Space, Tensor | None] = {}
        self.sides: dict[ModuleRef, Sides] = {}
        self.touching: dict[Space, list[ModuleRef]] = {}
        self._unmoved: dict[ModuleRef, float] = {}
        for module, shapes in modules.items():
            sides = self.sides[module] = sides_of(module, *shapes)
            for space in {sides.out, sides.inp} - {None}:
                assert space is not None
                self.touching.setdefault(space, []).append(module)

    def solve(self) -> None:
        pending = dict.fromkeys(self.touching)
        while pending:
            best = max(pending, key=lambda space: sum(1 for _ in self._bearing(space)))
            del pending[best]
            self._fit(best)
        if any(map_ is not None for map_ in self.maps.values()):
            for _ in range(_SWEEPS - 1):
                for space in self.touching:
                    self._fit(space)

    def _known(self, space: Space | None) -> bool:
        return space is None or space in self.maps

    def _bearing(self, space: Space) -> Iterator[tuple[ModuleRef, bool]]:
        """Modules that touch ``space`` and whose other side is known, and whether they do so with their outputs."""
        for module in self.touching[space]:
            sides = self.sides[module]
            for here, other, writes in ((sides.out, sides.inp, True), (sides.inp, sides.out, False)):
                if here == space and self._known(other):
                    yield module, writes

    def _other_mapped(self, module: ModuleRef, writes: bool) -> tuple[Tensor, Tensor]:
        """The old weight with its other side mapped, and the new one."""
        old, new = self.load(module)
        sides = self.sides[module]
        return (self._right(sides.inp, old) if writes else self._left(sides.out, old, sides.out_copies)), new

    def _in_place(self, space: Space) -> float:
        """Mean cosine of the weights that bear on ``space``, left as it is: the traces of their cross-Gram matrices."""
        total, count = 0.0, 0
        for module, writes in self._bearing(space):
            sides = self.sides[module]
            other, count = sides.inp if writes else sides.out, count + 1
            if other is not None and self.maps[other] is not None:
                total += cosine(*self._other_mapped(module, writes))
                continue
            if module not in self._unmoved:
                self._unmoved[module] = cosine(*self.load(module))
            total += self._unmoved[module]
        return total / max(1, count)

    def _gram(self, space: Space) -> Tensor | None:
        """Sum of the cross-Gram matrices (m', m) of every weight that bears on ``space``; None without one."""
        total = None
        for module, writes in self._bearing(space):
            old, new = self._other_mapped(module, writes)
            scale = float(old.norm() * new.norm()) or 1.0
            copies = self.sides[module].out_copies if writes else 1
            for a, b in zip(old.chunk(copies), new.chunk(copies), strict=True):
                part = (b @ a.T if writes else b.T @ a) / scale
                total = part if total is None else total + part
        return total

    def _left(self, space: Space | None, x: Tensor, copies: int) -> Tensor:
        map_ = self.maps.get(space) if space is not None else None
        return x if map_ is None else torch.cat([map_ @ part for part in x.chunk(copies)])

    def _right(self, space: Space | None, x: Tensor) -> Tensor:
        map_ = self.maps.get(space) if space is not None else None
        return x if map_ is None else x @ map_.T

    def _fit(self, space: Space) -> None:
        _, _, m, m_new = space
        # A trace takes one pass over the weights, and settles a space that is still in place.
        if m == m_new and self._in_place(space) >= self.keep_identity:
            self.maps[space] = None
            return
        gram = self._gram(space)
        if gram is None:
            like = self.load(self.touching[space][0])[0]
            self.maps[space] = None if m == m_new else torch.eye(m_new, m, dtype=like.dtype, device=like.device)
        else:
            u, _, vh = torch.linalg.svd(gram, full_matrices=False)
            self.maps[space] = u @ vh

    def transport(self, module: ModuleRef, shared: dict[Space, LinearMap]) -> Transport:
        sides = self.sides[module]

        def map_of(space: Space | None) -> LinearMap:
            matrix = self.maps.get(space) if space is not None else None
            if space is None or matrix is None:
                return IDENTITY
            return shared.setdefault(space, LinearMap(0.0, matrix))

        left, right = map_of(sides.out), map_of(sides.inp).T
        if sides.out_copies > 1 and not left.is_identity:
            assert left.left is not None
            blocks: Tensor = torch.block_diag(*[left.left] * sides.out_copies)  # type: ignore[no-untyped-call]
            left = LinearMap(0.0, blocks)
        return Transport(((left, right),), rotates=not (left.is_identity and right.is_identity))

    def cosine(self, module: ModuleRef) -> float:
        """Cosine of the new weight and the aligned old one."""
        old, new = self.load(module)
        sides = self.sides[module]
        return cosine(self._left(sides.out, self._right(sides.inp, old), sides.out_copies), new)


def _connected(pairs: WeightPairs) -> dict[ModuleRef, Shapes]:
    """The modules whose weights bear on the wanted ones' spaces, over any chain of spaces; by names alone."""
    spaces: dict[ModuleRef, set[tuple[str, str]]] = {}
    for module in pairs:
        sides = named_sides(module.path)
        spaces[module] = {(module.component, name) for name in (sides.out, sides.inp) if name is not None}
    wanted = set(pairs.wanted)
    reached = {space for module in wanted for space in spaces[module]}
    while grown := {space for held in spaces.values() if held & reached for space in held} - reached:
        reached |= grown
    return {module: pairs.shapes(module) for module, held in spaces.items() if module in wanted or held & reached}


def _by_chance(load: Load) -> Load:
    """The same pairs with the new weights' rows and columns permuted, columns of either sign: chance alone.

    It keeps the spectrum, as a random rotation would, at the cost of one pass over the weight.
    """

    def shuffled(module: ModuleRef) -> tuple[Tensor, Tensor]:
        old, new = load(module)
        # Each module has a shuffle of its own; one that two shared would be a change of coordinates to be found.
        dice = torch.Generator().manual_seed(crc32(str(module).encode()))
        rows, columns = (torch.randperm(size, generator=dice).to(new.device) for size in new.shape)
        signs = torch.randint(0, 2, (new.shape[1],), generator=dice) * 2 - 1
        new = new[rows][:, columns] * signs.to(new)
        return old, new

    return shuffled


@method(
    "procrustes",
    reference="orthogonal Procrustes (Schönemann 1966); for networks as in Git Re-Basin (Ainsworth et al. 2022)",
    summary="Rotates the update from the old base's hidden spaces into the new one's, where those moved.",
    needs=("old", "new"),
    per="pair",
    resizes=True,
)
def procrustes(pairs: WeightPairs, *, keep_identity: float = 0.5) -> Fit:
    """ΔW_new = Q_out ΔW Q_inᵀ, with each Q (m', m) maximising Σ ⟨W_new, Q_out W_old Q_inᵀ⟩ over its space's weights.

    Fixed spaces (tokens, pixels) anchor the rest. A space whose units are still in place keeps the identity, so that
    between near bases this is a copy. Spaces and roles: ``families/_spaces.json``.

    Args:
        pairs: all paired weights.
        keep_identity: mean cosine of the weights in their own coordinates from which on a space is left as it is;
            above 1, every space is rotated (the method as published).
    """
    modules = _connected(pairs)
    found = _Alignment(pairs.load, modules, keep_identity)
    found.solve()
    shared: dict[Space, LinearMap] = {}
    transports = {module: found.transport(module, shared) for module in pairs.wanted}
    moved = [module for module, transport in transports.items() if not transport.is_identity]
    similarity: dict[ModuleRef, float] = {}
    if moved:
        null = _Alignment(_by_chance(pairs.load), modules, keep_identity)
        null.solve()
        for module in moved:
            chance = min(max(0.0, null.cosine(module)), 0.99)
            similarity[module] = (found.cosine(module) - chance) / (1 - chance)
    reason = f"{len(shared)} hidden spaces rotated" if shared else "every hidden space is still in place"
    return Fit(transports, "procrustes", reason, similarity)
