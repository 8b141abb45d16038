"""DART: each module's update rotated as its weight was."""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.methods import method
from regraft.transport import IDENTITY, LinearMap, Transport

# Of the mean diagonal: keeps directions that a weight says nothing about where they are.
_PRIOR = 1e-9


@method(
    "dart",
    reference="DART (training-free rotation alignment), from its summary; formulas chosen here",
    summary="Rotates the update by the orthogonal maps that turn each old weight into the new one, module by module.",
    needs=("old", "new"),
    resizes=True,
)
def dart(old: Tensor, new: Tensor, *, sweeps: int = 3) -> Transport:
    """ΔW_new = Q_out ΔW Q_inᵀ with orthogonal Q minimising ‖W_new − Q_out W_old Q_inᵀ‖_F, module by module.

    The paper's formulas could not be found. Chosen: alternating orthogonal Procrustes from the identity, starting with
    the side that alone explains more (both at once would match singular vectors by their index, which `lora-x` shows
    to be no match). A weight's null directions keep their places. One rotated side is recovered exactly, and no
    rotation stays none; two at once only where the start is near. Unlike `procrustes`, modules that share a space are
    not tied to one map.

    Args:
        old: old weight (out, in).
        new: new weight (out', in').
        sweeps: alternations.
    """
    old, new = old.double(), new.double()
    maps: list[Tensor | None] = [None, None]
    sides = [side for side in (0, 1) if old.shape[1 - side] == new.shape[1 - side]]
    if not sides:
        # Neither size is the same: the first units start in place.
        maps[0] = torch.eye(len(new), len(old), dtype=old.dtype, device=old.device)
        sides = [1]
    elif len(sides) == 1:
        sides = [sides[0], 1 - sides[0]]
    else:
        sides.sort(key=lambda side: -float(torch.linalg.svdvals(_gram(old, new, [None, None], side)).sum()))
    for _ in range(sweeps):
        for side in sides:
            maps[side] = _polar(_gram(old, new, maps, side))
        sides = [0, 1] if len(sides) == 1 else sides
    left, right = (IDENTITY if side is None else LinearMap(0.0, side.float()) for side in maps)
    return Transport(((left, right.T),), rotates=True)


def _gram(old: Tensor, new: Tensor, maps: list[Tensor | None], side: int) -> Tensor:
    """Cross-Gram matrix (m', m) of one side's units, the other side mapped already."""
    if side == 1:
        old, new, other = old.T, new.T, maps[0]
    else:
        other = maps[1]
    return new @ (old if other is None else old @ other.T).T


def _polar(gram: Tensor) -> Tensor:
    """The orthogonal matrix (m', m) nearest to a cross-Gram matrix."""
    if gram.shape[0] == gram.shape[1]:
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        gram = gram + _PRIOR * gram.norm() / len(gram) ** 0.5 * eye
    u, _, vh = torch.linalg.svd(gram, full_matrices=False)
    nearest: Tensor = u @ vh
    return nearest
