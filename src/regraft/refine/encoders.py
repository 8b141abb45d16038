"""Text encoders that are trained with the denoiser: gradients come back to them through the pipeline's own encoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regraft.adapter import ModuleRef
from regraft.probes.diffusion import first_call, reads_prompts
from regraft.runtime.load import Loaded


def trainable_encoders(model: Loaded, updates: Iterable[ModuleRef], targets: Sequence[str] = ()) -> frozenset[str]:
    """A pipeline's components beside the denoiser that gradients come back to from what the denoiser is handed.

    Tried on a prompt, for those that have updates, or with ``targets`` for all: some pipelines encode prompts without.
    """
    if model.pipeline is None or not reads_prompts(model):
        return frozenset()
    asked = set(model.components) if targets else {ref.component for ref in updates} & set(model.components)
    return frozenset(name for name in asked - {model.main_name} if _lets_through(model, model.components[name]))


def _lets_through(model: Loaded, encoder: nn.Module) -> bool:
    weights = [p for p in encoder.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        handed = first_call(model, ["a"], torch.empty(0), gradients=True)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return any(tensor.requires_grad for tensor in _tensors(handed))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
