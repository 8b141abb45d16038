"""Prompts through the new base alone and with the bridge, side by side."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from regraft._version import __version__
from regraft.adapter import Adapter
from regraft.base import Base
from regraft.bridge.control import load_controlnet
from regraft.bridge.delta import Course, DeltaPipeline, strength_of
from regraft.bridge.mixture import check_mix
from regraft.bridge.x_adapter.files import load_mapper
from regraft.bridge.x_adapter.mapper import Mapper
from regraft.bridge.x_adapter.settings import Joining
from regraft.errors import InputError, UsageError, first_line, having_room, reading
from regraft.output import check_writable, readable, whole, write_text
from regraft.probes.pictures import Images, png
from regraft.report.bridge_schema import BridgedText, BridgeReport
from regraft.report.bridge_table import bridge_text
from regraft.runtime.both import BothModels
from regraft.runtime.libraries import library, quiet_libraries
from regraft.runtime.load import DENOISERS, Loaded

#: Called with (prompts done, prompts in all, what is at work now).
Tick = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BridgeSettings:
    """How the prompts are run.

    Attributes:
        strength: λ; for pictures it may go from one number to another over the sampling.
        mix: of texts, the adapter's part of a mixture; None: no mixture.
        seed: of the noise of the first picture, the next has the next; of texts that are drawn.
        steps: of the new pipeline's sampler.
        guidance: of both pipelines; None: each one's own default.
        negative_prompt: what guidance leads away from.
        height: of pictures; None: what the new pipeline draws.
        width: likewise.
        tokens: of a text, at most.
        temperature: texts are drawn at; 0: the likeliest token each time.
        config: of bare weights files.
        device: to run on.
        dtype: name of the one that both bases are held in.
        mapper: of `regraft bridge train`, to bridge pictures by; None for delta sampling.
        joining: with a mapper, how the new base joins.
        controlnet: folder of a ControlNet for the old base.
        image: that it is shown.
        control_scale: of what it adds.
        low_memory: with a mapper, the bases take turns on the device.
    """

    strength: Course = 1.0
    mix: float | None = None
    seed: int = 0
    steps: int = 30
    guidance: float | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    tokens: int = 64
    temperature: float = 0.0
    config: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"
    mapper: Path | None = None
    joining: Joining = Joining()
    controlnet: Path | None = None
    image: Path | None = None
    control_scale: float = 1.0
    low_memory: bool = False


def run_bridge(
    adapter: Adapter | None,
    old: Base,
    new: Base,
    prompts: Sequence[str],
    output: Path | None = None,
    settings: BridgeSettings = BridgeSettings(),
    *,
    overwrite: bool = False,
    tick: Tick = lambda done, total, what: None,
) -> BridgeReport:
    """Run prompts through the new base, alone and with the adapter on the old base beside it.

    Args:
        adapter: for ``old``; None where a ControlNet is the only plug-in.
        old: the base that it was trained on.
        new: the base to run.
        prompts: one row of the result each.
        output: of pictures a PNG, of texts a text file; texts may do without.
        settings: see `BridgeSettings`.
        overwrite: replace the output.
        tick: told of progress.

    Raises:
        InputError: a base can't be loaded, or no bridge can be made between the two.
        OutputError: the output can't be written.
        Refused: the mapper is for other bases.
        UsageError: pictures without an output, or options that don't go together.
    """
    started = perf_counter()
    if output is not None:
        check_writable(output, overwrite=overwrite)
    _check(adapter, settings)
    # Of bases of two kinds that is told instead, once they are loaded.
    if output is None and not any(base.components.keys().isdisjoint(DENOISERS) for base in (old, new)):
        raise _unnamed()
    # Before the bases are loaded: it may be for others.
    mapper = None if settings.mapper is None else load_mapper(settings.mapper, old, new)
    remedy = _smaller(settings)
    with quiet_libraries(), having_room("both bases take more memory than there is", new.path, remedy):
        models = BothModels.load(
            old,
            new,
            settings.config,
            settings.device,
            in_turns=settings.low_memory,
            dtype=settings.dtype,
            remedy=remedy,
        )
        if models.new.kind == "denoiser":
            if output is None:
                raise _unnamed()
            if settings.mix is not None:
                raise UsageError("--mix is of texts", remedy="Leave it out: these are pictures.")
            way, texts, notes = _pictures(models, adapter, prompts, output, settings, mapper, tick)
        elif adapter is None or mapper is not None or settings.controlnet is not None:
            raise UsageError(
                "a language model is bridged with an adapter alone", remedy="Leave --mapper and --controlnet out."
            )
        else:
            way, texts, notes = _texts(models, adapter, prompts, settings, tick)
    report = BridgeReport(
        regraft_version=__version__,
        adapter=_plugins(adapter, settings),
        source=str(old.path),
        target=str(new.path),
        model_class=models.new.name,
        unit="pictures" if models.new.kind == "denoiser" else "texts",
        way=way,
        strength=settings.strength,
        mix=settings.mix,
        seed=settings.seed,
        prompts=list(prompts),
        texts=texts,
        outputs=[] if output is None else [str(output)],
        notes=notes,
        seconds=perf_counter() - started,
    )
    if output is not None and texts:
        write_text(bridge_text(report), output, overwrite=overwrite)
    return report


def _texts(
    models: BothModels, adapter: Adapter, prompts: Sequence[str], settings: BridgeSettings, tick: Tick
) -> tuple[str, list[BridgedText], list[str]]:
    from regraft.bridge.logits import LogitBridge

    for name in ("negative_prompt", "height", "width"):
        if getattr(settings, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is of pictures", remedy="Leave it out: these are texts.")
    if isinstance(settings.strength, tuple):
        raise UsageError("--strength of a text is one number", remedy="Give one such as 0.85.")
    new = models.new
    bridge = LogitBridge(models.old, new, adapter, settings.strength, mix=settings.mix)
    if new.tokenizer is None:
        raise InputError("there is no tokenizer to read the prompts with", file=new.path)
    found = []
    for i, prompt in enumerate(prompts):
        tick(i, len(prompts), prompt)
        ids = new.tokenizer(prompt, return_tensors="pt")["input_ids"]
        if ids.shape[1] == 0:
            raise InputError(f"a prompt has no tokens: {prompt!r}", file=new.path)
        alone, bridged = (_continued(new, ids, processor, settings) for processor in (None, bridge))
        found.append(BridgedText(prompt=prompt, new=alone, bridged=bridged))
    vocabulary = bridge.vocabulary
    shared = int((vocabulary.to_old >= 0).sum())
    notes = [] if vocabulary.alike else [f"{shared} of {len(vocabulary.to_old)} tokens have one in the old base"]
    way = "logit arithmetic: three passes for a token"
    return way if settings.mix is None else f"{way}, weighed by the text so far", found, notes


def _continued(new: Loaded, ids: Any, bridge: Any, settings: BridgeSettings) -> str:
    torch.manual_seed(settings.seed)
    drawn = {"temperature": settings.temperature, "top_k": 0, "top_p": 1.0} if settings.temperature else {}
    pad = new.tokenizer.pad_token_id
    made = new.main.generate(
        ids.to(new.device),
        attention_mask=torch.ones_like(ids).to(new.device),
        logits_processor=library("transformers").LogitsProcessorList([] if bridge is None else [bridge]),
        max_new_tokens=settings.tokens,
        do_sample=settings.temperature > 0,
        pad_token_id=new.tokenizer.eos_token_id if pad is None else pad,
        **drawn,
    )
    return str(new.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def _check(adapter: Adapter | None, settings: BridgeSettings) -> None:
    if adapter is None and settings.controlnet is None:
        raise UsageError("there is no plug-in to bridge", remedy="Name an adapter, or a --controlnet.")
    if (settings.controlnet is None) != (settings.image is None):
        raise UsageError("a ControlNet and its image go together", remedy="Give --controlnet and --control-image.")
    # Before the bases are loaded.
    check_mix(settings.mix)
    _opened(settings.image)


def _smaller(settings: BridgeSettings) -> str:
    """What takes less memory than is asked for."""
    ways = [] if settings.dtype != "float32" else ["--dtype bfloat16"]
    if settings.device != "cpu":
        turns = "--low-memory" if settings.mapper is not None else "--low-memory (with --mapper)"
        ways += [*([] if settings.low_memory else [turns]), "--device cpu"]
    return f"Free some, or take {' or '.join([*ways, 'a machine with more'])}."


def _unnamed() -> UsageError:
    return UsageError("--output is missing", remedy="Name the PNG that the pictures are to be in with -o.")


def _plugins(adapter: Adapter | None, settings: BridgeSettings) -> str:
    named = [] if adapter is None else [str(adapter.path or adapter.format)]
    return " + ".join([*named, *([] if settings.controlnet is None else [str(settings.controlnet)])])


def _pictures(
    models: BothModels,
    adapter: Adapter | None,
    prompts: Sequence[str],
    output: Path,
    settings: BridgeSettings,
    mapper: Mapper | None,
    tick: Tick,
) -> tuple[str, list[BridgedText], list[str]]:
    draw, way, notes = _drawer(models, adapter, settings, mapper)
    rows = []
    for i, prompt in enumerate(prompts):
        tick(i, len(prompts), prompt)
        # On the CPU, so that one seed is one noise on every device.
        generator = torch.Generator().manual_seed(settings.seed + i)
        try:
            with models.turn("new"):
                alone = _alone(models.new, prompt, settings, generator)
            bridged = draw(prompt, generator.manual_seed(settings.seed + i))
        except (ValueError, TypeError) as error:
            # By the pipelines themselves, of steps or sizes that they can't do.
            raise InputError(f"can't be drawn with ({first_line(error)})", file=models.new.path) from error
        rows.append(np.concatenate([alone, bridged], axis=1))
    with whole(output) as stage:
        stage.write_bytes(base64.b64decode(png(np.concatenate(rows, axis=0))))
        readable(stage)
    return way, [], notes


def _alone(new: Loaded, prompt: str, settings: BridgeSettings, generator: torch.Generator) -> Images:
    asked = {**_drawn(settings), "num_inference_steps": settings.steps, "output_type": "np"}
    made = new.pipeline(prompt=prompt, generator=generator, **asked)
    image: Images = made.images[0]
    return image


def _drawn(settings: BridgeSettings) -> dict[str, Any]:
    """What pipelines are told beyond the prompt, where it is asked for."""
    asked = {
        "guidance_scale": settings.guidance,
        "negative_prompt": settings.negative_prompt,
        "height": settings.height,
        "width": settings.width,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _drawer(
    models: BothModels, adapter: Adapter | None, settings: BridgeSettings, mapper: Mapper | None
) -> tuple[Callable[[str, torch.Generator], Images], str, list[str]]:
    """What draws a prompt through the bridge, what that is called, and what is to be said of it."""
    net = None if settings.controlnet is None else load_controlnet(settings.controlnet, models.old)
    common: dict[str, Any] = {
        **_drawn(settings),
        "num_inference_steps": settings.steps,
        "strength": strength_of(settings.strength),
        "image": _opened(settings.image),
        "controlnet_conditioning_scale": settings.control_scale,
        "output_type": "np",
    }
    if mapper is None:
        delta = DeltaPipeline(models.old, models.new, adapter, net)
        notes = [] if delta.shared else ["the autoencoders differ: each step goes through pixels"]
        way = "delta sampling: three passes for a step, each doubled by guidance"
        return lambda prompt, generator: delta(prompt, generator=generator, **common).images[0], way, notes
    from regraft.bridge.x_adapter.pipeline import BridgePipeline

    bridge = BridgePipeline(models.old, models.new, mapper, net, turns=models.turns)
    if adapter is not None:
        bridge.load_lora_weights(adapter)
    asked = {**common, **settings.joining.arguments}
    way = "X-Adapter: two passes for a step"
    if settings.joining.reading != "drawing":
        way += ", after the old base's own sampling"
    return lambda prompt, generator: bridge(prompt, generator=generator, **asked).images[0], way, []


def _opened(image: Path | None) -> Any:
    if image is None:
        return None
    pictures = library("PIL.Image")
    try:
        with reading(image), pictures.open(image) as opened:
            return opened.convert("RGB")
    except pictures.DecompressionBombError as error:
        raise InputError(f"is too large to be opened ({first_line(error)})", file=image) from error
