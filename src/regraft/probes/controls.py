"""The random control: an adapter of the same modules, ranks and norms, with nothing learnt in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from regraft.adapter import Adapter, ModuleRef
from regraft.runtime.applied import Place, find_places
from regraft.tensors import InMemory, Shape
from regraft.updates import Diff, Full, LowRank, Update


def random_like(components: Mapping[str, nn.Module], adapter: Adapter, seed: int) -> Adapter:
    """For each module of ``adapter`` a random update of the same rank and the same ‖W' − W‖_F.

    Args:
        components: the models that ``adapter`` has its places in.
        adapter: the adapter to be like.
        seed: same seed, same update.
    """
    generator = torch.Generator().manual_seed(seed)
    found, _ = find_places(components, adapter)
    updates: dict[ModuleRef, Update] = {}
    with torch.no_grad():
        for ref, place in found.items():
            norm = place.change()
            if isinstance(place.update, Full | Diff):
                updates[ref] = _value(place, norm, generator)
            elif place.tensor.dim() == 1:
                # A shift of a norm's weight.
                noise = _normal(tuple(place.tensor.shape), generator)
                name = ModuleRef(ref.component, f"{ref.path}.{place.name}")
                updates[name] = Diff(InMemory(noise * (norm / float(noise.norm()))), f"{ref.path}.w_norm")
            else:
                updates[ref] = _lowrank(place, norm, generator)
    return replace(adapter, updates=updates)


def _lowrank(place: Place, norm: float, generator: torch.Generator) -> LowRank:
    shape = place.update.shape if isinstance(place.update, LowRank) else tuple(place.tensor.shape)
    rank = place.update.rank or min(shape[0], prod(shape[1:]))
    up, down = _normal((shape[0], rank), generator), _normal((rank, prod(shape[1:])), generator)
    made = LowRank(InMemory(up), InMemory(down.reshape(rank, *shape[1:])), scale=1.0)
    made = replace(made, scale=norm / made.norm())
    bias = getattr(place.update, "bias", None)
    if bias is None or made.scale == 0.0:
        return made
    size = getattr(place.update, "scale", 1.0) * float(bias.load().float().norm())
    noise = _normal(bias.shape, generator)
    return replace(made, bias=InMemory(noise * (size / (float(noise.norm()) * made.scale))))


def _value(place: Place, norm: float, generator: torch.Generator) -> Full | Diff:
    if isinstance(place.update, Diff):
        noise = _normal(place.update.shape, generator)
        return replace(place.update, value=InMemory(noise * (norm / float(noise.norm()))))
    assert isinstance(place.update, Full)
    old, new = place.tensor.detach().cpu().float(), place.update.value.load().float().clone()
    noise = _normal(tuple(old.shape), generator)
    new[: len(old)] = old + noise * (norm / float(noise.norm()))
    return replace(place.update, value=InMemory(new))


def _normal(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)
