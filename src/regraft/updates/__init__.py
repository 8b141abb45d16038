"""Kinds of update: what an adapter does to one module. One file each.

Each is a frozen dataclass of tensor references with the members of `Kind`. `regraft.updates.rows` cuts and joins them
along the rows of a weight.
"""

from __future__ import annotations

from regraft.updates._by_shape import ByShape
from regraft.updates._kind import Kind, scale_of
from regraft.updates.boft import Boft
from regraft.updates.diff import Diff
from regraft.updates.foura import Foura
from regraft.updates.fourierft import FourierFT
from regraft.updates.full import Full
from regraft.updates.glora import GLora
from regraft.updates.ia3 import Ia3
from regraft.updates.loha import LoHa
from regraft.updates.lokr import LoKr
from regraft.updates.lorax import Subspace
from regraft.updates.lowrank import LowRank
from regraft.updates.oft import Oft
from regraft.updates.rows import Slice
from regraft.updates.shapes import with_shapes
from regraft.updates.svdiff import SpectralShift
from regraft.updates.tucker import Tucker
from regraft.updates.vera import Vera

Update = (
    LowRank
    | Tucker
    | LoHa
    | LoKr
    | Diff
    | Full
    | Ia3
    | Oft
    | Boft
    | GLora
    | SpectralShift
    | Subspace
    | Foura
    | Vera
    | FourierFT
    | Slice
)

__all__ = [
    "Boft",
    "ByShape",
    "Diff",
    "Foura",
    "FourierFT",
    "Full",
    "GLora",
    "Ia3",
    "Kind",
    "LoHa",
    "LoKr",
    "LowRank",
    "Oft",
    "Slice",
    "SpectralShift",
    "Subspace",
    "Tucker",
    "Update",
    "Vera",
    "scale_of",
    "with_shapes",
]
