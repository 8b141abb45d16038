"""A bridge as the teacher: what it shows at run time is learnt, so that the new base alone shows it afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regraft.adapter import Adapter
from regraft.errors import InputError
from regraft.probes.diffusion import prompts_for
from regraft.refine import drawn
from regraft.refine.drawn import Drawn, Painter
from regraft.refine.settings import RefineSettings
from regraft.runtime.both import BothModels


def check_bridge(models: BothModels, settings: RefineSettings) -> None:
    """Fail where no bridge can be learnt from.

    Raises:
        InputError: the bases draw no pictures.
    """
    if settings.teacher == "bridge" and models.old.pipeline is None:
        raise InputError(
            f"a {models.old.name} draws no pictures: only what a bridge draws can be learnt",
            file=models.old.path,
            remedy="Leave --teacher out.",
        )


def painter_of(models: BothModels, adapter: Adapter, settings: RefineSettings) -> Painter | None:
    """What draws the pictures to learn from; None where the old base with its adapter does.

    Args:
        models: both bases.
        adapter: for the old one.
        settings: whether there is a bridge, and its mapper; without one it is delta sampling.

    Raises:
        InputError: no bridge can be made between the two.
    """
    if settings.teacher != "bridge":
        return None
    # A bridge draws on refine's pictures for its own training.
    from regraft.bridge.delta import DeltaPipeline
    from regraft.bridge.x_adapter.files import load_mapper
    from regraft.bridge.x_adapter.pipeline import BridgePipeline

    bridge: DeltaPipeline | BridgePipeline
    if settings.mapper is None:
        bridge = DeltaPipeline(models.old, models.new, adapter)
    else:
        bridge = BridgePipeline(models.old, models.new, load_mapper(settings.mapper))
        bridge.load_lora_weights(adapter)

    def paint(given: Sequence[str], n: int, seed: int) -> Drawn:
        texts, parts = prompts_for(given, n, seed), []
        for i in range(0, n, drawn.DRAWN):
            part = texts[i : i + drawn.DRAWN]
            generators = [torch.Generator().manual_seed(seed + i + j) for j in range(len(part))]
            made = bridge(part, num_inference_steps=drawn.STEPS, generator=generators, output_type="pt").images
            parts.append(made.float().cpu() * 2 - 1)
        pictures = torch.cat(parts)
        return Drawn(tuple(texts), drawn.encoded(models.old, pictures), pictures)

    return paint
