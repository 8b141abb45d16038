"""A look at two bases beyond the modules that an adapter changes, and at their leading subspaces."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import isfinite, prod, sqrt
from statistics import mean
from typing import TypeVar

import torch
from torch import Tensor

from regraft.adapter import ModuleRef
from regraft.base import Base
from regraft.forecast.evidence import Survey
from regraft.methods._subspace import overlap
from regraft.nearness import compare
from regraft.pairing import Pairing, pair_bases
from regraft.parallel import side_by_side

#: Modules of the fixed sample; ``--deep`` takes all.
SAMPLE = 16
# Rank of the subspaces that are compared, at most a quarter of the full rank, where chance would be too high.
_RANK = 16
# Weights of each base that are looked at for the marks of training; smaller sides than this tell too little.
_DRAWS, _SMALL = 8, 16
# So far beyond the edge of a random matrix's singular values, a weight still looks drawn; from there on, learnt.
_DRAWN, _LEARNT = 1.08, 1.3

_T = TypeVar("_T")

#: From the old base's modules that an adapter changes to its survey: for whoever keeps what many adapters share.
Surveyor = Callable[[Collection[ModuleRef]], Survey]


def survey(
    old: Base, new: Base, touched: Collection[ModuleRef], *, pairing: Pairing | None = None, deep: bool = False
) -> Survey:
    """Drift over the whole pair and subspace overlap where the adapter works, from a fixed sample of modules.

    Args:
        old: the old base.
        new: the new base.
        touched: the old base's modules that the adapter changes.
        pairing: of the two, if it is known.
        deep: take all modules in place of the sample.
    """
    pairing = pairing or pair_bases(old, new)
    paired = {ref: answer.module for ref, answer in pairing.counterparts.items() if answer.module is not None}
    same = [ref for ref, target in paired.items() if old.shape(ref) == new.shape(target)]
    everywhere = same if deep else spread(same, SAMPLE)
    inside = [ref for ref in same if ref in set(touched)]
    inside = inside if deep else spread(inside, SAMPLE)
    for_drift, for_overlap = set(everywhere), set(inside)

    def looked_at(ref: ModuleRef) -> tuple[float | None, float | None]:
        before, after = old.weight(ref).flatten(1), new.weight(paired[ref]).flatten(1)
        drift = compare(before, after).distance if ref in for_drift else None
        return drift, subspace_overlap(before, after) if ref in for_overlap else None

    # What is fetched from the hub is fetched in one go.
    workers = 1 if old.partial or new.partial else None
    refs = dict.fromkeys([*everywhere, *inside])
    seen = list(side_by_side(looked_at, refs, workers, size=lambda ref: 8 * prod(old.shape(ref))))
    drifts = [drift for drift, _ in seen if drift is not None and isfinite(drift)]
    overlaps = [share for _, share in seen if share is not None]
    components = {target.component for target in paired.values()}
    there = sum(1 for name in components for _ in new.modules(name))
    return Survey(
        modules=len(for_drift | for_overlap),
        deep=deep,
        drift=mean(drifts) if drifts else None,
        overlap=mean(overlaps) if overlaps else None,
        added=1 - len(set(paired.values())) / there if there else 0.0,
        untrained=is_drawn(new, components) and not is_drawn(old, set(old.components), _LEARNT),
    )


def is_drawn(base: Base, components: Collection[str], most: float = _DRAWN) -> bool:
    """Whether a sample of weights looks like random draws: no singular value beyond the edge of such a matrix's.

    Of (out, in) independent values of deviation σ, the largest is close to σ (√out + √in) (Marchenko & Pastur 1967);
    training puts some far beyond it.

    Args:
        base: to look at.
        components: of it.
        most: how far beyond the edge counts as on it.
    """
    refs = [ModuleRef(name, path) for name in sorted(components) for path in base.modules(name)]
    refs = spread([ref for ref in refs if min(_sides(base, ref)) >= _SMALL], _DRAWS)
    return bool(refs) and all(beyond_chance(base.weight(ref).float().flatten(1)) < most for ref in refs)


def beyond_chance(weight: Tensor) -> float:
    """Largest singular value of a weight less its mean, in units of what independent values would have.

    Args:
        weight: (out, in).
    """
    weight = weight - weight.mean()
    edge = float(weight.std()) * (sqrt(weight.shape[0]) + sqrt(weight.shape[1]))
    return float((weight @ leading(weight, 1)[1]).norm()) / edge if edge > 0 else 0.0


def _sides(base: Base, ref: ModuleRef) -> tuple[int, int]:
    shape = base.shape(ref)
    return shape[0], prod(shape[1:])


def spread(items: Sequence[_T], count: int) -> list[_T]:
    """``count`` of the items, evenly spaced, always the same ones; all of them where there are no more.

    >>> spread([0, 1, 2, 3, 4, 5, 6, 7], 3)
    [0, 2, 5]
    """
    return list(items) if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def subspace_overlap(old: Tensor, new: Tensor) -> float:
    """How far the leading left and right singular subspaces agree, chance-corrected; 1 equal, about 0 unrelated.

    Args:
        old: (out, in), of any float dtype.
        new: likewise.
    """
    rank = min(_RANK, max(1, min(old.shape) // 4))
    (u_old, v_old), (u_new, v_new) = (leading(weight.float(), rank) for weight in (old, new))
    return (overlap(u_old, u_new) + overlap(v_old, v_new)) / 2


def leading(weight: Tensor, rank: int, rounds: int = 6) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the leading left and right singular subspaces, (out, rank) and (in, rank).

    By block power iteration from a fixed start (Halko, Martinsson & Tropp 2011, algorithm 4.4): weights are the same,
    so are the subspaces.

    Args:
        weight: (out, in), float32.
        rank: at most the smaller side.
        rounds: of the iteration.
    """
    if min(weight.shape) <= 128:
        u, _, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], vh[:rank].T
    # A few more columns than wanted make the last wanted ones settle.
    start = torch.randn(weight.shape[1], rank + 8, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(start)[0]
    for _ in range(rounds):
        basis = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ basis)[0])[0]
    u, _, vh = torch.linalg.svd(weight @ basis, full_matrices=False)
    return u[:, :rank], basis @ vh[:rank].T
