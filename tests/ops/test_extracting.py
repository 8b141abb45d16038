"""A LoRA out of two checkpoints: the known one comes back, and the tuned model's outputs with it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters_made import close, noise
from diffusers import UNet2DConditionModel
from peft import PeftModel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from regraft import InputError, ModuleRef, OutputError, Refused, UsageError, load_adapter, open_base
from regraft.ops.extract import Settings, extract, extract_adapter
from regraft.plan import Selection
from regraft.updates import LowRank
from toys import deltas, llama, lora, relative_error, save_base

FULL = Settings(energy=1.0)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def _llama(vocabulary: int = 32) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_key_value_heads=1, **sizes))


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8))


def _tuned(model: nn.Module, chosen: Callable[[str], bool] = lambda name: True) -> nn.Module:
    tuned = copy.deepcopy(model)
    for i, (name, parameter) in enumerate(tuned.named_parameters()):
        if chosen(name):
            parameter.data += noise(*parameter.shape, seed=i)
    return tuned


def _save(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_a_known_lora_comes_back_from_what_it_changed(tmp_path: Path) -> None:
    state, known = llama(), lora(llama(), rank=4)
    tuned = dict(state)
    for ref, delta in deltas(known).items():
        tuned[f"{ref.path}.weight"] = state[f"{ref.path}.weight"] + delta
    base, new = save_base(state, tmp_path / "old.safetensors"), save_base(tuned, tmp_path / "new.safetensors")
    report = extract_adapter(base, new, tmp_path / "out", Settings(rank=4))
    found = load_adapter(tmp_path / "out")
    assert found.updates.keys() == known.updates.keys()
    for ref, delta in deltas(known).items():
        assert relative_error(found.updates[ref].delta(), delta) < 1e-5
    assert report.energy_kept == pytest.approx(1.0, abs=1e-6)
    assert report.unchanged == len(state) - len(known.updates)
    # No more rank than the change has, up to the noise of float32.
    more = extract_adapter(base, new, tmp_path / "more", Settings(rank=9, energy=0.999999))
    assert {row.rank for row in more.modules} == {4}


@pytest.mark.parametrize("make", [_llama, _gpt2], ids=["llama", "gpt2"])
def test_at_full_rank_peft_gives_the_tuned_models_outputs(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    # GPT-2's embedding is its output layer too, which PEFT's LoRA of the embedding does not reach.
    tuned = _tuned(model, lambda name: "wte" not in name)
    old, new = _save(model, tmp_path / "old"), _save(tuned, tmp_path / "new")
    report = extract_adapter(old, new, tmp_path / "out", FULL)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert float((loaded(ids).logits - tuned(ids).logits).abs().max()) <= 1e-5
        assert float((model(ids).logits - tuned(ids).logits).abs().max()) > 1e-2
    kinds = {row.kind for row in report.modules}
    assert kinds == {"lora", "full"}


def test_an_embedding_that_is_the_output_layer_too_is_said_to_be(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _gpt2()
    old, new = _save(model, tmp_path / "old"), _save(_tuned(model), tmp_path / "new")
    report = extract_adapter(old, new, tmp_path / "out", Settings(rank=2))
    assert any("transformer.wte" in note and "output" in note for note in report.notes)


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny U-Net and its fine-tune, weights of linear layers and convolutions alone, as pipelines lie on disk."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    tuned = _tuned(model, lambda name: name.endswith(".weight") and "norm" not in name)
    folders = []
    for name, unet in (("old", model), ("new", tuned)):
        folder = tmp_path_factory.mktemp(name)
        unet.save_pretrained(folder / "unet")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
        folders.append(folder)
    return folders[0], folders[1]


def _denoised(unet: nn.Module) -> Tensor:
    with torch.no_grad():
        sample, text = noise(1, 4, 8, 8, seed=1) * 20, noise(1, 5, 8, seed=2) * 20
        return unet(sample, torch.tensor([7]), encoder_hidden_states=text).sample


def test_at_full_rank_diffusers_gives_the_tuned_unets_outputs(unets: tuple[Path, Path], tmp_path: Path) -> None:
    extract_adapter(*unets, tmp_path / "out.safetensors", FULL, format="diffusers")
    old, new = (UNet2DConditionModel.from_pretrained(folder / "unet") for folder in unets)
    before = _denoised(old)
    old.load_lora_adapter(str(tmp_path / "out.safetensors"), prefix="unet")
    assert float((_denoised(old) - _denoised(new)).abs().max()) <= 1e-5
    assert float((before - _denoised(new)).abs().max()) > 1e-2


def test_convolutions_are_extracted_as_convolutions(unets: tuple[Path, Path]) -> None:
    adapter, _ = extract(*map(open_base, unets), "diffusers", Settings(rank=2))
    shapes = {update.shape[2:] for update in adapter.updates.values()}
    assert shapes == {(), (1, 1), (3, 3)}
    assert all(isinstance(update, LowRank) and update.rank <= 2 for update in adapter.updates.values())


@pytest.mark.parametrize("format", ["lycoris", "comfyui", "peft"])
def test_norms_and_biases_come_along_where_the_format_holds_them(format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3), "norm": nn.LayerNorm(8), "proj": nn.Linear(8, 6)})
    tuned = _tuned(model)
    for name, unet in (("old", model), ("new", tuned)):
        save_base({key: t.detach() for key, t in unet.state_dict().items()}, tmp_path / name / "unet" / WEIGHTS)
        (tmp_path / name / "model_index.json").write_text("{}")
    out = tmp_path / ("out" if format == "peft" else "out.safetensors")
    extract_adapter(tmp_path / "old", tmp_path / "new", out, FULL, format=format)
    names = tuple(model.state_dict())
    back = load_adapter(out, names={"unet": names, "model": names})
    changed = {ref.path if update.by_parameter else f"{ref.path}.weight" for ref, update in back.updates.items()}
    assert changed == set(names)
    for ref, update in back.updates.items():
        name = ref.path if update.by_parameter else f"{ref.path}.weight"
        assert close(update.merged(model.state_dict()[name]), tuned.state_dict()[name])


def test_only_what_is_asked_for_is_extracted(unets: tuple[Path, Path]) -> None:
    chosen = Settings(rank=2, selection=Selection(include=("*attn2*",), exclude=("*to_q",)))
    adapter, report = extract(*map(open_base, unets), "diffusers", chosen)
    assert adapter.updates
    assert all("attn2" in ref.path and not ref.path.endswith("to_q") for ref in adapter.updates)
    assert len(report.modules) == len(adapter.updates)


def test_what_the_format_has_no_place_for_is_said(tmp_path: Path) -> None:
    state = llama()
    tuned = {name: tensor + noise(*tensor.shape) for name, tensor in state.items() if "lm_head" not in name}
    base, new = save_base(state, tmp_path / "old.safetensors"), save_base(tuned, tmp_path / "new.safetensors")
    _, report = extract(open_base(base), open_base(new), "peft", Settings(rank=2))
    left = {row.name: row.reason for row in report.modules if row.kind is None}
    assert left == {"lm_head.weight": "is not in the tuned checkpoint"}


def test_norms_and_biases_of_a_pipeline_are_left_out_of_kohyas_files_and_named(
    unets: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(unets[0], tmp_path / "new")
    unet = _tuned(UNet2DConditionModel.from_pretrained(unets[0] / "unet"))
    unet.save_pretrained(tmp_path / "new" / "unet")
    report = extract_adapter(unets[0], tmp_path / "new", tmp_path / "out.safetensors", Settings(rank=2))
    left = {row.name.removeprefix("unet.") for row in report.modules if row.kind is None}
    assert left == {name for name, value in unet.named_parameters() if value.dim() < 2}


def test_a_selection_of_nothing_is_said(unets: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="selected"):
        extract_adapter(*unets, tmp_path / "out", Settings(rank=2, selection=Selection(include=("none*",))))


def test_a_cast_alone_is_no_change(tmp_path: Path) -> None:
    state = llama()
    half = {name: tensor.half() for name, tensor in state.items()}
    base, new = save_base(state, tmp_path / "old.safetensors"), save_base(half, tmp_path / "new.safetensors")
    with pytest.raises(InputError, match="nothing to extract"):
        extract_adapter(base, new, tmp_path / "out", Settings(rank=2))
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused(unets: tuple[Path, Path], tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "old.safetensors")
    with pytest.raises((Refused, InputError, OutputError)):
        extract_adapter(base, unets[1], tmp_path / "out", Settings(rank=2))


@pytest.mark.parametrize("settings", [Settings(), Settings(rank=0), Settings(energy=2.0)])
def test_a_size_that_is_none_is_a_usage_error(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        extract_adapter(tmp_path / "a", tmp_path / "b", tmp_path / "out", settings)


def test_the_ranks_energy_is_that_of_the_kept_singular_values(tmp_path: Path) -> None:
    state = llama(layers=1)
    name = "model.layers.0.mlp.up_proj"
    change = noise(*state[f"{name}.weight"].shape, seed=4)
    tuned = {**state, f"{name}.weight": state[f"{name}.weight"] + change}
    base, new = save_base(state, tmp_path / "old.safetensors"), save_base(tuned, tmp_path / "new.safetensors")
    adapter, report = extract(open_base(base), open_base(new), "peft", Settings(rank=3))
    s = torch.linalg.svdvals(change.double()).square()
    assert report.modules[0].energy_kept == pytest.approx(float(s[:3].sum() / s.sum()), rel=1e-4)
    assert not close(adapter.updates[ModuleRef("model", name)].delta(), change, 0.1)
