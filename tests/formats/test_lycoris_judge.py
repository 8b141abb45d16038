"""LyCORIS itself loads what we write, and computes what its own file computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from safetensors.torch import load_file, save_file

from regraft import OutputError, load_adapter, open_base
from regraft.ops.convert import plan_conversion

# Without IA3: LyCORIS 4.1.3 fails to load its own files of that kind.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "tucker": {"algo": "lora", "use_tucker": True},
    "dora": {"algo": "lora", "dora_wd": True},
    "dora per input": {"algo": "lora", "dora_wd": True, "wd_on_out": False},
    "rs": {"algo": "lora", "rs_lora": True},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr dora": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "full": {"algo": "full"},
    "glora": {"algo": "glora"},
    "diag-oft": {"algo": "diag-oft", "constraint": 0},
    "boft": {"algo": "boft", "constraint": 0},
}
# What plain LoRA are, too: the others need the base's weights, or a rank that is full.
EQUAL_A_LORA = ("lora", "tucker", "rs", "loha", "lokr")


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


@pytest.fixture(autouse=True)
def _presets() -> None:
    LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D"]})


def trained(options: dict[str, Any], path: Path) -> None:
    """A LyCORIS file whose tensors are no zeros."""
    network = create_lycoris(unet(), 1.0, linear_dim=4, linear_alpha=2.0, conv_dim=4, conv_alpha=2.0, **options)
    network.apply_to()
    generator = torch.Generator().manual_seed(1)
    for name, value in network.named_parameters():
        if "dora_scale" not in name:
            value.data += 0.1 * torch.randn(value.shape, generator=generator)
    network.save_weights(str(path), torch.float32, {})


@torch.no_grad()
def output(path: Path) -> torch.Tensor:
    model = unet().eval()
    network, _ = create_lycoris_from_weights(1.0, str(path), model)
    network.apply_to()
    network.eval()
    generator = torch.Generator().manual_seed(2)
    noise, prompt = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 16, generator=generator)
    sample: torch.Tensor = model(noise, 10, prompt).sample
    return sample


def names() -> dict[str, tuple[str, ...]]:
    return {"unet": tuple(unet().state_dict())}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_lycoris_computes_the_same_from_our_file(name: str, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    trained(ALGORITHMS[name], theirs)
    adapter = load_adapter(theirs, names=names())
    assert adapter.unrecognised == ()
    adapter.save(ours)
    assert torch.allclose(output(ours), output(theirs), atol=1e-6)


@pytest.mark.parametrize("name", EQUAL_A_LORA)
def test_lycoris_computes_the_same_from_the_plain_lora_that_an_update_equals(name: str, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    trained(ALGORITHMS[name], theirs)
    # The base tells which of the flattened kernels are convolutions.
    unet().save_pretrained(tmp_path / "base" / "unet")
    plan = plan_conversion(load_adapter(theirs, names=names()), "kohya", open_base(tmp_path / "base"))
    assert plan.lost == []
    assert {update.kind for update in plan.adapter.updates.values()} == {"lora"}
    plan.adapter.save(ours, format="kohya")
    assert torch.allclose(output(renamed(ours)), output(theirs), atol=1e-5)


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_without_a_base_flattened_kernels_are_not_taken_for_matrices(name: str, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.safetensors"
    trained(ALGORITHMS[name], theirs)
    assert plan_conversion(load_adapter(theirs, names=names()), "kohya").lost


def renamed(path: Path) -> Path:
    """The file with the prefix that LyCORIS' wrapper looks for."""
    tensors = {key.replace("lora_unet_", "lycoris_"): value for key, value in load_file(path).items()}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("suffix", ["oft_blocks", "oft_blocks of stages"])
def test_a_rotation_at_a_part_of_its_strength_is_refused(suffix: str, tmp_path: Path) -> None:
    blocks = torch.randn(*((2,) if "stages" in suffix else ()), 4, 8, 8) * 0.1
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    save_file({f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(0.0)}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    adapter.save(tmp_path / "whole.safetensors")
    half = replace(adapter, updates={ref: update.scaled(0.5) for ref, update in adapter.updates.items()})
    with pytest.raises(OutputError, match="a strength other than 1"):
        half.save(tmp_path / "half.safetensors")
