"""Pictures over a mapper's training: a few prompts from the same noise, through the bridge without any plug-in."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regraft.bridge.x_adapter.mapper import Mapper
from regraft.bridge.x_adapter.pipeline import BridgePipeline
from regraft.output import readable, whole
from regraft.probes.pictures import Images, draw, png
from regraft.runtime.both import BothModels
from regraft.runtime.libraries import quiet_libraries
from regraft.training.loop import Look

#: Prompts that are drawn, and steps of the sampler.
PROMPTS, STEPS = 4, 12


@dataclass
class MapperStrip:
    """A row for each prompt: the old base, the new one alone, then the bridge each time that the steps have doubled.

    The file is written anew with each column, so that a training can be watched.

    Attributes:
        file: a PNG.
        prompts: what to draw.
        seed: of the first row's noise; the next row has the next seed.
    """

    file: Path
    prompts: Sequence[str]
    seed: int = 0
    _columns: list[Images] = field(default_factory=list)
    _next: int = 0

    def before(self, models: BothModels, mapper: Mapper) -> None:
        """Draw what stays the same: each base alone."""
        self._bridge = BridgePipeline(models.old, models.new, mapper)
        with quiet_libraries():
            for model in (models.old, models.new):
                self._columns.append(draw(model.pipeline, self._texts, self._seeds, steps=STEPS))

    def at(self, look: Look) -> None:
        """Called with every look, while the mapper holds what would be kept."""
        if look.step < self._next:
            return
        self._next = max(1, 2 * look.step)
        generators: list[Any] = [torch.Generator().manual_seed(seed) for seed in self._seeds]
        made = self._bridge(self._texts, None, STEPS, generator=generators, start=1.0, output_type="np")
        self._columns.append(made.images)
        # Bases may draw at different sizes.
        height = max(column.shape[1] for column in self._columns)
        rows = np.concatenate([np.concatenate(list(_enlarged(c, height)), axis=0) for c in self._columns], axis=1)
        with whole(self.file) as stage:
            stage.write_bytes(base64.b64decode(png(rows)))
            readable(stage)

    @property
    def _texts(self) -> list[str]:
        return list(self.prompts)[:PROMPTS]

    @property
    def _seeds(self) -> list[int]:
        return [self.seed + i for i in range(len(self._texts))]


def _enlarged(pictures: Images, height: int) -> Images:
    """Pictures (n, height, width, 3) at another height."""
    if pictures.shape[1] == height:
        return pictures
    width = round(pictures.shape[2] * height / pictures.shape[1])
    given = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    made: Images = torch.nn.functional.interpolate(given, (height, width)).permute(0, 2, 3, 1).numpy()
    return made
