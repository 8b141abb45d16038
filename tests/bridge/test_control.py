from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

from bridge import drawing
from regraft.bridge.control import Control, controlled, load_controlnet
from regraft.bridge.delta import DeltaPipeline
from regraft.bridge.x_adapter.mapper import Mapper
from regraft.bridge.x_adapter.pairing import mapper_config
from regraft.bridge.x_adapter.pipeline import BridgePipeline
from regraft.errors import InputError
from regraft.runtime import Loaded


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Loaded]:
    place = tmp_path_factory.mktemp("pair")
    return drawing.pipeline(place / "old"), drawing.pipeline(place / "new", drift=0.3)


@pytest.fixture(scope="module")
def net(pair: tuple[Loaded, Loaded]) -> Any:
    """Not trained, and loud: its zero convolutions are drawn anew."""
    made = ControlNetModel.from_unet(pair[0].main, conditioning_embedding_out_channels=(4, 8))
    torch.manual_seed(5)
    for block in (*made.controlnet_down_blocks, made.controlnet_mid_block, made.controlnet_cond_embedding.conv_out):
        for parameter in block.parameters():
            parameter.data.normal_(0, 0.5)
    return made.eval().requires_grad_(False)


def _image(seed: int = 0) -> Any:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (0, 1)]


def test_a_controlled_pipeline_draws_what_diffusers_own_draws(pair: tuple[Loaded, Loaded], net: Any) -> None:
    old, image = pair[0], _image()
    parts = {name: getattr(old.pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    theirs = StableDiffusionControlNetPipeline(
        **parts, controlnet=net, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "output_type": "np", "generator": _generators()}
    prompts, scale = ["a sun", "a boat"], 0.7
    wanted = theirs(prompts, [image] * 2, controlnet_conditioning_scale=scale, height=16, width=16, **settings).images
    control = Control.of(net, old, image, 2, (8, 8), scale)
    plain = old.pipeline(prompts, **{**settings, "generator": _generators()}).images
    with controlled(old.main, control):
        made = old.pipeline(prompts, **{**settings, "generator": _generators()}).images
    assert np.allclose(made, wanted, atol=1e-4)
    assert np.abs(made - plain).max() > 0.01
    again = old.pipeline(prompts, **{**settings, "generator": _generators()}).images
    assert np.array_equal(again, plain)


def test_a_controlnet_is_heard_through_both_bridges(pair: tuple[Loaded, Loaded], net: Any) -> None:
    mapper = Mapper(mapper_config(*pair, 2, blocks=1))
    for parameter in mapper.parameters():
        parameter.data.normal_(0, 0.3)
    for bridge in (BridgePipeline(*pair, mapper, net), DeltaPipeline(*pair, None, net)):

        def draw(bridge: Any = bridge, **settings: Any) -> Any:
            return bridge(
                ["a sun", "a boat"], num_inference_steps=3, generator=_generators(), output_type="np", **settings
            ).images

        first, second = draw(image=_image(0)), draw(image=_image(1))
        assert np.abs(first - second).max() > 1e-3
        both = draw(image=[_image(0), _image(1)])
        assert np.allclose(both[0], first[0], atol=1e-5)
        assert np.allclose(both[1], second[1], atol=1e-5)
        off = draw(image=_image(0), controlnet_conditioning_scale=0.0)
        assert np.abs(off - first).max() > 1e-3
        with pytest.raises(InputError, match="has no image"):
            draw()
    # What a ControlNet of scale 0 adds is nothing.
    off = DeltaPipeline(*pair, None, net)("a sun", image=_image(), num_inference_steps=3, output_type="np",
                                          generator=_generators()[0], controlnet_conditioning_scale=0.0)  # fmt: skip
    new = pair[1].pipeline("a sun", num_inference_steps=3, output_type="np", generator=_generators()[0])
    assert np.allclose(off.images, new.images, atol=1e-4)


def test_a_controlnet_of_another_family_is_refused(pair: tuple[Loaded, Loaded], net: Any, tmp_path: Path) -> None:
    net.save_pretrained(tmp_path / "net")
    assert isinstance(load_controlnet(tmp_path / "net", pair[0]), ControlNetModel)
    wider = ControlNetModel(
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32,
        norm_num_groups=4, attention_head_dim=2, conditioning_embedding_out_channels=(4, 8),
    )  # fmt: skip
    wider.save_pretrained(tmp_path / "wider")
    for folder, model, words in (
        (tmp_path / "wider", pair[0], "is for another denoiser"),
        (tmp_path / "net", drawing.flow(tmp_path / "sd3"), "takes no ControlNet"),
        (tmp_path / "gone", pair[0], "no config.json"),
        (Path(pair[0].path) / "unet", pair[0], "is no ControlNet that is known here, but UNet2DConditionModel"),
    ):
        with pytest.raises(InputError, match=words):
            load_controlnet(folder, model)
    smaller = ControlNetModel.from_unet(pair[0].main)
    with pytest.raises(InputError, match="shrinks its image 8 times"):
        Control.of(smaller, pair[0], _image(), 1, (8, 8), 1.0)
    bridge = DeltaPipeline(*pair, tiny_lora(pair[0]))
    with pytest.raises(InputError, match="no ControlNet to show"):
        bridge("a sun", image=_image(), num_inference_steps=1)
    with pytest.raises(InputError, match="3 images for 2 prompts"):
        Control.of(net, pair[0], [_image()] * 3, 2, (8, 8), 1.0)


def tiny_lora(model: Loaded) -> Any:
    from verify import tiny

    return tiny.lora({"unet": model.main}, ("to_v",))
