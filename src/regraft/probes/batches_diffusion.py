"""Noisy states for two denoisers that share a latent space, each with its own conditioning of the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regraft.adapter import Adapter
from regraft.errors import InputError
from regraft.probes.batches import Batch, Batches, Maker
from regraft.probes.diffusion import (
    STATES,
    STEPS,
    Call,
    first_argument,
    first_call,
    made_up,
    noise_states,
    prompts_for,
    reads,
    reads_prompts,
    recording,
    sample_latents,
)
from regraft.probes.sentences import PICTURE_PROMPTS
from regraft.runtime.applied import applied
from regraft.runtime.both import BothModels, Side
from regraft.runtime.load import Loaded

# Pictures that are made together.
_TOGETHER = 16


@dataclass(frozen=True)
class DiffusionBatch:
    """Noisy states, their timesteps, and the prompt of each.

    Attributes:
        latents: name of the denoiser's first argument → (n, channels, height, width).
        timesteps: (n,).
        prompts: per state; None for a U-Net alone.
        made_by: by which model.
        seed: of a U-Net's made-up conditioning.
    """

    latents: tuple[str, Tensor]
    timesteps: Tensor
    prompts: tuple[str | None, ...]
    made_by: Maker
    seed: int = 0

    def __len__(self) -> int:
        return len(self.timesteps)

    def run(self, model: Loaded, side: Side) -> Tensor:
        """The prediction for every state, (n, channels, height, width)."""
        with torch.no_grad():
            return self.predict(model, self.conditions(model))

    def conditions(self, model: Loaded, *, gradients: bool = False) -> Call:
        """What the denoiser is handed beside states and timesteps, a row for each state.

        Args:
            model: to run.
            gradients: of its text encoders are kept (`regraft.probes.diffusion.first_call`).
        """
        distinct = list(dict.fromkeys(self.prompts))
        which = torch.tensor([distinct.index(prompt) for prompt in self.prompts])
        call: Call = _taken(_conditions(model, distinct, self.latents[1], self.seed, gradients), which, len(distinct))
        return call

    def predict(self, model: Loaded, conditions: Call) -> Tensor:
        """The prediction under conditions that `conditions` gave, with gradients where they are on."""
        name, x = self.latents
        states = {name: x.to(model.device, model.main.dtype), "timestep": self.timesteps.to(model.device)}
        prediction: Tensor = model.main(**{**conditions, **states, "return_dict": False})[0]
        return prediction

    def rows(self, side: Side) -> Tensor | None:
        return None

    def first(self) -> DiffusionBatch:
        name, x = self.latents
        return replace(self, latents=(name, x[:1]), timesteps=self.timesteps[:1], prompts=self.prompts[:1])


def diffusion_batches(
    models: BothModels,
    adapter: Adapter | None,
    n: int,
    seed: int,
    prompts: Sequence[str] | None,
    held_out: int,
    guidance: float | None = None,
) -> Batches:
    """See `regraft.probes.batches.make_batches`; ``guidance`` is each pipeline's own default where it is None."""
    old, new = models.old, models.new
    _check_alike(old, new)
    if prompts is not None and not reads_prompts(old):
        raise InputError(f"a {old.name} reads no prompts", file=old.path, remedy="Leave --prompts out.")
    second: Maker = "adapter" if adapter is not None else "new"
    wanted: dict[Maker, tuple[int, int]] = {"old": (n - n // 2, held_out), second: (n // 2, held_out)}
    wanted.setdefault("new", (0, held_out))
    fit: list[Batch] = []
    held: list[Batch] = []
    for number, (maker, (to_fit, to_hold)) in enumerate(wanted.items()):
        side: Side = "new" if maker == "new" else "old"
        model = models.side(side)
        with models.turn(side), applied(model.components, adapter if maker == "adapter" else None):
            for part, count, first in ((fit, to_fit, 0), (held, to_hold, 1)):
                part += _states(model, count, seed + 10_000 * (2 * number + first), prompts, maker, guidance)
    halves = "the old base and the old base with its adapter" if adapter is not None else "the old and the new base"
    made = f"{n} noisy states, {STATES} of each picture that {halves} drew in {STEPS} steps, half each, seed {seed}"
    return Batches(tuple(fit), tuple(held), made)


def _check_alike(old: Loaded, new: Loaded) -> None:
    if (old.pipeline is None) is not (new.pipeline is None):
        raise InputError(
            "one base is a pipeline and the other a U-Net alone",
            file=new.path,
            remedy="Give both as pipeline folders, or both as U-Net folders.",
        )
    channels = [getattr(model.main.config, "in_channels", None) for model in (old, new)]
    if channels[0] != channels[1]:
        raise InputError(
            f"its latents have {channels[1]} channels, the old base's {channels[0]}",
            file=new.path,
            remedy="Take a method that runs no model.",
        )
    if reads(old) != reads(new):
        raise InputError(
            f"predicts or reads something else ({reads(new)}) than the old base ({reads(old)})",
            file=new.path,
            remedy="Take a method that runs no model.",
        )


def _states(
    model: Loaded, count: int, seed: int, prompts: Sequence[str] | None, maker: Maker, guidance: float | None
) -> list[Batch]:
    """``count`` states in batches."""
    if count <= 0:
        return []
    if model.pipeline is None:
        return [_pure_noise(model, count, seed, maker)]
    pictures = -(-count // STATES)
    given = list(prompts if prompts is not None else PICTURE_PROMPTS) if reads_prompts(model) else [""]
    # A fifth without a prompt, as guidance runs the model.
    texts = ["" if i % 5 == 4 and reads_prompts(model) else t for i, t in enumerate(prompts_for(given, pictures, seed))]
    batches: list[Batch] = []
    left = count
    for i in range(0, pictures, _TOGETHER):
        batch = _drawn(model, texts[i : i + _TOGETHER], seed + i, maker, left, guidance)
        left -= len(batch)
        batches.append(batch)
    return batches


def _drawn(
    model: Loaded, texts: list[str], seed: int, maker: Maker, most: int, guidance: float | None
) -> DiffusionBatch:
    """States on the way to one picture of each text."""
    calls: list[Call] = []
    with recording(model.main, calls):
        sample_latents(model, texts, seed, guidance_scale=1.0 if texts == [""] else guidance)
    name = first_argument(model)
    spread = torch.linspace(0, len(calls) - 1, STATES).round().int().tolist()
    n = len(texts)
    x = torch.cat([calls[i][name][-n:] for i in spread]).float().cpu()
    times = torch.cat([torch.as_tensor(calls[i]["timestep"]).reshape(-1)[-1:].expand(n) for i in spread]).cpu()
    return DiffusionBatch((name, x[:most]), times[:most].clone(), tuple((texts * STATES)[:most]), maker)


def _pure_noise(model: Loaded, count: int, seed: int, maker: Maker) -> DiffusionBatch:
    states = [state for i in range(-(-count // STATES)) for state in noise_states(model, seed + i)][:count]
    x = torch.cat([state["sample"] for state in states])
    return DiffusionBatch(
        ("sample", x), torch.stack([s["timestep"] for s in states]), (None,) * len(states), maker, seed
    )


def _conditions(model: Loaded, prompts: Sequence[str | None], like: Tensor, seed: int, gradients: bool) -> Call:
    """What the pipeline hands to its denoiser for these prompts, without guidance: one row for each."""
    if model.pipeline is None:
        return made_up(model, seed)
    return first_call(model, [prompt or "" for prompt in prompts], like, gradients=gradients)


def _taken(value: Any, which: Tensor, rows: int) -> Any:
    """The rows ``which`` of every tensor that has one row per prompt."""
    if isinstance(value, dict):
        return {name: _taken(part, which, rows) for name, part in value.items()}
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
        return value[which.to(value.device)]
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == 1:
        return value.expand(len(which), *value.shape[1:])
    return value
