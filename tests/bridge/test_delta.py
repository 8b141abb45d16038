from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ImagePipelineOutput,
)

from bridge import drawing
from regraft.adapter import Adapter
from regraft.bridge.delta import DeltaPipeline
from regraft.bridge.latent_spaces import SharedLatents, same_latents
from regraft.bridge.levels import Levels
from regraft.errors import InputError
from regraft.runtime import Loaded, applied, load_model
from verify import tiny

PROMPTS = ["a boat", "the sun"]
Images = np.ndarray[Any, Any]


def lora(model: Loaded) -> Adapter:
    targets = ("to_v", "to_out.0", "v_proj")
    return tiny.lora(dict(model.components), targets, size=0.5)


def settings(**more: Any) -> dict[str, Any]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    return {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": generators, "output_type": "np", **more}


def plain(model: Loaded, **more: Any) -> Images:
    return model.pipeline(prompt=PROMPTS, **settings(**more)).images


def bridged(bridge: DeltaPipeline, **more: Any) -> Images:
    made = bridge(PROMPTS, **settings(**more))
    assert isinstance(made, ImagePipelineOutput)
    return made.images


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Loaded, Loaded]:
    """Two bases of one autoencoder."""
    return drawing.pipeline(folder / "sd"), drawing.pipeline(folder / "sd2", drift=0.3, prediction="v_prediction")


def test_strength_0_is_the_new_base_and_runs_no_other(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = pair
    bridge = DeltaPipeline(old, new, lora(old))
    monkeypatch.setattr(old.main, "forward", None)
    assert np.array_equal(bridged(bridge, strength=0.0), plain(new))


MAKERS: list[tuple[str, Callable[[Path], Loaded]]] = [
    ("ddim", drawing.pipeline),
    ("v", lambda path: drawing.pipeline(path, prediction="v_prediction")),
    ("euler", lambda path: drawing.pipeline(path, scheduler=EulerDiscreteScheduler)),
    ("dpm", lambda path: drawing.pipeline(path, scheduler=DPMSolverMultistepScheduler)),
    ("heun", lambda path: drawing.pipeline(path, scheduler=HeunDiscreteScheduler)),
    ("flow", drawing.flow),
]


@pytest.mark.parametrize(("name", "make"), MAKERS, ids=[name for name, _ in MAKERS])
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_between_equal_bases_strength_1_is_the_old_base_with_the_adapter(name, make, guidance, tmp_path: Path) -> None:
    old, new = make(tmp_path), make(tmp_path)
    adapter = lora(old)
    found = bridged(DeltaPipeline(old, new, adapter), guidance_scale=guidance)
    with applied(old.components, adapter):
        expected = plain(old, guidance_scale=guidance)
    assert np.abs(found - expected).max() < 1e-3
    assert np.abs(expected - plain(new, guidance_scale=guidance)).max() > 0.02


def test_the_same_model_may_stand_on_both_sides(pair) -> None:
    old, _ = pair
    adapter = lora(old)
    found = bridged(DeltaPipeline(old, old, adapter))
    with applied(old.components, adapter):
        assert np.abs(found - plain(old)).max() < 1e-3


def test_a_step_costs_the_new_pass_and_two_old_ones(pair) -> None:
    old, new = pair
    bridge = DeltaPipeline(old, new, lora(old))
    calls: dict[str, list[int]] = {"old": [], "adapted": [], "new": []}
    models = {"old": old.main, "adapted": bridge.with_adapter.main, "new": new.main}
    # Behind the pass: one that is left before it, to learn how the model is conditioned, costs nothing.
    hooks = [
        model.register_forward_hook(lambda module, args, output, name=name: calls[name].append(len(output[0])))
        for name, model in models.items()
    ]
    bridged(bridge)
    for hook in hooks:
        hook.remove()
    assert calls == {name: [4] * 4 for name in models}


def test_latents_of_another_scale_and_shift_are_the_same_pictures(tmp_path: Path) -> None:
    """The old base reads x_old = c x_new + d: at the noise level where that is the same noisy picture."""
    old, new = drawing.pipeline(tmp_path), drawing.pipeline(tmp_path, scaling=0.3)
    old.pipeline.vae.register_to_config(shift_factor=0.2)
    assert same_latents(old, new)
    ours, theirs = Levels(old), Levels(new)
    raw, noise, ratio = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), theirs.ratio(300)
    alpha, sigma = theirs.mix(ratio)
    seen: list[tuple[torch.Tensor, float]] = []

    def pair(z: torch.Tensor, time: float) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((z, time))
        return torch.zeros_like(z), torch.ones_like(z)

    u = alpha * 0.3 * raw + sigma * noise
    change = SharedLatents(ours, theirs).change(pair, u, torch.zeros_like(u), ratio, 2.0)
    factor = old.pipeline.vae.config.scaling_factor
    (z, time) = seen[0]
    keeps, spread = ours.mix(ours.ratio(time))
    # The noise on the raw latents is σ / (α · scale) on both sides.
    assert spread / keeps / factor == pytest.approx(sigma / alpha / 0.3, rel=1e-5)
    torch.testing.assert_close(z, keeps * (raw - 0.2) * factor + spread * noise, atol=1e-5, rtol=0)
    # x̂ moved by slope · (1 − 0) in the old latents, and by the factors' quotient of that in the new ones.
    expected = torch.full_like(u, 2.0 * ours.slope(ours.ratio(time)) * 0.3 / factor)
    torch.testing.assert_close(change, expected)


def test_schedules_of_two_lengths_meet_at_one_noise_level(tmp_path: Path) -> None:
    long, short, flow = drawing.pipeline(tmp_path / "a"), drawing.pipeline(tmp_path / "b"), drawing.flow(tmp_path / "f")
    long.pipeline.scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="scaled_linear")
    short.pipeline.scheduler = DDIMScheduler(num_train_timesteps=250, beta_end=0.06)
    for time in (20, 400, 900):
        kept = long.pipeline.scheduler.alphas_cumprod[time]
        ratio = Levels(long).ratio(time)
        assert ratio == pytest.approx(float(((1 - kept) / kept).sqrt()), rel=1e-5)
        found = Levels(short).time(ratio)
        low, high = (float(short.pipeline.scheduler.alphas_cumprod[int(found) + i]) for i in (0, 1))
        assert high <= float(kept) <= low
        assert abs(found - time) > 3
        sigma = Levels(flow).time(ratio) / 1000
        assert sigma / (1 - sigma) == pytest.approx(ratio)
    # Beyond the end of a schedule, its end is meant.
    assert Levels(short).time(1e6) == 249
    assert Levels(long).time(Levels(long).ratio(437)) == 437


def test_a_bridge_between_formats_carries_the_adapter(pair, tmp_path: Path) -> None:
    """One base as noise prediction, and asked in v: the same function of the same states, told otherwise."""
    old = pair[0]
    new = load_model(old.path)
    predict = new.main.forward

    def in_v(sample: torch.Tensor, timestep: torch.Tensor, *args: Any, **more: Any) -> tuple[torch.Tensor]:
        noise = predict(sample, timestep, *args, **more)[0]
        kept = new.pipeline.scheduler.alphas_cumprod[int(timestep)]
        # v = (ε − σ z) / α
        return ((noise - (1 - kept).sqrt() * sample) / kept.sqrt(),)

    new.main.forward = in_v
    new.pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    adapter = lora(old)
    with applied(old.components, adapter):
        expected = plain(old)
    assert np.abs(bridged(DeltaPipeline(old, new, adapter)) - expected).max() < 1e-3


def test_bases_and_adapters_are_loaded_as_diffusers_loads_them(pair, tmp_path: Path) -> None:
    old, new = pair
    adapter = lora(old)
    adapter.save(tmp_path / "lora.safetensors", format="diffusers")
    bridge = DeltaPipeline.from_pretrained(old.path, new.path)
    assert np.abs(bridged(bridge) - plain(new)).max() < 1e-5
    bridge.load_lora_weights(tmp_path / "lora.safetensors")
    made = bridged(bridge)
    assert np.allclose(made, bridged(DeltaPipeline(old, new, adapter)), atol=1e-4)
    assert np.abs(made - plain(new)).max() > 1e-3
    with pytest.raises(InputError, match="another adapter is at work"):
        bridge.load_lora_weights(adapter)
    bridge.unload_lora_weights()
    assert np.abs(bridged(bridge) - plain(new)).max() < 1e-5


def test_a_flow_base_is_bridged_from_a_noise_predicting_one(pair, tmp_path: Path) -> None:
    old, new = pair[0], drawing.flow(tmp_path)
    bridge = DeltaPipeline(old, new, lora(old))
    found, alone = bridged(bridge, strength=0.5), plain(new)
    assert np.isfinite(found).all()
    assert found.shape == alone.shape
    assert np.abs(found - alone).max() > 1e-3


def test_between_other_autoencoders_the_change_goes_through_pixels(tmp_path: Path) -> None:
    old, new = drawing.pipeline(tmp_path / "old"), drawing.pipeline(tmp_path / "new", seed=4)
    adapter = lora(old)
    bridge = DeltaPipeline(old, new, adapter)
    assert not bridge.shared
    assert np.array_equal(bridged(bridge, strength=0.0), plain(new))
    assert np.abs(bridged(bridge) - plain(new)).max() > 1e-3
    # An adapter that does nothing changes nothing, though all of it is run.
    nothing = DeltaPipeline(old, new, tiny.lora(dict(old.components), ("to_v",), size=0.0))
    assert np.abs(bridged(nothing) - plain(new)).max() < 1e-5


def test_strength_may_follow_the_sampling(pair) -> None:
    old, new = pair
    bridge = DeltaPipeline(old, new, lora(old))
    asked: list[float] = []

    def late(done: float) -> float:
        asked.append(done)
        return 1.0 if done >= 0.5 else 0.0

    found = bridged(bridge, strength=late)
    assert asked == [0.0, 0.25, 0.5, 0.75]
    assert not np.array_equal(found, plain(new))
    assert not np.array_equal(found, bridged(bridge))
    assert np.array_equal(bridged(bridge, strength=lambda done: 1.0), bridged(bridge))


def test_what_no_bridge_can_be_made_of_is_told_in_one_line(pair, tmp_path: Path) -> None:
    old, new = pair
    unknown = drawing.pipeline(tmp_path / "edm")
    unknown.pipeline.scheduler = EDMEulerScheduler()
    other = load_model(old.path)
    other.pipeline.vae.register_to_config(latents_mean=[0.0])
    cases: list[tuple[Loaded, Loaded, Adapter, str]] = [
        (old, load_model(tiny.llama(tmp_path / "llama")), lora(old), "is no diffusion model"),
        (old, load_model(tiny.unet(tmp_path / "unet")), lora(old), "makes no pictures"),
        (old, unknown, lora(old), "how much noise"),
        (other, new, lora(old), "could be converted"),
        (old, new, Adapter({}, format="kohya"), "changes no weights"),
    ]
    for ours, theirs, adapter, words in cases:
        with pytest.raises(InputError, match=words) as told:
            DeltaPipeline(ours, theirs, adapter)
        assert "\n" not in str(told.value)


def test_an_autoencoder_in_half_precision_is_the_same(tmp_path: Path) -> None:
    old, new = drawing.pipeline(tmp_path / "old"), drawing.pipeline(tmp_path / "new")
    for parameter in old.pipeline.vae.parameters():
        # As real ones have them: some values lie below what half precision holds.
        parameter.data.mul_(0.02).view(-1)[0] = 1e-6
    new.pipeline.vae.load_state_dict(old.pipeline.vae.state_dict())
    new.pipeline.vae.to(torch.float16)
    assert same_latents(old, new)
    new.pipeline.vae.encoder.conv_in.weight.data.mul_(1.1)
    assert not same_latents(old, new)


def test_the_old_base_sees_a_wide_picture_wide(tmp_path: Path) -> None:
    old, new = drawing.pipeline(tmp_path / "old"), drawing.pipeline(tmp_path / "new", seed=3)
    new.pipeline.vae.encoder.conv_in.weight.data.mul_(1.5)
    bridge = DeltaPipeline(old, new, tiny.lora({"unet": old.main}, ("to_v",), size=1.0))
    assert not bridge.shared
    seen: list[tuple[int, ...]] = []
    hook = old.main.register_forward_pre_hook(
        lambda module, args, given: seen.append(tuple(given["sample"].shape[2:]) if not args else (8, 8)),
        with_kwargs=True,
    )
    factor = new.pipeline.vae_scale_factor
    bridge("a boat", num_inference_steps=1, height=8 * factor, width=32 * factor, output_type="np")
    hook.remove()
    assert (8, 16) in seen


def test_a_method_that_stood_there_before_stands_there_again(pair) -> None:
    old, new = pair
    mine = new.pipeline.scheduler.step
    new.pipeline.scheduler.step = mine
    bridge = DeltaPipeline(old, new, tiny.lora({"unet": old.main}, ("to_v",), size=1.0))
    bridge("a boat", num_inference_steps=1, output_type="np")
    assert vars(new.pipeline.scheduler)["step"] is mine
    del new.pipeline.scheduler.step


def test_clocks_and_signs_of_their_own_are_refused(tmp_path: Path) -> None:
    from types import SimpleNamespace

    model = drawing.pipeline(tmp_path / "any", scheduler=EulerDiscreteScheduler)
    model.pipeline.scheduler.register_to_config(timestep_type="continuous")
    with pytest.raises(InputError, match="does not tell how much noise"):
        Levels(model)

    class Lumina2Pipeline(SimpleNamespace):
        pass

    turned = replace(model, pipeline=Lumina2Pipeline(scheduler=model.pipeline.scheduler))
    with pytest.raises(InputError, match="turns its predictions about"):
        Levels(turned)
