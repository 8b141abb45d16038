"""How a mapper is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from regraft.bridge.x_adapter.mapper import Fusion
from regraft.runtime.optim import Optimizer, Precision


@dataclass(frozen=True)
class MapperSettings:
    """How a mapper is built and trained.

    Attributes:
        levels: as `regraft.bridge.x_adapter.pairing.mapper_config` takes them.
        blocks: residual blocks of a level.
        fusion: how a level joins; see `regraft.bridge.x_adapter.mapper.Fusion`.
        timed: the mapper is told noise levels.
        pictures: that the bases draw to learn from, half each, where there are none.
        prompts: that they draw; None for general ones.
        varied: further versions of each picture in other colours.
        lead: least share of the new base's noise that the old one sees.
        prompted: share of the pictures whose caption the new base is given.
        dropped: share of them that the old base is shown without a caption.
        steps: of the training.
        batch: pictures in a step.
        rate: AdamW's learning rate at its peak; None: 1e-3 where the widest level has 64 channels, less with more.
        average: decay of the mean of the mapper's values over the steps, which is what is kept.
        held: share of the pictures that is only measured on.
        size: height and width of the new base's pictures; None for what it draws.
        caption: of pictures that have none.
        seed: of first values, pictures, order and noise.
        budget: seconds; None for no limit.
        look: steps from one measurement to the next.
        config: of bare weights files.
        device: ``cpu``, ``cuda`` or ``mps``.
        dtype: that the bases are held in.
        precision: of the passes, as accelerate names it.
        checkpointing: save memory by computing activations twice.
        optimizer: ``adamw``, or ``adamw8bit`` (bitsandbytes).
    """

    levels: int | tuple[tuple[str, str], ...] | None = None
    blocks: int = 3
    fusion: Fusion = "add"
    timed: bool = True
    pictures: int = 256
    prompts: tuple[str, ...] | None = None
    varied: int = 4
    lead: float = 0.3
    prompted: float = 0.0
    dropped: float = 0.1
    steps: int = 1000
    batch: int = 16
    rate: float | None = None
    average: float = 0.998
    held: float = 0.05
    size: int | None = None
    caption: str | None = None
    seed: int = 0
    budget: float | None = None
    look: int = 50
    config: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"
    precision: Precision = "no"
    checkpointing: bool = False
    optimizer: Optimizer = "adamw"
