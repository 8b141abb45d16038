"""Low-rank factors given in the frequency domain of the channels, as factors on the channels themselves.

FouRA (Borse et al., NeurIPS 2024, arXiv 2406.08798): z_out = F⁻¹(B · s · A · F(z_in)), F an orthonormal transform over
the channels. F is linear: A F and F⁻¹ B are factors of a plain LoRA, so that F is never applied to an activation.

- ``dct``: the orthonormal DCT-II C, real: A' = A C, B' = Cᵀ B. Rank r stays rank r.
- ``fft``: the orthonormal real FFT; A (r, n // 2 + 1) and B are complex, stored with a last dimension of 2. The map is
  x ↦ Re(B' A' x) = (Re B' Re A' − Im B' Im A') x: rank r becomes 2 r.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TRANSFORMS = ("dct", "fft")


def frequencies(channels: int, transform: str) -> int:
    """How many coefficients so many channels have; of ``fft`` complex ones."""
    return channels if transform == "dct" else channels // 2 + 1


def folded_down(factor: Tensor, channels: int, transform: str) -> Tensor:
    """A F as real rows.

    Args:
        factor: A, (r, n, …) of ``dct`` or (r, n // 2 + 1, …, 2) of ``fft``; further dimensions are a kernel's.
        channels: n.
        transform: one of `TRANSFORMS`.

    Returns:
        (r, n, …) or, real parts first, (2 r, n, …), float32.
    """
    if transform == "dct":
        return inverse_dct(factor.float(), 1)
    spectrum = torch.fft.fft(torch.view_as_complex(factor.float().contiguous()), channels, dim=1, norm="ortho")
    return torch.cat([spectrum.real, spectrum.imag])


def folded_up(factor: Tensor, channels: int, transform: str) -> Tensor:
    """F⁻¹ B as real columns.

    Args:
        factor: B, (m, r) of ``dct`` or (m // 2 + 1, r, 2) of ``fft``.
        channels: m.
        transform: one of `TRANSFORMS`.

    Returns:
        (m, r) or, to match `folded_down`, (m, 2 r), float32.
    """
    if transform == "dct":
        return inverse_dct(factor.float(), 0)
    # A real signal's other half mirrors all coefficients but the first and, of an even number, the last.
    twice = torch.full((len(factor), 1), 2.0, device=factor.device)
    twice[0] = 1.0
    if channels % 2 == 0:
        twice[-1] = 1.0
    signal = torch.fft.ifft(twice * torch.view_as_complex(factor.float().contiguous()), channels, dim=0, norm="ortho")
    return torch.cat([signal.real, -signal.imag], 1)


def inverse_dct(values: Tensor, dim: int) -> Tensor:
    """Cᵀ v along one dimension, C the orthonormal DCT-II (this is the DCT-III), by a padded FFT."""
    x = values.movedim(dim, -1)
    n = x.shape[-1]
    angle = torch.arange(n, device=x.device, dtype=torch.float32) * (math.pi / (2 * n))
    weight = torch.full((n,), math.sqrt(2.0 / n), device=x.device)
    weight[0] = math.sqrt(1.0 / n)
    turned = torch.polar(weight, angle) * x
    result = torch.fft.ifft(turned, 2 * n, dim=-1, norm="forward").real[..., :n]
    back: Tensor = result.movedim(-1, dim)
    return back
