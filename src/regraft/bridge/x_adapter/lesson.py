"""What a mapper learns from: clean pictures that the new base denoises, hearing what the old base makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regraft.bridge.guided import Prompted
from regraft.bridge.levels import Levels
from regraft.bridge.x_adapter.mapper import Mapper
from regraft.bridge.x_adapter.places import Change, changed, heard
from regraft.probes.batches_diffusion import DiffusionBatch
from regraft.probes.diffusion import first_argument
from regraft.runtime.latents import Latents
from regraft.runtime.load import Loaded
from regraft.training.lessons import drawn_times

# Noise levels that a held-out picture is measured at, and states that are measured together.
_LEVELS, _TOGETHER = 4, 16


@dataclass(frozen=True)
class PairedPictures:
    """Pictures in the latents of both bases.

    Attributes:
        old: (n, channels, height, width).
        new: (n, channels, height, width), of the same pictures.
        captions: n.
    """

    old: Tensor
    new: Tensor
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)


class BridgeLesson:
    """The new base's own loss on pictures (arXiv 2312.02238, eq. 4).

    Both bases are frozen. The old one is run on the same picture in its own latents, under noise of its own, with the
    caption; the new one under an empty prompt, so that all it knows of the picture's content comes through the mapper.
    In the paper both see the same noise level; here the old base sees one between a share of it (the mapper's ``lead``)
    and all of it, in σ / α: while sampling it may know its finished picture already.
    """

    def __init__(
        self,
        old: Loaded,
        new: Loaded,
        mapper: Mapper,
        pictures: PairedPictures,
        fit: Sequence[int],
        apart: Sequence[int],
        *,
        prompted: float = 0.0,
        dropped: float = 0.1,
        seed: int = 0,
    ) -> None:
        """Nothing is run yet.

        Args:
            old: the base that plug-ins are for.
            new: the base that is bridged to.
            mapper: that is trained.
            pictures: all.
            fit: numbers of those to learn from.
            apart: of those to measure on.
            prompted: share of the pictures whose caption the new base is given.
            dropped: share of them that the old base is shown without a caption, as guidance runs it.
            seed: of the noise that is measured under.
        """
        self.old, self.mapper, self.pictures = old, mapper, pictures
        self.fit, self.apart = list(fit), list(apart)
        self.prompted, self.dropped, self.seed = prompted, dropped, seed
        self.levels = Levels(old), Levels(new)
        # Some denoisers are told the time at another pace than their scheduler counts it.
        shapes = [(part.shape[2], part.shape[3]) for part in (pictures.old, pictures.new)]
        self.paces = [
            Prompted.of(model, [""], None, 1.0, shape).pace for model, shape in zip((old, new), shapes, strict=True)
        ]
        self._open = ExitStack()

    @property
    def n(self) -> int:
        return len(self.fit)

    def loss(self, model: Loaded, which: Sequence[int], generator: torch.Generator) -> Tensor:
        """The loss on some of what is learnt from, with gradients, ().

        The new base goes on hearing of the old one's maps until the next call, or `close`: with gradient checkpointing
        its blocks run once more on the way back.
        """
        self.close()
        return self._loss(model, [self.fit[i] for i in which], generator, self._open)

    def close(self) -> None:
        """Have the new base run as it is again."""
        self._open.close()

    @torch.no_grad()
    def held(self, model: Loaded) -> float | None:
        """Mean loss on the pictures that are not learnt from; None without any."""
        self.close()
        generator = torch.Generator().manual_seed(self.seed)
        rows = [i for i in self.apart for _ in range(_LEVELS)]
        parts = [rows[i : i + _TOGETHER] for i in range(0, len(rows), _TOGETHER)]
        losses = [float(self._loss(model, part, generator)) * len(part) for part in parts]
        return sum(losses) / len(rows) if rows else None

    @torch.no_grad()
    def settle(self, model: Loaded, seed: int) -> None:
        """Measure what the mapper's levels read, before the first step.

        Args:
            model: the new base.
            seed: of the pictures and noise.
        """
        generator = torch.Generator().manual_seed(seed)
        n = min(len(self.fit), 2 * _TOGETHER)
        order = torch.randperm(len(self.fit), generator=generator)[:n].tolist()
        chosen = [self.fit[i] for i in order]
        parts = [chosen[i : i + _TOGETHER] for i in range(0, n, _TOGETHER)]
        self.mapper.settle([self._heard(part, *self._noise(model, len(part), generator)[1:]) for part in parts])

    def _loss(
        self, new: Loaded, rows: Sequence[int], generator: torch.Generator, kept: ExitStack | None = None
    ) -> Tensor:
        times, old_times, ratios = self._noise(new, len(rows), generator)
        maps = self._heard(rows, old_times, ratios, generator)
        clean = self.pictures.new[rows]
        noise = torch.randn(clean.shape, generator=generator)
        space = Latents(new)
        alpha, sigma = space.levels(times)
        given = torch.rand(len(rows), generator=generator) < self.prompted
        captions = tuple(
            self.pictures.captions[i] if told else "" for i, told in zip(rows, given.tolist(), strict=True)
        )
        states = alpha * clean + sigma * noise
        batch = DiffusionBatch((first_argument(new), states), times * self.paces[1], captions, "given")
        with torch.no_grad():
            conditions = batch.conditions(new)
        shares = ratios / (1 + ratios)
        changes = changes_of(self.mapper, maps, shares.to(new.device), 1.0)
        with ExitStack() as here:
            (kept or here).enter_context(changed(new.main, changes, (clean.shape[2], clean.shape[3])))
            prediction = batch.predict(new, conditions)
        wanted = space.target(clean, noise, times).to(prediction.device)
        return F.mse_loss(prediction[:, : wanted.shape[1]].float(), wanted)

    def _noise(self, new: Loaded, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps of both, (n,), and σ / α of the new and the old base, (n, 2)."""
        old_levels, new_levels = self.levels
        times = drawn_times(new, n, Latents(new).steps, generator)
        least = self.mapper.config.lead
        leads = least + (1 - least) * torch.rand(n, generator=generator)
        found = [new_levels.ratio(float(time)) for time in times]
        old_times = [old_levels.time(ratio * float(lead)) for ratio, lead in zip(found, leads, strict=True)]
        ratios = torch.tensor([found, [old_levels.ratio(time) for time in old_times]]).T
        return times, torch.tensor(old_times), ratios

    @torch.no_grad()
    def _heard(
        self, rows: Sequence[int], times: Tensor, ratios: Tensor, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """The old base's maps for some pictures at its timesteps, (n,)."""
        generator = generator or torch.Generator().manual_seed(self.seed)
        clean = self.pictures.old[list(rows)]
        mixes = torch.tensor([self.levels[0].mix(float(ratio)) for ratio in ratios[:, 1]])
        alpha, sigma = (part[:, None, None, None] for part in mixes.unbind(1))
        states = alpha * clean + sigma * torch.randn(clean.shape, generator=generator)
        silent = torch.rand(len(rows), generator=generator) < self.dropped
        captions = tuple(
            "" if mute else self.pictures.captions[i] for i, mute in zip(rows, silent.tolist(), strict=True)
        )
        batch = DiffusionBatch((first_argument(self.old), states), times * self.paces[0], captions, "given")
        places = [level.old for level in self.mapper.config.levels]
        with heard(self.old.main, places, (clean.shape[2], clean.shape[3])) as maps:
            batch.predict(self.old, batch.conditions(self.old))
            return list(maps)


def changes_of(mapper: Mapper, maps: Sequence[Tensor], noise: Tensor, strength: float) -> dict[str, Change]:
    """What the new denoiser's blocks hear of the old one's maps, for `regraft.bridge.x_adapter.places.changed`.

    Args:
        mapper: of the pair.
        maps: that the old blocks gave, (n, channels, height, width) each.
        noise: σ / (α + σ) of the new and the old base's states, (n, 2).
        strength: of the mapper.
    """

    def change_of(i: int) -> Change:
        return lambda hidden: mapper(i, maps[i].to(hidden.device), hidden, noise, strength)

    return {level.new: change_of(i) for i, level in enumerate(mapper.config.levels)}
