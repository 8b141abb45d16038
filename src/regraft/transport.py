"""A transport: how one module's update is carried, ΔW_new = Σ Lᵢ · ΔW_old · Rᵢ.

A map is stored as ``c · I + diag(d) + left @ right``, so that the identity costs nothing, a projection costs its thin
basis (left = U, right = Uᵀ), and the complement of a projection costs no more (c = 1, left = −U, right = Uᵀ).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LinearMap:
    """x ↦ c · x + d ⊙ x + left @ (right @ x).

    Attributes:
        identity: the coefficient c of the identity.
        left: (m', k), or None where the map is c · I + diag(d).
        right: (k, m); None stands for the identity, so that ``left`` is the whole (m', m) matrix.
        diagonal: d, (m,); None for zeros.
    """

    identity: float = 1.0
    left: Tensor | None = None
    right: Tensor | None = None
    diagonal: Tensor | None = None

    @property
    def is_identity(self) -> bool:
        return self.identity == 1.0 and self.left is None and self.diagonal is None

    def __matmul__(self, x: Tensor) -> Tensor:
        """The map applied to the columns of x: (m, n) → (m', n)."""
        if self.left is None:
            return self._scaled(x, 0)
        left = self.left.to(x.dtype)
        moved = left @ x if self.right is None else left @ (self.right.to(x.dtype) @ x)
        return moved if self.is_low else self._scaled(x, 0) + moved

    def on_the_right(self, x: Tensor) -> Tensor:
        """x · M for rows x: (n, m') → (n, m)."""
        if self.left is None:
            return self._scaled(x, 1)
        left = self.left.to(x.dtype)
        moved = x @ left if self.right is None else (x @ left) @ self.right.to(x.dtype)
        return moved if self.is_low else self._scaled(x, 1) + moved

    @property
    def is_low(self) -> bool:
        """Whether nothing but ``left @ right`` is there."""
        return self.identity == 0.0 and self.diagonal is None

    def _scaled(self, x: Tensor, axis: int) -> Tensor:
        """(c · I + diag(d)) applied along one axis of x."""
        plain = x if self.identity == 1.0 else self.identity * x
        if self.diagonal is None:
            return plain
        d = self.diagonal.to(x.dtype)
        return plain + (d[:, None] if axis == 0 else d) * x

    @property
    def T(self) -> LinearMap:
        """The transposed map."""
        if self.left is None:
            return self
        if self.right is None:
            return LinearMap(self.identity, self.left.T, None, self.diagonal)
        return LinearMap(self.identity, self.right.T, self.left.T, self.diagonal)

    def squared(self, out_features: int) -> Tensor:
        """The elementwise square of the matrix, (m', m), float32."""
        eye = torch.eye(out_features if self.left is None else self._in_features())
        return (self @ eye).square()

    def to_cpu(self, seen: dict[int, Tensor]) -> LinearMap:
        """The map in float32 on the CPU.

        Args:
            seen: address → tensor on the CPU; a map that many modules share, or its transpose, is moved once.
        """

        def moved(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or (tensor.device.type == "cpu" and tensor.dtype == torch.float32):
                return tensor
            base = tensor if tensor.is_contiguous() or tensor.dim() != 2 else tensor.T
            kept = seen.setdefault(base.data_ptr(), base.to("cpu", torch.float32))
            return kept if base is tensor else kept.T

        return LinearMap(self.identity, moved(self.left), moved(self.right), moved(self.diagonal))

    @property
    def out_features(self) -> int | None:
        """m'; None where the map fits any size."""
        side = self.left if self.left is not None else self.diagonal
        return None if side is None else side.shape[0]

    def _in_features(self) -> int:
        last = self.right if self.right is not None else self.left
        assert last is not None
        return last.shape[1]


IDENTITY = LinearMap()
#: (L, R) of each part of a transport.
Terms = tuple[tuple[LinearMap, LinearMap], ...]


def projection(basis: Tensor) -> LinearMap:
    """U Uᵀ for orthonormal columns U (m, k)."""
    if basis.shape[0] == basis.shape[1]:
        return IDENTITY
    return LinearMap(0.0, basis, basis.T)


@dataclass(frozen=True)
class Moved:
    """A low-rank update after a transport.

    Attributes:
        up: (out', r').
        down: (r', in').
        energy_kept: ‖ΔW_new‖² / ‖ΔW_old‖² (1 for a zero update).
        cut_loss: share of the carried ‖ΔW‖² that the cut back to the wanted rank lost.
    """

    up: Tensor
    down: Tensor
    energy_kept: float
    cut_loss: float


@dataclass(frozen=True, eq=False)
class Transport:
    """ΔW_new = Σ L · ΔW_old · R over ``terms`` (L (out', out), R (in, in')).

    Attributes:
        terms: (L, R) of each part.
        rotates: whether L leads from the old base's output units to the new one's, so that whatever belongs to a unit
            (a bias, DoRA's magnitude) moves along. A projection does not: its units stay what they are.
    """

    terms: Terms = ((IDENTITY, IDENTITY),)
    rotates: bool = False

    @property
    def is_identity(self) -> bool:
        return len(self.terms) == 1 and all(map_.is_identity for map_ in self.terms[0])

    def held(self) -> Transport:
        """The same transport, its maps in memory."""
        return self

    def to_cpu(self, seen: dict[int, Tensor]) -> Transport:
        """The transport in float32 on the CPU, as adapters' factors are; see `LinearMap.to_cpu`."""
        terms = tuple((left.to_cpu(seen), right.to_cpu(seen)) for left, right in self.terms)
        return Transport(terms, self.rotates)

    def rank_out(self, rank: int) -> int:
        """Rank of the carried update, before any cut."""
        return rank * len(self.terms)

    def dense(self, delta: Tensor) -> Tensor:
        """The transport of a whole ΔW, (out, in) → (out', in'); a kernel lies flattened, (out, in · kh · kw)."""
        total = None
        for left, right in self.terms:
            part = _on_inputs(left @ delta, right)
            total = part if total is None else total + part
        assert total is not None
        return total

    def factors(self, up: Tensor, down: Tensor, rank: int | float | None = None) -> Moved:
        """The transport of up @ down, cut back to ``rank``.

        Args:
            up: (out, r).
            down: (r, in), a kernel flattened.
            rank: of the result: a number, a share of ‖ΔW‖² to keep (a float up to 1), or None for the rank of ``up``.
        """
        before, terms = _squared_norm(up, down), self.terms
        new_up = torch.cat([left @ up for left, _ in terms], dim=1)
        new_down = torch.cat([_on_inputs(down, right) for _, right in terms], dim=0)
        carried = _squared_norm(new_up, new_down)
        wanted = up.shape[1] if rank is None else rank
        if isinstance(wanted, float) or wanted < new_up.shape[1]:
            new_up, new_down = cut(new_up, new_down, wanted)
        after = _squared_norm(new_up, new_down)
        if isinstance(wanted, int) and wanted > new_up.shape[1]:
            pad = wanted - new_up.shape[1]
            new_up = torch.nn.functional.pad(new_up, (0, pad))
            new_down = torch.nn.functional.pad(new_down, (0, 0, 0, pad))
        return Moved(
            new_up,
            new_down,
            energy_kept=after / before if before > 0 else 1.0,
            cut_loss=max(0.0, 1.0 - after / carried) if carried > 0 else 0.0,
        )


class Deferred(Transport):
    """A transport whose maps are made whenever they are asked for, and not kept; it is never the identity.

    Ask for ``terms`` once, or take `held`: every look at them makes them anew.
    """

    def __init__(self, rotates: bool) -> None:
        object.__setattr__(self, "rotates", rotates)

    @property
    def terms(self) -> Terms:
        raise NotImplementedError

    @property
    def is_identity(self) -> bool:
        return False

    def held(self) -> Transport:
        return Transport(self.terms, self.rotates)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rotates={self.rotates})"


class Chained(Deferred):
    """A transport whose maps are products, which need not be taken where a few directions are carried.

    It keeps what they are products of, whole weights among it.
    """

    def images(self, up: Tensor, down: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """What each term's maps make of given directions, L · up and down · R, float32 on the CPU.

        Args:
            up: (out, k).
            down: (k, in).
        """
        raise NotImplementedError


def _on_inputs(x: Tensor, right: LinearMap) -> Tensor:
    """x · R for rows x, (n, in) → (n, in').

    Of a convolution, x is (n, in · k): a map of the input channels alone moves every place of the kernel alike.
    """
    size = right.out_features
    if size is None or size == x.shape[1] or x.shape[1] % size:
        return right.on_the_right(x)
    places = x.reshape(len(x), size, -1).transpose(1, 2)
    moved = right.on_the_right(places.reshape(-1, size)).reshape(*places.shape[:2], -1)
    return moved.transpose(1, 2).flatten(1)


def cut(up: Tensor, down: Tensor, rank: int | float) -> tuple[Tensor, Tensor]:
    """The best approximation of up @ down of a lower rank (Eckart–Young), without building the product.

    Args:
        up: (out, r).
        down: (r, in).
        rank: a number, or the share of ‖ΔW‖² to keep.
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    if isinstance(rank, float):
        rank = rank_for_energy(s, rank)
    root = s[:rank].sqrt()
    return (q_up @ (u[:, :rank] * root)).to(up.dtype), ((root[:, None] * vh[:rank]) @ q_down.T).to(down.dtype)


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """The smallest rank that keeps the share ``energy`` of Σσ²; at least 1."""
    squared = singular_values.cpu().double().square()  # MPS has no float64
    total = squared.sum()
    if total == 0:
        return 1
    # A hair below, so that rounding in the sum never asks for one rank more.
    enough = squared.cumsum(0) >= (energy - 1e-12) * total
    return int(enough.int().argmax()) + 1 if bool(enough.any()) else len(squared)


def _squared_norm(up: Tensor, down: Tensor) -> float:
    up, down = up.double(), down.double()
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0))
