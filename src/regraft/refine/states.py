"""Hidden states after blocks: how they are read while a model runs, and what is wanted of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.runtime.load import Loaded
from regraft.runtime.record import output_rows

#: Positions of each batch that are kept.
POSITIONS = 1024


@dataclass(frozen=True)
class HiddenAim:
    """What is wanted of the hidden states on one batch.

    Attributes:
        wanted: block of the new base → (k, width) in half precision.
        number: of the batch, which tells which positions those are (`picked`).
        sizes: block → mean square of the wanted change, over all batches that the adapter is learnt from.
    """

    wanted: Mapping[str, Tensor]
    number: int
    sizes: Mapping[str, float]

    def distance(self, seen: Mapping[str, Tensor]) -> Tensor:
        """Mean squared error in sizes of the wanted change, mean over blocks: the new base alone is at about 1.

        Args:
            seen: block → hidden states (positions, width), as `watching` gives them.
        """
        parts = [
            F.mse_loss(seen[name][picked(len(seen[name]), self.number)], wanted.to(seen[name])) / self.sizes[name]
            for name, wanted in self.wanted.items()
        ]
        return torch.stack(parts).mean()


def picked(n: int, number: int) -> Tensor:
    """Which of the ``n`` positions of a batch are kept, the same for every model, (at most `POSITIONS`,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(number))[:POSITIONS]


@contextmanager
def watching(model: Loaded, blocks: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Block → its output as rows (positions, width), float32, of what the main model runs inside.

    Args:
        model: to watch; of a pipeline, its denoiser.
        blocks: names of its modules.
    """
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            stream = _stream(output)
            if stream is not None:
                seen[name] = output_rows(module, stream)

        return hook

    handles = [model.main.get_submodule(name).register_forward_hook(note(name)) for name in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _stream(output: Any) -> Tensor | None:
    """The hidden states in what a block gives; of two streams (text and picture) the longer one."""
    if isinstance(output, Tensor):
        return output
    tensors = [part for part in output if isinstance(part, Tensor)] if isinstance(output, tuple | list) else []
    alike = [part for part in tensors if part.dim() == tensors[0].dim() and part.shape[-1] == tensors[0].shape[-1]]
    return max(alike, key=Tensor.numel) if alike else None
