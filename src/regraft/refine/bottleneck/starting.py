"""What bottlenecks begin from on the new base: themselves, or their image in its width; block by block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regraft.base import Base
from regraft.errors import InputError
from regraft.methods._embeddings import width_map
from regraft.pairing import monotone_alignment, pair_bases
from regraft.refine.bottleneck.files import HEAD, Bottlenecks
from regraft.refine.bottleneck.layers import Bottleneck, empty
from regraft.refine.bottleneck.places import Layout, Spot, blocks_of, layout_of, width_of
from regraft.refine.starting import ZERO
from regraft.refine.words import NOISE, shared_embeddings
from regraft.runtime.both import BothModels

_KEPT = "kept as it is"


@dataclass(frozen=True)
class First:
    """The first state for the new base.

    Attributes:
        modules: spot in the new base → a trainable `Bottleneck`.
        how: they were made.
        config: ``adapter_config.json`` for the new base.
        like: the adapter whose folder the result is written as.
        untrained: what of the old one is not trained → what became of it.
    """

    modules: Mapping[Spot, Bottleneck]
    how: str
    config: dict[str, Any]
    like: Bottlenecks
    untrained: dict[str, str]

    @torch.no_grad()
    def zero(self) -> None:
        """Leave no effect, but something to learn by."""
        for module in self.modules.values():
            _silence(module)


def first_state(bottlenecks: Bottlenecks, old: Base, new: Base, models: BothModels) -> First:
    """The first state for the new base.

    Blocks are paired by name and depth (`regraft.pairing`). Where widths differ, W is the least-squares map of the
    shared tokens' embeddings from the old width to the new one and V that of the way back, both on rows: D' = D Vᵀ and
    U' = Wᵀ U. A block of the new base that answers to none of the old one begins without effect.

    Raises:
        InputError: a base is of a kind that bottlenecks aren't placed in.
    """
    layouts = layout_of(models.old), layout_of(models.new)
    depths = len(blocks_of(models.old)), len(blocks_of(models.new))
    widths = width_of(models.old), width_of(models.new)
    origin = _paired(old, new, layouts, depths)
    own = bottlenecks.modules()
    maps, how = _maps(models, widths)
    sizes = sorted(module.down.out_features for module in own.values())
    modules: dict[Spot, Bottleneck] = {}
    for block in range(depths[1]):
        for position in dict.fromkeys(spot.position for spot in own):
            if block in origin:
                source = own.get(Spot(origin[block], position))
                if source is not None:
                    modules[Spot(block, position)] = _carried(source, maps, widths[1])
            else:
                module = empty(widths[1], sizes[len(sizes) // 2], bottlenecks.form)
                modules[Spot(block, position)] = _silence(module)
    if not modules:
        raise InputError("has no block that a bottleneck belongs to", file=new.path)
    lost = sorted({spot.block for spot in own} - set(origin.values()))
    untrained = {f"block {block}": "has no counterpart in the new base, and is left out" for block in lost}
    head = _head(bottlenecks, models, widths)
    if head:
        untrained["prediction head"] = head
    config, like = _configured(bottlenecks, models, modules, widths[1], keep_head=head == _KEPT)
    return First(modules, how, config, like, untrained)


def _maps(models: BothModels, widths: tuple[int, int]) -> tuple[tuple[Tensor, Tensor] | None, str]:
    """W (h, h') and V (h', h) of two widths, and how the start is made; None where none are needed or can be had."""
    if widths[0] == widths[1]:
        return None, "copy"
    ours, theirs = shared_embeddings(models)
    if len(ours) < max(widths):
        return None, ZERO
    there, back = width_map(ours, theirs, rtol=NOISE), width_map(theirs, ours, rtol=NOISE)
    return (there, back), f"embedding map of {len(ours)} shared tokens"


@torch.no_grad()
def _carried(source: Bottleneck, maps: tuple[Tensor, Tensor] | None, width: int) -> Bottleneck:
    """A bottleneck as it is, in another width, or where no map leads there without effect."""
    module = empty(width, source.down.out_features, source.form)
    if maps is None:
        if source.down.in_features != width:
            return _silence(module)
        module.load_state_dict(source.state_dict())
        return module
    there, back = maps
    up, bias = source.adapter_up.weight, source.adapter_up.bias
    if source.form.scaling == "channel":
        # One factor for each of the old numbers; those of the new ones begin at 1.
        up, bias = source.scaling[:, None] * up, source.scaling * bias
    elif source.form.scaling == "learned":
        module.scaling.copy_(source.scaling)
    # Norms of its own scale each number of the old width, and begin as norms do.
    module.down.weight.copy_(source.down.weight @ back.T)
    module.down.bias.copy_(source.down.bias)
    module.adapter_up.weight.copy_(there.T @ up)
    module.adapter_up.bias.copy_(bias @ there)
    return module


@torch.no_grad()
def _silence(module: Bottleneck) -> Bottleneck:
    for part in (module.adapter_up.weight, module.adapter_up.bias):
        part.zero_()
    for norm in (part for part in module.modules() if isinstance(part, nn.LayerNorm)):
        norm.reset_parameters()
    return module


def _paired(old: Base, new: Base, layouts: tuple[Layout, Layout], depths: tuple[int, int]) -> dict[int, int]:
    """Block of the new base → the old one that it answers to."""
    if depths[0] == depths[1]:
        return {block: block for block in range(depths[0])}
    here, there = (re.compile(rf"(?:^|\.){re.escape(layout.blocks)}\.(\d+)\.") for layout in layouts)
    found: dict[int, int] = {}
    for module, counterpart in pair_bases(old, new).counterparts.items():
        one, other = here.search(module.path), counterpart.module and there.search(counterpart.module.path)
        if one is not None and other:
            found[int(other[1])] = int(one[1])
    if found:
        return found
    # Of other architectures names say nothing, and depth alone does.
    apart = torch.linspace(0, 1, depths[0])[:, None] - torch.linspace(0, 1, depths[1])[None, :]
    return {j: i for i, j in monotone_alignment(-apart.abs())}


def _head(bottlenecks: Bottlenecks, models: BothModels, widths: tuple[int, int]) -> str:
    """What becomes of the prediction head; empty where there is none."""
    if not any(name in bottlenecks.files for name in HEAD):
        return ""
    if bottlenecks.says_words():
        # The library saves such a head with every adapter of a language model, trained or not.
        return "is the old language model's own, and is left out: the new base has one"
    same = models.new.main.config.model_type == bottlenecks.config["model_type"] and widths[0] == widths[1]
    return _KEPT if same else "does not fit the new base, and is left out"


def _configured(
    bottlenecks: Bottlenecks, models: BothModels, modules: Mapping[Spot, Bottleneck], width: int, *, keep_head: bool
) -> tuple[dict[str, Any], Bottlenecks]:
    """The configuration for the new base, and an adapter whose files are those of the result."""
    before, main = bottlenecks.config, models.new.main
    kind = str(main.config.model_type)
    sizes = {spot.block: module.down.out_features for spot, module in modules.items()}
    options = {
        **before["config"],
        "reduction_factor": _reduction(before["config"].get("reduction_factor"), sizes, width),
        "leave_out": [block for block in range(len(blocks_of(models.new))) if block not in sizes],
    }
    new = {"config": options, "model_type": kind, "hidden_size": width, "model_name": models.new.path.name}
    config = {**before, **new}
    if kind == before["model_type"]:
        files = {name: file for name, file in bottlenecks.files.items() if keep_head or name not in HEAD}
        return config, replace(bottlenecks, files=files)
    config.pop("model_class", None)
    prefix = f"{main.base_model_prefix}." if bottlenecks.prefix else ""
    return config, replace(bottlenecks, files={}, prefix=prefix)


def _reduction(before: Any, sizes: Mapping[int, int], width: int) -> Any:
    """The option that gives bottlenecks of these sizes; the library rounds width / option down."""

    def gives(factor: Any, size: int) -> bool:
        return isinstance(factor, int | float) and factor > 0 and int(width // factor) == size

    def factor_of(size: int) -> float:
        factor = width / size
        while not gives(factor, size):
            factor = torch.nextafter(torch.tensor(factor).double(), torch.tensor(0.0).double()).item()
        return factor

    if all(gives(before, size) for size in sizes.values()):
        return before
    if len(set(sizes.values())) == 1:
        return factor_of(next(iter(sizes.values())))
    found: dict[str, float] = {str(block): factor_of(size) for block, size in sizes.items()}
    return {**found, "default": next(iter(found.values()))}
