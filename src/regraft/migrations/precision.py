"""Half precision for a migration's maps and norms, where the error allows it.

float16 has 11 significant bits: rounding moves an entry by at most 2⁻¹¹ of itself, or by 2⁻²⁵ where it is smaller than
2⁻¹⁴. A map is stored in half where ‖M − half(M)‖_F ≤ 2⁻¹¹ ‖M‖_F, so that tiny entries do not matter, and in float32
otherwise. An update that passes k such maps then differs by at most about k · 2⁻¹¹ of its norm for maps that spread it
evenly (rotations, projections); float16 adapters carry the same error in each factor.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regraft.migration import Entry, Migration
from regraft.transport import LinearMap, Transport

#: Largest relative Frobenius error of one stored tensor.
BOUND = 2.0**-11


def halved(migration: Migration) -> Migration:
    """The same migration with its maps and norms rounded to half precision where `BOUND` allows."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def of_map(map_: LinearMap) -> LinearMap:
        return replace(map_, left=_shared(map_.left, seen), right=_shared(map_.right, seen))

    def of(transport: Transport) -> Transport:
        return Transport(tuple((of_map(left), of_map(right)) for left, right in transport.terms), transport.rotates)

    def of_entry(entry: Entry) -> Entry:
        if entry.transport is None:
            return entry
        norms = entry.row_norms
        # In float32 again: they are divided by each other.
        return replace(
            entry,
            transport=of(entry.transport),
            row_norms=None if norms is None else rounded(norms).float(),
        )

    entries = {module: of_entry(entry) for module, entry in migration.entries.items()}
    return replace(migration, entries=entries)


def _shared(tensor: Tensor | None, seen: dict[int, tuple[Tensor, Tensor]]) -> Tensor | None:
    """`rounded`, done once for a map that many modules share, and for its transpose."""
    if tensor is None:
        return None
    base = tensor if tensor.is_contiguous() or tensor.dim() != 2 else tensor.T
    # The original is kept beside its address: freed memory may come back as another tensor.
    original, half = seen.setdefault(base.data_ptr(), (base, rounded(base)))
    if original.shape != base.shape or original.stride() != base.stride():
        half = rounded(base)
    return half if base is tensor else half.T


def rounded(tensor: Tensor) -> Tensor:
    """The tensor in float16 where that keeps it to `BOUND`, else as it is."""
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    half = tensor.to(torch.float16)
    exact = tensor.double()
    error = float((half.double() - exact).norm())
    return half if error <= BOUND * float(exact.norm()) else tensor
