"""How good an adapter is on a base: denoising errors on pictures that nothing was trained on, and sampled pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regraft.adapter import Adapter
from regraft.bench import diffusion_art as art
from regraft.bench import diffusion_models as models
from regraft.bench.diffusion_data import (
    EMPTY,
    FEW_STEPS,
    Latents,
    Noised,
    Schedule,
    ddim,
    decode,
    encode,
    held_out_batches,
    open_autoencoder,
)
from regraft.bench.diffusion_judge import Judge, look_number, style_share, trained_judge
from regraft.bench.diffusion_recipes import ADAPTERS, TunerRecipe
from regraft.bench.diffusion_train import Workshop, trajectories
from regraft.bench.resume import step_generator
from regraft.bench.worlds import Scorer, Scores
from regraft.runtime import Loaded, applied, load_model

TASK_TIMES = (900, 650, 400, 150)
"""Noise levels of the task: from where the style must be decided to where only lines are left to draw."""
RETENTION_TIMES = (650, 400, 200)
"""Noise levels of retention: enough noise to ask what the thing looks like, not enough to hide which thing it is."""
OLD_ART, NEW_ART = "fluent", "noto"
OLD_BASE = "v1"
TEST_RUNS, TEST_SEED = 96, 77
SAMPLES, SAMPLE_STEPS, SAMPLE_SEED = 32, 12, 9100
VARIED, OF_EACH, VARIED_SEED = 8, 4, 9300
"""Prompts that diversity is measured on, and pictures of each."""

_GROUNDS = len(art.BACKGROUNDS)
SAMPLED = [(place % 16) * _GROUNDS + (3 + place % 16 + 2 * (place // 16)) % _GROUNDS for place in range(SAMPLES)]
"""Prompts of the sampled pictures: each concept on two backgrounds."""


@contextmanager
def scoring(shop: Workshop, base: str, new: str, name: str) -> Iterator[Scorer]:
    """A scorer of adapter ``name``'s task on ``base``, tested in the new base's world.

    Task of a style: −½ ln of the squared error of the predicted v, per held-out picture of the *new* art in
    that style, averaged over `TASK_TIMES`. That is a log-likelihood in nats per latent value, up to a
    constant, so halving a small error counts like halving a large one; the plain error is nearly all
    colour of the paper, which even a poor port gets right.

    Task of the few-step adapter: −½ ln of the squared distance between the latents after `FEW_STEPS`
    unguided steps and the new base's own after `TEACHER_STEPS` guided ones, from the same noise.

    Retention: the error on a plain picture of the old art less that on one of the new art (same prompt,
    same noise), averaged over `RETENTION_TIMES`. A style spoils plain pictures on any base, the natively
    trained one as well, so their error alone says nothing; the style's part is the same in both terms,
    and what is left tells which art the model expects. An old base expects the old one: a port
    that undoes the upgrade sinks towards it.

    Extra, from `SAMPLES` pictures: the share of concepts and of the look that the judge recognises, and
    how much of the pixels lies on the look's palette.
    """
    look = ADAPTERS[name].look
    loaded = load_model(shop.base(base))
    run = _Run(loaded, Schedule.of(loaded.path / "scheduler"))
    judge = trained_judge(
        shop.cache / "art", shop.cache / "diffusion" / "judge.pt", through_autoencoder(shop.base(OLD_BASE) / "vae")
    )
    run_on = [_every_second(shop.latents(base, f"{name}-test")) for name in (OLD_ART, NEW_ART)]
    old_art, new_art = (held_out_batches(data, run.schedule, RETENTION_TIMES) for data in run_on)
    teacher: dict[str, Tensor] = {}
    styled: list[Noised] = []
    if look is None:
        teacher = trajectories(new, shop, TEST_RUNS, seed=TEST_SEED)
    else:
        styled = held_out_batches(shop.latents(base, f"{NEW_ART}-{look}-test"), run.schedule, TASK_TIMES)

    @torch.no_grad()
    def score(adapter: Adapter | None) -> Scores:
        with applied(loaded.components, adapter):
            words = run.words()
            retention = (run.errors(old_art, words) - run.errors(new_art, words)).mean(axis=0)
            if look is None:
                error = run.distances(teacher, words)[None]
                pictures = run.sampled(words, FEW_STEPS, guided=False)
            else:
                error = run.errors(styled, words)
                pictures = run.sampled(words, SAMPLE_STEPS, guided=True)
            extra = _seen(pictures, judge, look)
            if isinstance(ADAPTERS[name], TunerRecipe):
                extra["diversity"] = _diversity(judge, run.varied(words))
        task = (-0.5 * np.log(error)).mean(axis=0)
        return Scores(task, retention, extra)

    yield score


def _diversity(judge: Judge, pictures: art.Floats) -> float:
    """Mean distance (1 − cosine) of the judge's features between pictures of one prompt from different noise.

    Args:
        judge: a classifier of things and looks.
        pictures: (`VARIED` · `OF_EACH`, 32, 32, 3), those of one prompt together.
    """
    seen = judge.features(pictures).reshape(VARIED, OF_EACH, -1)
    alike = (seen @ seen.mT).sum((1, 2)) - OF_EACH
    return float(1 - alike.mean() / (OF_EACH * (OF_EACH - 1)))


def through_autoencoder(vae: Path) -> Callable[[art.Pixels], art.Floats]:
    """Pictures through an autoencoder and back."""

    def there_and_back(pixels: art.Pixels) -> art.Floats:
        return decode(open_autoencoder(vae), encode(vae, pixels))

    return there_and_back


def _every_second(data: Latents) -> Latents:
    return Latents(data.values[::2], data.prompts[::2])


def _seen(pictures: art.Floats, judge: Judge, look: str | None) -> dict[str, float]:
    concepts, looks = judge.named(pictures)
    found = {"concept": float((concepts == np.array(SAMPLED) // _GROUNDS).mean())}
    if look is not None:
        found |= {"style": style_share(pictures, look), "judge": float((looks == look_number(look)).mean())}
    return found


class _Run:
    """A loaded base at work."""

    def __init__(self, loaded: Loaded, schedule: Schedule) -> None:
        self.loaded, self.schedule = loaded, schedule
        self.vae: Any = loaded.pipeline.vae.float().eval()
        self.ids = models.token_ids(loaded.pipeline.tokenizer, [*art.PROMPTS, ""])

    def words(self) -> Tensor:
        """Embeddings of all prompts by the text encoder as it is now: (97, 16, 64)."""
        found: Tensor = self.loaded.components["text_encoder"](self.ids)[0]
        return found

    def denoise(self, states: Tensor, times: Tensor, words: Tensor) -> Tensor:
        # Larger batches fall out of the processor's cache.
        parts = zip(*(torch.split(all_of, 32) for all_of in (states, times, words)), strict=True)
        return torch.cat([self.loaded.main(x, t, w).sample for x, t, w in parts])

    def errors(self, batches: list[Noised], words: Tensor) -> NDArray[np.float64]:
        """Squared error of v by noise level and picture: (levels, n)."""
        levels = [
            (self.denoise(batch.states, batch.times, words[batch.prompts]) - batch.aims).square().mean(dim=(1, 2, 3))
            for batch in batches
        ]
        return torch.stack(levels).double().numpy()

    def distances(self, teacher: dict[str, Tensor], words: Tensor) -> NDArray[np.float64]:
        """Squared error of the few-step picture per run of the teacher."""
        states = teacher["states"].float()
        made = ddim(self.denoise, self.schedule, states[0], words[teacher["prompts"]], None, FEW_STEPS)[-1]
        return (made - states[-1]).square().mean(dim=(1, 2, 3)).double().numpy()

    def sampled(self, words: Tensor, steps: int, *, guided: bool) -> art.Floats:
        """Pictures of `SAMPLED`, each from noise of its own."""
        noise = torch.stack(
            [torch.randn((8, 16, 16), generator=step_generator(SAMPLE_SEED, i)) for i in range(SAMPLES)]
        )
        empty = words[EMPTY:] if guided else None
        return decode(self.vae, ddim(self.denoise, self.schedule, noise, words[SAMPLED], empty, steps)[-1])

    def varied(self, words: Tensor) -> art.Floats:
        """`OF_EACH` pictures of each of the first `VARIED` sampled prompts, guided."""
        count = VARIED * OF_EACH
        noise = torch.stack([torch.randn((8, 16, 16), generator=step_generator(VARIED_SEED, i)) for i in range(count)])
        prompts = [prompt for prompt in SAMPLED[:VARIED] for _ in range(OF_EACH)]
        made = ddim(self.denoise, self.schedule, noise, words[prompts], words[EMPTY:], SAMPLE_STEPS)[-1]
        return decode(self.vae, made)
