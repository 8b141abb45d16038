from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from bridge import drawing
from regraft.base import open_base
from regraft.bridge.x_adapter import files
from regraft.bridge.x_adapter.mapper import Level, Mapper, MapperConfig
from regraft.bridge.x_adapter.pairing import _level, mapper_config, paired
from regraft.bridge.x_adapter.places import changed, heard, places_in, places_of
from regraft.errors import InputError, Refused
from verify import tiny

LEVELS = (Level("a", "b", 4, 6), Level("c", "d", 6, 6), Level("e", "f", 4, 8, grows=True))


def _filled(mapper: Mapper, seed: int = 0) -> Mapper:
    """Every number is drawn anew: the last convolutions don't stay at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in mapper.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return mapper.eval()


def _sd15() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        main = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        call = {
            "sample": torch.zeros(1, 4, 64, 64),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.zeros(1, 77, 768),
        }
    return places_in(main, call)


def _sdxl() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        main = UNet2DConditionModel(
            sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        call = {
            "sample": torch.zeros(1, 4, 128, 128), "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.zeros(1, 77, 2048),
            "added_cond_kwargs": {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)},
        }  # fmt: skip
    return places_in(main, call)


def test_the_levels_of_sd15_and_sdxl_are_those_of_the_released_x_adapter(tmp_path: Path) -> None:
    pairs = paired(_sd15(), _sdxl(), 3, drawing.pipeline(tmp_path / "any"))
    found = [(old.module, new.module, old.channels, new.channels, new.cells // old.cells) for old, new in pairs]
    # showlab/X-Adapter: Adapter_XL's defaults, and where unet_adapter.py adds them.
    assert found == [
        ("up_blocks.1", "mid_block", 1280, 1280, 1),
        ("up_blocks.2", "up_blocks.0", 640, 1280, 1),
        ("up_blocks.3", "up_blocks.1", 320, 640, 2),
    ]
    assert tuple(_level(old, new) for old, new in pairs) == files.RELEASED.levels


def test_the_released_mapper_has_as_many_numbers_as_its_file() -> None:
    with torch.device("meta"):
        mapper = Mapper(files.RELEASED)
    assert sum(parameter.numel() for parameter in mapper.parameters()) == 212_914_240


def test_a_new_mapper_changes_nothing() -> None:
    for fusion in ("add", "spade"):
        mapper = Mapper(MapperConfig(LEVELS, fusion=fusion, timed=True))
        hidden = torch.randn(2, 6, 5, 5)
        noise = torch.tensor([[0.3, 0.1], [0.9, 0.5]])
        assert torch.equal(mapper(0, torch.randn(2, 4, 3, 3), hidden, noise), hidden)
        assert not torch.equal(_filled(mapper)(0, torch.randn(2, 4, 3, 3), hidden, noise), hidden)


def test_fusions_are_what_the_paper_calls_them() -> None:
    x, hidden = torch.randn(1, 4, 4, 4), torch.randn(1, 6, 4, 4)
    add = _filled(Mapper(MapperConfig(LEVELS)))
    said = add(0, x, hidden, None) - hidden
    assert torch.allclose(add(0, x, hidden, None, 0.25), hidden + 0.25 * said, atol=1e-5)
    guided = _filled(Mapper(MapperConfig(LEVELS, fusion="guided")))
    assert torch.allclose(guided(0, x, hidden, None, 1.0), said, atol=1e-5)
    assert torch.allclose(guided(0, x, hidden, None, 0.3), 0.7 * hidden + 0.3 * said, atol=1e-5)
    spade = _filled(Mapper(MapperConfig(LEVELS, fusion="spade")))
    doubled = spade(0, x, 2 * hidden + 5, None) - (2 * hidden + 5)
    # Scale and shift are of what is normalised: they don't depend on the size and mean of what they join.
    assert torch.allclose(doubled, spade(0, x, hidden, None) - hidden, atol=1e-3)
    with pytest.raises(InputError, match="no such fusion: sum"):
        MapperConfig(LEVELS, fusion="sum")  # type: ignore[arg-type]


def test_only_a_timed_mapper_hears_of_noise() -> None:
    x, hidden = torch.randn(1, 4, 4, 4), torch.randn(1, 6, 4, 4)
    levels = [torch.tensor([[a, b]]) for a, b in ((0.2, 0.2), (0.2, 0.8), (0.8, 0.2))]
    plain, timed = (_filled(Mapper(MapperConfig(LEVELS, timed=told))) for told in (False, True))
    assert all(torch.equal(plain(0, x, hidden, noise), plain(0, x, hidden, None)) for noise in levels)
    said = [timed(0, x, hidden, noise) for noise in levels]
    assert not torch.allclose(said[0], said[1])
    assert not torch.allclose(said[0], said[2])
    assert not torch.allclose(said[1], said[2])


def test_what_a_level_reads_is_brought_to_mean_0_and_deviation_1() -> None:
    mapper = _filled(Mapper(MapperConfig(LEVELS[:1])))
    maps = [torch.randn(3, 4, 8, 8) * torch.tensor([1.0, 5.0, 0.1, 2.0])[:, None, None] + 3 for _ in range(2)]
    hidden = torch.zeros(3, 6, 8, 8)
    mapper.settle([[part] for part in maps])
    before = mapper(0, maps[0], hidden, None)
    scaled = [100 * part - 7 for part in maps]
    mapper.settle([[part] for part in scaled])
    assert torch.allclose(mapper(0, scaled[0], hidden, None), before, atol=1e-3)


def test_a_place_is_read_and_changed_where_it_is(tmp_path: Path) -> None:
    for model in (drawing.pipeline(tmp_path / "unet"), drawing.flow(tmp_path / "sd3")):
        places = places_of(model)
        assert len(places) >= 2
        place = places[-1]
        assert place.tokens is ("unet" not in model.components)
        probe = tiny_pass(model)
        with heard(model.main, [place.module], (8, 8)) as maps:
            plain = probe()
            before = maps[0].clone()
        assert before.shape == (1, place.channels, place.cells, place.cells)
        with changed(model.main, {place.module: lambda hidden: hidden}, (8, 8)):
            assert torch.equal(probe(), plain)
        # What is alike at every place, or in every channel, the next norm takes away again.
        dice = torch.Generator().manual_seed(0)
        more = torch.randn(place.channels, place.cells, place.cells, generator=dice)
        with changed(model.main, {place.module: lambda hidden, more=more: hidden + more}, (8, 8)):
            with heard(model.main, [place.module], (8, 8)) as maps:
                moved = probe()
            assert torch.allclose(maps[0], before + more, atol=1e-5)
        assert not torch.allclose(moved, plain, atol=1e-2)
        assert torch.equal(probe(), plain)


def tiny_pass(model: Any, size: tuple[int, int] = (8, 8)) -> Any:
    from regraft.bridge.guided import Prompted

    prompted = Prompted.of(model, ["a sun"], None, 1.0, size)
    z = torch.randn(1, model.main.config.in_channels, *size, generator=torch.Generator().manual_seed(1))
    return lambda: prompted.predict(z, 300.0)


def test_tokens_of_patches_are_a_map_of_the_picture(tmp_path: Path) -> None:
    """Behind the last block each token makes its own patch: who changes a cell of the map changes that patch alone."""
    model = drawing.flow(tmp_path / "sd3", patch=2)
    places = places_of(model)
    assert {(place.channels, place.cells, place.tokens) for place in places} == {(16, 4, True)}
    last = places[-1].module
    probe, wide = tiny_pass(model, (8, 16)), (8, 16)
    with heard(model.main, [last], wide) as maps:
        plain = probe()
    assert maps[0].shape == (1, 16, 4, 8)
    slope = torch.linspace(-1, 1, 16)

    def bent(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[0, :, 1, 6] += slope
        return hidden

    with changed(model.main, {last: bent}, wide):
        moved = (probe() - plain).abs().amax((0, 1)) > 1e-6
    inside = torch.zeros(8, 16, dtype=torch.bool)
    inside[2:4, 12:14] = True
    assert bool(moved.any())
    assert not bool((moved & ~inside).any())
    assert bool(moved[inside].float().mean() > 0.5)


def test_levels_may_be_named_and_are_told_when_they_are_not_there(tmp_path: Path) -> None:
    old, new = drawing.pipeline(tmp_path / "old"), drawing.flow(tmp_path / "new")
    config = mapper_config(old, new, [("up_blocks.0", "transformer_blocks.1")])
    assert [(level.old, level.new) for level in config.levels] == [("up_blocks.0", "transformer_blocks.1")]
    with pytest.raises(InputError, match=r"no block up_blocks\.7"):
        mapper_config(old, new, [("up_blocks.7", "transformer_blocks.1")])
    with pytest.raises(InputError, match="9 levels can't be paired"):
        mapper_config(old, new, 9)


def test_a_mapper_comes_back_from_its_file(tmp_path: Path) -> None:
    old, new = (open_base(tiny.pipeline(tmp_path / name, drift=drift)) for name, drift in (("old", 0.0), ("new", 0.3)))
    mapper = _filled(Mapper(MapperConfig(LEVELS, fusion="spade", timed=True)))
    file = files.save_mapper(mapper, tmp_path / "m.safetensors", old, new, told={"steps": 3})
    again = files.load_mapper(file, old, new)
    assert again.config == mapper.config
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), mapper.state_dict().values(), strict=True)
    )
    with pytest.raises(Refused, match="made for another old base"):
        files.load_mapper(file, new, new)
    with pytest.raises(Refused, match="made for another new base"):
        files.load_mapper(file, old, old)


def test_damaged_mappers_are_told_by_file_and_key(tmp_path: Path) -> None:
    base = open_base(tiny.pipeline(tmp_path / "base"))
    mapper = _filled(Mapper(MapperConfig(LEVELS)))
    file = files.save_mapper(mapper, tmp_path / "m.safetensors", base, base)
    with safe_open(file, "pt") as handle:
        header = handle.metadata()
    tensors = mapper.state_dict()
    key = "levels.1.out.weight"
    lacking, reshaped = ({n: t for n, t in tensors.items() if n != key}, {**tensors, key: torch.zeros(2, 2)})
    other = {files.KEY: json.dumps({**json.loads(header[files.KEY]), "config": {"levels": [1]}})}
    for content, metadata, words in (
        (lacking, header, f"{key}: is missing"),
        (reshaped, header, f"{key}: has shape"),
        (tensors, {}, "is no mapper"),
        (tensors, {files.KEY: "{"}, "damaged header"),
        (tensors, other, "damaged header"),
    ):
        save_file(content, file, metadata=metadata)
        with pytest.raises(InputError, match=words):
            files.load_mapper(file, base, base)


def test_the_released_file_is_read_by_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what its code computes: convolution, ReLU, convolution, plus the input; and a 1 × 1 convolution."""
    small = MapperConfig(
        (Level("up_blocks.1", "mid_block", 8, 8), Level("up_blocks.2", "up_blocks.0", 6, 8),
         Level("up_blocks.3", "up_blocks.1", 4, 6, grows=True))
    )  # fmt: skip
    monkeypatch.setattr(files, "RELEASED", small)
    generator = torch.Generator().manual_seed(3)
    state: dict[str, torch.Tensor] = {}

    def put(name: str, out: int, inp: int, k: int, transposed: bool = False) -> None:
        shape = (inp, out, k, k) if transposed else (out, inp, k, k)
        state[f"{name}.weight"] = 0.2 * torch.randn(shape, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(out, generator=generator)

    for i, level in enumerate(small.levels):
        for j in range(3):
            number = 3 * i + j
            if j == 0 and level.grows:
                put(f"body.{number}.up_opt.op", level.inner, level.inner, 3, transposed=True)
            if j == 0 and level.inner != level.outer:
                put(f"body.{number}.in_conv", level.outer, level.inner, 3)
            put(f"body.{number}.block1", level.outer, level.outer, 3)
            put(f"body.{number}.block2", level.outer, level.outer, 3)
        put(f"zero_out.{i}", level.outer, level.outer, 1)
    torch.save(state, tmp_path / "X_Adapter_v1.bin")
    mapper = files.load_mapper(tmp_path / "X_Adapter_v1.bin").eval()

    for i, (level, size) in enumerate(zip(small.levels, (4, 8, 16), strict=True)):
        x = torch.randn(2, level.inner, 8 if level.grows else size, 8 if level.grows else size, generator=generator)
        h = x
        for number in range(3 * i, 3 * i + 3):
            if f"body.{number}.up_opt.op.weight" in state:
                weight, bias = state[f"body.{number}.up_opt.op.weight"], state[f"body.{number}.up_opt.op.bias"]
                h = F.conv_transpose2d(h, weight, bias, stride=2, padding=1, output_padding=1)
            if f"body.{number}.in_conv.weight" in state:
                h = F.conv2d(h, state[f"body.{number}.in_conv.weight"], state[f"body.{number}.in_conv.bias"], padding=1)
            inner = F.conv2d(h, state[f"body.{number}.block1.weight"], state[f"body.{number}.block1.bias"], padding=1)
            h = h + F.conv2d(
                inner.relu(), state[f"body.{number}.block2.weight"], state[f"body.{number}.block2.bias"], padding=1
            )
        wanted = F.conv2d(h, state[f"zero_out.{i}.weight"], state[f"zero_out.{i}.bias"])
        assert wanted.shape[2] == size
        got = mapper(i, x, torch.zeros(2, level.outer, size, size), None)
        assert torch.allclose(got, wanted, atol=1e-5)

    torch.save({**state, "body.0.norm.weight": torch.zeros(2)}, tmp_path / "X_Adapter_v1.bin")
    with pytest.raises(InputError, match=r"body.0.norm.weight.*no part of the released"):
        files.load_mapper(tmp_path / "X_Adapter_v1.bin")
