"""Options of SVDiff."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from regraft.tuners._config import TunerConfig, check_one_of
from regraft.tuners._register import peft_type


@dataclass
class SvdiffConfig(TunerConfig):
    """SVDiff: W' = U diag(relu(σ + s · δ)) Vᵀ, one number per singular value.

    Source: Han et al., ICCV 2023, arXiv 2303.11305, eq. 2.

    Args:
        norm_shift: on a weight of one dimension, ``element``: W' = W + s · δ, a number per element, as in the paper and
            its author's code; or ``scalar``: its one singular value, the norm, as in svdiff-pytorch.
        init_weights: start from δ = 0, without effect; False starts from small random numbers, for tests.
        base_changed: what to do where an adapter is loaded on another base than it was trained on: ``refuse``, or
            ``port``, which applies δ to the new base's own singular values by their index.
        svd_cache: a folder that keeps decompositions, so that each is computed once per weight; it is not saved.
    """

    norm_shift: str = field(default="element", metadata={"help": "element or scalar, on weights of one dimension."})
    init_weights: bool = field(default=True, metadata={"help": "Start without effect."})
    base_changed: str = field(default="refuse", metadata={"help": "refuse or port, on another base."})
    svd_cache: str | None = field(default=None, metadata={"help": "A folder that keeps decompositions."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("SVDIFF")
        check_one_of("norm_shift", self.norm_shift, "element", "scalar")
        check_one_of("base_changed", self.base_changed, "refuse", "port")

    def to_dict(self) -> dict[str, Any]:
        """The options that are saved."""
        found = super().to_dict()
        # A folder of this machine means nothing elsewhere.
        found.pop("svd_cache", None)
        return dict(found)
