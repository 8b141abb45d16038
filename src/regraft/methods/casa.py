"""CASA: in the old weight's singular basis, the update is set against what the upgrade changed there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from regraft.adapter import ModuleRef
from regraft.methods import Carried, method
from regraft.methods._moments import cut_in
from regraft.methods.task import AdapterTask
from regraft.updates import Update

# Of the old weight's ‖W‖², held by the directions that are clustered (square weights; all directions of others).
_TOP = 0.9
# `torch.quantile` takes no more values.
_MOST_SORTED = 2**24


@method(
    "casa",
    reference="CASA (Wang et al., ICML 2026; Noahwangyuchen/CASA transfer.py at 45d058d)",
    summary="Adds the update where the upgrade changed most, and takes the upgrade back elsewhere. Confounded by that.",
    needs=("old", "new"),
    scope="adapter",
    per="adapter",
)
def casa(task: AdapterTask, *, rotation: float = 0.5, density: float = 0.5, arbitrate: float = 0.85) -> Carried:
    """ΔW_new = U_s C V_sᵀ, C from the update C_s = U_sᵀ ΔW V_s and the upgrade C_t = U_sᵀ (W_new − W_old) V_s.

    As the released code has it: elsewhere than in the upgrade's dense rows and columns C is C_s − C_t, which takes the
    upgrade back. So part of what it recovers is the old base's, not the adapter's: look at retention beside it. That
    code leaves ``alpha`` behind with all that is no factor, and so changes the strength of most files; here ΔW is the
    whole update, alpha and DoRA's magnitude included. Of one size only. The cut to the adapter's rank loses most of
    the part taken back, as it does there (rank 32).

    Args:
        task: the adapter and both bases.
        rotation: predicted rotation |C_s[i, j]| / |σ_i − σ_j| from which on two singular directions are one cluster.
        density: quantile of the clusters' mean norm in C_t above which their rows and columns are protected.
        arbitrate: quantile of the score above which a protected entry that both push the same way takes the larger of
            the two in place of their sum.
    """
    updates: dict[ModuleRef, Update] = {}
    lost: dict[ModuleRef, float] = {}
    skipped: dict[ModuleRef, str] = {}
    for done, module in enumerate(task.modules):
        task.tick(done, len(task.modules), str(module))
        target = task.target(module)
        if target is None or task.new.shape(target) != task.old.shape(module):
            why = task.pairing[module].reason if target is None else "casa carries equal sizes only"
            skipped[module] = why
            continue
        old, new = (b.weight(ref).float().flatten(1) for b, ref in ((task.old, module), (task.new, target)))
        made = arbitrated(task.delta(module), old, new, rotation, density, arbitrate)
        rank = task.rank_of(module)
        if rank is None:
            name, update = task.dense(module, made)
            updates[name] = update
        else:
            up, down, lost[target] = cut_in(made, rank)
            updates[target] = task.made(module, up, down)
    reason = "its rule takes a part of the upgrade back: what it recovers is in part the old base's"
    return Carried({**task.whole_parameters(), **updates}, "casa", reason, skipped, lost=lost)


def arbitrated(delta: Tensor, old: Tensor, new: Tensor, rotation: float, density: float, arbitrate: float) -> Tensor:
    """One module's ΔW_new, (out, in), before any cut.

    Args:
        delta: ΔW on the old base, (out, in).
        old: W_old, (out, in).
        new: W_new, (out, in).
        rotation: see `casa`.
        density: likewise.
        arbitrate: likewise.
    """
    u, s, vh = torch.linalg.svd(old, full_matrices=True)
    update, upgrade = u.T @ delta @ vh.T, u.T @ (new - old) @ vh.T
    k = len(s)
    if old.shape[0] == old.shape[1]:
        k = int((s.square().cumsum(0) / s.square().sum().clamp_min(1e-30) < _TOP).sum()) + 1
    member = _clusters(update[:k, :k], s[:k], rotation)
    high = _protected(member, upgrade[:k, :k], density, (len(u), len(vh)))
    score = (update * upgrade).abs()
    score[:k, :k] *= _agreement(member, update[:k, :k], upgrade[:k, :k])
    result = torch.where(high, update, update - upgrade)
    both = high & (update.sign() == upgrade.sign())
    if both.any():
        loud = both & (score > _quantile(score[both], arbitrate))
        larger = torch.where(update.abs() > upgrade.abs(), update, upgrade)
        result = torch.where(loud, larger - upgrade, result)
    made: Tensor = u @ result @ vh
    return made


def _clusters(update: Tensor, s: Tensor, rotation: float) -> Tensor:
    """Singular directions that the update would rotate into each other, (clusters, k) of zeros and ones."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    turned = update.abs() / ((s[:, None] - s[None, :]).abs() + 1e-6) > rotation
    turned.fill_diagonal_(False)
    count, labels = connected_components(csr_matrix((turned | turned.T).numpy()), directed=False)
    return torch.nn.functional.one_hot(torch.as_tensor(labels).long(), count).float().T


def _protected(member: Tensor, upgrade: Tensor, density: float, shape: tuple[int, int]) -> Tensor:
    """Whether an entry's row or column is of a cluster in which the upgrade is dense, (out, in)."""
    sizes = member.sum(dim=1).clamp_min(1)
    masks = []
    for axis, length in ((1, shape[0]), (0, shape[1])):
        dense = member @ upgrade.norm(dim=axis) / sizes
        chosen = (dense >= torch.quantile(dense, density)).float() @ member > 0
        masks.append(torch.nn.functional.pad(chosen, (0, length - len(chosen))))
    return masks[0][:, None] | masks[1][None, :]


def _quantile(x: Tensor, share: float) -> Tensor:
    """`torch.quantile` of a vector, and of one that has more values than that takes: large models' layers have."""
    if len(x) <= _MOST_SORTED:
        return torch.quantile(x, share)
    # As an array, the share is not rounded to float32, in which such places can't be told apart.
    return torch.as_tensor(np.quantile(x.numpy(), np.asarray(share)))


def _agreement(member: Tensor, update: Tensor, upgrade: Tensor) -> Tensor:
    """Cosine of update and upgrade over the block of clusters that an entry lies in, (k, k)."""

    def over(x: Tensor) -> Tensor:
        return member @ x @ member.T

    cosine = over(update * upgrade) / (over(update.square()).sqrt() * over(upgrade.square()).sqrt() + 1e-8)
    return member.T @ cosine @ member
