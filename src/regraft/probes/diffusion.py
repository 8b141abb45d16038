"""Inputs for denoisers: noise, states on the way from noise to picture, timesteps and prompts.

States and timesteps are shared by the old and the new model; the conditioning comes from each model's own text
encoders, with the adapter on them, as in use.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regraft.adapter import Adapter
from regraft.errors import InputError, RegraftError, first_line
from regraft.probes.sentences import PICTURE_PROMPTS
from regraft.runtime.applied import applied
from regraft.runtime.latents import predicted
from regraft.runtime.load import Loaded
from regraft.runtime.walk import course

N_INPUTS, STATES, STEPS, CONTEXT_TOKENS = 16, 4, 8, 16
# Pure noise is what a model sees at the very beginning only: without a pipeline no lower timestep can be asked for.
_NOISE_TIMESTEPS = (999, 966, 933, 900)

#: Arguments of one call of a denoiser, by name.
Call = dict[str, Any]


@dataclass(frozen=True)
class DiffusionProbe:
    """Per input a prompt and a few states; the effect is taken over all of them together.

    Attributes:
        texts: one prompt per input; None for a U-Net alone.
        states: per input, calls with nothing but noisy latents and their timestep.
        made: how, in words.
        prompts: the distinct prompts.
        reads: what the old model predicts and is conditioned on, to tell whether another one can be compared.
        seed: of the conditioning that is made up for a U-Net alone.
    """

    texts: tuple[str | None, ...]
    states: tuple[tuple[Call, ...], ...]
    made: str
    prompts: list[str]
    reads: tuple[Any, ...]
    seed: int
    logits: bool = False

    def __len__(self) -> int:
        return len(self.states)

    @torch.no_grad()
    def outputs(self, model: Loaded) -> Iterator[Tensor]:
        """The predictions for each input, (states, channels, height, width)."""
        known: dict[str, Call] = {}
        for i, (text, states) in enumerate(zip(self.texts, self.states, strict=True)):
            if text is None:
                condition = made_up(model, self.seed + i)
            else:
                if text not in known:
                    known[text] = first_call(model, text, _latents(states[0]))
                condition = known[text]
            yield torch.cat([_predict(model, condition, state) for state in states]).float().cpu()

    def carried_to(self, model: Loaded) -> tuple[DiffusionProbe, str | None]:
        """The same states for another denoiser; where it can't read them, noise in its own shape, and the reason."""
        if model.kind != "denoiser":
            raise InputError("is no diffusion model, and the old base is one", file=model.path)
        text = self.texts[0]
        if (model.pipeline is None) is not (text is None):
            raise InputError(
                "one base is a pipeline and the other a U-Net alone",
                file=model.path,
                remedy="Give both as pipeline folders, or both as U-Net folders.",
            )
        old = self.states[0][0]
        new = (
            noise_states(model, self.seed)[0] if text is None else _state(model, first_call(model, text, _latents(old)))
        )
        (ours, x), (theirs, y) = next(iter(old.items())), next(iter(new.items()))
        if ours != theirs or x.shape != y.shape:
            noise = torch.Generator().manual_seed(self.seed)
            own = tuple(tuple({**new, theirs: _normal(y.shape, noise).to(y)} for _ in s) for s in self.states)
            return replace(self, states=own), f"the latents have different shapes, {_sizes(x)} and {_sizes(y)}"
        if reads(model) != self.reads:
            return (
                self,
                f"the models predict or read different things, {_words(self.reads)} and {_words(reads(model))}",
            )
        return self, None


def diffusion_probe(
    model: Loaded, adapter: Adapter, *, prompts: Sequence[str] | None, n_inputs: int | None, seed: int
) -> DiffusionProbe:
    """See `regraft.probes.make_probe`."""
    if prompts is not None and not reads_prompts(model):
        raise InputError(
            f"a {model.name} reads no prompts",
            file=model.path,
            remedy="Leave --prompts out, or give the pipeline's folder (the one with model_index.json).",
        )
    if model.pipeline is None:
        n = n_inputs or N_INPUTS
        states = tuple(tuple(noise_states(model, seed + i)) for i in range(n))
        made = f"{n} × Gaussian noise at timesteps {_NOISE_TIMESTEPS} with random conditioning, seed {seed}"
        return DiffusionProbe((None,) * n, states, made, [], reads(model), seed)
    given = list(prompts if prompts is not None else PICTURE_PROMPTS) if reads_prompts(model) else [""]
    n = n_inputs or (len(given) if prompts is not None else N_INPUTS)
    texts = [given[i % len(given)] for i in range(n)]
    own = {i: _trajectory(model, texts[i], seed + i) for i in range(0, n, 2)}
    with applied(model.components, adapter):
        own |= {i: _trajectory(model, texts[i], seed + i) for i in range(1, n, 2)}
    distinct = list(dict.fromkeys(text for text in texts if text))
    whose = f"{len(distinct)} {'given' if prompts is not None else 'built-in'} prompts" if distinct else "no prompts"
    made = (
        f"{n} × {STATES} states on the way from noise to picture, made by the old base and by the old base with its "
        f"adapter in turn, {STEPS} steps, {whose}, seed {seed}"
    )
    return DiffusionProbe(tuple(texts), tuple(own[i] for i in range(n)), made, distinct, reads(model), seed)


def prompts_for(given: Sequence[str], count: int, seed: int) -> list[str]:
    """So many prompts, in an order of the seed; from the start again where there are too few."""
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed)).tolist()
    return [given[order[i % len(given)]] for i in range(count)]


def noise_plan(
    texts: Sequence[str], levels: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Noise levels of pictures, spread over a schedule's; a fifth without a prompt, as guidance runs the model.

    Args:
        texts: one per picture.
        levels: of each.
        steps: of the schedule.
        generator: the levels are drawn first, then who goes without a prompt.

    Returns:
        Which picture (n,), its timestep (n,), and its prompt, for n = pictures · levels.
    """
    n = len(texts) * levels
    which = torch.arange(len(texts)).repeat_interleave(levels)
    spread = torch.arange(levels).repeat(len(texts)) + torch.rand(n, generator=generator)
    times = (spread / levels * steps).long().clamp(1, steps - 1)
    without = torch.rand(n, generator=generator) < 0.2
    return which, times, tuple("" if without[i] else texts[int(which[i])] for i in range(n))


def reads_prompts(model: Loaded) -> bool:
    """Whether it is a pipeline that takes prompts."""
    return model.pipeline is not None and "prompt" in inspect.signature(model.pipeline.__call__).parameters


@torch.no_grad()
def _trajectory(model: Loaded, prompt: str, seed: int) -> tuple[Call, ...]:
    """States of one sampling run, evenly spread from pure noise to the last step."""
    calls: list[Call] = []
    with recording(model.main, calls):
        sample_latents(model, prompt, seed)
    spread = torch.linspace(0, len(calls) - 1, STATES).round().int().tolist()
    return tuple(_state(model, calls[i]) for i in spread)


@torch.no_grad()
def first_call(model: Loaded, prompts: str | list[str], latents: Tensor, *, gradients: bool = False) -> Call:
    """What the pipeline hands to its denoiser for the prompts, without guidance, at the size of ``latents``.

    Args:
        model: a pipeline.
        prompts: one or several.
        latents: four dimensions say the size; any other leave it to the pipeline.
        gradients: of the text encoders' trained parameters are kept, where the pipeline lets them through.
    """
    sizes: dict[str, Any] = {}
    if latents.dim() == 4:
        scale = getattr(model.pipeline, "vae_scale_factor", 8)
        sizes = {"height": latents.shape[2] * scale, "width": latents.shape[3] * scale}
    # Models distilled with guidance read it as an input; for the others 1 switches the second pass off.
    guided = getattr(model.main.config, "guidance_embeds", False)
    calls: list[Call] = []
    if not guided:
        sizes["guidance_scale"] = 1.0
    with recording(model.main, calls, stop=True), suppress(Enough), torch.set_grad_enabled(gradients):
        sample_latents(model, prompts, 0, gradients=gradients, **sizes)
    return calls[0]


def _latents(state: Call) -> Tensor:
    latents: Tensor = next(iter(state.values()))
    return latents


class Enough(Exception):
    """Leaves a pipeline at its denoiser's first call."""


@contextmanager
def recording(model: nn.Module, calls: list[Call], *, stop: bool = False) -> Iterator[None]:
    """Note the arguments of every call; with ``stop``, leave at the first by `Enough`."""
    signature, ours = inspect.signature(model.forward), course()

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Several runs may be on their way through one model.
        if course() is not ours:
            return
        arguments = signature.bind(*args, **kwargs).arguments
        calls.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()})
        if stop:
            raise Enough

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def sample_latents(
    model: Loaded, prompt: str | list[str], seed: int, *, gradients: bool = False, **settings: Any
) -> Any:
    """Latents for a prompt, or several together, as the pipeline gives them; settings that are None are left out."""
    run = model.pipeline.__call__
    if gradients:
        # Pipelines are called under `torch.no_grad`.
        run = partial(
            getattr(type(model.pipeline).__call__, "__wrapped__", type(model.pipeline).__call__), model.pipeline
        )
    accepted = inspect.signature(model.pipeline.__call__).parameters
    settings = {"prompt": prompt, "num_inference_steps": STEPS, "output_type": "latent", **settings}
    several = [torch.Generator().manual_seed(seed + i) for i in range(len(prompt))] if isinstance(prompt, list) else []
    generator = several or torch.Generator().manual_seed(seed)
    try:
        made = run(generator=generator, **{k: v for k, v in settings.items() if k in accepted and v is not None})
    except (Enough, RegraftError):
        raise
    except Exception as error:
        raise InputError(
            f"{type(model.pipeline).__name__} can't be run on a prompt alone ({first_line(error)})", file=model.path
        ) from error
    return getattr(made, "images", made)


def first_argument(model: Loaded) -> str:
    """The denoiser's argument that holds the latents; PEFT leaves the signature of what it changes as it is."""
    return next(iter(inspect.signature(model.main.forward).parameters))


def _state(model: Loaded, call: Call) -> Call:
    """Latents and timestep of one row; with guidance the rows are alike in them."""
    latents = first_argument(model)
    time = call["timestep"]
    return {latents: call[latents][-1:], "timestep": time[-1:] if isinstance(time, Tensor) and time.dim() else time}


def _predict(model: Loaded, condition: Call, state: Call) -> Tensor:
    call = {**condition, **state, "return_dict": False}
    latents, x = next(iter(state.items()))
    rows = condition[latents].shape[0] if latents in condition else 1
    call[latents] = x.to(model.device, model.main.dtype).expand(rows, *x.shape[1:])
    prediction: Tensor = model.main(**call)[0]
    return prediction[-1:]


def noise_states(model: Loaded, seed: int) -> list[Call]:
    """Gaussian noise at the first timesteps: all that can be asked of a U-Net without a pipeline."""
    config, noise = model.main.config, torch.Generator().manual_seed(seed)
    size = config.sample_size or 64
    shape = (1, config.in_channels, *((size, size) if isinstance(size, int) else size))
    return [{"sample": _normal(shape, noise), "timestep": torch.tensor(t)} for t in _NOISE_TIMESTEPS]


def made_up(model: Loaded, seed: int) -> Call:
    """Random conditioning of the sizes that a U-Net wants: text, class, and SDXL's pooled text and picture sizes."""
    config, noise = model.main.config, torch.Generator().manual_seed(seed)
    made: Call = {}
    width = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
    if width is not None:
        width = width if isinstance(width, int) else width[0]
        made["encoder_hidden_states"] = _normal((1, CONTEXT_TOKENS, width), noise)
    if config.get("num_class_embeds"):
        made["class_labels"] = torch.randint(config.num_class_embeds, (1,), generator=noise)
    elif config.get("class_embed_type") in ("projection", "simple_projection"):
        made["class_labels"] = _normal((1, config.projection_class_embeddings_input_dim), noise)
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]])
        made["added_cond_kwargs"] = {"text_embeds": _normal((1, pooled), noise), "time_ids": sizes}
    return {name: _to(value, model) for name, value in made.items()}


def _to(value: Any, model: Loaded) -> Any:
    if isinstance(value, dict):
        return {name: _to(part, model) for name, part in value.items()}
    return value.to(model.device, model.main.dtype if value.is_floating_point() else value.dtype)


def reads(model: Loaded) -> tuple[Any, ...]:
    """What two models must have in common for their predictions to be compared."""
    if model.pipeline is None:
        return tuple((name, tuple(v.shape)) for name, v in made_up(model, 0).items() if isinstance(v, Tensor))
    return (predicted(model.pipeline),)


def _words(reads: tuple[Any, ...]) -> str:
    return ", ".join(str(part) for part in reads)


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator)


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape[1:])
