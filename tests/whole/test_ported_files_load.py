"""What the real libraries load from a ported file is what the port meant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "verify"))
import tiny

from regraft import load_adapter, open_base

QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 6, "init_lora_weights": False}
PEFT = {
    "plain": QV,
    "rank and alpha patterns": {**QV, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.0.mlp.down_proj": 9}},
    "rslora": {**QV, "use_rslora": True, "rank_pattern": {"q_proj": 6}},
    "dora": {**QV, "use_dora": True},
    "dora with rslora": {**QV, "use_dora": True, "use_rslora": True},
}
WAYS: dict[str, tuple[str, ...]] = {
    "copy": ("-m", "copy"),
    "lora-x": ("-m", "lora-x", "--energy", "0.8"),
    "prolora cut to rank 2": ("-m", "prolora", "--rank", "2"),
    "copy padded to rank 8": ("-m", "copy", "--rank", "8"),
    "half strength": ("--strength", "0.5"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", PEFT)
def test_peft_merges_a_ported_folder_to_the_weights_that_were_meant(
    tmp_path: Path, run: Run, case: str, way: str
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    old, new = tiny.llama(tmp_path / "old"), tiny.llama(tmp_path / "new", drift=0.1)
    model = AutoModelForCausalLM.from_pretrained(old)
    torch.manual_seed(3)
    tuned = get_peft_model(model, LoraConfig(**PEFT[case]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1.0 + 0.1 * torch.rand_like(parameter))
    tuned.save_pretrained(tmp_path / "lora")

    ran = run("port", tmp_path / "lora", "--from", old, "--to", new, "-o", tmp_path / "out", *WAYS[way])
    assert ran.code == 0, ran.err
    adapter, base = load_adapter(tmp_path / "out"), open_base(new)
    meant = {ref: update.merged(base.weight(ref)) for ref, update in adapter.updates.items()}

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(new), tmp_path / "out")
    merged = dict(loaded.merge_and_unload().named_modules())
    assert len(meant) == 6
    for ref, weight in meant.items():
        torch.testing.assert_close(merged[ref.path].weight, weight, rtol=1e-5, atol=1e-5)


def test_a_copy_merges_to_the_same_change_on_the_new_base(tmp_path: Path, run: Run) -> None:
    """Beside the library's word against ours: the change itself, computed by PEFT on both bases."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    old, new = tiny.llama(tmp_path / "old"), tiny.llama(tmp_path / "new", drift=0.1)
    torch.manual_seed(3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(old), LoraConfig(**PEFT["rslora"])).save_pretrained(
        tmp_path / "lora"
    )
    assert run("port", tmp_path / "lora", "--from", old, "--to", new, "-o", tmp_path / "out", "-m", "copy").code == 0

    def change(base: Path, lora: str) -> dict[str, torch.Tensor]:
        plain: Any = AutoModelForCausalLM.from_pretrained(base)
        before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
        after = PeftModel.from_pretrained(plain, tmp_path / lora).merge_and_unload().state_dict()
        return {name: after[name] - before[name] for name in before}

    there, here = change(old, "lora"), change(new, "out")
    assert any(float(delta.abs().max()) > 0.01 for delta in there.values())
    for name, delta in there.items():
        torch.testing.assert_close(here[name], delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("way", ["copy", "lora-x", "prolora cut to rank 2", "half strength"])
def test_diffusers_fuses_a_ported_file_to_the_weights_that_were_meant(
    tmp_path: Path, run: Run, format: str, way: str
) -> None:
    from diffusers import DiffusionPipeline

    old, new = tiny.pipeline(tmp_path / "old"), tiny.pipeline(tmp_path / "new", drift=0.1)
    save_unet_lora(old, tmp_path)
    flags, out = (*WAYS[way], "--format", format), tmp_path / "out.safetensors"
    ran = run("port", tmp_path / "lora.safetensors", "--from", old, "--to", new, "-o", out, *flags)
    assert ran.code == 0, ran.err
    base = open_base(new)
    adapter = load_adapter(out, names={name: tuple(base.modules(name)) for name in base.components})
    pipeline: Any = DiffusionPipeline.from_pretrained(new)
    pipeline.load_lora_weights(out)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    modules = dict(pipeline.unet.named_modules())
    assert len(adapter.updates) == len(load_adapter(tmp_path / "lora.safetensors").updates) > 0
    for ref, update in adapter.updates.items():
        assert ref.component == "unet"
        meant = update.merged(base.weight(ref))
        torch.testing.assert_close(modules[ref.path].weight, meant, rtol=1e-4, atol=1e-5)


def save_unet_lora(base: Path, folder: Path) -> None:
    """A LoRA on attention, feed-forward and convolutions, written by diffusers with its metadata."""
    from diffusers import DiffusionPipeline, StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet: Any = DiffusionPipeline.from_pretrained(base).unet
    torch.manual_seed(3)
    targets = ["to_q", "to_v", "to_out.0", "ff.net.2", "proj_in", "conv1"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    unet.add_adapter(config)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        weight_name="lora.safetensors",
        unet_lora_adapter_metadata={
            k: v for k, v in config.to_dict().items() if not isinstance(v, set) and v is not None
        }
        | {"target_modules": targets},
    )
