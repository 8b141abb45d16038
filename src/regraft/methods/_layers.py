"""Layers against layers: how alike every old module is to every new one of its role, by their weights' subspaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.adapter import ModuleRef
from regraft.methods import WeightPairs
from regraft.methods._subspace import overlap, subspaces

# Containers of blocks; other numbers (``to_out.0``, ``net.2``) belong to the role.
_CONTAINERS = ("h", "layer", "block")
_SINKHORN_STEPS = 500


@dataclass(frozen=True)
class Grid:
    """One role's modules and their likeness.

    Attributes:
        olds: of the old base.
        news: of the new base.
        similarity: chance-corrected subspace overlap (LoRA-X eq. 4), mean of left and right, (old, new); −inf where
            shapes differ.
    """

    olds: tuple[ModuleRef, ...]
    news: tuple[ModuleRef, ...]
    similarity: Tensor


def role_of(module: ModuleRef) -> tuple[str, str]:
    """Component, and the path behind the last numbered block.

    >>> role_of(ModuleRef("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"))[1]
    'attn1.to_out.0'
    """
    parts = module.path.split(".")
    blocks = [
        i + 1
        for i, part in enumerate(parts[:-1])
        if parts[i + 1].isdigit() and (part.endswith("s") or part in _CONTAINERS)
    ]
    return module.component, ".".join(parts[blocks[-1] + 1 :] if blocks else parts)


def grids(
    pairs: WeightPairs, subspace_rank: int | float | None = None, energy: float | None = None
) -> Mapping[tuple[str, str], Grid]:
    """The grid of every role that a wanted module has; the bases of one role are in memory at a time."""
    wanted = {role_of(module): module.component for module in pairs.wanted}
    targets = {m.component: t.component for m in pairs.wanted if (t := pairs.pairing[m].module) is not None}
    found = {}
    for role, component in wanted.items():
        olds = [ModuleRef(component, path) for path in pairs.bases[0].modules(component)]
        there = targets.get(component, component)
        news = [ModuleRef(there, path) for path in pairs.bases[1].modules(there)]
        olds = [ref for ref in olds if role_of(ref) == role]
        news = [ref for ref in news if role_of(ref)[1] == role[1]]
        found[role] = Grid(tuple(olds), tuple(news), _similarity(pairs, olds, news, subspace_rank, energy))
    return found


def _similarity(
    pairs: WeightPairs,
    olds: list[ModuleRef],
    news: list[ModuleRef],
    subspace_rank: int | float | None,
    energy: float | None,
) -> Tensor:
    left = [(pairs.bases[0].shape(ref), subspaces(pairs.weight("old", ref), subspace_rank, energy)) for ref in olds]
    scores = torch.full((len(olds), len(news)), float("-inf"))
    for j, ref in enumerate(news):
        shape, rank = pairs.bases[1].shape(ref), {u.shape[1] for _, (u, _) in left}
        bases = {r: subspaces(pairs.weight("new", ref), r, None) for r in rank}
        for i, (other, (u, v)) in enumerate(left):
            if other == shape:
                u_new, v_new = bases[u.shape[1]]
                scores[i, j] = (overlap(u, u_new) + overlap(v, v_new)) / 2
    return scores


def transport_plan(cost: Tensor, *, sharpness: float = 0.02) -> Tensor:
    """The optimal transport plan between uniform weights on rows and columns, by Sinkhorn's iterations.

    Args:
        cost: (n, m); infinite where nothing may go.
        sharpness: of the entropy that is added, as a share of the largest finite cost: small is exact.

    Returns:
        (n, m), rows summing to 1 / n and columns to 1 / m. Rows and columns without a finite cost take no part: they
        are zeros, and n and m count the others.
    """
    cost = cost.double()
    rows, columns = cost.isfinite().any(dim=1), cost.isfinite().any(dim=0)
    whole = torch.zeros_like(cost)
    if not rows.any():
        return whole
    cost = cost[rows][:, columns]
    scale = float(cost[cost.isfinite()].abs().max().clamp_min(1e-12)) * sharpness
    logits = torch.where(cost.isfinite(), -cost / scale, float("-inf"))
    n, m = cost.shape
    row, column = torch.zeros(n).double(), torch.zeros(m).double()
    for _ in range(_SINKHORN_STEPS):
        row = -torch.log(torch.tensor(float(n))) - torch.logsumexp(logits + column, dim=1)
        column = -torch.log(torch.tensor(float(m))) - torch.logsumexp(logits + row[:, None], dim=0)
    whole[rows.nonzero(), columns.nonzero()[:, 0]] = (logits + row[:, None] + column).exp()
    return whole
