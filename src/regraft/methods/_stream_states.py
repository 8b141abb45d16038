"""Noisy states for two denoisers whose latents may differ: pictures of the old base, read by both autoencoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regraft.errors import InputError, first_line
from regraft.methods.task import AdapterTask
from regraft.probes.batches_diffusion import DiffusionBatch
from regraft.probes.diffusion import STEPS, reads_prompts
from regraft.probes.sentences import PICTURE_PROMPTS
from regraft.runtime.applied import applied
from regraft.runtime.load import Loaded

# Pictures that are made, and run, together; noise levels of each; every so many pictures, one that is held out.
TOGETHER, LEVELS, HELD = 16, 4, 6


@dataclass(frozen=True)
class Latents:
    """How a pipeline reads and writes pictures, and what its denoiser predicts of a noisy state z = α x + σ ε."""

    model: Loaded

    @property
    def _scale(self) -> tuple[float, float]:
        config = self.model.pipeline.vae.config
        return config.scaling_factor, getattr(config, "shift_factor", None) or 0.0

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (n, 3, h, w), from −1 to 1."""
        factor, shift = self._scale
        vae = self.model.pipeline.vae
        picture: Tensor = vae.decode(latents.to(vae.device, vae.dtype) / factor + shift).sample
        return picture.float().clamp(-1, 1)

    def encode(self, pictures: Tensor) -> Tensor:
        factor, shift = self._scale
        vae = self.model.pipeline.vae
        mode: Tensor = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.mode()
        return ((mode - shift) * factor).float()

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ, (n, 1, 1, 1)."""
        kept = self.model.pipeline.scheduler.alphas_cumprod[times].float()[:, None, None, None]
        return kept.sqrt(), (1 - kept).sqrt()

    def clean(self, prediction: Tensor, z: Tensor, times: Tensor) -> Tensor:
        """The picture's latents in a prediction."""
        alpha, sigma = self.levels(times)
        if self._predicts == "v_prediction":
            return alpha * z - sigma * prediction
        return prediction if self._predicts == "sample" else (z - sigma * prediction) / alpha.clamp_min(0.02)

    def prediction(self, clean: Tensor, z: Tensor, times: Tensor) -> Tensor:
        """The inverse of `clean`."""
        alpha, sigma = self.levels(times)
        if self._predicts == "v_prediction":
            return (alpha * z - clean) / sigma.clamp_min(0.05)
        return clean if self._predicts == "sample" else (z - alpha * clean) / sigma.clamp_min(0.05)

    @property
    def _predicts(self) -> str:
        return str(self.model.pipeline.scheduler.config.prediction_type)


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
    alike: bool = Latents(task.models.old)._scale == Latents(task.models.new)._scale
    return alike and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def make_states(task: AdapterTask, n: int, seed: int) -> tuple[list[States], list[States], str]:
    """``n`` noisy states to fit on, in batches, as many as make a fifth more to choose by, and how they were made."""
    old, new = task.models.old, task.models.new
    pictures = max(2, -(-n // LEVELS))
    held = max(1, pictures // HELD)
    given = list(task.prompts if task.prompts is not None else PICTURE_PROMPTS)
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [given[order[i % len(given)]] for i in range(pictures + held)]
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
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
        try:
            made: Any = old.pipeline(
                prompt=list(texts), num_inference_steps=STEPS, generator=generators, output_type="latent"
            )
        except Exception as error:
            raise InputError(
                f"{old.name} can't be run on prompts alone ({first_line(error)})", file=old.path
            ) from error
        latents = made.images.float().cpu()
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
    n = len(texts) * LEVELS
    which = torch.arange(len(texts)).repeat_interleave(LEVELS)
    spread = torch.arange(LEVELS).repeat(len(texts)) + torch.rand(n, generator=generator)
    steps = len(task.models.old.pipeline.scheduler.alphas_cumprod)
    times = (spread / LEVELS * steps).long().clamp(1, steps - 1)
    # A fifth without a prompt, as guidance runs the model.
    without = torch.rand(n, generator=generator) < 0.2
    prompts = tuple("" if without[i] else texts[int(which[i])] for i in range(n))
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
