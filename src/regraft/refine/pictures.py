"""Inputs for denoisers: pictures that the old base draws with its adapter, under noise of every level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from regraft.adapter import Adapter
from regraft.probes.batches import Batch, Batches, Maker
from regraft.probes.batches_diffusion import DiffusionBatch, diffusion_batches
from regraft.probes.diffusion import Call, noise_plan, prompts_for, reads_prompts, sample_latents
from regraft.probes.sentences import PICTURE_PROMPTS
from regraft.runtime.applied import applied
from regraft.runtime.both import BothModels, Side
from regraft.runtime.latents import Latents
from regraft.runtime.load import Loaded

#: Pictures to learn from, noise levels of each, and states that are run together.
N_PICTURES, LEVELS, TOGETHER = 64, 6, 16
#: Of the pictures, those that the old base draws without its adapter: there the adapter acts, too.
_PLAIN = 0.25
#: Pictures that are drawn together, and the steps that they take.
DRAWN, STEPS = 16, 20


@dataclass(frozen=True)
class PreparedBatch(DiffusionBatch):
    """States whose conditioning is computed once for a model, where its text encoders are not trained."""

    known: dict[int, Call] = field(default_factory=dict, compare=False)

    def prepare(self, model: Loaded) -> None:
        """Compute the conditioning for a model that stays as it is."""
        self.known[id(model.main)] = self.conditions(model)

    def forget(self, model: Loaded) -> None:
        """Let go of it."""
        self.known.pop(id(model.main), None)

    def run(self, model: Loaded, side: Side) -> Tensor:
        known = self.known.get(id(model.main))
        return super().run(model, side) if known is None else self.predict(model, known)

    def first(self) -> DiffusionBatch:
        found = super().first()
        assert isinstance(found, PreparedBatch)
        # What is known is of all states.
        return replace(found, known={})


def picture_inputs(
    models: BothModels,
    adapter: Adapter,
    n: int | None,
    seed: int,
    prompts: Sequence[str] | None,
    *,
    kept: bool,
    guidance: float | None = None,
) -> Batches:
    """Noisy states of pictures by the old base with its adapter, by the old base, and by the new one.

    Args:
        models: both bases; they share a space of latents.
        adapter: for the old one.
        n: states to fit on.
        seed: same seed, same inputs.
        prompts: in place of general ones.
        kept: the new base's own pictures are among those to fit on, for retention.
        guidance: that both bases draw with; None: each pipeline's own default.
    """
    old, new = models.old, models.new
    if not _renoised(old) or not _renoised(new):
        # States on the way to a picture are all that can be had of pipelines whose noise is another.
        found = diffusion_batches(
            models, adapter, n or N_PICTURES * LEVELS, seed, prompts, max(4, (n or 96) // 4), guidance
        )
        return replace(found, fit=_prepared(found.fit), held_out=_prepared(found.held_out))
    pictures = max(4, -(-n // LEVELS)) if n else N_PICTURES
    given = list(prompts if prompts is not None else PICTURE_PROMPTS) if reads_prompts(old) else [""]
    plain = max(1, round(_PLAIN * pictures))
    fit: list[Batch] = []
    held: list[Batch] = []
    makers: list[tuple[Maker, int]] = [("adapter", pictures - plain), ("old", plain)]
    makers += [("new", max(1, pictures // 4))] if kept else []
    for number, (maker, count) in enumerate(makers):
        side: Side = "new" if maker == "new" else "old"
        model = models.side(side)
        apart = max(1, count // 6)
        texts = prompts_for(given, count + apart, seed + number)
        with models.turn(side), applied(model.components, adapter if maker == "adapter" else None):
            parts = latents_of(model, texts, seed + 10_000 * number, STEPS, guidance_scale=guidance)
            drawn = torch.cat([part.float().cpu() for part in parts])
        fit += _noised(model, texts[:count], drawn[:count], maker, seed + number)
        held += _noised(model, texts[count:], drawn[count:], maker, seed + 100 + number)
    made = (
        f"{pictures} pictures that the old base drew in {STEPS} steps, {pictures - plain} of them with its adapter"
        f"{f', {makers[-1][1]} by the new base' if kept else ''}; {LEVELS} noise levels of each, seed {seed}"
    )
    return Batches(tuple(fit), tuple(held), made)


def _renoised(model: Loaded) -> bool:
    """Whether noise can be added to finished pictures by what the pipeline says of itself."""
    scheduler = getattr(model.pipeline, "scheduler", None)
    return hasattr(scheduler, "alphas_cumprod") and getattr(model.pipeline, "vae", None) is not None


def _prepared(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    return tuple(
        PreparedBatch(batch.latents, batch.timesteps, batch.prompts, batch.made_by, batch.seed)
        if isinstance(batch, DiffusionBatch)
        else batch
        for batch in batches
    )


def latents_of(model: Loaded, texts: Sequence[str], seed: int, steps: int, **settings: Any) -> Iterator[Tensor]:
    """Latents of finished pictures, `DRAWN` at a time, as the pipeline gives them; None leaves a setting to it."""
    for i in range(0, len(texts), DRAWN):
        with torch.no_grad():
            made = sample_latents(model, list(texts[i : i + DRAWN]), seed + i, num_inference_steps=steps, **settings)
        yield made


def _noised(model: Loaded, texts: Sequence[str], clean: Tensor, maker: Maker, seed: int) -> list[Batch]:
    """Every picture at `LEVELS` noise levels (see `regraft.probes.diffusion.noise_plan`)."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(model.pipeline.scheduler.alphas_cumprod)
    which, times, prompts = noise_plan(texts, LEVELS, steps, generator)
    n = len(which)
    alpha, sigma = Latents(model).levels(times)
    states = alpha * clean[which] + sigma * torch.randn(n, *clean.shape[1:], generator=generator)
    # Mixed, so that a step sees several pictures.
    order = torch.randperm(n, generator=generator)
    return [
        PreparedBatch(("sample", states[part]), times[part], tuple(prompts[int(i)] for i in part), maker, seed)
        for part in torch.split(order, TOGETHER)
    ]
