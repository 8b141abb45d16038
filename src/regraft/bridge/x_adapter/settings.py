"""How a mapper is trained, and how bases are joined by one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from regraft.bridge.x_adapter.mapper import Fusion
from regraft.runtime.optim import Optimizer, Precision

#: How the old base is heard: its finished picture is read by the base without its plug-ins, or with them; or it is
#: heard while it draws, as in the paper.
Reading = Literal["plain", "plugged", "drawing"]
#: Share of the noise schedule at which the new base joins, by default: the paper's T0 (section 4.4).
START = 0.8


@dataclass(frozen=True)
class Joining:
    """How the new base joins what the old one draws; see `regraft.bridge.x_adapter.pipeline.BridgePipeline`.

    Attributes:
        start: share of the schedule at which it joins.
        lead: share of the new base's noise that the old one's states have; None for the pipeline's default.
        reading: see `Reading`.
        new_prompt: for the new base.
        new_guidance: of the new base.
    """

    start: float = START
    lead: float | None = None
    reading: Reading = "plain"
    new_prompt: str = ""
    new_guidance: float = 1.0

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "new_guidance"}
        return {**own, "new_guidance_scale": self.new_guidance}

    @property
    def asked(self) -> list[str]:
        """Names of what is not as it is by default."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


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
