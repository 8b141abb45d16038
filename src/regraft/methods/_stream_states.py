"""Noisy states for two denoisers whose latents may differ: pictures of the old base, read by both autoencoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.methods.task import AdapterTask
from regraft.probes.batches_diffusion import DiffusionBatch
from regraft.probes.diffusion import STEPS, noise_plan, prompts_for, reads_prompts, sample_latents
from regraft.probes.sentences import PICTURE_PROMPTS
from regraft.runtime.applied import applied
from regraft.runtime.latents import Latents

# Pictures that are made, and run, together; noise levels of each; every so many pictures, one that is held out.
TOGETHER, LEVELS, HELD = 16, 4, 6


@dataclass(frozen=True)
class States:
    """The same pictures with the same noise in both latent spaces.

    Attributes:
        styled: side → states of pictures that the old base with the adapter drew.
        plain: side → states of those that it drew alone, from the same noise and prompts.
    """

    styled: dict[str, DiffusionBatch]
    plain: dict[str, DiffusionBatch]


def check_pipelines(task: AdapterTask) -> None:
    """Whether both bases are what `make_states` can work with.

    Raises:
        InputError: one is a U-Net alone, has no autoencoder or no noise schedule that could be read, or no prompts.
    """
    for model in (task.models.old, task.models.new):
        pipeline = model.pipeline
        known = getattr(pipeline, "vae", None) is not None and hasattr(
            getattr(pipeline, "scheduler", None), "alphas_cumprod"
        )
        if not known or not reads_prompts(model):
            raise InputError(
                f"stream goes through pictures, and a {model.name} alone draws none that it could read",
                file=model.path,
                remedy="Give a text-to-image pipeline's folder (with model_index.json, an autoencoder and a "
                "noise schedule), or take another method.",
            )


def same_space(task: AdapterTask) -> bool:
    """Whether both bases have one autoencoder, so that latents need no way through pictures."""
    ours, theirs = (model.pipeline.vae.state_dict() for model in (task.models.old, task.models.new))
    alike: bool = Latents(task.models.old).scale == Latents(task.models.new).scale
    return alike and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def make_states(task: AdapterTask, n: int, seed: int) -> tuple[list[States], list[States], str]:
    """``n`` noisy states to fit on, in batches, as many as make a fifth more to choose by, and how they were made."""
    old, new = task.models.old, task.models.new
    pictures = max(2, -(-n // LEVELS))
    held = max(1, pictures // HELD)
    given = list(task.prompts if task.prompts is not None else PICTURE_PROMPTS)
    texts = prompts_for(given, pictures + held, seed)
    parts = (texts[:pictures], texts[pictures:])
    fit, rest = ([*_batches(task, part, seed + 10_000 * i)] for i, part in enumerate(parts))
    made = (
        f"{pictures * LEVELS} noisy states, {LEVELS} of each of {pictures} pictures that the old base with its "
        f"adapter drew in {STEPS} steps, and of those that it drew alone from the same noise, read by "
        f"{'both autoencoders' if old.path != new.path else 'its autoencoder'}, seed {seed}"
    )
    return fit, rest, made


def _batches(task: AdapterTask, texts: Sequence[str], seed: int) -> Iterator[States]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [_drawn(task, texts[i : i + TOGETHER], seed + i) for i in range(0, len(texts), TOGETHER)]
    pairs = [pair for styled, plain in drawn for pair in (styled, plain)]
    turn = (
        None if same_space(task) else _turn(torch.cat([old for old, _ in pairs]), torch.cat([new for _, new in pairs]))
    )
    for i, (styled, plain) in enumerate(drawn):
        yield _noised(task, texts[i * TOGETHER : (i + 1) * TOGETHER], styled, plain, turn, generator)


def _drawn(task: AdapterTask, texts: Sequence[str], seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Latents of pictures with and without the adapter, each in the old and the new base's space."""
    old, here, there = task.models.old, Latents(task.models.old), Latents(task.models.new)
    same = same_space(task)

    def draw() -> tuple[Tensor, Tensor]:
        latents = sample_latents(old, list(texts), seed).float().cpu()
        return latents, latents if same else there.encode(here.decode(latents)).cpu()

    plain = draw()
    with applied(old.components, task.adapter):
        styled = draw()
    return styled, plain


def _turn(old: Tensor, new: Tensor) -> Tensor | None:
    """The orthogonal map of channels that brings the old latents nearest to the new ones; None for other sizes.

    Noise that is turned by it stays Gaussian, and hides in both spaces the same parts of a picture.
    """
    if old.shape[1:] != new.shape[1:]:
        return None
    a, b = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (old, new))
    u, _, vh = torch.linalg.svd((a - a.mean(0)).T @ (b - b.mean(0)))
    turned: Tensor = u @ vh
    return turned


def _noised(
    task: AdapterTask,
    texts: Sequence[str],
    styled: tuple[Tensor, Tensor],
    plain: tuple[Tensor, Tensor],
    turn: Tensor | None,
    generator: torch.Generator,
) -> States:
    steps = len(task.models.old.pipeline.scheduler.alphas_cumprod)
    which, times, prompts = noise_plan(texts, LEVELS, steps, generator)
    n = len(which)
    noise = torch.randn(n, *plain[0].shape[1:], generator=generator)
    if plain[0] is plain[1]:
        other = noise
    elif turn is None:
        other = torch.randn(n, *plain[1].shape[1:], generator=generator)
    else:
        other = torch.einsum("nchw,cd->ndhw", noise, turn)
    name = "sample"
    made: list[dict[str, DiffusionBatch]] = []
    for pair in (styled, plain):
        batches: dict[str, DiffusionBatch] = {}
        for side, clean, eps in (("old", pair[0], noise), ("new", pair[1], other)):
            alpha, sigma = Latents(getattr(task.models, side)).levels(times)
            batches[side] = DiffusionBatch((name, alpha * clean[which] + sigma * eps), times, prompts, "adapter")
        made.append(batches)
    return States(*made)
