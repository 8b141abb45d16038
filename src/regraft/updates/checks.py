"""Whether the tensors of an update belong together, told from their shapes: what a reader asks of a file's parts."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from regraft.tensors import Shape, TensorRef
from regraft.updates._kind import is_per_column
from regraft.updates.boft import Boft
from regraft.updates.diff import Diff
from regraft.updates.foura import Foura
from regraft.updates.fourierft import FourierFT
from regraft.updates.full import Full
from regraft.updates.glora import GLora
from regraft.updates.ia3 import Ia3
from regraft.updates.loha import LoHa
from regraft.updates.lokr import LoKr
from regraft.updates.lorax import Subspace
from regraft.updates.lowrank import LowRank
from regraft.updates.oft import Oft
from regraft.updates.rows import Slice
from regraft.updates.svdiff import SpectralShift
from regraft.updates.tucker import Tucker
from regraft.updates.vera import Vera

if TYPE_CHECKING:
    from regraft.updates import Update

# What is wrong, or nothing.
_Finding = str | None


def mismatch(update: Update) -> tuple[str, str] | None:
    """The first part that does not belong to the others, and why; None where all fit.

    Returns:
        ``(role, what is wrong)``, the role as `Kind.parts` names it.
    """
    if isinstance(update, Slice):
        return mismatch(update.of)
    for role, part in update.parts().items():
        if not isinstance(update, Diff | Full) and role not in _SCALARS and not all(part.shape):
            return role, f"is empty, of shape {list(part.shape)}"
        if role in _SCALARS and prod(part.shape) != 1:
            return role, f"must be one number, but has shape {list(part.shape)}"
    for role, finding in _findings(update):
        if finding is not None:
            return role, finding
    weight_shape = getattr(update, "weight_shape", None)
    if weight_shape is not None and not update.shaped(None).fits(weight_shape):
        return next(iter(update.parts())), f"does not fit the base's weight, {list(weight_shape)}"
    if update.magnitude is not None:
        finding = _magnitude(update.magnitude.shape, update.shape)
        return ("magnitude", finding) if finding is not None else None
    return None


_SCALARS = ("alpha", "on_input")


def _findings(update: Update) -> Iterator[tuple[str, _Finding]]:
    if isinstance(update, LowRank):
        yield from _factors({"up": update.up, "down": update.down})
        yield from _vector("bias", update.bias, update.up.shape[0])
    elif isinstance(update, Tucker):
        yield from _tucker("mid", update.mid, {"up": update.up, "down": update.down}, (1, 0))
    elif isinstance(update, LoHa):
        yield from _loha(update)
    elif isinstance(update, LoKr):
        yield from _lokr(update)
    elif isinstance(update, GLora):
        yield from _glora(update)
    elif isinstance(update, Oft):
        yield from _oft(update)
    elif isinstance(update, Boft):
        yield from _boft(update)
    elif isinstance(update, Ia3):
        yield "weight", None if prod(update.weight.shape) == max(update.weight.shape, default=0) else "is no vector"
    elif isinstance(update, SpectralShift):
        yield "shift", _dims(update.shift.shape, 1)
    elif isinstance(update, Subspace):
        yield from _subspace(update)
    elif isinstance(update, Foura):
        yield from _foura(update)
    elif isinstance(update, Vera):
        yield from _vera(update)
    elif isinstance(update, FourierFT):
        yield "spectrum", _dims(update.spectrum.shape, 1)


def _dims(shape: Shape, least: int, most: int | None = None) -> _Finding:
    if least <= len(shape) <= (most or least):
        return None
    wanted = str(least) if most is None else f"{least} to {most}"
    return f"must have {wanted} dimensions, but has shape {list(shape)}"


def _equal(have: int, wanted: int, of: str) -> _Finding:
    return None if have == wanted else f"has {have} where {of} has {wanted}"


def _factors(pair: dict[str, TensorRef]) -> Iterator[tuple[str, _Finding]]:
    """Matrices or kernels (out, r) and (r, in)."""
    (up_role, up), (down_role, down) = pair.items()
    yield up_role, _dims(up.shape, 2, 5)
    yield down_role, _dims(down.shape, 2, 5)
    yield up_role, _equal(prod(up.shape[1:]), down.shape[0], f"{down_role} (the rank)")


def _tucker(
    core_role: str, core: TensorRef, pair: dict[str, TensorRef], ranks: tuple[int, int]
) -> Iterator[tuple[str, _Finding]]:
    """A core (r, r', …) and two factors, whose dimensions ``ranks`` are r and r'."""
    yield core_role, _dims(core.shape, 3, 5)
    for side, ((role, factor), dim) in enumerate(zip(pair.items(), ranks, strict=True)):
        yield role, _dims(factor.shape, 2, 5)
        yield role, None if prod(factor.shape[2:]) == 1 else f"must be a matrix, but has shape {list(factor.shape)}"
        yield role, _equal(factor.shape[dim], core.shape[side], f"{core_role} (the rank)")


def _vector(role: str, ref: TensorRef | None, size: int) -> Iterator[tuple[str, _Finding]]:
    if ref is not None:
        yield role, _equal(prod(ref.shape), size, "the weight (its rows)")


def _magnitude(magnitude: Shape, shape: Shape) -> _Finding:
    axis = 1 if is_per_column(magnitude) else 0
    if len(magnitude) > 1 and prod(magnitude) != magnitude[axis]:
        return f"must run along one axis, but has shape {list(magnitude)}"
    return _equal(prod(magnitude), shape[axis], "the weight (its inputs)" if axis else "the weight (its rows)")


def _loha(update: LoHa) -> Iterator[tuple[str, _Finding]]:
    one = {"w1_a": update.w1_a, "w1_b": update.w1_b}
    two = {"w2_a": update.w2_a, "w2_b": update.w2_b}
    if (update.t1 is None) != (update.t2 is None):
        yield "t1" if update.t1 is not None else "t2", "has no counterpart: both halves have a core, or none"
        return
    if update.t1 is None or update.t2 is None:
        yield from _factors(one)
        yield from _factors(two)
        yield "w2_a", _equal(update.w2_a.shape[0], update.w1_a.shape[0], "w1_a (the rows)")
        yield "w2_b", _equal(prod(update.w2_b.shape[1:]), prod(update.w1_b.shape[1:]), "w1_b (the inputs)")
    else:
        yield from _tucker("t1", update.t1, one, (0, 0))
        yield from _tucker("t2", update.t2, two, (0, 0))
        yield "w2_a", _equal(update.w2_a.shape[1], update.w1_a.shape[1], "w1_a (the rows)")
        yield "w2_b", _equal(update.w2_b.shape[1], update.w1_b.shape[1], "w1_b (the inputs)")
        yield "t2", None if update.t1.shape[2:] == update.t2.shape[2:] else "has another kernel than t1"


def _lokr(update: LoKr) -> Iterator[tuple[str, _Finding]]:
    if update.w1 is not None:
        yield "w1", _dims(update.w1.shape, 2)
    elif update.w1_a is not None and update.w1_b is not None:
        yield from _factors({"w1_a": update.w1_a, "w1_b": update.w1_b})
    if update.w2 is not None:
        yield "w2", _dims(update.w2.shape, 2, 5)
    elif update.w2_a is not None and update.w2_b is not None:
        pair = {"w2_a": update.w2_a, "w2_b": update.w2_b}
        yield from _factors(pair) if update.t2 is None else _tucker("t2", update.t2, pair, (0, 0))


def _glora(update: GLora) -> Iterator[tuple[str, _Finding]]:
    yield from _factors({"a1": update.a1, "a2": update.a2})
    yield "a1", _equal(update.a1.shape[0], prod(update.a2.shape[1:]), "a2 (the inputs)")
    if update.bm is None:
        yield from _factors({"b1": update.b1, "b2": update.b2})
    else:
        yield from _tucker("bm", update.bm, {"b1": update.b1, "b2": update.b2}, (1, 0))
    yield "b2", _equal(update.b2.shape[1], update.a1.shape[0], "a1 (the inputs)")


def _subspace(update: Subspace) -> Iterator[tuple[str, _Finding]]:
    shape = update.sigma.shape
    yield "sigma", _dims(shape, 1, 2)
    yield "sigma", _equal(shape[0], shape[-1], "its other side")
    for role, vectors in (("u", update.u), ("v", update.v)):
        if vectors is not None:
            yield role, _dims(vectors.shape, 2)
            yield role, _equal(vectors.shape[1], shape[0], "sigma (the rank)")
    if update.marks is not None:
        yield "marks", _dims(update.marks.shape, 2)
        yield "marks", _equal(update.marks.shape[0], shape[0], "sigma (the rank)")
        yield "marks", _equal(update.marks.shape[1], 4, "every direction")


def _foura(update: Foura) -> Iterator[tuple[str, _Finding]]:
    a, b = update.a.shape, update.b.shape
    least = 2 if update.size is None else 3
    yield "a", _dims(a, least, least + 3)
    yield "b", _dims(b, least)
    yield "b", _equal(b[1], a[0], "a (the rank)")
    if update.size is not None:
        for role, count, channels in (("a", a[1], update.size[1]), ("b", b[0], update.size[0])):
            yield role, _equal(count, channels // 2 + 1, f"the transform of {channels} channels")
            yield role, _equal((a if role == "a" else b)[-1], 2, "a complex number")
    if update.mask is not None:
        yield "mask", _dims(update.mask.shape, 1)
        yield "mask", _equal(update.mask.shape[0], a[0], "a (the rank)")


def _vera(update: Vera) -> Iterator[tuple[str, _Finding]]:
    yield "lambda_b", _dims(update.lambda_b.shape, 1)
    yield "lambda_d", _dims(update.lambda_d.shape, 1)
    if update.a is None or update.b is None:
        return
    rank, rows = update.lambda_d.shape[0], update.lambda_b.shape[0]
    for role, ref, dim in (("a", update.a, 0), ("b", update.b, 1)):
        yield role, _dims(ref.shape, 2)
        yield role, _equal(ref.shape[dim], rank, "lambda_d (the rank)")
    have = update.b.shape[0]
    yield "b", None if have >= rows else f"has {have} rows where lambda_b has {rows}"


def _oft(update: Oft) -> Iterator[tuple[str, _Finding]]:
    shape = update.blocks.shape
    if update.convention == "peft":
        yield "blocks", _dims(shape, 2)
        size = update.block_size
        yield "blocks", None if size * (size - 1) // 2 == shape[1] else f"has {shape[1]} numbers a block: no triangle"
        return
    yield "blocks", _dims(shape, 3)
    yield "blocks", _equal(shape[1], shape[2], "its other side")
    yield from _vector("rescale", update.rescale, shape[0] * shape[1])


def _boft(update: Boft) -> Iterator[tuple[str, _Finding]]:
    shape = update.blocks.shape
    yield "blocks", _dims(shape, 4)
    stages, blocks, size, other = shape
    yield "blocks", _equal(size, other, "its other side")
    single = update.convention == "peft" and stages == 1
    # Stage i pairs 2ⁱ halves of blocks with as many others.
    whole = single or (size % 2 == 0 and blocks % 2 ** (stages - 1) == 0)
    yield "blocks", None if whole else f"has {blocks} blocks of {size}, which {stages} butterfly stages can't pair"
    if update.convention == "lycoris":
        yield from _vector("rescale", update.rescale, blocks * size)
