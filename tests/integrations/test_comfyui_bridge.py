"""ComfyUI's bridge node with a stub of the host whose models do real arithmetic; ComfyUI itself is not run here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_package import imported
from torch import Tensor

KINDS = ("eps", "v", "flow")


class Format:
    """How latents are scaled."""

    latent_dimensions = 2

    def __init__(self, channels: int = 4, scale: float = 0.18, shift: float = 0.0) -> None:
        self.latent_channels, self.scale_factor, self.shift = channels, scale, shift

    def process_in(self, latent: Tensor) -> Tensor:
        return (latent - self.shift) * self.scale_factor


class Sampling:
    """What a model predicts, and how noise is mixed into a picture."""

    def __init__(self, kind: str) -> None:
        self.kind, self.sigma_max = kind, torch.tensor(1.0 if kind == "flow" else 14.6)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        if self.kind == "odd":
            return sigma * noise + (1 - sigma**2) ** 0.5 * latent
        return sigma * noise + ((1 - sigma) if self.kind == "flow" else 1) * latent

    def output_of(self, picture: Tensor, state: Tensor, sigma: float) -> Tensor:
        """The prediction that says this picture."""
        if self.kind == "v":
            return (state / (sigma**2 + 1) - picture) * (sigma**2 + 1) ** 0.5 / sigma
        return (state - picture) / sigma

    def picture_of(self, output: Tensor, state: Tensor, sigma: float) -> Tensor:
        if self.kind == "v":
            return state / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5
        return state - output * sigma


class Model:
    """A denoiser whose picture depends on its weight, the state, the noise level and the prompt, and on no kind."""

    def __init__(self, kind: str = "eps", seed: int = 0, latents: Format | None = None) -> None:
        self.model_sampling, self.latent_format = Sampling(kind), latents or Format()
        channels = self.latent_format.latent_channels
        self.own = torch.randn(channels, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.weight = self.own
        self.calls = 0
        self.levels: list[float] = []

    def predict(self, state: Tensor, sigma: float, prompt: float) -> Tensor:
        self.calls += 1
        self.levels.append(sigma)
        flow = self.model_sampling.kind == "flow"
        clean, r = (state / (1 - sigma), sigma / (1 - sigma)) if flow else (state, sigma)
        seen = clean.double() / (1 + r**2) ** 0.5
        picture = torch.tanh(torch.einsum("oc,nchw->nohw", self.weight, seen) + prompt)
        return self.model_sampling.output_of(picture, state, sigma)


class Patcher:
    """The host's handle on a model: patches are in the weights only while it is loaded."""

    def __init__(self, model: Model, patch: Tensor | float = 0.0) -> None:
        self.model, self.patch = model, patch
        self.model_options: dict[str, Any] = {}
        self.additional: dict[str, list[Patcher]] = {}

    def clone(self) -> Patcher:
        made = Patcher(self.model, self.patch)
        made.model_options = {**self.model_options}
        return made

    def set_model_sampler_post_cfg_function(self, function: Callable[[Any], Tensor]) -> None:
        self.model_options["post"] = [*self.model_options.get("post", []), function]

    def set_additional_models(self, key: str, models: list[Patcher]) -> None:
        self.additional[key] = models

    def with_lora(self, strength: float = 1.0) -> Patcher:
        made = self.clone()
        made.patch = strength * torch.full_like(self.model.own, 0.4)
        return made


def load_models_gpu(patchers: list[Patcher]) -> None:
    for patcher in patchers:
        patcher.model.weight = patcher.model.own + patcher.patch


def sampling_function(
    model: Model,
    state: Tensor,
    sigma: Tensor,
    negative: Any,
    positive: Any,
    guidance: float,
    model_options: Any = None,
    seed: Any = None,
    *,
    tells: bool = True,
) -> Tensor:
    level = float(sigma[0])
    assert sigma.shape == state.shape[:1]
    sides = [positive] if guidance == 1 else [positive, negative]
    made = [
        model.model_sampling.picture_of(model.predict(state, level, conds[0]["prompt"]), state, level)
        for conds in sides
    ]
    denoised = made[0] if len(made) == 1 else made[1] + guidance * (made[0] - made[1])
    for function in (model_options or {}).get("post", []):
        args = {"denoised": denoised, "sigma": sigma, "input": state, "model": model}
        denoised = function({**args, "cond_scale": guidance} if tells else args)
    return denoised


def sampled(
    patcher: Patcher, guidance: float = 3.0, steps: int = 6, prompts: tuple[float, float] = (-0.3, 0.2), **more: Any
) -> Tensor:
    """Euler's sampler, over the model's own levels, from one noise."""
    load_models_gpu([*(model for models in patcher.additional.values() for model in models), patcher])
    flow = patcher.model.model_sampling.kind == "flow"
    ratios = [8.0 * 0.5**step for step in range(steps)]
    levels = [r / (1 + r) if flow else r for r in ratios] + [0.0]
    channels = patcher.model.latent_format.latent_channels
    noise = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    state = noise * levels[0]
    conds = [[{"prompt": prompt}] for prompt in prompts]
    for now, following in pairwise(levels):
        sigma = torch.full((2,), now, dtype=torch.float64)
        denoised = sampling_function(patcher.model, state, sigma, *conds, guidance, patcher.model_options, **more)
        state = state + (following - now) * (state - denoised) / now
    return state


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Any:
    processed: list[Any] = []

    def process_conds(model: Model, noise: Tensor, conds: Any, device: Any) -> Any:
        processed.append(tuple(noise.shape))
        return conds

    modules = {
        "comfy.model_management": SimpleNamespace(load_models_gpu=load_models_gpu),
        "comfy.sampler_helpers": SimpleNamespace(convert_cond=lambda cond: [{"prompt": c[0]} for c in cond]),
        "comfy.samplers": SimpleNamespace(sampling_function=sampling_function, process_conds=process_conds),
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(vars(content))
        monkeypatch.setitem(sys.modules, name, module)
    found = imported(monkeypatch).NODE_CLASS_MAPPINGS["RegraftBridgeDelta"]
    found.processed = processed
    return found


def bridged(
    node: Any, new: Patcher, old: Patcher, adapted: Patcher, strength: float = 1.0, cfg: float = 0.0
) -> Patcher:
    positive, negative = [(0.2, {})], [(-0.3, {})]
    (made,) = getattr(node(), node.FUNCTION)(new, old, adapted, positive, negative, strength, cfg)
    assert isinstance(made, Patcher)
    assert made is not new
    return made


def test_strength_zero_is_the_new_model_and_runs_no_other(node: Any) -> None:
    new, old = Patcher(Model("v", 1)), Patcher(Model("eps", 2))
    assert torch.equal(sampled(bridged(node, new, old, old.with_lora(), strength=0.0)), sampled(new))
    assert old.model.calls == 0
    assert new.model_options == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("shared", [True, False])
def test_between_equal_bases_it_is_the_new_base_with_the_lora(node: Any, kind: str, other: str, shared: bool) -> None:
    """Whatever the two predict, and whether the old base's two patchers take turns on one weight or not."""
    new, old = Patcher(Model(kind, 1)), Patcher(Model(other, 1))
    adapted = old.with_lora() if shared else Patcher(Model(other, 1)).with_lora()
    wanted, plain = sampled(new.with_lora()), sampled(new)
    found = sampled(bridged(node, new, old, adapted))
    assert (wanted - plain).abs().max() > 0.05
    # The arithmetic in between is float32.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_each_step_adds_what_the_formula_says(node: Any) -> None:
    new, old = Patcher(Model("eps", 1)), Patcher(Model("eps", 2))
    model = bridged(node, new, old, old.with_lora(), strength=0.7)
    state, sigma = torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.full((2,), 1.5, dtype=torch.float64)
    conds = [[{"prompt": prompt}] for prompt in (-0.3, 0.2)]
    parts = []
    for patcher in (new, old, old.with_lora()):
        load_models_gpu([patcher])
        parts.append(sampling_function(patcher.model, state, sigma, *conds, 3.0))
    found = sampling_function(model.model, state, sigma, *conds, 3.0, model.model_options)
    torch.testing.assert_close(found, parts[0] + 0.7 * (parts[2] - parts[1]), rtol=1e-5, atol=1e-5)


def test_a_lora_of_the_text_encoder_acts_through_its_own_prompts(node: Any) -> None:
    """Between equal bases with no LoRA on the denoiser, the result is the new base with the other prompts."""
    new, old = Patcher(Model("eps", 1)), Patcher(Model("eps", 1))
    prompts = {"lora_positive": [(0.9, {})], "lora_negative": [(-0.6, {})]}
    (model,) = getattr(node(), node.FUNCTION)(new, old, old.clone(), [(0.2, {})], [(-0.3, {})], 1.0, 0.0, **prompts)
    wanted = sampled(new, prompts=(-0.6, 0.9))
    assert (wanted - sampled(new)).abs().max() > 0.05
    torch.testing.assert_close(sampled(model), wanted, rtol=1e-4, atol=1e-4)


def test_a_state_beyond_the_old_schedule_is_read_at_its_last_level(node: Any) -> None:
    new, old = Patcher(Model("flow", 1)), Patcher(Model("eps", 2))
    model = bridged(node, new, old, old.with_lora())
    conds = [[{"prompt": prompt}] for prompt in (-0.3, 0.2)]
    load_models_gpu([new])
    state, sigma = torch.randn(1, 4, 4, 4, dtype=torch.float64), torch.tensor([0.999], dtype=torch.float64)
    assert sampling_function(model.model, state, sigma, *conds, 3.0, model.model_options).isfinite().all()
    # r = 999 of a flow; the old base ends at 14.6.
    assert old.model.levels == pytest.approx([14.6] * len(old.model.levels))
    assert old.model.levels


def test_a_lora_that_is_on_neither_side_is_told(node: Any) -> None:
    new, old = Patcher(Model("flow", 1)), Patcher(Model("eps", 2))
    with pytest.raises(RuntimeError, match="put the LoRA on the second one"):
        bridged(node, new, old, old)


def test_guidance_is_the_samplers_unless_it_is_given(node: Any) -> None:
    new, old = Patcher(Model("eps", 1)), Patcher(Model("eps", 1))
    own = sampled(bridged(node, new, old, old.with_lora()))
    assert torch.equal(sampled(bridged(node, new, old, old.with_lora(), cfg=3.0)), own)
    assert not torch.allclose(sampled(bridged(node, new, old, old.with_lora(), cfg=1.0)), own, atol=1e-3)
    # Older hosts don't tell it.
    with pytest.raises(RuntimeError, match="set the node's cfg"):
        sampled(bridged(node, new, old, old.with_lora()), tells=False)
    assert torch.equal(sampled(bridged(node, new, old, old.with_lora(), cfg=3.0), tells=False), own)


def test_prompts_are_prepared_once_for_a_size(node: Any) -> None:
    new, old = Patcher(Model("eps", 1)), Patcher(Model("eps", 2))
    sampled(bridged(node, new, old, old.with_lora()), steps=5)
    assert node.processed == [(2, 4, 4, 4)] * 2


def test_room_is_asked_for_once_for_each_model(node: Any) -> None:
    new, old = Patcher(Model("eps", 1)), Patcher(Model("eps", 2))
    assert bridged(node, new, old, old.with_lora()).additional == {"regraft_bridge": [old]}
    apart = Patcher(Model("eps", 2)).with_lora()
    assert bridged(node, new, old, apart).additional == {"regraft_bridge": [old, apart]}
    assert bridged(node, new, old, apart, strength=0.0).additional == {}


@pytest.mark.parametrize("other", [Format(16), Format(4, 0.13), Format(4, 0.18, 0.05)])
def test_another_latent_space_is_refused(node: Any, other: Format) -> None:
    new, old = Patcher(Model("eps", 1, other)), Patcher(Model("eps", 2))
    with pytest.raises(RuntimeError, match=r"latents of old_model .* differ") as error:
        bridged(node, new, old, old.with_lora())
    assert "\n" not in str(error.value)


def test_what_would_draw_something_else_is_refused(node: Any) -> None:
    new, old = Patcher(Model("eps", 1)), Patcher(Model("eps", 2))
    with pytest.raises(RuntimeError, match="one loader"):
        bridged(node, old, old, old.with_lora())
    with pytest.raises(RuntimeError, match="not known here"):
        bridged(node, Patcher(Model("odd", 1)), old, old.with_lora())
    for place in (0, 1):
        prompts: list[Any] = [[(0.2, {})], [(-0.3, {})]]
        prompts[place] = [(0.2, {"control": object()})]
        with pytest.raises(RuntimeError, match="carry control"):
            getattr(node(), node.FUNCTION)(new, old, old.with_lora(), *prompts, 1.0, 0.0)
    broken = old.with_lora()
    broken.patch = float("nan")
    with pytest.raises(RuntimeError, match="NaN"):
        sampled(bridged(node, new, old, broken))
