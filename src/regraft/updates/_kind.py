"""What every kind of update has in common, and the maths that several share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import prod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from regraft.tensors import InMemory, Shape, TensorRef

if TYPE_CHECKING:
    from typing_extensions import Self


class RowPart(NamedTuple):
    """How one tensor of an update runs along the rows of the weight."""

    dim: int
    rows_each: int = 1


@dataclass(frozen=True)
class Kind:
    """One change to one module. Tensors are references: values lie on disk until they are needed.

    A kind gives `kind`, `shape`, `delta` and `scaled`, and overrides what it knows a shorter way for.
    """

    #: True where the module path of the update is a parameter's whole name (``x.norm1.weight``).
    by_parameter: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        raise NotImplementedError

    @property
    def shape(self) -> Shape:
        """Shape of ΔW in the base weight's orientation, as far as the update itself tells it."""
        raise NotImplementedError

    @property
    def rows(self) -> int | None:
        """How many rows the weight has, where the update tells."""
        return self.shape[0] if self.shape else None

    def fits(self, weight_shape: Shape) -> bool:
        """Whether the update can change a weight of this shape; 1 × 1 kernels and matrices are the same."""
        return bare(weight_shape) == bare(self.shape)

    @property
    def rank(self) -> int | None:
        return None

    @property
    def alpha(self) -> TensorRef | None:
        return None

    @property
    def magnitude(self) -> TensorRef | None:
        return None

    @property
    def additive(self) -> bool:
        """Whether ΔW is the same on every base weight."""
        return self.magnitude is None

    def shaped(self, weight_shape: Shape | None) -> Self:
        """The same update with the shape of the base's weight, where the kind can't tell it by itself."""
        known = any(field.name == "weight_shape" for field in fields(self))
        return replace(self, **{"weight_shape": weight_shape}) if known else self

    def parts(self) -> dict[str, TensorRef]:
        """Role → tensor, every tensor of the update."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if hasattr(value, "load")}

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """ΔW in float32, without DoRA's magnitude: of ``weight``'s shape where it is given, else of `shape`.

        Raises:
            ValueError: ΔW depends on the base's ``weight``, and there is none.
        """
        raise NotImplementedError

    def merged(self, weight: Tensor) -> Tensor:
        """The changed weight, float32, of ``weight``'s shape: what the real tools compute on that base."""
        return decomposed(weight.float() + self.delta(weight).reshape(weight.shape), self.magnitude)

    def norm(self, weight: Tensor | None = None) -> float:
        """‖ΔW‖_F, without DoRA's magnitude.

        Raises:
            ValueError: ΔW depends on the base's ``weight``, and there is none.
        """
        return float(self.delta(weight).double().norm())

    def scaled(self, strength: float) -> Self:
        """The update at another strength, as its tool applies one: strength · ΔW where it is additive."""
        raise NotImplementedError

    def cast(self, dtype: torch.dtype) -> Self:
        """The same update with its tensors in ``dtype``."""
        return self.mapped(lambda tensor: tensor.to(dtype))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same update with every tensor passed through ``change``."""
        return replace(self, **{name: InMemory(change(ref.load())) for name, ref in self.parts().items()})

    def row_parts(self) -> dict[str, RowPart] | None:
        """The tensors that can be cut along the rows of the weight, by role; None where that can't be done exactly.

        All other tensors serve every row.
        """
        return None


def bare(shape: Shape) -> Shape:
    """The shape without kernel sides of 1 at its end."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def fits_flattened(shape: Shape, weight_shape: Shape) -> bool:
    """Whether an update of ``shape`` (out, in · kh · kw) is one of a kernel (out, in, kh, kw)."""
    return len(shape) == 2 and shape[:1] == weight_shape[:1] and shape[1] == prod(weight_shape[1:])


def magnitude_rows(magnitude: TensorRef | None) -> dict[str, RowPart] | None:
    """Where DoRA's magnitude stands in `Kind.row_parts`: nowhere if there is none, None if it spans the rows."""
    if magnitude is None:
        return {}
    # The norm of a column takes every row of the weight.
    return None if is_per_column(magnitude.shape) else {"magnitude": RowPart(0)}


def is_per_column(shape: Shape) -> bool:
    """Whether a DoRA magnitude of this shape holds one norm per input column, not per output row."""
    return len(shape) > 1 and shape[0] == 1


def decomposed(changed: Tensor, magnitude: TensorRef | None) -> Tensor:
    """DoRA's weight m · V / ‖V‖ of the changed weight V (arXiv 2402.09353, eq. 5); V itself without a magnitude.

    Args:
        changed: V = W + ΔW, (out, in, …), float32.
        magnitude: one norm per output row, (out,) or (out, 1, …), or, as LyCORIS and OneTrainer may have it, per
            input column, (1, in, …).
    """
    if magnitude is None:
        return changed
    m = magnitude.load().float()
    axis = 1 if is_per_column(m.shape) else 0
    norm = changed.transpose(0, axis).flatten(1).norm(dim=1)
    along = [1] * changed.dim()
    along[axis] = -1
    result: Tensor = changed * (m.reshape(along) / norm.reshape(along))
    return result


def scaled_ref(ref: TensorRef, strength: float) -> InMemory:
    """strength · tensor, in the tensor's dtype."""
    tensor = ref.load()
    return InMemory((tensor.float() * strength).to(tensor.dtype))


def floats(*refs: TensorRef) -> tuple[Tensor, ...]:
    return tuple(ref.load().float() for ref in refs)


def scale_of(alpha: float | None, rank: int | None) -> float:
    """alpha / rank, the scale of kohya's and LyCORIS' files; 1 without alpha or without a low-rank factor (LoKr)."""
    return 1.0 if alpha is None or not rank else alpha / rank


def fitted(delta: Tensor, weight: Tensor | None) -> Tensor:
    """``delta`` in the shape of the base's weight: files flatten kernels, and 1 × 1 convolutions are matrices too."""
    return delta if weight is None else delta.reshape(weight.shape)


def needed(weight: Tensor | None, kind: str) -> Tensor:
    if weight is None:
        raise ValueError(f"the change of a {kind} update depends on the base's weight")
    return weight.float()


def low_rank_norm(up: Tensor, down: Tensor) -> float:
    """‖up · down‖_F through r × r Gram matrices; (out, r), (r, in)."""
    up, down = up.double(), down.double()
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())


def tucker_product(mid: Tensor, out_factor: Tensor, in_factor: Tensor) -> Tensor:
    """(out, in, …) of a core (r, r', …) and factors (r, out), (r', in)."""
    return torch.einsum("ij...,ip,jq->pq...", mid, out_factor, in_factor)


def tucker_norm(mid: Tensor, out_factor: Tensor, in_factor: Tensor) -> float:
    """‖tucker_product‖_F through Gram matrices of the factors."""
    core, a, b = mid.double().flatten(2), out_factor.double(), in_factor.double()
    moved = torch.einsum("ijk,ip,jq->pqk", core, a @ a.T, b @ b.T)
    return float((moved * core).sum().clamp_min(0).sqrt())
