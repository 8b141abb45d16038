from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridge import drawing
from regraft.base import open_base
from regraft.bridge.delta import DeltaPipeline
from regraft.bridge.guided import Prompted
from regraft.bridge.levels import Levels
from regraft.bridge.x_adapter.files import load_mapper, save_mapper
from regraft.bridge.x_adapter.lesson import BridgeLesson, PairedPictures
from regraft.bridge.x_adapter.mapper import Mapper
from regraft.bridge.x_adapter.pairing import mapper_config
from regraft.bridge.x_adapter.pipeline import BridgePipeline
from regraft.bridge.x_adapter.sampling import Sampling
from regraft.bridge.x_adapter.settings import MapperSettings
from regraft.bridge.x_adapter.training import Averaged, _split, paired_pictures, state_file, train_mapper
from regraft.bridge.x_adapter.variety import varied
from regraft.errors import InputError, Refused
from regraft.runtime import Loaded, applied, room
from regraft.runtime.both import BothModels
from regraft.runtime.latents import Latents
from regraft.runtime.optim import checkpoint_activations
from regraft.training.loop import Look
from verify import tiny

QUICK = MapperSettings(
    levels=2,
    blocks=1,
    pictures=8,
    varied=1,
    steps=6,
    batch=4,
    look=3,
    rate=1e-2,
    held=0.25,
    prompts=("a sun", "a boat"),
)

#: What has the new base draw as its own pipeline does by default.
SAME = {"new_prompt": ["a sun", "a boat"], "new_guidance_scale": None}


def _mapper(old: Loaded, new: Loaded, size: float = 0.3, **settings: Any) -> Mapper:
    """Not trained: what it says is loud noise."""
    mapper = Mapper(mapper_config(old, new, 2, blocks=1, **settings))
    generator = torch.Generator().manual_seed(0)
    for parameter in mapper.parameters():
        parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
    return mapper


def _drawn(pipeline: Any, seeds: tuple[int, ...] = (0, 1), **settings: Any) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    prompts = ["a sun", "a boat"][: len(seeds)]
    return pipeline(prompts, num_inference_steps=4, generator=generators, output_type="np", **settings).images


def _alone(model: Loaded, **settings: Any) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    settings = {"output_type": "np", **settings}
    made = model.pipeline(["a sun", "a boat"], num_inference_steps=4, generator=generators, **settings)
    return made.images


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Loaded]:
    place = tmp_path_factory.mktemp("pair")
    return drawing.pipeline(place / "old"), drawing.pipeline(place / "new", drift=0.3)


def test_with_strength_0_it_is_the_new_base(pair: tuple[Loaded, Loaded]) -> None:
    bridge = BridgePipeline(*pair, _mapper(*pair))
    assert np.allclose(_drawn(bridge, start=1.0, strength=0, **SAME), _alone(pair[1]), atol=1e-4)
    assert np.abs(_drawn(bridge, start=1.0) - _alone(pair[1])).max() > 0.01


def test_a_mapper_that_says_nothing_leaves_the_new_base_as_it_is(pair: tuple[Loaded, Loaded]) -> None:
    bridge = BridgePipeline(*pair, Mapper(mapper_config(*pair)))
    for reading in ("plain", "plugged", "drawing"):
        assert np.allclose(_drawn(bridge, start=1.0, reading=reading, **SAME), _alone(pair[1]), atol=1e-4)


def test_other_samplers_and_predictions_are_stepped_as_their_pipelines_step_them(
    pair: tuple[Loaded, Loaded], tmp_path: Path
) -> None:
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

    models = [
        drawing.pipeline(tmp_path / "dpm", scheduler=DPMSolverMultistepScheduler),
        drawing.pipeline(tmp_path / "euler", scheduler=EulerDiscreteScheduler),
        drawing.flow(tmp_path / "sd3"),
    ]
    for new in models:
        bridge = BridgePipeline(pair[0], new, Mapper(mapper_config(pair[0], new, 2)))
        assert np.allclose(_drawn(bridge, start=1.0, **SAME), _alone(new), atol=2e-3), new.name
        assert np.isfinite(_drawn(BridgePipeline(pair[0], new, _mapper(pair[0], new)), start=0.7)).all()
    back = BridgePipeline(models[2], pair[1], Mapper(mapper_config(models[2], pair[1], 2)))
    assert np.allclose(_drawn(back, start=1.0, **SAME), _alone(pair[1]), atol=1e-4)


def test_transformers_are_bridged_to_transformers_of_other_patches(tmp_path: Path) -> None:
    old, new = drawing.flow(tmp_path / "old"), drawing.flow(tmp_path / "new", seed=1, patch=2)
    config = mapper_config(old, new, 2)
    assert [(level.old, level.new) for level in config.levels] == [
        (f"transformer_blocks.{i}", f"transformer_blocks.{i}") for i in (0, 1)
    ]
    alone = _alone(new)
    assert np.allclose(_drawn(BridgePipeline(old, new, Mapper(config)), start=1.0, **SAME), alone, atol=2e-3)
    for first, second in ((old, new), (new, old)):
        bridge = BridgePipeline(first, second, _mapper(first, second))
        before = _drawn(bridge, start=0.7)
        assert np.isfinite(before).all()
        bridge.load_lora_weights(tiny.lora({"transformer": first.main}, ("to_v", "to_q"), size=1.0))
        assert np.abs(_drawn(bridge, start=0.7) - before).max() > 1e-3


def test_a_mapper_is_trained_between_transformers(tmp_path: Path) -> None:
    old, new = (
        open_base(drawing.flow_folder(tmp_path / name, seed=seed, patch=patch))
        for name, seed, patch in (("old", 0, 1), ("new", 1, 2))
    )
    report = train_mapper(old, new, tmp_path / "m.safetensors", settings=replace(QUICK, steps=3, look=3, pictures=4))
    assert [level.new for level in report.levels] == ["transformer_blocks.0", "transformer_blocks.1"]
    assert report.looks[-1].held is not None
    bridge = BridgePipeline.from_pretrained(old.path, new.path, tmp_path / "m.safetensors")
    assert all(bool(level.out.weight.any()) for level in bridge.mapper.levels)
    assert np.isfinite(_drawn(bridge)).all()


def test_the_old_base_draws_what_its_own_sampler_draws(
    pair: tuple[Loaded, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new base's levels are the old one's here, so that its steps are those of its pipeline's DDIM."""
    seen: list[torch.Tensor] = []
    alone = Sampling._alone
    monkeypatch.setattr(
        Sampling, "_alone", lambda self, *given: seen.append(alone(self, *given)[1]) or (seen[-1], seen[-1])
    )
    bridge = BridgePipeline(*pair, Mapper(mapper_config(*pair)))
    for adapter in (None, tiny.lora({"unet": pair[0].main}, ("to_v",), size=1.0)):
        if adapter is not None:
            bridge.load_lora_weights(adapter)
        _drawn(bridge)
        with applied(pair[0].components, adapter):
            own = _alone(pair[0], output_type="latent")
        assert torch.allclose(seen[-1], torch.as_tensor(own), atol=1e-3)
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)


def test_the_first_picture_of_the_new_base_is_the_old_ones_under_noise(
    pair: tuple[Loaded, Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import EulerDiscreteScheduler

    for new in (
        pair[1],
        drawing.pipeline(tmp_path / "euler", scheduler=EulerDiscreteScheduler),
        drawing.flow(tmp_path / "f"),
    ):
        begun: list[Any] = []
        begin = Sampling._begin

        def keep(self: Any, picture: Any, times: Any, alone: int, begin: Any = begin, begun: Any = begun) -> Any:
            state = begin(self, picture, times, alone)
            scheduler = copy.deepcopy(self.scheduler)
            scaled = getattr(scheduler, "scale_model_input", lambda sample, time: sample)(state, times[alone])
            begun.append((self, picture, times[alone], scaled))
            return state

        monkeypatch.setattr(Sampling, "_begin", keep)
        _drawn(BridgePipeline(pair[0], new, Mapper(mapper_config(pair[0], new, 2))), start=0.6)
        run, picture, time, scaled = begun[0]
        assert float(time) <= 0.6 * 1000
        size = [scaled.shape[2] * new.pipeline.vae_scale_factor] * 2
        there = Latents(new).encode(torch.nn.functional.interpolate(picture, size, mode="bilinear", antialias=True))
        alpha, sigma = run.levels[1].mix(run.levels[1].ratio(float(time)))
        assert torch.allclose(scaled, alpha * there + sigma * run.new_noise, atol=1e-2)


def test_a_lora_on_the_old_base_is_heard_and_can_be_taken_off(pair: tuple[Loaded, Loaded], tmp_path: Path) -> None:
    bridge = BridgePipeline(*pair, _mapper(*pair))
    before = _drawn(bridge)
    tiny.lora({"unet": pair[0].main}, ("to_v",), size=1.0).save(tmp_path / "lora.safetensors", format="diffusers")
    bridge.load_lora_weights(tmp_path / "lora.safetensors")
    assert np.abs(_drawn(bridge) - before).max() > 0.01
    with pytest.raises(InputError, match="another adapter is at work"):
        bridge.load_lora_weights(tmp_path / "lora.safetensors")
    bridge.unload_lora_weights()
    assert np.array_equal(_drawn(bridge), before)


def test_the_reader_hears_of_plug_ins_only_where_it_is_to(pair: tuple[Loaded, Loaded]) -> None:
    """An old picture that is the same with and without the LoRA: only a reader that has the LoRA tells them apart."""
    bridge = BridgePipeline(*pair, _mapper(*pair))
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    found: dict[tuple[str, bool], Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampling, "_alone", lambda self, ratios, steps: (clean, clean))
        for adapter in (None, tiny.lora({"unet": pair[0].main}, ("to_v",), size=1.0)):
            if adapter is not None:
                bridge.load_lora_weights(adapter)
            for reading in ("plain", "plugged"):
                found[reading, adapter is not None] = _drawn(bridge, reading=reading)
    assert np.array_equal(found["plain", False], found["plain", True])
    assert np.array_equal(found["plain", False], found["plugged", False])
    assert np.abs(found["plugged", True] - found["plugged", False]).max() > 0.01
    with pytest.raises(InputError, match="no such reading: aloud"):
        _drawn(bridge, reading="aloud")


def test_guidance_prompts_and_sizes_are_each_sides_own(pair: tuple[Loaded, Loaded]) -> None:
    bridge = BridgePipeline(*pair, _mapper(*pair))
    plain = _drawn(bridge)
    for settings in (
        {"new_prompt": "a boat"}, {"new_guidance_scale": 3.0, "new_prompt": "a boat"}, {"guidance_scale": 1.0},
        {"negative_prompt": "a boat"}, {"lead": 0.1}, {"reading": "drawing"}, {"strength": lambda done: 1 - done},
    ):  # fmt: skip
        assert np.abs(_drawn(bridge, **settings) - plain).max() > 1e-4, settings
    factor = pair[1].pipeline.vae_scale_factor
    wide = _drawn(bridge, height=8 * factor, width=16 * factor)
    assert wide.shape[1:3] == (8 * factor, 16 * factor)
    with pytest.raises(InputError, match=f"multiples of {factor}"):
        _drawn(bridge, height=8 * factor + 1)


def test_a_base_without_the_mappers_blocks_is_refused(pair: tuple[Loaded, Loaded], tmp_path: Path) -> None:
    other = drawing.flow(tmp_path / "sd3")
    with pytest.raises(InputError, match=r"has no block up_blocks"):
        BridgePipeline(pair[0], other, Mapper(mapper_config(*pair)))


def test_training_lowers_the_loss_and_leaves_both_bases_as_they_are(tmp_path: Path) -> None:
    old, new = (open_base(tiny.pipeline(tmp_path / name, drift=drift)) for name, drift in (("old", 0.0), ("new", 0.3)))
    prints = [str(base.prints) for base in (old, new)]
    looks: list[Look] = []
    settings = replace(QUICK, steps=60, look=60, batch=8)
    report = train_mapper(old, new, tmp_path / "m.safetensors", settings=settings, heard=looks.append)
    assert report.looks[-1].held is not None
    assert report.looks[0].held is not None
    assert report.looks[-1].held < report.looks[0].held
    assert [look.step for look in looks] == [0, 60]
    assert [(level.old, level.new) for level in report.levels] == [
        ("up_blocks.0", "up_blocks.0"),
        ("up_blocks.1", "up_blocks.1"),
    ]
    assert prints == [str(open_base(base.path).prints) for base in (old, new)]
    mapper = load_mapper(tmp_path / "m.safetensors", old, new)
    bridge = BridgePipeline.from_pretrained(old.path, new.path, tmp_path / "m.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(bridge.mapper.parameters(), mapper.parameters(), strict=True))
    assert np.abs(_drawn(bridge, start=1.0) - _alone(bridge.new)).max() > 1e-3


def test_a_stopped_training_goes_on_to_the_same_mapper(tmp_path: Path) -> None:
    old, new = (open_base(tiny.pipeline(tmp_path / name, drift=drift)) for name, drift in (("old", 0.0), ("new", 0.3)))
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    train_mapper(old, new, whole, settings=QUICK)

    def stop(look: Look) -> None:
        if look.step == 3:
            raise KeyboardInterrupt

    state = state_file(old, new, None, QUICK)
    with pytest.raises(KeyboardInterrupt):
        train_mapper(old, new, parts, settings=QUICK, heard=stop)
    assert state.is_file()
    assert not parts.exists()
    report = train_mapper(old, new, parts, settings=QUICK)
    assert [look.step for look in report.looks] == [0, 3, 6]
    assert not state.is_file()
    assert not list(state.parent.glob("*.pt"))
    first, second = (load_mapper(file).state_dict() for file in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_kept_is_the_mean_of_the_steps(pair: tuple[Loaded, Loaded]) -> None:
    mapper = Mapper(mapper_config(*pair, 2, blocks=1))
    learner = Averaged(mapper, 0.5)
    value = next(iter(mapper.parameters()))
    start = value.detach().clone()
    seen, mean = [], start
    for step in range(4):
        learner.train()
        value.data.add_(1.0)
        learner.stepped()
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * (start + step + 1)
        learner.eval()
        seen.append(value.detach().clone())
        assert torch.allclose(seen[-1], mean)
    learner.train()
    assert torch.allclose(value, start + 4)


def test_pictures_of_a_folder_are_paired_with_their_captions(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (80 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    old, new = (open_base(tiny.pipeline(tmp_path / name)) for name in ("old", "new"))
    models = BothModels.load(old, new)
    pictures, made = paired_pictures(models, folder, replace(QUICK, varied=2), None, lambda *_: None)
    assert pictures.captions == ("picture 0", "picture 1", "picture 2") * 3
    assert pictures.old.shape == pictures.new.shape == (9, 4, 8, 8)
    # One autoencoder, one size: what either base reads is the same, version by version.
    assert torch.allclose(pictures.old, pictures.new, atol=1e-5)
    assert not torch.allclose(pictures.new[:3], pictures.new[3:6], atol=1e-2)
    assert str(folder) in made
    with pytest.raises(InputError, match="no such folder"):
        state_file(old, new, tmp_path / "gone", QUICK)


def test_other_colours_keep_what_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = -torch.ones(3, 16, 16)
    picture[:, 4:12, 4:12] = torch.tensor([0.9, 0.7, 0.8])[:, None, None]
    pictures = picture.expand(12, -1, -1, -1)
    made = varied(pictures, generator)
    assert made.shape == pictures.shape
    assert float(made.abs().max()) <= 1
    inside, outside = made[:, :, 5:11, 5:11], made[:, :, :3]
    # The shape is still told from the ground, each is flat, and no two pictures have one palette.
    assert float((inside.mean((2, 3)) - outside.mean((2, 3))).abs().amax(1).min()) > 0.05
    assert float(inside.std((2, 3)).max()) < 0.01
    palettes = torch.cat([inside.mean((2, 3)), outside.mean((2, 3))], dim=1)
    apart = torch.cdist(palettes, palettes) + 10 * torch.eye(12)
    assert float(apart.min()) > 0.05
    assert torch.equal(varied(pictures, torch.Generator().manual_seed(0)), made)


def test_the_file_of_a_pair_opens_for_that_pair_alone(tmp_path: Path) -> None:
    folders = [tiny.pipeline(tmp_path / name, seed=i) for i, name in enumerate(("old", "new", "other"))]
    old, new, other = (open_base(folder) for folder in folders)
    models = BothModels.load(old, new)
    save_mapper(_mapper(models.old, models.new), tmp_path / "m.safetensors", old, new)
    BridgePipeline.from_pretrained(old.path, new.path, tmp_path / "m.safetensors")
    with pytest.raises(Refused, match="another new base"):
        BridgePipeline.from_pretrained(old.path, other.path, tmp_path / "m.safetensors")


@pytest.mark.parametrize("start", [1.0, 0.8, 0.45, 0.01])
@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
     "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler"],
)  # fmt: skip
def test_whoever_knows_the_picture_arrives_at_it_from_any_start(
    name: str, start: float, pair: tuple[Loaded, Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sampler ends at what the denoiser says is the picture, where it says the same at every step."""
    import diffusers

    new = drawing.pipeline(tmp_path / "new", drift=0.3, scheduler=getattr(diffusers, name))
    if name == "PNDMScheduler":
        # As Stable Diffusion has it; with its Runge-Kutta steps it can't be joined midway.
        bridge = BridgePipeline(pair[0], new, Mapper(mapper_config(pair[0], new)))
        if start < 0.5:
            with pytest.raises(InputError, match="begins with steps of its own"):
                _drawn(bridge, start=start)
        new.pipeline.scheduler.register_to_config(skip_prk_steps=True)
    levels, picture = Levels(new), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    predict = Prompted.predict

    def knowing(self: Prompted, z: torch.Tensor, time: float) -> torch.Tensor:
        if self.model is not new:
            return predict(self, z, time)
        alpha, sigma = levels.mix(levels.ratio(time))
        return (z - alpha * picture) / sigma

    monkeypatch.setattr(Prompted, "predict", knowing)
    bridge = BridgePipeline(pair[0], new, Mapper(mapper_config(pair[0], new)))
    made = bridge(
        ["a sun", "a boat"], num_inference_steps=20, generator=torch.Generator().manual_seed(0), output_type="latent",
        start=start, strength=0.0,
    ).images  # fmt: skip
    assert float((made - picture).abs().mean()) < 0.1


def test_samplers_that_draw_noise_at_each_step_follow_the_seed(pair: tuple[Loaded, Loaded], tmp_path: Path) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    new = drawing.pipeline(tmp_path / "new", drift=0.3, scheduler=EulerAncestralDiscreteScheduler)
    bridge = BridgePipeline(pair[0], new, Mapper(mapper_config(pair[0], new)))
    first, second = (_drawn(bridge, start=1.0, **SAME) for _ in range(2))
    assert np.array_equal(first, second)
    assert np.allclose(first, _alone(new), atol=2e-3)


def test_noise_is_what_diffusers_draws(pair: tuple[Loaded, Loaded]) -> None:
    bridge = BridgePipeline(*pair, Mapper(mapper_config(*pair)))
    prompts, settings = ["a sun", "a boat"], {"num_inference_steps": 3, "output_type": "np"}
    same = {"new_prompt": prompts, "new_guidance_scale": None}
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    for _ in range(2):
        # One generator for all, and once more: it has moved on.
        made = bridge(prompts, generator=one, start=1.0, **same, **settings).images
        assert np.allclose(made, pair[1].pipeline(prompts, generator=other, **settings).images, atol=1e-4)
    torch.manual_seed(2)
    drawn = [bridge(prompts, start=1.0, **settings).images for _ in range(2)]
    torch.manual_seed(2)
    assert np.abs(drawn[0] - drawn[1]).max() > 0.01


@pytest.mark.slow
def test_half_precision_trains_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (open_base(tiny.pipeline(tmp_path / name, drift=drift)) for name, drift in (("old", 0.0), ("new", 0.3)))
    for precision in ("no", "bf16"):
        file = tmp_path / f"{precision}.safetensors"
        settings = replace(QUICK, steps=2, look=2, dtype="bfloat16", precision=precision)  # type: ignore[arg-type]
        report = train_mapper(old, new, file, settings=settings, strip=tmp_path / f"{precision}.png")
        assert report.looks[-1].held == report.looks[-1].held
        assert (tmp_path / f"{precision}.png").is_file()
    # Half the room is enough for half precision, and only for that.
    monkeypatch.setattr(room, "free_bytes", lambda device: int(0.8 * room.needed([old, new])))
    with pytest.raises(InputError, match="free on cpu"):
        BridgePipeline.from_pretrained(old.path, new.path, file)
    bridge = BridgePipeline.from_pretrained(old.path, new.path, file, dtype="bfloat16")
    monkeypatch.undo()
    parts = (bridge.old.main, bridge.old.components["text_encoder"], bridge.new.main, bridge.new.pipeline.vae)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert np.isfinite(_drawn(bridge)).all()
    # Eight bits of a number are left; another noise would be another picture.
    alone = _alone(bridge.new)
    assert np.abs(_drawn(bridge, start=1.0, strength=0, **SAME) - alone).mean() < 0.02
    delta = DeltaPipeline(bridge.old, bridge.new, tiny.lora({"unet": bridge.old.main}, ("to_v",), size=1.0))
    assert np.abs(_drawn(delta) - alone).max() > 0.01


def test_an_autoencoder_too_wide_for_float16_is_run_in_float32(pair: tuple[Loaded, Loaded]) -> None:
    space, vae = Latents(copy.deepcopy(pair[0])), copy.deepcopy(pair[0].pipeline.vae)
    space.model.pipeline.vae = vae
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted = space.encode(picture), space.decode(space.encode(picture))
    vae.to(torch.float16)
    seen: list[torch.dtype] = []
    for place in (vae.encoder, vae.decoder):
        place.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    found = space.encode(picture), space.decode(wanted[0])
    assert seen == [torch.float32] * 2
    assert vae.dtype == torch.float16
    assert all(torch.allclose(a, b, atol=0.02) for a, b in zip(found, wanted, strict=True))
    vae.register_to_config(force_upcast=False)
    space.encode(picture)
    assert seen[-1] == torch.float16


def test_activations_that_are_computed_twice_give_the_same_gradient(tmp_path: Path) -> None:
    old = drawing.pipeline(tmp_path / "old")
    for new in (drawing.pipeline(tmp_path / "new", drift=0.3), drawing.flow(tmp_path / "sd3")):
        generator = torch.Generator().manual_seed(0)
        clean = torch.randn(4, 4, 8, 8, generator=generator)
        pictures = PairedPictures(clean, clean, ("a sun",) * 4)
        mapper = _mapper(old, new)
        lesson = BridgeLesson(old, new, mapper, pictures, range(4), [])
        found = []
        for twice in (False, True):
            if twice:
                new.main.requires_grad_(True)
                checkpoint_activations(new)
            loss = lesson.loss(new, [0, 1], torch.Generator().manual_seed(1))
            loss.backward()
            found.append([p.grad.clone() for p in mapper.parameters()])
            mapper.zero_grad()
        lesson.close()
        new.main.eval()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
        assert not any(module._forward_hooks for module in new.main.modules())


def test_all_versions_of_a_picture_are_learnt_from_or_none(tmp_path: Path) -> None:
    latents = torch.zeros(12, 1, 1, 1)
    pictures = PairedPictures(latents, latents, tuple("abcd") * 3)
    fit, apart = _split(pictures, replace(QUICK, varied=2, held=0.25))
    named = [{pictures.captions[i] for i in part} for part in (fit, apart)]
    assert (len(fit), len(apart)) == (9, 3)
    assert named[0] & named[1] == set()
    with pytest.raises(InputError, match="held out"):
        _split(pictures, replace(QUICK, varied=2, held=1.0))


def test_a_start_that_is_none_and_a_mapper_of_other_channels_are_told(pair: tuple[Loaded, Loaded]) -> None:
    config = mapper_config(*pair)
    with pytest.raises(InputError, match=r"start 0 is out of range"):
        _drawn(BridgePipeline(*pair, Mapper(config)), start=0)
    wide = replace(config, levels=(replace(config.levels[0], outer=99), *config.levels[1:]))
    with pytest.raises(InputError, match=r"and the mapper is for 99"):
        BridgePipeline(*pair, Mapper(wide))
    with pytest.raises(InputError, match="two levels join one block"):
        replace(config, levels=(config.levels[0], config.levels[0]))
    with pytest.raises(InputError, match="at least one level"):
        replace(config, levels=())


def test_bases_that_take_turns_draw_the_same(pair: tuple[Loaded, Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing moves, but who is asked for is seen: neither base runs in the other's turn."""
    mapper, turn = _mapper(*pair), [""]
    adapter = tiny.lora({"unet": pair[0].main}, ("to_v",), size=1.0)
    bridges = [BridgePipeline(*pair, mapper), BridgePipeline(*pair, mapper, turns="cpu")]
    predict, move = Prompted.predict, BridgePipeline._turn
    seen: list[tuple[bool, str]] = []

    def noted(self: Prompted, z: torch.Tensor, time: float) -> torch.Tensor:
        seen.append((self.model is pair[1], turn[0]))
        return predict(self, z, time)

    def moved(self: BridgePipeline, side: Any) -> None:
        turn[0] = side
        move(self, side)

    monkeypatch.setattr(Prompted, "predict", noted)
    monkeypatch.setattr(BridgePipeline, "_turn", moved)
    for bridge in bridges:
        bridge.load_lora_weights(adapter)
    for reading in ("plain", "plugged", "drawing"):
        made = []
        for bridge in bridges:
            seen.clear()
            made.append(_drawn(bridge, reading=reading))
        assert np.allclose(made[0], made[1], atol=1e-5)
        assert {("new" if new else "old") == side for new, side in seen} == {True}
