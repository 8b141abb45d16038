from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ldm
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from regraft.errors import InputError, RegraftError
from regraft.runtime import load_model

IDS = torch.arange(6).reshape(1, 6)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.unet(tmp_path_factory.mktemp("models") / "unet")


def test_each_kind_of_base_becomes_its_own_class(bert: Path, unet: Path, tmp_path: Path) -> None:
    cases = {
        "LlamaForCausalLM": (tiny.llama(tmp_path / "llama"), "language"),
        "BertModel": (bert, "encoder"),
        "BertForMaskedLM": (tiny.bert(tmp_path / "mlm", head=True), "encoder"),
        "UNet2DConditionModel": (unet, "denoiser"),
        "StableDiffusionPipeline": (tiny.pipeline(tmp_path / "pipe"), "denoiser"),
    }
    for name, (folder, kind) in cases.items():
        loaded = load_model(folder)
        assert (loaded.name, loaded.kind) == (name, kind)
        assert not any(model.training for model in loaded.components.values())
        assert not any(p.requires_grad for model in loaded.components.values() for p in model.parameters())
    assert list(load_model(tmp_path / "pipe").components) == ["unet", "text_encoder"]
    assert not torch.backends.mha.get_fastpath_enabled()


def test_a_bare_weights_file_runs_with_its_config(bert: Path, unet: Path, tmp_path: Path) -> None:
    whole = load_model(bert).main
    file = tmp_path / "weights.safetensors"
    state = load_file(bert / "model.safetensors")
    prefixed = {f"bert.{name}": value for name, value in state.items()}
    buffers = {**state, "embeddings.position_ids": torch.arange(40)[None]}
    for tensors in (state, prefixed, buffers):
        save_file(tensors, file)
        for config in (bert, bert / "config.json"):
            assert torch.equal(load_model(file, config=config).main(IDS)[0], whole(IDS)[0])
    shutil.copy(unet / "diffusion_pytorch_model.safetensors", file)
    alone = load_model(file, config=unet)
    assert list(alone.components) == ["unet"]
    folder = load_model(unet).main.state_dict()
    assert all(torch.equal(value, folder[name]) for name, value in alone.main.state_dict().items())
    assert load_model(bert / "model.safetensors").name == "BertModel"


def test_a_bare_file_without_config_asks_for_it(bert: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    shutil.copy(bert / "model.safetensors", file)
    with pytest.raises(InputError, match=r"does not say which model it is for.*--config"):
        load_model(file)


def test_weights_that_do_not_fit_the_config_are_named(bert: Path, unet: Path, tmp_path: Path) -> None:
    state, file = load_file(bert / "model.safetensors"), tmp_path / "weights.safetensors"
    gone = "encoder.layer.1.output.dense.weight"
    save_file({name: value for name, value in state.items() if name != gone}, file)
    with pytest.raises(InputError, match=f"lacks 1 tensors: {gone}"):
        load_model(file, config=bert)
    save_file({**state, "stray.weight": torch.zeros(2)}, file)
    with pytest.raises(InputError, match=r"has, beyond what its config asks for, 1 tensors: stray\.weight"):
        load_model(file, config=bert)
    save_file({**state, gone: torch.zeros(3, 3)}, file)
    with pytest.raises(InputError, match="don't have the shapes of the config"):
        load_model(file, config=bert)
    weights = load_file(unet / "diffusion_pytorch_model.safetensors")
    save_file({**weights, "conv_in.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(InputError, match="don't have the shapes of the config"):
        load_model(file, config=unet)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(InputError, match="lacks"):
        load_model(file, config=unet)


def test_a_folder_with_missing_weights_is_not_filled_with_random_ones(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    state = load_file(bert / "model.safetensors")
    del state["encoder.layer.0.output.dense.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 tensors"):
        load_model(folder)


def test_configs_that_name_no_known_model_are_errors(bert: Path, tmp_path: Path) -> None:
    weights, config = bert / "model.safetensors", tmp_path / "config.json"
    for content, message in (
        ({}, "is no config of a transformers or diffusers model"),
        ({"_class_name": "NoSuchModel"}, "has no NoSuchModel"),
        ({"model_type": "no_such", "architectures": ["NoSuch"]}, "has no model type 'no_such'"),
        ({"_class_name": "FluxTransformer2DModel"}, "alone can't be run"),
    ):
        config.write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            load_model(weights, config=config)
    config.write_text("{")
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(weights, config=config)
    with pytest.raises(InputError, match="no such file or folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(RegraftError, match="no device 'nowhere'"):
        load_model(bert, device="nowhere")
    with pytest.raises(RegraftError, match="no dtype"):
        load_model(bert, dtype="int4")


def test_a_config_without_architectures_gives_the_plain_model(bert: Path, tmp_path: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(bert / "model.safetensors", config=tmp_path).name == "BertModel"


def test_a_missing_library_is_told_with_its_remedy(unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(RegraftError, match=r"diffusers is not installed.*pip install 'regraft\[run\]'"):
        load_model(unet)


def test_another_dtype_is_run_in(bert: Path) -> None:
    assert load_model(bert, dtype="bfloat16").main.dtype == torch.bfloat16


def test_a_single_file_checkpoint_is_read_with_its_pipelines_folder(tmp_path: Path) -> None:
    folder = load_model(tiny.pipeline(tmp_path / "folder"))
    file = ldm.write_single_file(folder.pipeline, tmp_path / "single.safetensors")
    single = load_model(file, config=tmp_path / "folder")
    assert single.name == "StableDiffusionPipeline"
    for name, model in folder.components.items():
        state = single.components[name].state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(InputError, match="does not fit the pipeline"):
        load_model(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors", config=tmp_path / "folder")


def test_a_pipeline_with_a_lora_gives_what_diffusers_gives(tmp_path: Path) -> None:
    from regraft.runtime import applied

    base = load_model(tiny.pipeline(tmp_path / "base"))
    adapter = tiny.lora(dict(base.components), ["to_q", "to_v", "proj_in", "v_proj"], size=0.3)
    tensors = {}
    for ref, update in adapter.updates.items():
        tensors[f"{ref}.lora_A.weight"] = update.down.load().contiguous()
        tensors[f"{ref}.lora_B.weight"] = (update.up.load() * update.scale).contiguous()
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")

    def latents() -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        return base.pipeline("a cat", num_inference_steps=3, generator=noise, output_type="latent").images

    plain = latents()
    with applied(base.components, adapter):
        ours = latents()
    base.pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    theirs = latents()
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (ours - plain).abs().max() > 1e-2 * plain.abs().max()


@pytest.mark.slow  # a process of its own, to import diffusers anew
def test_a_library_that_is_imported_while_it_is_to_be_quiet_is_quiet_until_the_end() -> None:
    said = """
from regraft.runtime.libraries import quiet_libraries
with quiet_libraries():
    with quiet_libraries():
        import diffusers
        log = diffusers.utils.logging.get_logger("diffusers.x")
        log.warning("inner")
    log.warning("outer")
log.warning("after")
"""
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    heard = [word for word in ("inner", "outer", "after") if word in done.stderr]
    assert heard == ["after"]
