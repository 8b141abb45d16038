"""A bottleneck's forward, as the `adapters` library has it, and bottlenecks at work in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import InputError
from regraft.refine.bottleneck.places import Layout, Spot, blocks_of, layout_of
from regraft.runtime.libraries import library
from regraft.runtime.load import Loaded

_IN_MODEL = "bottlenecks"


@dataclass(frozen=True)
class Form:
    """What the library's options say of the forward.

    Attributes:
        non_linearity: transformers' name of the activation, or ``leakyrelu``.
        original_ln_before: the bottleneck reads the sum with the residual, behind the block's own norm if that is last.
        original_ln_after: the residual is added behind it, and such a norm follows.
        ln_before: a norm of its own in front of it.
        ln_after: and one behind it.
        residual_before_ln: its own skip connection starts at the sublayer's output (True), at what it reads (False),
            or between the sum and the block's norm (``post_add``).
        adapter_residual_before_ln: that skip connection is added in front of ``ln_after``.
        scaling: of its output; a number, or ``learned`` (one) or ``channel`` (one for each).
    """

    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    scaling: float | str = 1.0

    @property
    def silent_at_zero(self) -> bool:
        """Whether a bottleneck whose up-projection is zero leaves its block as it is."""
        if self.ln_after and self.adapter_residual_before_ln:
            return False
        if self.residual_before_ln is True or not self.original_ln_before:
            return self.original_ln_after
        return self.residual_before_ln is False and not self.original_ln_after


class Bottleneck(nn.Module):
    """One bottleneck; its parameters have the library's names, so that its state dict is what a file holds.

    Args:
        width: of hidden states.
        size: of the bottleneck.
        form: of the forward.
    """

    def __init__(self, width: int, size: int, form: Form) -> None:
        super().__init__()
        self.form = form
        layers: list[nn.Module] = [nn.Linear(width, size)]
        if form.ln_before:
            self.adapter_norm_before = nn.LayerNorm(width)
            # A file has it under both names.
            layers.insert(0, self.adapter_norm_before)
        self.adapter_down = nn.Sequential(*layers, activation(form.non_linearity))
        self.adapter_up = nn.Linear(size, width)
        if form.ln_after:
            self.adapter_norm_after = nn.LayerNorm(width)
        self.scaling: Any = form.scaling
        if isinstance(form.scaling, str):
            self.scaling = nn.Parameter(torch.ones(1 if form.scaling == "learned" else width))

    @property
    def down(self) -> nn.Linear:
        """The projection into the bottleneck."""
        found = self.adapter_down[1 if self.form.ln_before else 0]
        assert isinstance(found, nn.Linear)
        return found

    def forward(self, h: Tensor, residual: Tensor, norm: Callable[[Tensor], Tensor] | None) -> Tensor:
        """What takes the place of norm(h + residual), or without a norm behind it of h + residual.

        Args:
            h: the sublayer's output, (…, width).
            residual: of the block, (…, width).
            norm: the block's, where it is behind the residual connection.
        """
        form = self.form
        x = skip = h
        if form.original_ln_before:
            x = h + residual
            skip = h if form.residual_before_ln is True else x
            if norm is not None:
                x = norm(x)
                skip = x if form.residual_before_ln is False else skip
        y = self.adapter_up(self.adapter_down(x)) * self.scaling
        if form.adapter_residual_before_ln:
            y = y + skip
        if form.ln_after:
            y = self.adapter_norm_after(y)
        if not form.adapter_residual_before_ln:
            y = y + skip
        if not form.original_ln_after:
            return y  # type: ignore[no-any-return]
        return y + residual if norm is None else norm(y + residual)


def empty(width: int, size: int, form: Form) -> Bottleneck:
    """A bottleneck of random numbers, the same ones each time; the caller's are drawn as if there were none."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Bottleneck(width, size, form)


def built(table: Mapping[str, Tensor], form: Form) -> Bottleneck:
    """A bottleneck of these parameters, float32; the width and the size are told by its down-projection.

    Raises:
        RuntimeError: there are others than such a bottleneck has.
    """
    size, width = table[f"adapter_down.{int(form.ln_before)}.weight"].shape
    module = empty(width, size, form)
    module.load_state_dict(dict(table))
    return module


def activation(name: str) -> nn.Module:
    """An activation by transformers' name, or ``leakyrelu``.

    Raises:
        InputError: there is none of that name.
    """
    if name == "leakyrelu":
        return nn.LeakyReLU()
    try:
        found: nn.Module = library("transformers.activations").get_activation(name)
    except KeyError:
        raise InputError(f"names an activation that isn't known here ({name})", key="non_linearity") from None
    return found


@contextmanager
def placed(model: Loaded, modules: Mapping[Spot, nn.Module]) -> Iterator[None]:
    """Bottlenecks at work in a model, as modules of its own; on leaving it is as it was.

    Args:
        model: with a block for every spot.
        modules: a `Bottleneck` for each spot; they are moved to the model's device.

    Raises:
        InputError: bottlenecks aren't placed in models of its type.
    """
    layout, blocks, handles = layout_of(model), blocks_of(model), []
    names = {f"{spot.block}_{spot.position}": module for spot, module in modules.items()}
    model.main.add_module(_IN_MODEL, nn.ModuleDict(names).to(model.device))
    try:
        for spot, module in modules.items():
            handles += _hooked(blocks[spot.block], layout, spot, module)
        yield
    finally:
        for handle in handles:
            handle.remove()
        delattr(model.main, _IN_MODEL)


def _hooked(block: nn.Module, layout: Layout, spot: Spot, bottleneck: nn.Module) -> list[Any]:
    place = layout.places[spot.position]
    sublayer, norm = block.get_submodule(place.sublayer), block.get_submodule(place.norm)
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Any = None) -> None:
        # Of the norm's call the input is noted, of the sublayer's the output, which may have attention maps beside it.
        kept = args[0] if output is None else output
        seen[:] = [kept[0] if isinstance(kept, tuple) else kept]

    def at_end(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        h = seen.pop()
        # Not the module itself, whose hook this is.
        replaced: Tensor = bottleneck(h, args[0] - h, norm.forward)
        return replaced

    def behind(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        residual, h = seen.pop(), output[0] if isinstance(output, tuple) else output
        # The block adds its residual itself.
        own = bottleneck(h, residual, None) - residual
        return (own, *output[1:]) if isinstance(output, tuple) else own

    if layout.norm_last:
        return [sublayer.register_forward_hook(note), norm.register_forward_hook(at_end)]
    return [norm.register_forward_pre_hook(note), sublayer.register_forward_hook(behind)]
