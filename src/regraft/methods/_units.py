"""Which unit of the old base each unit of the new one is a copy of, found from the weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from regraft.adapter import ModuleRef
from regraft.methods import WeightPairs
from regraft.spaces import Sides, Space, sides_of
from regraft.transport import IDENTITY, LinearMap, Transport

# Mean cosine from which on the units of a space of one size are taken to be in their places.
_IN_PLACE = 0.5
# Below this cosine, a new unit is no copy of any: it takes no update. Where most are none, nothing is known.
_COPY = 0.3
# What growths multiply the copies of a unit by, as powers of their count.
_POWERS = (0.0, -0.5, -1.0)
_SNAP = 0.15


class UnitMatch:
    """The copies of every hidden space of a pair of bases, and what the growth multiplied them by.

    Fixed spaces (tokens) come first; each further space is matched by all weights between it and the known ones: unit
    i' of the new base is a copy of that unit i whose rows and columns have the highest cosine with its own.

    Attributes:
        sources: space → old unit of every new one, (m',), -1 for none.
        scales: (space, side) → factor of every new unit, (m',). Embeddings write along their columns.
    """

    def __init__(self, pairs: WeightPairs) -> None:
        self.load = pairs.load
        self.sides: dict[ModuleRef, Sides] = {}
        self.touching: dict[Space, list[ModuleRef]] = {}
        old, new = pairs.bases
        for module in pairs:
            target = pairs.pairing[module].module
            assert target is not None
            shapes = (_matrix(old.shape(module)), _matrix(new.shape(target)))
            sides = self.sides[module] = sides_of(module, *shapes)
            for space in {sides.out, sides.inp} - {None}:
                assert space is not None
                self.touching.setdefault(space, []).append(module)
        self.sources: dict[Space, Tensor] = {}
        self.scales: dict[tuple[Space, str], Tensor] = {}
        self._maps: dict[tuple[Space, str], LinearMap] = {}
        self._solve()

    @property
    def grown(self) -> int:
        """Spaces whose units are not in their places."""
        return sum(not _in_place(source, space) for space, source in self.sources.items())

    def transport(self, module: ModuleRef) -> Transport | None:
        """ΔW ↦ diag(g) C_out ΔW C_inᵀ diag(s); None where a space of the module is not matched."""
        sides = self.sides[module]
        if any(space is not None and space not in self.sources for space in (sides.out, sides.inp)):
            return None
        left, right = self._map(sides.out, "write"), self._map(sides.inp, _side(module)).T
        if sides.out_copies > 1 and not left.is_identity:
            assert left.left is not None
            blocks: Tensor = torch.block_diag(*[left.left] * sides.out_copies)  # type: ignore[no-untyped-call]
            left = LinearMap(0.0, blocks)
        return Transport(((left, right),), rotates=not (left.is_identity and right.is_identity))

    def _solve(self) -> None:
        same = all(space[2] == space[3] for space in self.touching)
        pending = dict.fromkeys(self.touching)
        while pending:
            best = max(pending, key=lambda space: sum(1 for _ in self._known(space)))
            del pending[best]
            _, _, m, m_new = best
            if same:
                self.sources[best] = torch.arange(m)
                continue
            cosines = self._cosines(best)
            if cosines is None and m != m_new:
                continue
            if cosines is None or (m == m_new and float(cosines.diagonal().mean()) >= _IN_PLACE):
                self.sources[best] = torch.arange(m)
                continue
            high, source = cosines.max(dim=1)
            if float((high >= _COPY).float().mean()) >= 0.5:
                self.sources[best] = torch.where(high >= _COPY, source, -1).cpu()
        if not same:
            for _ in range(2):
                self._fit_scales()

    def _known(self, space: Space) -> Iterator[tuple[ModuleRef, bool]]:
        """Modules that touch a space and whose other side is matched, and whether ``space`` is what they write."""
        for module in self.touching[space]:
            sides = self.sides[module]
            for here, other, writes in ((sides.out, sides.inp, True), (sides.inp, sides.out, False)):
                if here == space and (other is None or other in self.sources):
                    yield module, writes

    def _cosines(self, space: Space) -> Tensor | None:
        """Mean cosine of every new unit's rows or columns with every old one's, (m', m)."""
        total, count = None, 0
        for module, writes in self._known(space):
            sides = self.sides[module]
            old, new = self.load(module)
            if writes:
                old, copies = self._columns(old, sides.inp, _side(module)), sides.out_copies
            else:
                old, new, copies = self._rows(old, sides).T, new.T, 1
            for one, other in zip(old.chunk(copies), new.chunk(copies), strict=True):
                found = _unit(other) @ _unit(one).T
                total, count = found if total is None else total + found, count + 1
        return None if total is None else total / count

    def _columns(self, old: Tensor, space: Space | None, side: str) -> Tensor:
        return old if space is None else _taken(old.T, self.sources[space], self.scales.get((space, side))).T

    def _rows(self, old: Tensor, sides: Sides) -> Tensor:
        if sides.out is None:
            return old
        source, scale = self.sources[sides.out], self.scales.get((sides.out, "write"))
        return torch.cat([_taken(part, source, scale) for part in old.chunk(sides.out_copies)])

    def _fit_scales(self) -> None:
        """One factor per space, side and number of copies, by least squares over all weights there."""
        sums: dict[tuple[Space, str], Tensor] = {}
        for module, sides in self.sides.items():
            if any(space is not None and space not in self.sources for space in (sides.out, sides.inp)):
                continue
            old, new = self.load(module)
            scaled = self._rows(self._columns(old, sides.inp, _side(module)), sides)
            products, squares = new * scaled, scaled.square()
            for axis, space, side in ((1, sides.out, "write"), (0, sides.inp, _side(module))):
                if space is None:
                    continue
                pair = torch.stack([products.sum(axis), squares.sum(axis)])
                if axis == 1:
                    pair = pair.reshape(2, sides.out_copies, -1).sum(1)
                # Each weight counts alike, whatever its size.
                pair = pair / squares.sum().clamp_min(1e-30)
                sums[space, side] = sums[space, side] + pair if (space, side) in sums else pair
        for (space, side), (products, squares) in sums.items():
            known = self.scales.get((space, side), torch.ones(space[3]))
            self.scales[space, side] = _by_count(self.sources[space], known, products.cpu(), squares.cpu())

    def _map(self, space: Space | None, side: str) -> LinearMap:
        if space is None or _in_place(self.sources[space], space):
            return IDENTITY
        if (space, side) not in self._maps:
            source, (_, _, m, m_new) = self.sources[space], space
            kept = source >= 0
            matrix = torch.zeros(m_new, m)
            matrix[torch.arange(m_new)[kept], source[kept]] = self.scales.get((space, side), torch.ones(m_new))[kept]
            self._maps[space, side] = LinearMap(0.0, matrix)
        return self._maps[space, side]


def _by_count(source: Tensor, known: Tensor, products: Tensor, squares: Tensor) -> Tensor:
    """The factors (m',), one for all units with as many copies.

    Units with one copy keep 1, and what drift took of them is taken as taken from all. A factor near a power of the
    count that growths use is taken as that.
    """
    kept = source >= 0
    counts = torch.bincount(source[kept], minlength=int(source.max()) + 1)
    count = torch.where(kept, counts[source.clamp_min(0)], 0)
    raw = {}
    for k in sorted(set(count[kept].tolist())):
        here = count == k
        # Of what the units have by now.
        raw[k] = float((known[here].mean()) * products[here].sum() / squares[here].sum().clamp_min(1e-30))
    single = raw.get(1, 1.0)
    factors = torch.zeros(len(source))
    for k, value in raw.items():
        ratio = 1.0 if k == 1 else value / single if single > 0 else value
        near = min((k**power for power in _POWERS), key=lambda f: abs(f - ratio))
        factors[count == k] = near if abs(near - ratio) < _SNAP * near else ratio
    return factors


def _taken(rows: Tensor, source: Tensor, scale: Tensor | None) -> Tensor:
    """The rows (m, n) of each new unit's source, (m', n), scaled; zeros where it has none."""
    source = source.to(rows.device)
    taken = rows[source.clamp_min(0)]
    factor = (source >= 0).to(rows.dtype) if scale is None else scale.to(rows)
    return taken * factor[:, None]


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _in_place(source: Tensor, space: Space) -> bool:
    return space[2] == space[3] and bool(torch.equal(source, torch.arange(space[2])))


def _side(module: ModuleRef) -> str:
    """What a weight does along its columns: embeddings write there, all others read."""
    return "write" if "embed" in module.path.rsplit(".", 1)[-1] else "read"


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    size = 1
    for n in shape[1:]:
        size *= n
    return shape[0], size
