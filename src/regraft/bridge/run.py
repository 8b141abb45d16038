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
from regraft.errors import InputError, UsageError
from regraft.output import check_writable, readable, whole, write_text
from regraft.probes.pictures import Images, png
from regraft.report.bridge_schema import BridgedText, BridgeReport
from regraft.report.bridge_table import bridge_text
from regraft.runtime.both import BothModels
from regraft.runtime.libraries import library, quiet_libraries
from regraft.runtime.load import Loaded

#: Called with (prompts done, prompts in all, what is at work now).
Tick = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BridgeSettings:
    """How the prompts are run.

    Attributes:
        strength: λ.
        seed: of the noise of the first picture, the next has the next; of texts that are drawn.
        steps: of the new pipeline's sampler.
        guidance: of both pipelines; None: each one's own default.
        tokens: of a text, at most.
        temperature: texts are drawn at; 0: the likeliest token each time.
        config: of bare weights files.
        device: to run on.
    """

    strength: float = 1.0
    seed: int = 0
    steps: int = 30
    guidance: float | None = None
    tokens: int = 64
    temperature: float = 0.0
    config: Path | None = None
    device: str = "cpu"


def run_bridge(
    adapter: Adapter,
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
        adapter: for ``old``.
        old: the base that it was trained on.
        new: the base to run.
        prompts: one row of the result each.
        output: of pictures a PNG, of texts a text file; texts may do without.
        settings: see `BridgeSettings`.
        overwrite: replace the output.
        tick: told of progress.

    Raises:
        InputError: a base can't be loaded, or no bridge can be made between the two.
        UsageError: pictures without an output.
        OutputError: the output can't be written.
    """
    started = perf_counter()
    if output is not None:
        check_writable(output, overwrite=overwrite)
    with quiet_libraries():
        models = BothModels.load(old, new, settings.config, settings.device)
        if models.new.kind == "denoiser":
            if output is None:
                raise UsageError("--output is missing", remedy="Name the PNG that the pictures are to be in with -o.")
            way, texts, notes = _pictures(models, adapter, prompts, output, settings, overwrite, tick)
        else:
            way, texts, notes = _texts(models, adapter, prompts, settings, tick)
    report = BridgeReport(
        regraft_version=__version__,
        adapter=str(adapter.path or adapter.format),
        source=str(old.path),
        target=str(new.path),
        model_class=models.new.name,
        unit="pictures" if models.new.kind == "denoiser" else "texts",
        way=way,
        strength=settings.strength,
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

    new = models.new
    bridge = LogitBridge(models.old, new, adapter, settings.strength)
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
    return "logit arithmetic: three passes for a token", found, notes


def _continued(new: Loaded, ids: Any, bridge: Any, settings: BridgeSettings) -> str:
    torch.manual_seed(settings.seed)
    drawn = {"temperature": settings.temperature, "top_k": 0} if settings.temperature else {}
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


def _pictures(
    models: BothModels,
    adapter: Adapter,
    prompts: Sequence[str],
    output: Path,
    settings: BridgeSettings,
    overwrite: bool,
    tick: Tick,
) -> tuple[str, list[BridgedText], list[str]]:
    from regraft.bridge.delta import DeltaPipeline

    bridge = DeltaPipeline(models.old, models.new, adapter)
    rows = []
    for i, prompt in enumerate(prompts):
        tick(i, len(prompts), prompt)
        drawn = [_drawn(bridge, prompt, settings, i, strength) for strength in (0.0, settings.strength)]
        rows.append(np.concatenate(drawn, axis=1))
    with whole(output) as stage:
        stage.write_bytes(base64.b64decode(png(np.concatenate(rows, axis=0))))
        readable(stage)
    notes = [] if bridge.shared else ["the autoencoders differ: each step goes through pixels"]
    return "delta sampling: three passes for a step, each doubled by guidance", [], notes


def _drawn(bridge: Any, prompt: str, settings: BridgeSettings, i: int, strength: float) -> Images:
    # On the CPU, so that one seed is one noise on every device.
    generator = torch.Generator().manual_seed(settings.seed + i)
    made = bridge(prompt, settings.steps, settings.guidance, strength, generator, "np")
    image: Images = made.images[0]
    return image
