"""What the tuners save, regraft reads: the same ΔW, the same bytes back, and a way to another base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regraft import InputError, OutputError, load_adapter, open_base, port
from regraft.adapter import MODEL, ModuleRef
from regraft.demo import data_folder
from regraft.inspection import inspect_adapter
from regraft.ops.convert import convert_adapter
from regraft.runtime import load_model
from tuners.cases import CASES, MERGEABLE, base, output, stir, trained
from tuners.real import TUNERS, tiny_gpt2
from verify import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def weight(name: str) -> Tensor:
    return base().get_submodule(name).weight.detach()


@pytest.mark.parametrize("case", MERGEABLE)
def test_regraft_reads_the_same_change(case: str, tmp_path: Path) -> None:
    model = trained(case)
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.unrecognised == ()
    targets = CASES[case][1]["target_modules"]
    assert set(adapter.updates) == {ModuleRef(MODEL, name) for name in targets}
    assert inspect_adapter(tmp_path).components[MODEL].kinds == {case.split()[0]: len(targets)}
    for name in targets:
        update = adapter.updates[ModuleRef(MODEL, name)]
        delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        assert update.fits(tuple(delta.shape))
        assert torch.allclose(update.delta(weight(name)), delta, atol=1e-5)
        assert torch.allclose(update.scaled(0.5).merged(weight(name)), half(model, name), atol=1e-5)


def half(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(f"base_model.model.{name}")
    layer.set_scale("default", 0.5)
    changed = weight(name) + layer.get_delta_weight("default").detach()
    layer.set_scale("default", 1.0)
    return changed


@pytest.mark.parametrize("case", MERGEABLE)
def test_what_regraft_writes_peft_loads(case: str, tmp_path: Path) -> None:
    model = trained(case)
    model.save_pretrained(tmp_path / "theirs")
    load_adapter(tmp_path / "theirs").save(tmp_path / "ours")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert set(after) == set(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    configs = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "ours")]
    assert configs[0] == configs[1]
    loaded = PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert torch.equal(output(loaded), output(model))


def test_a_gate_that_depends_on_the_input_is_told(tmp_path: Path) -> None:
    trained("foura").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"foura_gate: is of a gate that depends on the input.*freeze_gate"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("case", ["lorax", "svdiff norms"])
def test_another_base_is_refused(case: str, tmp_path: Path) -> None:
    trained(case).save_pretrained(tmp_path)
    update = load_adapter(tmp_path).updates[ModuleRef(MODEL, "lin")]
    with pytest.raises(InputError, match=r"the base is not the one .* \(the weight differs by about"):
        update.delta(weight("lin") + 0.1 * torch.randn(16, 12))


@pytest.mark.parametrize(
    ("case", "change", "why"),
    [
        ("lorax", {"lin.lorax_sigma": torch.zeros(2, 3)}, "its sigma has 2 where its other side has 3"),
        ("lorax stored", {"lin.lorax_u": None}, "only one of lorax_u and lorax_v"),
        ("lorax", {"lin.lorax_sigma": None}, "no matching lorax_sigma"),
        ("svdiff", {"lin.svdiff_delta": torch.zeros(2, 3)}, "its shift must have 1 dimensions"),
        ("foura none", {"lin.foura_a": torch.zeros(3, 12)}, "its b has 4 where a"),
        ("foura none", {"lin.foura_b": None}, "no matching foura_b"),
        ("foura frozen", {"lin.foura_mask": torch.zeros(3)}, "its mask has 3 where a"),
        ("foura none fft", {"lin.foura_size": torch.tensor([16, 99])}, "its a has 7 where the transform of 99"),
        ("foura none fft", {"lin.foura_size": torch.tensor([16])}, "foura_size: must be two whole numbers"),
        ("foura none", {"lin.foura_a": torch.zeros(4, 12, dtype=torch.int32)}, "not a float"),
    ],
)
def test_damaged_files_are_told_in_a_line(
    case: str, change: dict[str, Tensor | None], why: str, tmp_path: Path
) -> None:
    trained(case).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for key, value in change.items():
        del tensors[f"base_model.model.{key}"]
        if value is not None:
            tensors[f"base_model.model.{key}"] = value
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=why) as error:
        load_adapter(tmp_path)
    assert "\n" not in str(error.value)


def test_a_config_without_its_alpha_is_told(tmp_path: Path) -> None:
    trained("foura none").save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for field, value, why in (("foura_alpha", None, "foura_alpha: is missing"), ("conv1d_modules", 3, "list of names")):
        (tmp_path / CONFIG).write_text(json.dumps({**config, field: value}))
        with pytest.raises(InputError, match=why):
            load_adapter(tmp_path)


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_conv1d_of_gpt2_has_its_orientation(tuner: str, tmp_path: Path) -> None:
    kind, options = TUNERS[tuner]
    model = stir(get_peft_model(tiny_gpt2(), kind(target_modules=["c_attn", "c_proj", "lm_head"], **options)))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    adapter = load_adapter(tmp_path)
    found = dict(tiny_gpt2().named_parameters())
    assert len(adapter.updates) == 7
    for ref, update in adapter.updates.items():
        before = found.get(f"{ref.path}.weight", found["transformer.wte.weight"]).detach()
        delta = model.get_submodule(f"base_model.model.{ref.path}").get_delta_weight("default")
        assert torch.allclose(update.delta(before), delta, atol=1e-5)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return tiny.llama(folder / "old"), tiny.llama(folder / "new", drift=0.1)


def on(path: Path) -> nn.Module:
    return load_model(path).main.float().eval()


@pytest.mark.parametrize("method", ["copy", "lora-x"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_it_is_ported_as_the_lora_of_its_change(
    tuner: str, method: str, bases: tuple[Path, Path], tmp_path: Path
) -> None:
    kind, options = TUNERS[tuner]
    model = stir(get_peft_model(on(bases[0]), kind(target_modules=["q_proj", "v_proj"], **options)))
    model.save_pretrained(tmp_path / "theirs")
    old, new = (open_base(path) for path in bases)
    result = port(load_adapter(tmp_path / "theirs"), old, new, method)
    result.save(tmp_path / "ported")
    ported = PeftModel.from_pretrained(on(bases[1]), tmp_path / "ported")
    if method == "copy":
        for name, layer in model.named_modules():
            if name.endswith(("q_proj", "v_proj")):
                expected, found = layer.get_delta_weight("default"), ported.get_submodule(name)
                assert torch.allclose(found.get_delta_weight("default"), expected, atol=1e-4)
    kinds = {update.kind for update in load_adapter(tmp_path / "ported").updates.values()}
    # A FouRA is a plain change: a copy keeps its file.
    assert kinds == ({"foura"} if tuner.startswith("foura") and method == "copy" else {"lora"})


@pytest.mark.parametrize("tuner", TUNERS)
def test_it_converts_to_another_format_as_the_lora_of_its_change(tuner: str, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    pipeline = data_folder() / "v1"
    kind, options = TUNERS[tuner]
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    model = stir(get_peft_model(unet, kind(target_modules=["attn1.to_q", "attn2.to_v"], **options)))
    model.save_pretrained(tmp_path / "theirs")
    target = tmp_path / "x.safetensors"
    plain = tuner.startswith("foura")
    if not plain:
        with pytest.raises(OutputError, match=r"would be lost.*--base"):
            convert_adapter(tmp_path / "theirs", target, "kohya")
    convert_adapter(tmp_path / "theirs", target, "kohya", base=None if plain else pipeline, energy=1.0)
    updates = {ref.path: update for ref, update in load_adapter(target).updates.items()}
    for name, layer in model.base_model.model.named_modules():
        if name.endswith(("attn1.to_q", "attn2.to_v")):
            delta = layer.get_delta_weight("default")
            assert torch.allclose(updates[name].delta(), delta, atol=1e-4)


def test_a_community_file_becomes_a_folder_that_peft_loads(tmp_path: Path) -> None:
    from regraft.tuners import save_spectral_shifts

    model = trained("svdiff scalar norms")
    save_spectral_shifts(model, tmp_path / "x.safetensors")
    convert_adapter(tmp_path / "x.safetensors", tmp_path / "folder", "peft")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "folder").eval()
    assert torch.equal(output(loaded), output(model))


def test_a_number_per_element_of_a_norm_becomes_no_community_file(tmp_path: Path) -> None:
    """svdiff-pytorch has no place for it; with a number per norm its file says the same as PEFT's folder."""
    from diffusers import UNet2DConditionModel

    from regraft.tuners import SvdiffConfig

    attention = "down_blocks.0.attentions.0.transformer_blocks.0"
    targets = [f"{attention}.attn1.to_q", f"{attention}.norm1", "mid_block.resnets.0.norm1"]
    base_folder, target = data_folder() / "v1", tmp_path / "out"
    for shift in ("element", "scalar"):
        unet = UNet2DConditionModel.from_pretrained(base_folder / "unet")
        model = stir(get_peft_model(unet, SvdiffConfig(target_modules=targets, norm_shift=shift)))
        model.save_pretrained(tmp_path / shift)
    with pytest.raises(OutputError, match=r"2 modules in all.*svdiff-pytorch has one number on a norm"):
        convert_adapter(tmp_path / "element", target, "svdiff", base=base_folder)
    lost = convert_adapter(tmp_path / "element", target, "svdiff", base=base_folder, dry_run=True).changes
    assert sorted(row.name.removeprefix("unet.") for row in lost) == sorted(targets[1:])
    assert not target.exists()
    convert_adapter(tmp_path / "scalar", target, "svdiff", base=base_folder)
    assert set(load_file(target / "spectral_shifts.safetensors")) == {f"{name}.delta" for name in targets}


@pytest.mark.parametrize("case", ["lorax", "svdiff norms", "foura none"])
def test_whole_modules_and_biases_are_read_beside(case: str, tmp_path: Path) -> None:
    prefix = CASES[case][0](target_modules=["x"]).peft_type.value.lower()
    model = trained(case, modules_to_save=["head"], bias=f"{prefix}_only")
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.unrecognised == ()
    whole = {ref.path: update.merged(torch.zeros(0)) for ref, update in adapter.updates.items() if update.by_parameter}
    assert {"head.weight", "head.bias", "lin.bias"} <= set(whole)
    assert torch.equal(whole["head.weight"], model.base_model.model.head.modules_to_save["default"].weight)
    assert torch.equal(whole["lin.bias"], model.base_model.model.lin.base_layer.bias)
    adapter.save(tmp_path / "ours")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert torch.equal(output(loaded), output(model))
