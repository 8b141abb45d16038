"""FourierFT: a few coefficients of the change's discrete Fourier transform (Gao et al. 2024, arXiv 2405.03003).

Eqs. 2 to 4: the coefficients stand at fixed random places of an (out, in) spectrum F that is else zero, and
ΔW = α · Re(IDFT2(F)). In PEFT 0.21.2 the places are the first n of a permutation of all out · in, drawn from a seed by
a generator on the CPU; α is ``scaling``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from regraft.tensors import Shape, TensorRef
from regraft.updates._by_shape import ByShape
from regraft.updates._kind import bare, fitted, scaled_ref


@dataclass(frozen=True)
class FourierFT(ByShape):
    """ΔW = scale · Re(IDFT2(F)), F of the layer's (out, in) with ``spectrum`` at n places.

    Attributes:
        spectrum: (n,).
        scale: α.
        seed: of the places, which depend on out · in, too.
        orientation: ``conv1d`` where the base's weight is (in, out).
        weight_shape: shape of the base's weight where it is known; ΔW is told by nothing less.
    """

    spectrum: TensorRef
    scale: float
    seed: int
    orientation: Literal["weight", "conv1d"] = "weight"
    weight_shape: Shape | None = None

    @property
    def kind(self) -> str:
        return "fourierft"

    @property
    def shape(self) -> Shape:
        """Shape of ΔW where it is known, else (n,)."""
        return self.weight_shape or self.spectrum.shape

    def fits(self, weight_shape: Shape) -> bool:
        if self.weight_shape is not None:
            return super().fits(weight_shape)
        return len(bare(weight_shape)) == 2 and self.spectrum.shape[0] <= prod(weight_shape)

    def delta(self, weight: Tensor | None = None) -> Tensor:
        out, into = self.sides(weight)
        values = self.spectrum.load().float()
        generator = torch.Generator().manual_seed(self.seed)
        places = torch.randperm(out * into, generator=generator)[: len(values)].clone()
        dense = torch.zeros(out * into)
        dense[places] = values
        change: Tensor = torch.fft.ifft2(dense.reshape(out, into)).real * self.scale
        change = change.T.contiguous() if self.orientation == "conv1d" else change
        return fitted(change if self.weight_shape is None else change.reshape(self.weight_shape), weight)

    def scaled(self, strength: float) -> FourierFT:
        # α is the config's, for all modules: the strength goes into the coefficients.
        return self if strength == 1.0 else replace(self, spectrum=scaled_ref(self.spectrum, strength))
