"""Several subjects at once, each from a folder of its own: the lesson of Cut-Mix-Unmix (arXiv 2303.11305, sec. 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import Tensor

from regraft.errors import InputError, UsageError
from regraft.probes.pictures import STEPS, draw
from regraft.runtime.latents import Latents
from regraft.runtime.load import Loaded
from regraft.training.cutmix import CutMix, Phrases, Sample, Subject
from regraft.training.lessons import denoising_loss
from regraft.training.picture_data import read_pixels
from regraft.training.settings import SubjectSettings
from regraft.training.unmix import Apart, recorded_attention, token_positions, unmix_loss

# Pictures of a class that are drawn together.
_TOGETHER = 4


@dataclass(frozen=True)
class SubjectLesson:
    """The denoiser's loss on samples of several subjects, with prior preservation and the unmix regulariser.

    Each step's samples are drawn and encoded anew; nothing is held out, since a subject has but a few pictures.

    Attributes:
        draws: the subjects' samples.
        prior: those of their classes, as many in a step, under a loss of the same weight (eq. 3, λ = 1); None without.
        unmix: weight of the regulariser.
        dropped: share of the samples that are shown without a prompt.
    """

    draws: CutMix
    prior: CutMix | None
    unmix: float
    dropped: float

    @property
    def n(self) -> int:
        return sum(len(subject.pictures) for subject in self.draws.subjects)

    def loss(self, model: Loaded, which: Sequence[int], generator: torch.Generator) -> Tensor:
        samples = self._drawn(self.draws, len(which), generator)
        if self.unmix:
            with recorded_attention(model.main) as maps:
                loss, size = _loss(model, samples, generator)
            read = next(iter(maps.values())).shape[-1]
            apart = Apart.of(samples, model.pipeline.tokenizer, read)
            loss = loss + self.unmix * unmix_loss(maps, apart, size)
        else:
            loss, _ = _loss(model, samples, generator)
        if self.prior is None:
            return loss
        return loss + _loss(model, self._drawn(self.prior, len(which), generator), generator)[0]

    def held(self, model: Loaded) -> float | None:
        return None

    def _drawn(self, draws: CutMix, count: int, generator: torch.Generator) -> list[Sample]:
        samples = [draws.draw(generator) for _ in range(count)]
        silent = torch.rand(count, generator=generator) < self.dropped
        return [
            replace(sample, prompt="") if mute else sample
            for sample, mute in zip(samples, silent.tolist(), strict=True)
        ]


def _loss(model: Loaded, samples: Sequence[Sample], generator: torch.Generator) -> tuple[Tensor, tuple[int, int]]:
    """The denoiser's loss, (), and the height and width of its input."""
    with torch.no_grad():
        clean = Latents(model).encode(torch.stack([sample.picture for sample in samples])).cpu()
    loss = denoising_loss(model, clean, [sample.prompt for sample in samples], generator)
    return loss, (clean.shape[-2], clean.shape[-1])


def subject_lesson(model: Loaded, asked: SubjectSettings, size: int | None, dropped: float, seed: int) -> SubjectLesson:
    """Read the subjects' folders and draw the pictures of their classes.

    Args:
        model: a pipeline, without an adapter.
        asked: the subjects and how they are shown.
        size: height and width of the pictures; None for what the pipeline draws.
        dropped: share of the samples without a prompt.
        seed: of the class pictures.

    Raises:
        InputError: a folder can't be read; or, with unmix, a special token can't be found in a prompt, or the denoiser
            has no cross-attention.
        UsageError: subjects or phrases that can't be drawn from.
    """
    try:
        phrases = Phrases(**asked.phrases)
    except TypeError:
        known = ", ".join(Phrases.__dataclass_fields__)
        raise UsageError(f"no such phrase: {', '.join(asked.phrases)}", remedy=f"Known: {known}.") from None
    subjects = [Subject(read_pixels(one.folder, model, size), one.identifier, one.noun) for one in asked.folders]
    height, width = subjects[0].pictures.shape[-2:]
    draws = CutMix(subjects, (height, width), asked.cut_mix, asked.fit, phrases)
    if asked.unmix:
        _check_tokens(model, draws)
    prior = None
    if asked.prior:
        nouns = list(dict.fromkeys(subject.noun for subject in subjects))
        made = {
            noun: _class_pictures(model, phrases.one.format(noun), asked.prior, (height, width), seed + 1000 * at)
            for at, noun in enumerate(nouns)
        }
        prior = draws.of_classes([made[subject.noun] for subject in subjects])
    return SubjectLesson(draws, prior, asked.unmix, dropped)


def _check_tokens(model: Loaded, draws: CutMix) -> None:
    """Tell before the first step what the regulariser would fail at."""
    with recorded_attention(model.main):
        pass
    tokenizer = getattr(model.pipeline, "tokenizer", None)
    if tokenizer is None:
        raise InputError(f"a {model.name} has no tokenizer to find special tokens by", remedy="Train without unmix.")
    for first, second in permutations(draws.subjects, 2):
        for phrase in draws.phrases.of_two:
            for subject in (first, second):
                token_positions(tokenizer, phrase.format(first.name, second.name), subject.identifier)


def _class_pictures(model: Loaded, prompt: str, count: int, size: tuple[int, int], seed: int) -> Tensor:
    """What the base itself draws of a class, (count, 3, h, w) in [−1, 1]."""
    parts = []
    for at in range(0, count, _TOGETHER):
        seeds = range(seed + at, seed + min(at + _TOGETHER, count))
        images = draw(model.pipeline, [prompt] * len(seeds), seeds, steps=STEPS, height=size[0], width=size[1])
        parts.append(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(parts)
