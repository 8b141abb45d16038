"""Options of LoRA-X."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from regraft.tuners._config import TunerConfig, check_number, check_one_of, check_pattern_of, check_whole
from regraft.tuners._register import peft_type


@dataclass
class LoraXConfig(TunerConfig):
    """LoRA-X: ΔW = U_r ΔΣ V_rᵀ on the leading singular vectors of the frozen weight.

    Source: Farhadzadeh et al., ICLR 2025, arXiv 2501.16559, eq. 1; r is 320 in all of its experiments.

    Args:
        r: how many leading singular directions, at most the smaller side of each weight; None is the paper's 320, or
            all where there are fewer.
        energy: take as many directions as hold this share of ‖W‖² (0 to 1) instead of ``r``; the ranks that come of it
            are written into ``rank_pattern``.
        full: train all of the (r, r) matrix ΔΣ, not its diagonal alone.
        rank_pattern: module name or expression → r, where it is another one.
        init_weights: start from ΔΣ = 0, without effect; False starts from small random numbers, for tests.
        store_bases: save U and V too: the file no longer needs the base's weight, and is as large as a LoRA.
        base_changed: what to do where an adapter is loaded on another base than it was trained on: ``refuse``, or
            ``port``, which applies ΔΣ to the new base's own directions by their index.
        svd_cache: a folder that keeps singular vectors, so that they are computed once per weight; it is not saved.
    """

    r: int | None = field(default=None, metadata={"help": "How many leading singular directions."})
    energy: float | None = field(default=None, metadata={"help": "Share of the squared weight instead of r."})
    full: bool = field(default=False, metadata={"help": "Train an (r, r) matrix, not its diagonal alone."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Module name → r."})
    init_weights: bool = field(default=True, metadata={"help": "Start without effect."})
    store_bases: bool = field(default=False, metadata={"help": "Save U and V too."})
    base_changed: str = field(default="refuse", metadata={"help": "refuse or port, on another base."})
    svd_cache: str | None = field(default=None, metadata={"help": "A folder that keeps singular vectors."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("LORAX")
        if self.r is not None:
            check_whole("r", self.r)
        check_pattern_of("rank_pattern", self.rank_pattern, "r")
        check_one_of("base_changed", self.base_changed, "refuse", "port")
        if self.energy is not None:
            check_number("energy", self.energy, 0, 1)

    def to_dict(self) -> dict[str, Any]:
        """The options that are saved."""
        found = super().to_dict()
        # A folder of this machine means nothing elsewhere.
        found.pop("svd_cache", None)
        return dict(found)
