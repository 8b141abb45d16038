"""A real SD 1.5 LoRA on a checkpoint of SD 1.5's true names and shapes, loaded back by diffusers itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from running import Run

from regraft import load_adapter
from regraft.inspection import inspect_adapter

ANALOG = Path(__file__).parents[1] / "data" / "analog_svd_rank4.safetensors"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    from tools.bench_batch.sd15_size import make_pair

    folder = tmp_path_factory.mktemp("sd15")
    yield make_pair(folder)
    shutil.rmtree(folder)


def test_it_ports_whole_and_diffusers_loads_every_key(pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    old, new = pair
    ported = tmp_path / "ported.safetensors"
    ran = run("port", ANALOG, "--from", old, "--to", new, "-o", ported, "--json")
    assert ran.code == 0, ran.err
    assert ran.record["counts"] == {"ported": 192, "skipped": 0, "refused": 0}
    assert inspect_adapter(ported).format == "cloneofsimo"
    as_diffusers = tmp_path / "diffusers.safetensors"
    assert run("convert", ported, "-o", as_diffusers, "--format", "diffusers", "--quiet").code == 0

    unet = UNet2DConditionModel.from_pretrained(new / "unet", torch_dtype=torch.float16)
    text = CLIPTextModel.from_pretrained(new / "text_encoder", torch_dtype=torch.float16)
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(as_diffusers, return_lora_metadata=True)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata, adapter_name="a")
    StableDiffusionPipeline.load_lora_into_text_encoder(
        state, alphas, text, prefix="text_encoder", metadata=metadata, adapter_name="a"
    )
    adapter, models = load_adapter(ported), {"unet": unet, "text_encoder": text}
    found = set()
    for component, model in models.items():
        modules = dict(model.named_modules())
        for path, module in modules.items():
            if not hasattr(module, "lora_A") or "a" not in module.lora_A:
                continue
            loaded = module.get_delta_weight("a").float()
            refs = [ref for ref in adapter.updates if ref.component == component and _same(ref.path, path)]
            assert len(refs) == 1
            torch.testing.assert_close(loaded, adapter.updates[refs[0]].delta(), rtol=2e-2, atol=1e-4)
            found.add(refs[0])
    # Not one key unexpected or missing: every module of the file is on the model, with its own ΔW.
    assert found == set(adapter.updates)


def _same(in_file: str, in_model: str) -> bool:
    # transformers 5 dropped the level `text_model` from the text encoder.
    return in_file.removeprefix("text_model.") == in_model.removeprefix("text_model.")
