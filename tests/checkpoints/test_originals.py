"""Whole checkpoints in their makers' names, shown as diffusers' own converters make them, value by value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from regraft import InputError, open_base
from regraft.checkpoints._views import leaves
from regraft.checkpoints.single_file import split_components
from regraft.families import ORIGINAL, family_of_base, get_family
from regraft.tensors import InMemory, TensorRef, read_rows

single_file = pytest.importorskip("diffusers.loaders.single_file_utils")


def original(family: str, blocks: int | None = None) -> dict[str, Tensor]:
    """A family's diffusion model in the original names, each row with a number of its own and one column wide."""
    known = get_family(family)
    assert known is not None
    table = known.table(known.main)
    state, number = {}, 0
    for name in table.original:
        shape = table.named(ORIGINAL)[name].shape
        parts = name.split(".")
        if blocks is not None and "blocks" in parts[0] and int(parts[1]) >= blocks:
            continue
        # Rows count where they are cut; a column is enough to carry their numbers.
        values = torch.arange(number, number + shape[0], dtype=torch.float64)
        state[name] = values.reshape(shape[0], *[1] * (len(shape) - 1))
        number += shape[0]
    return state


def shown(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, TensorRef]], tuple[str, ...]]:
    refs = {name: InMemory(tensor) for name, tensor in state.items()}
    components, left_out = split_components(refs)
    held = {id(leaf) for part in components.values() for ref in part.values() for leaf in leaves(ref)}
    # Each stored tensor is in a shown one, or said to be left out; none is both.
    assert {name for name, ref in refs.items() if id(ref) not in held} == set(left_out)
    return {name: dict(part) for name, part in components.items()}, left_out


def same(part: Mapping[str, TensorRef], wanted: Mapping[str, Tensor]) -> None:
    assert set(part) == set(wanted)
    for name, ref in part.items():
        assert ref.shape == tuple(wanted[name].shape), name
        assert torch.equal(ref.load(), wanted[name]), name


UNET = {"class_embed_type": None, "layers_per_block": 2, "attention_head_dim": 8}
SD15 = UNET | {
    "addition_embed_type": None,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SDXL = UNET | {
    "addition_embed_type": "text_time",
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
}
CONVERTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("convert_ldm_unet_checkpoint", {"config": SD15}),
    "sdxl": ("convert_ldm_unet_checkpoint", {"config": SDXL}),
    "flux": ("convert_flux_transformer_checkpoint_to_diffusers", {}),
    "flux-schnell": ("convert_flux_transformer_checkpoint_to_diffusers", {}),
    "hunyuan-video": ("convert_hunyuan_video_transformer_to_diffusers", {}),
    "wan": ("convert_wan_transformer_to_diffusers", {}),
    "wan-1.3b": ("convert_wan_transformer_to_diffusers", {}),
    "wan-i2v": ("convert_wan_transformer_to_diffusers", {}),
    "wan22-5b": ("convert_wan_transformer_to_diffusers", {}),
    "sd2": ("convert_ldm_unet_checkpoint", {"config": SD15}),
    "sd3": ("convert_sd3_transformer_checkpoint_to_diffusers", {}),
    "sd35-medium": ("convert_sd3_transformer_checkpoint_to_diffusers", {}),
    "sd35-large": ("convert_sd3_transformer_checkpoint_to_diffusers", {}),
    "chroma": ("convert_chroma_transformer_checkpoint_to_diffusers", {}),
    "flux2": ("convert_flux2_transformer_checkpoint_to_diffusers", {}),
    "flux2-klein-4b": ("convert_flux2_transformer_checkpoint_to_diffusers", {}),
    "ltx-video": ("convert_ltx_transformer_checkpoint_to_diffusers", {}),
    "z-image": ("convert_z_image_transformer_checkpoint_to_diffusers", {}),
}
# Three blocks say as much as forty, where a block is like the next.
SHALLOW = {"flux": 3, "flux-schnell": 2, "hunyuan-video": 2, "wan": 2, "wan-i2v": 2, "chroma": 2, "flux2": 2}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""], ids=["whole", "bare"])
@pytest.mark.parametrize("family", CONVERTERS)
def test_the_diffusion_model_is_what_diffusers_makes_of_it(family: str, prefix: str) -> None:
    state = original(family, SHALLOW.get(family))
    name, options = CONVERTERS[family]
    whole = {f"{prefix}{key}": tensor for key, tensor in state.items()}
    # The converter of U-Nets wants that prefix; of the others, not all take it off.
    given = {f"model.diffusion_model.{k}": t for k, t in state.items()} if "unet" in name else dict(state)
    wanted = getattr(single_file, name)(given, **options)
    known = get_family(family)
    assert known is not None
    components, left_out = shown(whole)
    assert list(components) == [known.main]
    assert left_out == ()
    same(components[known.main], wanted)


def test_comfyuis_own_names_of_hunyuan_blocks_are_known() -> None:
    state = original("hunyuan-video", 1)
    known = get_family("hunyuan-video")
    assert known is not None
    own = {theirs: name for name, theirs in known.spellings["transformer"]["comfy"].items()}
    renamed = {f"model.diffusion_model.{own.get(name, name)}": tensor for name, tensor in state.items()}
    assert "model.diffusion_model.double_blocks.0.img_attn.qkv.weight" in renamed
    components, left_out = shown(renamed)
    assert left_out == ()
    same(components["transformer"], single_file.convert_hunyuan_video_transformer_to_diffusers(dict(state)))


def test_a_fused_weight_is_read_in_part(tmp_path: Path) -> None:
    state = {name: tensor.float() for name, tensor in original("flux", 1).items()}
    save_file(state, tmp_path / "flux.safetensors")
    base = open_base(tmp_path / "flux.safetensors")
    key = base.components["transformer"]["transformer_blocks.0.attn.to_k.weight"]
    assert [leaf.name for leaf in leaves(key)] == ["double_blocks.0.img_attn.qkv.weight"]
    fused = state["double_blocks.0.img_attn.qkv.weight"]
    assert torch.equal(read_rows(key, [range(10, 12), range(3070, 9999)]), fused[[3082, 3083, 6142, 6143]])
    swapped = base.components["transformer"]["norm_out.linear.weight"]
    end = state["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(read_rows(swapped, [range(3070, 3074)]), end[[6142, 6143, 0, 1]])


@pytest.mark.parametrize("width", [24, 48])
def test_another_width_is_cut_in_proportion(width: int) -> None:
    state = original("flux", 1)
    small = {name: tensor[: tensor.shape[0] * width // 3072] for name, tensor in state.items()}
    part, _ = shown(small)
    qkv, linear1 = small["double_blocks.0.txt_attn.qkv.weight"], small["single_blocks.0.linear1.weight"]
    value = part["transformer"]["transformer_blocks.0.attn.add_v_proj.weight"]
    assert torch.equal(value.load(), qkv[2 * width :])
    mlp = part["transformer"]["single_transformer_blocks.0.proj_mlp.weight"]
    assert torch.equal(mlp.load(), linear1[3 * width :])


def test_a_fused_weight_of_an_odd_size_is_refused_by_name() -> None:
    state = original("flux", 1)
    state["double_blocks.0.img_attn.qkv.weight"] = torch.zeros(3073, 1)
    with pytest.raises(InputError, match=r"double_blocks\.0\.img_attn\.qkv\.weight: has 3073 rows"):
        shown(state)


def test_a_shallower_model_whose_last_block_is_of_another_make_is_not_guessed() -> None:
    state = {name: tensor for name, tensor in original("sd3").items() if not name.startswith("joint_blocks.2")}
    last = {name: tensor for name, tensor in original("sd3").items() if name.startswith("joint_blocks.23.")}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("joint_blocks.19.")}
    state |= {name.replace(".23.", ".19."): tensor for name, tensor in last.items()}
    # Its text stream ends in block 19, where in the table block 19 is one like the others.
    parts, _ = shown(state)
    assert set(parts) == {"model"}


def test_files_of_other_models_stay_as_they_are() -> None:
    for names in (["double_blocks.0.img_attn.qkv.weight"], ["proj_in.weight", "blocks.0.x.weight"], ["img_in.weight"]):
        tensors = {name: InMemory(torch.ones(3, 3)) for name in names}
        assert split_components(tensors) == ({"model": tensors}, ())


# ---- text encoders


def open_clip(prefix: str, layers: int, width: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(layers)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    state = {"token_embedding.weight": random(20, width), "positional_embedding": random(7, width)}
    for i in range(layers):
        block = f"transformer.resblocks.{i}."
        state |= {
            f"{block}attn.in_proj_weight": random(3 * width, width),
            f"{block}attn.in_proj_bias": random(3 * width),
        }
        for module, out, wide in (("attn.out_proj", 1, 1), ("mlp.c_fc", 4, 1), ("mlp.c_proj", 1, 4)):
            state[f"{block}{module}.weight"] = random(out * width, wide * width)
            state[f"{block}{module}.bias"] = random(out * width)
        for norm in ("ln_1", "ln_2"):
            state |= {f"{block}{norm}.weight": random(width), f"{block}{norm}.bias": random(width)}
    state |= {"ln_final.weight": random(width), "ln_final.bias": random(width)}
    state |= {"text_projection": random(width, width), "logit_scale": random(1)}
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def clip(prefix: str) -> dict[str, Tensor]:
    names = [f"text_model.encoder.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    state = {f"{prefix}{name}": torch.full((2, 2), float(i)) for i, name in enumerate(names)}
    return state | {f"{prefix}text_model.embeddings.position_ids": torch.arange(7)[None]}


def test_sdxl_shows_its_second_encoder_and_leaves_the_autoencoder_out() -> None:
    second = open_clip("conditioner.embedders.1.model.", 3)
    rest = {"first_stage_model.encoder.conv_in.weight": torch.ones(1), "denoiser.sigmas": torch.ones(5)}
    unet = {f"model.diffusion_model.{name}": tensor for name, tensor in original("sdxl").items()}
    parts, left_out = shown(unet | clip("conditioner.embedders.0.transformer.") | second | rest)
    assert list(parts) == ["unet", "text_encoder", "text_encoder_2"]
    stub = SimpleNamespace(config=SimpleNamespace(hidden_size=8))
    wanted = single_file.convert_open_clip_checkpoint(stub, dict(second), prefix="conditioner.embedders.1.model.")
    same(parts["text_encoder_2"], wanted)
    assert set(parts["text_encoder"]) == {f"text_model.encoder.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert set(left_out) == set(rest) | {
        "conditioner.embedders.1.model.logit_scale",
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
    }


def test_sd2_shows_its_encoder_up_to_the_layer_that_it_reads() -> None:
    text = open_clip("cond_stage_model.model.", 24)
    unet = {f"model.diffusion_model.{name}": tensor for name, tensor in original("sd15").items()}
    parts, left_out = shown(unet | text)
    stub = SimpleNamespace(config=SimpleNamespace(hidden_size=8))
    same(parts["text_encoder"], single_file.convert_open_clip_checkpoint(stub, dict(text)))
    assert "cond_stage_model.model.transformer.resblocks.23.ln_1.weight" in left_out


def test_flux_with_its_encoders_in_one_file() -> None:
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in original("flux", 1).items()}
    t5 = {"text_encoders.t5xxl.transformer.shared.weight": torch.ones(3, 2)}
    parts, left_out = shown(state | clip("text_encoders.clip_l.transformer.") | t5 | {"vae.decoder.x": torch.ones(1)})
    assert list(parts) == ["transformer", "text_encoder", "text_encoder_2"]
    assert set(parts["text_encoder_2"]) == {"shared.weight"}
    assert "vae.decoder.x" in left_out


def test_sd3_numbers_its_three_encoders_as_diffusers_does() -> None:
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in original("sd3").items()}
    t5 = {"text_encoders.t5xxl.transformer.shared.weight": torch.ones(3, 2)}
    first, second = clip("text_encoders.clip_l.transformer."), clip("text_encoders.clip_g.transformer.")
    assert list(shown(state | t5 | second | first)[0]) == [
        "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"
    ]  # fmt: skip
    # The third one stays the third where the file lacks the second.
    assert list(shown(state | t5 | first)[0]) == ["transformer", "text_encoder", "text_encoder_3"]


# ---- together with quantisation and other containers


def test_a_scaled_fp8_flux_is_cut_and_dequantised(tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    state: dict[str, Tensor] = {f"{prefix}scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for name, tensor in original("flux", 1).items():
        state[f"{prefix}{name}"] = tensor.float()
    fused = f"{prefix}double_blocks.0.img_attn.qkv"
    values = torch.randn(9216, 4).to(torch.float8_e4m3fn)
    state |= {f"{fused}.weight": values, f"{fused}.scale_weight": torch.tensor(0.25)}
    save_file(state, tmp_path / "flux.safetensors")
    base = open_base(tmp_path / "flux.safetensors")
    value = base.components["transformer"]["transformer_blocks.0.attn.to_v.weight"]
    assert torch.equal(value.load(), values[6144:].float() / 4)
    assert base.description == "safetensors, scaled fp8"
    assert base.left_out == (f"{prefix}scaled_fp8",)


def test_an_image_model_in_gguf_is_shown_by_diffusers_names(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    state = {name: tensor.float() for name, tensor in original("flux", 1).items()}
    qkv = torch.randn(9216, 64)
    state["double_blocks.0.img_attn.qkv.weight"] = qkv
    writer = gguf.GGUFWriter(tmp_path / "flux.gguf", "flux")
    for name, tensor in state.items():
        if tensor is qkv:
            packed = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        elif name == "img_in.weight":
            writer.add_tensor(name, tensor.reshape(1, -1).numpy())
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = open_base(tmp_path / "flux.gguf")
    part = base.components["transformer"]
    assert part["x_embedder.weight"].shape == (3072, 1)
    whole = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
    key = part["transformer_blocks.0.attn.to_k.weight"]
    assert torch.equal(key.load(), whole[3072:6144])
    assert torch.equal(read_rows(key, [range(5, 7)]), whole[3077:3079])


def test_wan_22s_two_experts_are_its_two_transformers(tmp_path: Path) -> None:
    state = {name: tensor.float() for name, tensor in original("wan", 1).items()}
    for folder, offset in (("high_noise_model", 0.0), ("low_noise_model", 0.5)):
        (tmp_path / folder).mkdir()
        moved = {name: tensor + offset for name, tensor in state.items()}
        save_file(moved, tmp_path / folder / "diffusion_pytorch_model.safetensors")
    base = open_base(tmp_path)
    high, low = base.components["transformer"], base.components["transformer_2"]
    assert set(high) == set(low)
    name = "blocks.0.attn1.to_q.weight"
    assert torch.equal(low[name].load(), high[name].load() + 0.5)


def test_a_makers_folder_with_diffusers_file_names_is_recognised(tmp_path: Path) -> None:
    state = {name: tensor.float() for name, tensor in original("wan", 1).items()}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel", "dim": 5120}')
    base = open_base(tmp_path)
    assert "condition_embedder.text_embedder.linear_1.weight" in base.components["transformer"]
    assert base.configs["transformer"]["dim"] == 5120
    assert family_of_base(base) in ("wan", None)
