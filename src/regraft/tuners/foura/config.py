"""Options of FouRA."""

from __future__ import annotations

from dataclasses import dataclass, field

from regraft.frequency import TRANSFORMS
from regraft.tuners._config import TunerConfig, check_number, check_one_of, check_pattern_of, check_whole
from regraft.tuners._register import peft_type

GATES = ("adaptive", "frozen", "none")


@dataclass
class FouraConfig(TunerConfig):
    """FouRA: a low-rank change in the frequency domain of the channels, with a gate on its rank.

    Source: Borse et al., NeurIPS 2024, arXiv 2406.08798.

    Args:
        r: rank.
        foura_alpha: the change is scaled by foura_alpha / r.
        transform: ``dct``, real, or ``fft``, whose factors are complex and whose change has rank 2 r.
        gate: ``adaptive``, a mask that depends on the input, in training and afterwards; ``frozen``, one fixed mask,
            which `FouraModel.freeze_gate` makes; or ``none``.
        gate_threshold: the entropy, in bits, from which a direction is open.
        gate_sharpness: of the sigmoid that the adaptive gate learns through.
        rank_pattern: module name or expression → r, where it is another one.
        init_weights: start from B = 0, without effect; False starts from small random numbers, for tests.
        conv1d_modules: filled in: modules whose weight is (in, out), as GPT-2's is.
    """

    r: int = field(default=16, metadata={"help": "Rank."})
    foura_alpha: float = field(default=32, metadata={"help": "The change is scaled by foura_alpha / r."})
    transform: str = field(default="dct", metadata={"help": "dct or fft."})
    gate: str = field(default="adaptive", metadata={"help": "adaptive, frozen or none."})
    gate_threshold: float = field(default=0.5, metadata={"help": "Entropy in bits from which a direction is open."})
    gate_sharpness: float = field(default=8.0, metadata={"help": "Of the sigmoid that the gate learns through."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Module name → r."})
    init_weights: bool = field(default=True, metadata={"help": "Start without effect."})
    conv1d_modules: list[str] = field(default_factory=list, metadata={"help": "Modules of a weight (in, out)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("FOURA")
        check_whole("r", self.r)
        check_pattern_of("rank_pattern", self.rank_pattern, "r")
        check_number("foura_alpha", self.foura_alpha, 0)
        check_one_of("transform", self.transform, *TRANSFORMS)
        check_one_of("gate", self.gate, *GATES)
        check_number("gate_threshold", self.gate_threshold, 0, 1)
        check_number("gate_sharpness", self.gate_sharpness, 0)
