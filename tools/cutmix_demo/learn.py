"""An adapter and two new words on the demo's base, and pictures with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tools.cutmix_demo.subjects import NAMES
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from regraft.bench import diffusion_models as models
from regraft.bench.diffusion_data import Schedule, ddim, decode, open_autoencoder
from regraft.bench.resume import cosine_rate, step_generator
from regraft.demo import data_folder
from regraft.runtime.libraries import library
from regraft.training.cutmix import CutMix, Sample
from regraft.training.unmix import Apart, recorded_attention, unmix_loss
from regraft.tuners import SvdiffConfig

BATCH, PRIOR = 8, 2
POOL = 256
"""Samples that are drawn and encoded before the training, from which each step takes its own."""
TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|net\.0\.proj|net\.2|conv1|conv2|conv_shortcut|time_emb_proj)"
KINDS = {"svdiff": 2e-2, "lora": 5e-3}
"""Learning rates at their peak."""
TOKEN_RATE = 3e-3
SAMPLER_STEPS = 12


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        cut_mix: probability of a collage.
        unmix: weight of the regulariser; 0 is without.
    """

    cut_mix: float
    unmix: float = 0.0


class Model:
    """The demo's v1 with the two words in its vocabulary and an adapter on its U-Net."""

    def __init__(self, kind: str, seed: int) -> None:
        base = data_folder() / "v1"
        torch.manual_seed(seed)
        self.unet, (self.text, self.tokenizer) = models.open_unet(base), models.open_text(base)
        self.vae, self.schedule = open_autoencoder(base / "vae"), Schedule.of(base / "scheduler")
        self.text.requires_grad_(False)
        self.words = _new_words(self.text, self.tokenizer)
        self.unet.requires_grad_(False)
        if kind:
            self.unet.add_adapter(_config(kind))
            models.plain_attention(self.unet)

    def state(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        trained = {name: value for name, value in self.unet.named_parameters() if value.requires_grad}
        return {name: value.detach().clone() for name, value in (trained | {"words": self.words}).items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        trained = dict(self.unet.named_parameters()) | {"words": self.words}
        for name, value in state.items():
            trained[name].data.copy_(value)

    def read(self, prompts: list[str]) -> Tensor:
        """Embeddings of prompts, (n, 16, 64)."""
        seen = list(dict.fromkeys(prompts))
        found = self.text(models.token_ids(self.tokenizer, seen))[0]
        result: Tensor = found[[seen.index(prompt) for prompt in prompts]]
        return result

    def predict(self, states: Tensor, times: Tensor, words: Tensor) -> Tensor:
        found: Tensor = self.unet(states, times, words).sample
        return found

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Scaled latents (n, 8, 16, 16) of pictures in [−1, 1]."""
        codes: Tensor = self.vae.encode(pictures).latent_dist.mode()
        return codes * self.vae.config.scaling_factor

    @torch.no_grad()
    def paint(self, prompts: list[str], seed: int) -> Tensor:
        """Pictures (n, 3, 32, 32) in [−1, 1], guided."""
        noise = torch.randn((len(prompts), 8, 16, 16), generator=step_generator(seed, 0))
        words, empty = self.read(prompts), self.read([""])
        states = ddim(self.predict, self.schedule, noise, words, empty, SAMPLER_STEPS)
        return torch.from_numpy(decode(self.vae, states[-1])).permute(0, 3, 1, 2) * 2 - 1


def _config(kind: str) -> Any:
    if kind == "svdiff":
        return SvdiffConfig(target_modules=TARGETS)
    return library("peft").LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS)


def _new_words(text: Any, tokenizer: Any) -> nn.Parameter:
    """Add the identifiers, each with its class's embedding to begin with; of all words, only they learn."""
    tokenizer.add_tokens([identifier for identifier, _ in NAMES.values()])
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table: nn.Parameter = text.get_input_embeddings().weight
    new = torch.zeros(len(table), 1)
    for identifier, noun in NAMES.values():
        at, like = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in (identifier, noun))
        table.data[at] = table.data[like]
        new[at] = 1
    table.requires_grad_(True)
    table.register_hook(lambda gradient: gradient * new)
    return table


@dataclass(frozen=True)
class Pool:
    """Samples in latents, ready for training."""

    latents: Tensor
    samples: list[Sample]

    @classmethod
    def of(cls, draws: CutMix, model: Model, count: int, seed: int) -> Pool:
        generator = torch.Generator().manual_seed(seed)
        samples = [draws.draw(generator) for _ in range(count)]
        return cls(model.encode(torch.stack([sample.picture for sample in samples])), samples)

    def some(self, count: int, generator: torch.Generator) -> tuple[Tensor, list[Sample]]:
        chosen = torch.randint(len(self.samples), (count,), generator=generator)
        return self.latents[chosen], [self.samples[at] for at in chosen.tolist()]


def train(model: Model, kind: str, arm: Arm, own: Pool, prior: Pool, steps: int, seed: int) -> dict[str, float]:
    """Train the adapter and the words in place; the mean losses of the last tenth of the steps."""
    trained = [parameter for parameter in model.unet.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "peak": KINDS[kind]}, {"params": [model.words], "peak": TOKEN_RATE}]
    optimizer = torch.optim.AdamW(groups, lr=KINDS[kind], weight_decay=0.0)
    model.unet.train()
    sums: dict[str, float] = {}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * cosine_rate(step, steps, warmup=20)
        losses = _losses(model, own, prior, step_generator(seed, step))
        loss = losses["subjects"] + losses["prior"] + arm.unmix * losses["unmix"]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([*trained, model.words], 1.0)
        optimizer.step()
        if step >= steps - steps // 10:
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() / (steps // 10)
    return {name: round(value, 5) for name, value in sums.items()}


def _losses(model: Model, own: Pool, prior: Pool, random: torch.Generator) -> dict[str, Tensor]:
    """The subjects' loss, the prior's (arXiv 2303.11305, eq. 3) and the regulariser, from one pass."""
    parts = [own.some(BATCH, random), prior.some(PRIOR, random)]
    clean = torch.cat([latents for latents, _ in parts])
    samples = [sample for _, some in parts for sample in some]
    noise = torch.randn(clean.shape, generator=random)
    times = torch.randint(len(model.schedule.signal), (len(clean),), generator=random)
    states, aims = model.schedule.noised(clean, noise, times)
    with recorded_attention(model.unet) as maps:
        found = model.predict(states, times, model.read([sample.prompt for sample in samples]))
    apart = Apart.of(samples, model.tokenizer)
    return {
        "subjects": mse_loss(found[:BATCH], aims[:BATCH]),
        "prior": mse_loss(found[BATCH:], aims[BATCH:]),
        "unmix": unmix_loss(maps, apart, (clean.shape[2], clean.shape[3])),
    }
