"""Family by family: diffusers' pipelines load our copy of a file to the same weights as their own file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from regraft import Adapter, ModuleRef, load_adapter
from regraft.adapter import TokenRef
from regraft.tensors import InMemory
from regraft.updates import Full, LowRank

FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8],
}  # fmt: skip
# Family → pipeline, model, its size, target modules, the components that the pipeline goes without.
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], list[str], list[str]]] = {
    "flux": (
        "FluxPipeline",
        "FluxTransformer2DModel",
        FLUX,
        ["to_q", "to_k", "add_q_proj", "to_out.0", "ff.net.2", "proj_out", "norm.linear", "x_embedder"],
        ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"],
    ),
    "sd3": (
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {
            "sample_size": 32, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
        },
        ["to_q", "to_v", "add_k_proj", "to_out.0", "ff.net.0.proj"],
        [f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")],
    ),
    "wan": (
        "WanPipeline",
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
            "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
            "rope_max_seq_len": 32,
        },
        ["to_q", "to_k", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
        ["text_encoder", "tokenizer"],
    ),
    "hunyuan-video": (
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1,
            "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
        },
        ["to_q", "to_k", "add_q_proj", "proj_mlp", "norm1.linear"],
        ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"],
    ),
    "qwen-image": (
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8),
        },
        ["to_q", "to_v", "add_k_proj", "img_mlp.net.0.proj", "img_mod.1"],
        ["text_encoder", "tokenizer"],
    ),
    "ltx-video": (
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8,
            "cross_attention_dim": 16, "num_layers": 1, "caption_channels": 16,
        },
        ["to_q", "to_k", "to_out.0", "ff.net.0.proj"],
        ["text_encoder", "tokenizer"],
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> None:
    diffusers_logging.set_verbosity_error()


def pipeline(family: str) -> Any:
    """The same tiny pipeline at every call, with its transformer alone."""
    torch.manual_seed(0)
    name, model, sizes, _, without = TRANSFORMERS[family]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = {"scheduler": scheduler, "vae": None, "transformer": getattr(diffusers, model)(**sizes)}
    return getattr(diffusers, name)(**parts, **dict.fromkeys(without))


def randomised(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """The state dict of a LoRA on a model, every value of it random."""
    model.add_adapter(LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            new = torch.randn_like(parameter) * 0.2
            parameter.data = parameter.data + new.abs() if "magnitude" in name else new
    return get_peft_model_state_dict(model)


def fused(pipe: Any, file: Path, components: list[str], **options: Any) -> dict[str, Tensor]:
    """The weights after a pipeline has loaded and merged a file."""
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, **options)
    pipe.fuse_lora(components=components)
    pipe.unload_lora_weights()
    states = {name: getattr(pipe, name).state_dict() for name in components}
    return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert torch.allclose(ours[key], value, atol=1e-6), key


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_our_copy_is_fused_to_the_weights_of_theirs(family: str, dora: bool, tmp_path: Path) -> None:
    targets = TRANSFORMERS[family][3]
    pipe = pipeline(family)
    before = {f"transformer.{key}": value.clone() for key, value in pipe.transformer.state_dict().items()}
    options = {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_k": 5}, "use_dora": dora}
    layers = randomised(pipe.transformer, r=2, lora_alpha=3, target_modules=targets, **options)
    config = pipe.transformer.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(
        str(tmp_path), transformer_lora_layers=layers, transformer_lora_adapter_metadata=config
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    adapter = load_adapter(file)
    assert (adapter.format, adapter.unrecognised) == ("diffusers", ())
    adapter.save(tmp_path / "ours.safetensors")

    theirs = fused(pipeline(family), file, ["transformer"])
    same(fused(pipeline(family), tmp_path / "ours.safetensors", ["transformer"]), theirs)
    changed = {key for key, value in theirs.items() if not torch.equal(value, before[key])}
    assert changed == {f"{module}.weight" for module in adapter.updates}
    for module, update in adapter.updates.items():
        assert torch.allclose(update.merged(before[f"{module}.weight"]), theirs[f"{module}.weight"], atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_both_experts_of_wan_load_their_own_file(tmp_path: Path) -> None:
    def make() -> Any:
        pipe = pipeline("wan")
        torch.manual_seed(1)
        second = diffusers.WanTransformer3DModel(**TRANSFORMERS["wan"][2])
        pipe.register_modules(transformer_2=second)
        return pipe

    layers = randomised(make().transformer_2, r=2, target_modules=TRANSFORMERS["wan"][3])
    diffusers.WanPipeline.save_lora_weights(str(tmp_path), transformer_lora_layers=layers)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    load_adapter(file).save(tmp_path / "ours.safetensors")
    second = {"load_into_transformer_2": True}
    ours, theirs = (fused(make(), f, ["transformer_2"], **second) for f in (tmp_path / "ours.safetensors", file))
    same(ours, theirs)
    assert any(not torch.equal(ours[f"transformer_2.{k}"], v) for k, v in make().transformer_2.state_dict().items())


def sdxl() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=60,
        cross_attention_dim=24,
        norm_num_groups=4,
    )
    sizes = {"vocab_size": 20, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2}
    config = CLIPTextConfig(**sizes, num_attention_heads=2, projection_dim=12)
    return diffusers.StableDiffusionXLPipeline(
        vae=None,
        unet=unet,
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=None,
        tokenizer_2=None,
        scheduler=diffusers.EulerDiscreteScheduler(),
    )


@pytest.mark.filterwarnings("ignore")
def test_all_three_components_of_sdxl_load_as_theirs(tmp_path: Path) -> None:
    pipe = sdxl()
    text = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "out_proj"]}
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    layers = {
        "unet_lora_layers": randomised(pipe.unet, r=2, lora_alpha=5, target_modules=["to_q", "to_out.0", "proj_in"]),
        **{f"{name}_lora_layers": randomised(model, **text)
           for name, model in zip(("text_encoder", "text_encoder_2"), encoders, strict=True)},
    }  # fmt: skip
    configs = {
        "unet_lora_adapter_metadata": pipe.unet.peft_config["default"].to_dict(),
        "text_encoder_lora_adapter_metadata": pipe.text_encoder.peft_config["default"].to_dict(),
        "text_encoder_2_lora_adapter_metadata": pipe.text_encoder_2.peft_config["default"].to_dict(),
    }
    type(pipe).save_lora_weights(str(tmp_path), **layers, **configs)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    adapter = load_adapter(file)
    assert adapter.unrecognised == ()
    assert set(adapter.components()) == {"unet", "text_encoder", "text_encoder_2"}
    adapter.save(tmp_path / "ours.safetensors")
    parts = ["unet", "text_encoder", "text_encoder_2"]
    same(fused(sdxl(), tmp_path / "ours.safetensors", parts), fused(sdxl(), file, parts))


def control() -> Adapter:
    """A control LoRA as BFL's are: a bias beside each B, the norms of query and key stored whole."""
    model = pipeline("flux").transformer
    torch.manual_seed(2)
    updates: dict[ModuleRef, Any] = {}
    for name, parameter in model.state_dict().items():
        ref = ModuleRef("transformer", name.removesuffix(".weight"))
        if ".norm_q." in name or ".norm_added_k." in name:
            updates[ModuleRef("transformer", name)] = Full(InMemory(torch.randn_like(parameter)), name)
        elif name.endswith(("to_q.weight", "x_embedder.weight", "norm.linear.weight")):
            out, width = parameter.shape
            pair = [InMemory(torch.randn(size) * 0.3) for size in ((out, 2), (2, width))]
            updates[ref] = LowRank(pair[0], pair[1], 1.0, bias=InMemory(torch.randn(out)))
    return Adapter(updates, "original")


@pytest.mark.filterwarnings("ignore")
def test_a_control_lora_s_norms_and_biases_are_loaded(tmp_path: Path) -> None:
    adapter = control()
    adapter.save(tmp_path / "control.safetensors", format="diffusers")
    again = load_adapter(tmp_path / "control.safetensors")
    assert (set(again.updates), again.unrecognised) == (set(adapter.updates), ())

    pipe = pipeline("flux")
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(str(tmp_path), weight_name="control.safetensors")
    loaded = pipe.transformer.state_dict()
    norms = {str(module): update for module, update in adapter.updates.items() if isinstance(update, Full)}
    assert len(norms) == 3
    assert all(torch.equal(loaded[name.partition(".")[2]], full.value.load()) for name, full in norms.items())

    after = fused(pipeline("flux"), tmp_path / "control.safetensors", ["transformer"])
    for module, update in adapter.updates.items():
        if isinstance(update, Full):
            continue
        wanted = update.merged(before[f"{module.path}.weight"])
        assert torch.allclose(after[f"{module}.weight"], wanted, atol=1e-5)
        bias = before[f"{module.path}.bias"] + update.bias.load()
        assert torch.allclose(after[f"{module}.bias"], bias, atol=1e-5)


Rename = Callable[[str], str]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("transformer."),
        lambda key: key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.weight", ".lora_B.default.weight"),
    ],
    ids=["without a prefix", "with the adapter's name"],
)
def test_looser_spellings_of_a_transformer_s_file_mean_the_same(rename: Rename, tmp_path: Path) -> None:
    layers = randomised(pipeline("flux").transformer, r=2, target_modules=TRANSFORMERS["flux"][3])
    diffusers.FluxPipeline.save_lora_weights(str(tmp_path), transformer_lora_layers=layers)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    plain, renamed = load_adapter(file), {rename(key): value for key, value in load_file(file).items()}
    save_file(renamed, tmp_path / "loose.safetensors")
    loose = load_adapter(tmp_path / "loose.safetensors")
    assert (loose.format, loose.unrecognised, set(loose.updates)) == ("diffusers", (), set(plain.updates))
    for module, update in plain.updates.items():
        assert torch.equal(update.delta(), loose.updates[module].delta())
    loose.save(tmp_path / "again.safetensors")
    assert set(load_file(tmp_path / "again.safetensors")) == set(renamed)


def test_bundled_embeddings_stay_in_their_file(tmp_path: Path) -> None:
    pair = {"transformer.a.lora_A.weight": torch.ones(2, 4), "transformer.a.lora_B.weight": torch.ones(4, 2)}
    bundle = {"bundle_emb.<cat>.clip_l": torch.ones(1, 768), "bundle_emb.<cat>.t5_out": torch.ones(1, 4096)}
    save_file(pair | bundle, tmp_path / "in.safetensors")
    adapter = load_adapter(tmp_path / "in.safetensors")
    assert adapter.unrecognised == ()
    assert set(adapter.tokens) == {TokenRef("text_encoder", "<cat>"), TokenRef("text_encoder_2", "<cat>", True)}
    adapter.save(tmp_path / "out.safetensors")
    assert set(load_file(tmp_path / "out.safetensors")) == {*pair, *bundle}
    alone = replace(adapter, updates={})
    alone.save(tmp_path / "cat.safetensors", format="a1111-embedding")
    assert set(load_file(tmp_path / "cat.safetensors")) == {"clip_l", "t5_out"}
