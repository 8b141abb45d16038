"""What is learnt at a step: a loss on some of the data, and the same on data that nothing is learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from regraft.probes.batches_diffusion import DiffusionBatch
from regraft.probes.diffusion import first_argument
from regraft.runtime.latents import Latents, predicted
from regraft.runtime.load import Loaded
from regraft.training.picture_data import Pictures
from regraft.training.texts import IGNORED, TextExample

# Noise levels that a held-out picture is measured at.
_LEVELS = 4
# Examples that are measured together.
_TOGETHER = 8


class Lesson(Protocol):
    """Data that a model is trained on."""

    def loss(self, model: Loaded, which: Sequence[int], generator: torch.Generator) -> Tensor:
        """The loss on some of what is learnt from, with gradients, ().

        Args:
            model: with trainable layers.
            which: numbers of the examples, below `n`.
            generator: of noise and the rest.
        """
        ...

    @property
    def n(self) -> int:
        """Examples that are learnt from."""
        ...

    def held(self, model: Loaded) -> float | None:
        """The mean loss on those that are not, the same ones under the same noise each time; None without any."""
        ...


def split(n: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers to learn from, and numbers to measure on: of few none, for each is missed.

    Args:
        n: examples.
        share: of them to measure on.
        seed: of the choice.
    """
    apart = int(share * n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[apart:]), sorted(order[:apart])


@dataclass(frozen=True)
class TextLesson:
    """The next token of each text.

    Attributes:
        fit: to learn from.
        apart: to measure on.
    """

    fit: Sequence[TextExample]
    apart: Sequence[TextExample]

    @property
    def n(self) -> int:
        return len(self.fit)

    def loss(self, model: Loaded, which: Sequence[int], generator: torch.Generator) -> Tensor:
        return _text_loss(model, [self.fit[i] for i in which])

    @torch.no_grad()
    def held(self, model: Loaded) -> float | None:
        total, count = 0.0, 0
        for i in range(0, len(self.apart), _TOGETHER):
            part = self.apart[i : i + _TOGETHER]
            learnt = sum(label != IGNORED for example in part for label in example.labels[1:])
            total += float(_text_loss(model, part)) * learnt
            count += learnt
        return total / count if count else None


def _text_loss(model: Loaded, examples: Sequence[TextExample]) -> Tensor:
    """Mean cross-entropy in nats over the tokens that are learnt."""
    longest = max(len(example.ids) for example in examples)
    shape = (len(examples), longest)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, example in enumerate(examples):
        n = len(example.ids)
        ids[row, :n], labels[row, :n], mask[row, :n] = torch.tensor(example.ids), torch.tensor(example.labels), 1
    logits = model.main(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device))


@dataclass(frozen=True)
class PictureLesson:
    """A denoiser's own loss on pictures under noise: what its scheduler has it predict, mean squared error.

    Timesteps are uniform; with flow matching logit-normal (Esser et al. 2024, section 3.1).

    Attributes:
        pictures: all.
        fit: numbers of those to learn from.
        apart: of those to measure on.
        dropped: share that is shown without a caption.
        seed: of the noise that is measured under.
    """

    pictures: Pictures
    fit: Sequence[int]
    apart: Sequence[int]
    dropped: float
    seed: int

    @property
    def n(self) -> int:
        return len(self.fit)

    def loss(self, model: Loaded, which: Sequence[int], generator: torch.Generator) -> Tensor:
        chosen = [self.fit[i] for i in which]
        silent = torch.rand(len(chosen), generator=generator) < self.dropped
        captions = ["" if mute else self.pictures.captions[i] for i, mute in zip(chosen, silent.tolist(), strict=True)]
        return denoising_loss(model, self.pictures.latents[chosen], captions, generator)

    @torch.no_grad()
    def held(self, model: Loaded) -> float | None:
        losses = []
        generator = torch.Generator().manual_seed(self.seed)
        rows = [i for i in self.apart for _ in range(_LEVELS)]
        for i in range(0, len(rows), _TOGETHER):
            part = rows[i : i + _TOGETHER]
            captions = [self.pictures.captions[j] for j in part]
            losses += [float(denoising_loss(model, self.pictures.latents[part], captions, generator))] * len(part)
        return sum(losses) / len(losses) if losses else None


def denoising_loss(model: Loaded, clean: Tensor, captions: Sequence[str], generator: torch.Generator) -> Tensor:
    """Mean squared error of a denoiser's prediction, ().

    Args:
        model: a pipeline.
        clean: latents, (n, channels, height, width).
        captions: n.
        generator: of timesteps and noise.
    """
    space = Latents(model)
    noise = torch.randn(clean.shape, generator=generator)
    times = drawn_times(model, len(clean), space.steps, generator)
    alpha, sigma = space.levels(times)
    name = first_argument(model)
    batch = DiffusionBatch((name, alpha * clean + sigma * noise), times, tuple(captions), "given")
    prediction = batch.predict(model, batch.conditions(model))
    wanted = space.target(clean, noise, times).to(prediction.device)
    return F.mse_loss(prediction[:, : wanted.shape[1]].float(), wanted)


def drawn_times(model: Loaded, n: int, steps: int, generator: torch.Generator) -> Tensor:
    if predicted(model.pipeline) == "flow":
        return torch.sigmoid(torch.randn(n, generator=generator)) * steps
    return torch.randint(steps, (n,), generator=generator)
