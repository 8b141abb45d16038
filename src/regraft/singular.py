"""The singular vectors of a weight, chosen so that every machine finds the same ones, and a print to tell them by.

A singular value decomposition W = U diag(σ) Vᵀ leaves three things open: the sign of each pair (uᵢ, vᵢ); any rotation
among pairs whose σ are equal; and, where σ is 0, any rotation of the uᵢ and of the vᵢ apart. A file of numbers per
singular direction means nothing until they are settled:

- pairs whose σ lie within `CLUSTER` · σ₁ of the next are one cluster (σ this near change places at float32 rounding);
- within a cluster the basis is the one nearest to a fixed matrix G: U ← U · polar(Uᵀ G), V ← V · polar(Uᵀ G). The
  result doesn't depend on the U and V that the solver found. A cluster of one gets its sign so;
- below `NULL` · σ₁ the uᵢ are those nearest to G in the complement of all others, and likewise the vᵢ.

A rank that ends inside of a cluster takes the first directions of the settled basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Neighbouring singular values that are nearer than this share of the largest count as equal.
CLUSTER = 1e-5
#: Singular values below this share of the largest count as zero.
NULL = 1e-6
# Numbers per part of a print and per direction of marks, and how far the parts of a print may differ. Rounding to
# bfloat16 moves a weight by 0.002, an upgrade by more than 0.02. What the part of the directions differs by is about
# what a change on them differs by: rounding to bfloat16 comes to 0.1 where singular values lie close together.
_PROBES, _MARKS = 8, 4
_WEIGHT_MOVED, _VECTORS_MOVED = 0.02, 0.2
# What rounding to bfloat16 moves the prints of many weights by in the mean; a single one scatters by this many of them.
_ROUNDED, _SPREAD = 0.002, 3.0


class Singular(NamedTuple):
    """Leading singular directions of a weight as a matrix (m, n), float64, largest value first.

    Attributes:
        u: (m, r), orthonormal columns.
        s: (r,).
        v: (n, r), orthonormal columns.
    """

    u: Tensor
    s: Tensor
    v: Tensor


def as_matrix(weight: Tensor) -> Tensor:
    """(out, in · kh · kw) of a kernel, (1, n) of a vector, a matrix itself."""
    return weight[None] if weight.dim() == 1 else weight.flatten(1)


def decompose(weight: Tensor, rank: int | None = None) -> Singular:
    """The settled singular directions of a weight; computed in float64.

    Args:
        weight: (out, in, …) or (n,), with values.
        rank: how many; all min(m, n) by default.

    Raises:
        ValueError: the rank is not between 1 and min(m, n), or the weight holds NaN or Inf.
    """
    matrix = as_matrix(weight.detach())
    if rank is not None and not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"the rank {rank} is not between 1 and {min(matrix.shape)}, the number of singular values")
    u, s, vh = torch.linalg.svd(_finite(matrix), full_matrices=False)
    settled = _settled(u, s, vh.mT)
    keep = len(s) if rank is None else rank
    return Singular(settled.u[:, :keep].contiguous(), s[:keep].contiguous(), settled.v[:, :keep].contiguous())


def rank_for(weight: Tensor, energy: float) -> int:
    """The smallest rank whose directions hold this share of ‖W‖².

    Args:
        weight: (out, in, …).
        energy: above 0, at most 1.

    Raises:
        ValueError: the weight holds NaN or Inf.
    """
    squares = torch.linalg.svdvals(_finite(as_matrix(weight.detach()).cpu())).square().cumsum(0)
    # A share that is reached but for rounding is reached.
    return min(len(squares), int((squares < energy * squares[-1] * (1 - 1e-9)).sum()) + 1)


def _finite(matrix: Tensor) -> Tensor:
    """The matrix in float64, where it has singular values."""
    if matrix.device.type == "mps":
        # No float64 there.
        matrix = matrix.cpu()
    matrix = matrix.double()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("the weight holds NaN or Inf: it has no singular values")
    return matrix


def _settled(u: Tensor, s: Tensor, v: Tensor) -> Singular:
    if not float(s[0]) > 0:
        return Singular(_nearest(u[:, :0], len(s)), s, _nearest(v[:, :0], len(s)))
    rank = int((s > NULL * s[0]).sum())
    gaps = s[: rank - 1] - s[1:rank] > CLUSTER * s[0]
    ends = [*(torch.nonzero(gaps).flatten() + 1).tolist(), rank]
    u, v = u.clone(), v.clone()
    largest = max(end - start for start, end in zip([0, *ends], ends, strict=False))
    reference = _noise(u.shape[0], largest, "clusters").to(u.device)
    signs = torch.where(reference[:, 0] @ u >= 0, 1.0, -1.0).to(u.dtype)
    start = 0
    for end in ends:
        span = slice(start, end)
        turn = signs[start].reshape(1, 1)
        if end - start > 1:
            turn = _polar(u[:, span].mT @ reference[:, : end - start])
        u[:, span], v[:, span] = u[:, span] @ turn, v[:, span] @ turn
        start = end
    if rank < len(s):
        u[:, rank:] = _nearest(u[:, :rank], len(s) - rank)
        v[:, rank:] = _nearest(v[:, :rank], len(s) - rank)
    return Singular(u, s, v)


def _nearest(taken: Tensor, count: int) -> Tensor:
    """Orthonormal columns nearest to fixed ones in the complement of the ``taken`` (m, p); (m, count)."""
    wanted = _noise(taken.shape[0], count, "null").to(taken.device)
    return _polar(wanted - taken @ (taken.mT @ wanted))


def _polar(matrix: Tensor) -> Tensor:
    """The orthonormal columns nearest to those of a matrix (m, k), m ≥ k."""
    a, _, b = torch.linalg.svd(matrix, full_matrices=False)
    result: Tensor = a @ b
    return result


def _noise(rows: int, columns: int, purpose: str) -> Tensor:
    """Fixed numbers between −1 and 1, (rows, columns), float64; a column doesn't depend on how many there are.

    SplitMix64 (Steele et al. 2014) of the element's place: no library's random generator, whose stream may change.
    """
    seed = np.uint64(int.from_bytes(purpose.encode()[:8].ljust(8, b"\0"), "little"))
    place = np.arange(rows, dtype=np.uint64)[:, None] | (np.arange(columns, dtype=np.uint64)[None] << np.uint64(32))
    with np.errstate(over="ignore"):
        x = (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + seed
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0)


def print_of(weight: Tensor, u: Tensor | None = None, v: Tensor | None = None) -> Tensor:
    """A few numbers that tell a weight, and its singular directions where they are given; float32, (8,) or (16,).

    Random projections aⱼᵀ W bⱼ, then aⱼᵀ U diag(hⱼ) Vᵀ bⱼ, which doesn't depend on the directions' signs.

    Args:
        weight: (out, in, …).
        u: (m, r).
        v: (n, r).
    """
    matrix = as_matrix(weight.detach())
    rows, columns = (_noise(size, _PROBES, f"side {side}") for side, size in enumerate(matrix.shape))
    # Float32 on every machine: a double copy of a large weight is not worth digits that no comparison uses.
    found = [((matrix.float() @ columns.float().to(matrix.device)).cpu().double() * rows).sum(0)]
    if u is not None and v is not None:
        left, right = (side.mT @ part.detach().double().cpu() for side, part in ((rows, u), (columns, v)))
        found.append((left * right * _noise(u.shape[1], _PROBES, "mix").sign().mT).sum(1))
    return torch.cat(found).float()


def marks_of(u: Tensor) -> Tensor:
    """A few numbers per singular direction that tell its sign: projections of its left vector; float32, (r, 4).

    Args:
        u: (m, r).
    """
    return (u.detach().double().cpu().mT @ _noise(u.shape[0], _MARKS, "marks")).float()


def signs_by(marks: Tensor, u: Tensor) -> Tensor:
    """The sign of each direction that turns it to where its marks were taken, (r,), 1 or −1.

    A sign that a fixed rule gives turns over for the one direction in a hundred that is nearly orthogonal to the rule's
    own, as soon as the weight is rounded; only a (r, r) matrix on the directions depends on it.

    Args:
        marks: of `marks_of`, (r, 4).
        u: (m, r) of a weight that is the same up to rounding.
    """
    along = (marks.detach().double().cpu() * marks_of(u).double()).sum(1)
    return torch.where(along < 0, -1.0, 1.0).to(u.dtype).to(u.device)


def moved(stored: Tensor, found: Tensor) -> str | None:
    """How two prints differ, in words; None where they are of the same weight, up to rounding.

    Args:
        stored: of the weight that an adapter was trained on.
        found: of another, of the same length.
    """
    weight, *vectors = (_distance(a, b) for a, b in zip(_parts(stored), _parts(found), strict=True))
    if not weight <= _WEIGHT_MOVED:
        return f"the weight differs by about {weight:.1%}"
    worst = max(vectors, default=0.0)
    if worst <= _VECTORS_MOVED:
        return None
    return f"the weight is the same up to rounding, and its singular directions still differ by about {worst:.0%}"


def strayed(pairs: Sequence[tuple[Tensor, Tensor]], title: str) -> str | None:
    """How far a base is from an adapter's own, in words, where that is more than rounding; None where it is not.

    Args:
        pairs: of prints, the adapter's and the base's, none of which `moved` refuses; one for each weight.
        title: what the adapter is.
    """
    distances = [_distance(_parts(stored)[0], _parts(found)[0]) for stored, found in pairs]
    count = len(distances)
    mean = (sum(distance**2 for distance in distances) / max(count, 1)) ** 0.5
    if not count or mean <= _ROUNDED * (1 + _SPREAD / count**0.5):
        return None
    return (
        f"the base's weights differ by about {mean:.{int(count > 1)}%} from those that this {title} adapter was "
        "trained on, more than rounding makes, and what the adapter changes by ten times as much or more: load the "
        "base that it was trained on"
    )


def _parts(numbers: Tensor) -> list[Tensor]:
    plain = numbers.detach().double().cpu()
    return [plain[start : start + _PROBES] for start in range(0, len(plain), _PROBES)]


def _distance(a: Tensor, b: Tensor) -> float:
    scale = float(torch.maximum(a.norm(), b.norm()))
    return float((a - b).norm()) / scale if scale > 0 else 0.0
