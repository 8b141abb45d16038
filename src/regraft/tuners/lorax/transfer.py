"""Carries a LoRA-X adapter over to another base by its own rule, without data."""

from __future__ import annotations

import torch
from torch import nn

from regraft.tuners._model import tuned_layers
from regraft.tuners.lorax.layer import LoraXLayer


@torch.no_grad()
def transfer_lorax(old: nn.Module, new: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """Set ΔΣ on a new base from an adapter on the old one: ΔΣ_t = U_tᵀ ΔW_s V_t.

    With ``full`` on the new base that is all of U_t U_tᵀ ΔW_s V_t V_tᵀ (LoRA-X, arXiv 2501.16559, eq. 3); otherwise its
    diagonal. Between weights of two sizes ΔΣ is taken over by index (§4.2.2).

    Args:
        old: with the trained adapter.
        new: with an adapter of the same name on the new base.
        adapter_name: which.

    Returns:
        By module of the new base, the share of ‖ΔW_s‖² that is carried; −1 where sizes differ, which has no such share.

    Raises:
        ValueError: a module of the new model has no counterpart in the old one.
    """
    olds = {layer.key: layer for _, layer in tuned_layers(old, LoraXLayer) if adapter_name in layer.scaling}
    kept: dict[str, float] = {}
    for _, layer in tuned_layers(new, LoraXLayer):
        if adapter_name not in layer.scaling:
            continue
        if layer.key not in olds:
            raise ValueError(f"{layer.key}: the old model has no {adapter_name!r} there")
        kept[layer.key] = _carry(olds[layer.key], layer, adapter_name)
    if not kept:
        raise ValueError(f"the new model has no LoRA-X adapter {adapter_name!r}")
    return kept


def _carry(old: LoraXLayer, new: LoraXLayer, name: str) -> float:
    old.confirm([name])
    new.confirm([name])
    sigma, target = old.lorax_sigma[name].float(), new.lorax_sigma[name]
    u, v = new.lorax_u[name].double(), new.lorax_v[name].double()
    if len(u) != len(old.lorax_u[name]) or len(v) != len(old.lorax_v[name]):
        matrix, share = (sigma if sigma.dim() == 2 else torch.diag(sigma)), -1.0
        fitted = torch.zeros(len(target), len(target))
        rank = min(len(matrix), len(target))
        fitted[:rank, :rank] = matrix[:rank, :rank]
        carried = fitted if target.dim() == 2 else fitted.diagonal()
    else:
        change = old.matrix(name).double().to(u.device)
        inside = u.mT @ change @ v
        carried = inside if target.dim() == 2 else inside.diagonal()
        total = float(change.square().sum())
        share = float(carried.square().sum()) / total if total > 0 else 1.0
    target.data = carried.to(target)
    return share
