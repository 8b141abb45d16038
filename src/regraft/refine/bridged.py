"""A bridge as the teacher: what it shows at run time is learnt, so that the new base alone shows it afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regraft.adapter import Adapter
from regraft.errors import InputError, UsageError
from regraft.probes.diffusion import prompts_for
from regraft.refine import drawn
from regraft.refine.drawn import Drawn, Painter
from regraft.refine.pictures import DRAWN
from regraft.refine.settings import RefineSettings
from regraft.runtime.both import BothModels


def check_teacher(settings: RefineSettings) -> None:
    """Fail where settings speak of another teacher than the one that is asked for, before anything is loaded.

    Raises:
        UsageError: they do.
    """
    default = RefineSettings()
    mappers = ["--bridge-start" if name == "start" else _option(name) for name in settings.joining.asked]
    own = [name for name in ("mapper", "bridge_strength") if getattr(settings, name) != getattr(default, name)]
    if settings.teacher != "bridge":
        for option in (*map(_option, own), *mappers):
            raise UsageError(f"{option} is a bridge's", remedy="Give --teacher bridge with it.")
    elif settings.mapper is None:
        if mappers:
            raise UsageError(f"{mappers[0]} is a mapper's", remedy="Give --mapper with it.")
        if settings.low_memory:
            raise UsageError(
                "delta sampling runs both bases at every step: they can't take turns on the device",
                remedy="Give --mapper, or leave --low-memory out.",
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_draws(models: BothModels, settings: RefineSettings) -> None:
    """Fail where settings speak of pictures, and there are none to learn from.

    Raises:
        InputError: the bases draw no pictures.
    """
    if models.old.pipeline is not None:
        return
    for asked, why, option in (
        (settings.teacher == "bridge", "only what a bridge draws can be learnt", "--teacher"),
        (settings.guidance is not None, "there is nothing to guide", "--guidance"),
    ):
        if asked:
            raise InputError(
                f"a {models.old.name} draws no pictures: {why}",
                file=models.old.path,
                remedy=f"Leave {option} out.",
            )


def painter_of(models: BothModels, adapter: Adapter, settings: RefineSettings) -> Painter | None:
    """What draws the pictures to learn from; None where the old base with its adapter does.

    Args:
        models: both bases.
        adapter: for the old one.
        settings: whether there is a bridge, its mapper and how it draws; without a mapper it is delta sampling.

    Raises:
        InputError: no bridge can be made between the two.
    """
    if settings.teacher != "bridge":
        return None
    # A bridge draws on refine's pictures for its own training.
    from regraft.bridge.delta import DeltaPipeline, strength_of
    from regraft.bridge.x_adapter.files import load_mapper
    from regraft.bridge.x_adapter.pipeline import BridgePipeline

    bridge: DeltaPipeline | BridgePipeline
    asked: dict[str, Any] = {"guidance_scale": settings.guidance, "strength": strength_of(settings.bridge_strength)}
    if settings.mapper is None:
        bridge = DeltaPipeline(models.old, models.new, adapter)
    else:
        bridge = BridgePipeline(models.old, models.new, load_mapper(settings.mapper), turns=models.turns)
        bridge.load_lora_weights(adapter)
        asked |= settings.joining.arguments
    asked |= {"num_inference_steps": drawn.STEPS, "output_type": "pt"}

    def paint(given: Sequence[str], n: int, seed: int) -> Drawn:
        texts, parts = prompts_for(given, n, seed), []
        for i in range(0, n, DRAWN):
            part = texts[i : i + DRAWN]
            generators = [torch.Generator().manual_seed(seed + i + j) for j in range(len(part))]
            made = bridge(part, generator=generators, **asked).images
            parts.append(made.float().cpu() * 2 - 1)
        pictures = torch.cat(parts)
        with models.turn("old"):
            return Drawn(tuple(texts), drawn.encoded(models.old, pictures), pictures)

    return paint
