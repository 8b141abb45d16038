"""Where a denoiser's features are read and where others are added: its decoder's blocks, as maps of the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regraft.bridge.latent_spaces import own_shape
from regraft.errors import InputError
from regraft.probes.diffusion import first_call
from regraft.runtime.load import Loaded

# Of a transformer's blocks, those whose outputs are offered: the middle one, and at each further sixth.
_DEPTHS = (0.5, 2 / 3, 5 / 6, 1.0)

#: What is made of a map (n, channels, height, width) on its way: the map that goes on.
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """A block of a denoiser's decoder, by the map that it gives.

    Attributes:
        module: its path in the denoiser.
        channels: of the map.
        cells: of the map along a side, at the size that the model draws.
        depth: how much of the decoder is done behind it, up to 1.
        tokens: it gives rows of tokens, one for each cell, not a map.
    """

    module: str
    channels: int
    cells: int
    depth: float
    tokens: bool


def places_of(model: Loaded) -> list[Place]:
    """A denoiser's places, from the middle to the end: a U-Net's mid and up blocks, blocks of a transformer.

    The denoiser is run once, on noise.

    Raises:
        InputError: it is neither, or its blocks give no maps.
    """
    shape = (1, int(getattr(model.main.config, "in_channels", 4)), *own_shape(model))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        call = first_call(model, [""], noise)
    name = next(iter(call))
    if call[name].shape != noise.shape:
        raise InputError(f"{model.name} does not read pictures of latents", file=model.path)
    found = places_in(model.main, {**call, name: noise.to(call[name])})
    if not found:
        raise InputError(f"{model.name} has no decoder blocks that a bridge could join", file=model.path)
    return found


@torch.no_grad()
def places_in(main: nn.Module, call: Mapping[str, Any]) -> list[Place]:
    """A denoiser's places, by one pass.

    Args:
        main: the denoiser.
        call: its arguments by name, the latents first, (n, channels, height, width).
    """
    names = _unet_blocks(main) or _transformer_blocks(main)
    height, width = next(iter(call.values())).shape[2:]
    given: dict[str, Any] = {}
    hooks = [main.get_submodule(name).register_forward_hook(_keeper(given, name)) for name in names]
    try:
        main(**{**call, "return_dict": False})
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for i, name in enumerate(names):
        value = _output(given[name], _cells(main, height, width))
        if value is not None:
            tokens = value.dim() == 3
            cells = height // _patch(main) if tokens else value.shape[2]
            channels = value.shape[-1] if tokens else value.shape[1]
            found.append(Place(name, int(channels), int(cells), (i + 1) / len(names), tokens))
    return found


@contextmanager
def heard(main: nn.Module, modules: Sequence[str], latents: tuple[int, int]) -> Iterator[list[Tensor]]:
    """The maps that a denoiser's blocks gave in its last pass, in their order; empty before any.

    Args:
        main: the denoiser.
        modules: paths of the blocks.
        latents: height and width of what it is run on.
    """
    last: list[Tensor] = []
    now: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            value = _output(output, _cells(main, *latents))
            assert value is not None
            now[name] = _map(value, main, latents)
            if len(now) == len(set(modules)):
                last[:] = [now[module] for module in modules]
                now.clear()

        return hook

    hooks = [main.get_submodule(module).register_forward_hook(keep(module)) for module in modules]
    try:
        yield last
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def changed(main: nn.Module, changes: Mapping[str, Change], latents: tuple[int, int]) -> Iterator[None]:
    """What leaves some blocks is changed on its way for as long as the context is open.

    Args:
        main: the denoiser.
        changes: path of a block → what becomes of its map.
        latents: height and width of what it is run on.
    """

    def hook_of(change: Change) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> Any:
            value = _output(output, _cells(main, *latents))
            assert value is not None
            made = change(_map(value, main, latents)).to(value.dtype)
            back = made.flatten(2).transpose(1, 2) if value.dim() == 3 else made
            if isinstance(output, Tensor):
                return back
            return tuple(back if part is value else part for part in output)

        return hook

    hooks = [main.get_submodule(name).register_forward_hook(hook_of(change)) for name, change in changes.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def channels_of(main: nn.Module, module: str) -> int | None:
    """Channels of the map that a block gives, where that can be told without running it: of a U-Net's blocks.

    Raises:
        KeyError: there is no such block.
    """
    block = dict(main.named_modules())[module]
    resnets = getattr(block, "resnets", None)
    found = None if not resnets else getattr(resnets[-1], "out_channels", None)
    return None if found is None else int(found)


def _unet_blocks(main: nn.Module) -> list[str]:
    ups = getattr(main, "up_blocks", None)
    if ups is None:
        return []
    middle = ["mid_block"] if getattr(main, "mid_block", None) is not None else []
    return [*middle, *(f"up_blocks.{i}" for i in range(len(ups)))]


def _transformer_blocks(main: nn.Module) -> list[str]:
    lists = [name for name, child in main.named_children() if isinstance(child, nn.ModuleList)]
    if not lists:
        return []
    name = max(lists, key=lambda name: len(main.get_submodule(name)))  # type: ignore[arg-type]
    n = len(main.get_submodule(name))  # type: ignore[arg-type]
    numbers = dict.fromkeys(min(n - 1, max(0, round(n * depth) - 1)) for depth in _DEPTHS)
    return [f"{name}.{i}" for i in numbers]


def _patch(main: nn.Module) -> int:
    patch = getattr(main.config, "patch_size", None) or 1
    return int(patch if isinstance(patch, int) else patch[-1])


def _cells(main: nn.Module, height: int, width: int) -> int:
    return (height // _patch(main)) * (width // _patch(main))


def _output(output: Any, cells: int) -> Tensor | None:
    """The map, or the rows of as many tokens as the picture has cells, among what a block gives."""
    parts = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, tuple) else []
    for part in parts:
        if isinstance(part, Tensor) and (part.dim() == 4 or (part.dim() == 3 and part.shape[1] == cells)):
            return part
    return None


def _map(value: Tensor, main: nn.Module, latents: tuple[int, int]) -> Tensor:
    if value.dim() == 4:
        return value
    height, width = (side // _patch(main) for side in latents)
    return value.transpose(1, 2).reshape(len(value), -1, height, width)


def _keeper(kept: dict[str, Any], name: str) -> Any:
    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
        kept[name] = output

    return keep
