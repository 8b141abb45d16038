"""Carries a LoRA-X adapter over to another base by its own rule, without data."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from regraft.loading import base_in
from regraft.pairing import pair_bases
from regraft.tuners._model import base_modules, tuned_layers
from regraft.tuners.lorax.layer import LoraXLayer


@torch.no_grad()
def transfer_lorax(old: nn.Module, new: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """Set ΔΣ on a new base from an adapter on the old one: ΔΣ_t = U_tᵀ ΔW_s V_t.

    With ``full`` on the new base that is all of U_t U_tᵀ ΔW_s V_t V_tᵀ (LoRA-X, arXiv 2501.16559, eq. 3); otherwise its
    diagonal. Between weights of two sizes ΔΣ is taken over by index (§4.2.2). Where blocks were added or removed,
    modules are paired by depth as `regraft port` pairs them; those of added blocks stay as they are.

    Args:
        old: with the trained adapter.
        new: with an adapter of the same name on the new base.
        adapter_name: which.

    Returns:
        By module of the new base that has a counterpart, the share of ‖ΔW_s‖² that is carried; −1 where sizes differ,
        which has no such share.

    Raises:
        ValueError: a module of the new model has no counterpart in the old one, and is of no added block.
        InputError: blocks must be told apart by weights that are quantised.
    """
    olds, news = (
        {layer.key: layer for _, layer in tuned_layers(model, LoraXLayer) if adapter_name in layer.scaling}
        for model in (old, new)
    )
    if not news:
        raise ValueError(f"the new model has no LoRA-X adapter {adapter_name!r}")
    # The same modules may be tuned in bases of other depths.
    alike = olds.keys() == news.keys() and _in_blocks(old) == _in_blocks(new)
    homes = {key: key for key in news} if alike else _paired(old, new, olds, news)
    for key, home in homes.items():
        if home not in olds:
            where = "there" if home == key else f"at {home}, which answers to it"
            raise ValueError(f"{key}: the old model has no {adapter_name!r} {where}")
    return {key: _carry(olds[home], news[key], adapter_name) for key, home in homes.items()}


def _paired(old: nn.Module, new: nn.Module, olds: Collection[str], news: Collection[str]) -> dict[str, str]:
    """New module → old module; without those of added blocks."""
    pairing = pair_bases(base_in(old), base_in(new))
    found = {answer.module.path: ref.path for ref, answer in pairing.counterparts.items() if answer.module is not None}
    roles = {_role(key) for key in olds}
    # What the old model has nowhere is told by its own name.
    return {key: found.get(key, key) for key in news if key in found or _role(key) not in roles}


def _in_blocks(model: nn.Module) -> set[str]:
    """Names of the base's modules that lie in numbered blocks, or are blocks."""
    base: Any = model
    names = base_modules(base.get_base_model() if hasattr(base, "get_base_model") else base)
    return {name for name in names if _role(name) != name}


def _role(key: str) -> str:
    """A module's name without the numbers of its blocks."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", key)


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
