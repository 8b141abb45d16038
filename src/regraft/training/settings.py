"""How an adapter is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from regraft.refine.quantised import Quantize
from regraft.training.cutmix import PROBABILITY, Fit


@dataclass(frozen=True)
class SubjectFolder:
    """A subject that is to be learnt.

    Attributes:
        folder: of its pictures, without captions.
        identifier: its special token.
        noun: its class.
    """

    folder: Path
    identifier: str
    noun: str


@dataclass(frozen=True)
class SubjectSettings:
    """How several subjects are shown; see `regraft.training.cutmix`.

    Attributes:
        folders: of the subjects.
        cut_mix: probability of a collage of two.
        unmix: weight of the regulariser of `regraft.training.unmix`.
        prior: pictures of each class that the base draws for prior preservation; 0 for none.
        fit: how a picture comes into its half.
        phrases: of `regraft.training.cutmix.Phrases`, by name.
    """

    folders: tuple[SubjectFolder, ...]
    cut_mix: float = PROBABILITY
    unmix: float = 0.0
    prior: int = 0
    fit: Fit = "crop"
    phrases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainSettings:
    """How an adapter is trained.

    Attributes:
        kind: see `regraft.training.kinds.KINDS`.
        subjects: to learn in place of captioned pictures.
        rank: r; None for the kind's default.
        alpha: of the scale alpha / r; None for r.
        targets: names of modules or their ends, as PEFT takes them, or ``all-linear``; empty for the model's default.
        options: further options of PEFT's config of the kind, by name.
        steps: of the training.
        batch: texts or pictures in a step; None for the default of their kind.
        rate: AdamW's learning rate at its peak; None for the kind's default.
        held: share of the data that nothing is learnt from, to measure the loss on.
        size: height and width that pictures are cropped to; None for what the pipeline draws by default.
        caption: of pictures that have none.
        dropped: share of the pictures that are shown without their caption, as guidance needs it.
        context: tokens of a text at most.
        seed: of first values, order, noise and dropout.
        budget: seconds; None for no limit.
        look: steps from one measurement to the next.
        config: of bare weights files.
        device: ``cpu``, ``cuda`` or ``mps``.
        dtype: that the base is held in.
        precision: of the passes, as accelerate names it.
        quantize: how the base's linear layers are held; see `regraft.refine.quantised`.
        checkpointing: save memory by computing activations twice.
        optimizer: ``adamw``, or ``adamw8bit`` (bitsandbytes).
    """

    kind: str = "lora"
    subjects: SubjectSettings | None = None
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 400
    batch: int | None = None
    rate: float | None = None
    held: float = 0.1
    size: int | None = None
    caption: str | None = None
    dropped: float = 0.1
    context: int = 256
    seed: int = 0
    budget: float | None = None
    look: int = 50
    config: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"
    precision: Literal["no", "fp16", "bf16"] = "no"
    quantize: Quantize = "none"
    checkpointing: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
