"""diffusers' own loaders take what we write, and fuse the same weights that we compute."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from regraft import load_adapter
from regraft.adapter import Adapter, ModuleRef
from regraft.tensors import InMemory
from regraft.updates import LowRank

UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
TEXT = {"vocab_size": 20, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def tokenizer(tmp_path: Path) -> CLIPTokenizer:
    (tmp_path / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))


@pytest.fixture
def pipeline(tokenizer: CLIPTokenizer) -> Callable[[], StableDiffusionPipeline]:
    """Makes equal tiny pipelines, one per call."""

    def make() -> StableDiffusionPipeline:
        torch.manual_seed(0)
        return StableDiffusionPipeline(
            vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8),
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**UNET),
            scheduler=DDIMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    return make


UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def adapter_for(pipe: StableDiffusionPipeline, scale: float | None) -> Adapter:
    """Random factors of rank 2 on every target; without a scale, ranks and scales differ from module to module."""
    generator = torch.Generator().manual_seed(1)
    updates = {}
    for component, targets in (("unet", UNET_TARGETS), ("text_encoder", TEXT_TARGETS)):
        for number, (path, module) in enumerate(getattr(pipe, component).named_modules()):
            if not any(path == t or path.endswith(f".{t}") for t in targets) or not hasattr(module, "weight"):
                continue
            shape, tail = module.weight.shape, [1] * (module.weight.dim() - 2)
            rank = 1 + number % 3 if scale is None else 2
            up = torch.randn(shape[0], rank, *tail, generator=generator) * 0.2
            down = torch.randn(rank, *shape[1:], generator=generator) * 0.2
            factor = (1 + number % 4) / rank if scale is None else scale
            updates[ModuleRef(component, path)] = LowRank(InMemory(up), InMemory(down), factor)
    return Adapter(updates, "regraft", family="unet")


def parameters(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    states = {"unet": pipe.unet.state_dict(), "text_encoder": pipe.text_encoder.state_dict()}
    return {f"{component}.{name}": value.clone() for component, s in states.items() for name, value in s.items()}


def expected(before: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    changed = dict(before)
    for module, update in adapter.updates.items():
        path = module.path if f"{module}.weight" in before else module.path.removeprefix("text_model.")
        name = f"{module.component}.{path}.weight"
        changed[name] = update.merged(before[name])
    return changed


def fused(pipe: StableDiffusionPipeline, file: Path, caplog: pytest.LogCaptureFixture) -> dict[str, Tensor]:
    """The weights after diffusers has loaded and merged a file, which must go without a warning about keys."""
    diffusers_logging.enable_propagation()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    said = [record.getMessage() for record in caplog.records]
    assert not [line for line in said if "unexpected" in line or "missing" in line or "No LoRA keys" in line], said
    pipe.fuse_lora(components=["unet", "text_encoder"])
    pipe.unload_lora_weights()
    return parameters(pipe)


@pytest.mark.parametrize(
    ("format", "scale"),
    # diffusers 0.42 drops the alphas of attention layers from a kohya file where they differ between modules.
    [("diffusers", 1.0), ("diffusers", 0.75), ("diffusers", None), ("kohya", 1.0), ("kohya", 0.75)],
)
def test_diffusers_fuses_what_we_write(
    format: str,
    scale: float | None,
    pipeline: Callable[[], StableDiffusionPipeline],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = pipeline()
    adapter = adapter_for(pipe, scale)
    before = parameters(pipe)
    file = tmp_path / "lora.safetensors"
    adapter.save(file, format=format)

    after = fused(pipe, file, caplog)

    assert len(adapter.updates) > 30
    for name, value in expected(before, adapter).items():
        assert torch.allclose(after[name], value, atol=1e-5), name


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 3}, "rank_pattern": {"to_k": 3}}]
)
def test_we_read_what_diffusers_writes(
    options: dict[str, object], pipeline: Callable[[], StableDiffusionPipeline], tmp_path: Path
) -> None:
    pipe = pipeline()
    before = parameters(pipe)
    configs = {
        "unet": LoraConfig(r=2, lora_alpha=5, target_modules=UNET_TARGETS, **options),
        "text_encoder": LoraConfig(r=3, lora_alpha=2, target_modules=TEXT_TARGETS),
    }
    layers = {}
    for component, config in configs.items():
        model = getattr(pipe, component)
        model.add_adapter(config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.manual_seed(len(name))
                parameter.data = torch.randn_like(parameter) * 0.2
        prefix = "default_0." if component == "unet" else "default."
        state = {n: p for n, p in model.state_dict().items() if "lora_" in n}
        layers[component] = {n.replace(".default.", ".").replace(f".{prefix}", "."): p for n, p in state.items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=configs["unet"].to_dict(),
        text_encoder_lora_adapter_metadata=configs["text_encoder"].to_dict(),
    )
    adapter = load_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    pipe.fuse_lora(components=["unet", "text_encoder"])
    pipe.unload_lora_weights()

    after = parameters(pipe)
    assert adapter.unrecognised == ()
    assert adapter.family == "unet"
    for name, value in expected(before, adapter).items():
        assert torch.allclose(after[name], value, atol=1e-5), name


def test_a_cut_adapter_gets_metadata_that_diffusers_takes(
    pipeline: Callable[[], StableDiffusionPipeline], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = tmp_path / "first.safetensors"
    pipe = pipeline()
    adapter_for(pipe, None).save(first, format="diffusers")
    adapter = load_adapter(first)
    updates = {}
    for module, update in list(adapter.updates.items())[5:]:
        up, down = update.factors()
        updates[module] = update.with_factors(up[:, :1], down[:1])
    cut = replace(adapter, updates=updates)
    before = parameters(pipe)
    cut.save(tmp_path / "cut.safetensors")

    after = fused(pipe, tmp_path / "cut.safetensors", caplog)
    for name, value in expected(before, cut).items():
        assert torch.allclose(after[name], value, atol=1e-5), name
