"""What becomes of the updates of blocks that a pruned or distilled base lacks.

``drop``: nothing, as the reports say. ``nearest``: the update is added to that of the same role in the nearest block
that is left. ``fold``: likewise, but so that, to first order, it writes to the residual stream what it wrote from its
own block. All within the old base: from there, the survivor's own transport carries it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from regraft.adapter import ModuleRef
from regraft.errors import UsageError
from regraft.migrations.algebra import Products
from regraft.nearness import Nearness
from regraft.spaces import named_sides
from regraft.transport import IDENTITY, LinearMap, Transport

if TYPE_CHECKING:
    from regraft.methods import WeightPairs
    from regraft.migration import Entry

Policy = Literal["drop", "nearest", "fold"]

# Of the mean squared singular value: directions in which the survivor hardly reads or writes are not asked to.
_RIDGE = 0.1


def check_policy(policy: str) -> None:
    """Raises:
    UsageError: there is no such policy.
    """
    if policy not in get_args(Policy):
        raise UsageError(f"--removed {policy!r} is not known", remedy=f"Known: {', '.join(get_args(Policy))}.")


def rehomed(
    policy: Policy,
    module: ModuleRef,
    survivor: ModuleRef,
    there: Entry,
    pairs: WeightPairs,
) -> Entry:
    """The entry of a removed block's module, whose update goes along with its survivor's.

    Args:
        policy: ``nearest`` or ``fold``.
        module: of the old base.
        survivor: of the old base.
        there: the survivor's entry, if the adapter touches it or not.
        pairs: to read the old base's weights by.
    """
    reason = pairs.pairing[module].reason
    if there.transport is None or there.target is None:
        return replace(there, reason=f"{reason}, and {survivor}: {there.reason}", row_norms=None)
    map_ = Transport() if policy == "nearest" else fold(module, survivor, pairs)
    if map_ is None:
        return replace(there, target=None, transport=None, shape_new=None, reason=reason, row_norms=None)
    how = "added to" if policy == "nearest" else "folded into"
    nearness = Nearness(there.nearness.similarity, there.nearness.distance)
    return replace(
        there,
        transport=Products().transport(there.transport, map_),
        reason=f"{reason}; {how} {there.target}",
        shape_old=pairs.bases[0].shape(module),
        nearness=nearness,
        row_norms=None,
    )


def fold(module: ModuleRef, survivor: ModuleRef, pairs: WeightPairs) -> Transport | None:
    """The update's path to the residual stream, through the survivor's block.

    Of a pre-norm block, the stream gets D h(x), h(x) ≈ U x to first order in the weights (activations as the identity,
    attention as the same mixing of tokens in both blocks); r is the removed block, n the survivor:

    - a writer (D; attention's output): ΔD h_r ≈ ΔD M h_n, with M = U_r U_n⁺ expressing the removed block's hidden
      units by the survivor's: ΔD_n = ΔD M;
    - a reader (U; gate; v): D_r ΔU x = D_n ΔU_n x asks for ΔU_n = D_n⁺ D_r ΔU;
    - q and k only steer a pattern that the survivor has not got: None, they are dropped.

    The norms' scales and the distance between the two places in the stream are left out.
    """
    sides, block = named_sides(module.path), _block(module, survivor)
    blocks = block, _block(survivor, module)
    if sides.inp is not None and sides.inp.startswith(block):
        rows = [_rows(ref, blocks, pairs) for ref in _touching(module, sides.inp, "out", pairs)]
        if not rows:
            return None
        return Transport(((IDENTITY, _onto(torch.cat([n for _, n in rows], 1), torch.cat([r for r, _ in rows], 1))),))
    if sides.out is not None and sides.out.startswith(block):
        columns = [_pair(ref, blocks, pairs) for ref in _touching(module, sides.out, "in", pairs)]
        if not columns:
            return None
        d_r, d_n = (torch.cat(weights) for weights in zip(*columns, strict=True))
        left = _onto(d_n.T, d_r.T).T
        if sides.out_copies > 1:
            whole: Tensor = torch.block_diag(*[left @ torch.eye(d_r.shape[1])] * sides.out_copies)  # type: ignore[no-untyped-call]
            left = LinearMap(0.0, whole)
        return Transport(((left, IDENTITY),))
    return Transport()


def _onto(basis: Tensor, wanted: Tensor) -> LinearMap:
    """M (m_r, m_n) = U_r U_nᵀ (U_n U_nᵀ + λ)⁻¹, which expresses U_r's rows by U_n's; as a thin product.

    Args:
        basis: U_n, (m_n, k).
        wanted: U_r, (m_r, k).
    """
    gram = (basis.T @ basis).double()
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return LinearMap(0.0, wanted, torch.linalg.solve(gram + ridge, basis.T.double()).to(basis.dtype))


def _touching(module: ModuleRef, space: str, side: Literal["in", "out"], pairs: WeightPairs) -> list[ModuleRef]:
    """The old base's modules that write (out) or read (in) a space of the module's own block."""
    old, sides = pairs.bases[0], named_sides(module.path)
    found, shape = [], old.shape(module)
    size = shape[1] if side == "out" else shape[0] // sides.out_copies
    for path in old.modules(module.component):
        there = named_sides(path)
        ref = ModuleRef(module.component, path)
        if (there.out if side == "out" else there.inp) == space:
            # Grouped queries: values are fewer than the output's inputs, and no map of units is known.
            if size != (old.shape(ref)[0] // there.out_copies if side == "out" else old.shape(ref)[1]):
                return []
            found.append(ref)
    return found


def _pair(ref: ModuleRef, blocks: tuple[str, str], pairs: WeightPairs) -> tuple[Tensor, Tensor]:
    """The weight of a module of the removed block, and of its sibling in the survivor's."""
    sibling = ModuleRef(ref.component, blocks[1] + ref.path.removeprefix(blocks[0]))
    return pairs.weight("old", ref), pairs.weight("old", sibling)


def _rows(ref: ModuleRef, blocks: tuple[str, str], pairs: WeightPairs) -> tuple[Tensor, Tensor]:
    """The same, each with its copies of the space (value and gate) side by side: (m, copies · in)."""
    copies = named_sides(ref.path).out_copies
    one, other = (torch.cat(weight.chunk(copies), dim=1) for weight in _pair(ref, blocks, pairs))
    return one, other


def _block(module: ModuleRef, other: ModuleRef) -> str:
    """The module's path up to and with the last number in which the two differ: its block's."""
    parts, others = module.path.split("."), other.path.split(".")
    last = max(
        (i for i, pair in enumerate(zip(parts, others, strict=False)) if pair[0] != pair[1] and pair[0].isdigit()),
        default=-1,
    )
    return ".".join(parts[: last + 1]) + "."
