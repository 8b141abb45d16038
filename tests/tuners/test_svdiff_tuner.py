"""SVDiff: its formula, its sums and its community files."""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.functional import set_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regraft import InputError, OutputError, load_adapter
from regraft.adapter import ModuleRef
from regraft.tuners import SvdiffConfig, load_spectral_shifts, save_spectral_shifts
from tuners.cases import LAYERS, Degenerate, base, fresh, other_machines, output, stir, trained
from tuners.real import tiny_clip, tiny_unet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def layer(model: nn.Module, name: str = "lin") -> nn.Module:
    return model.get_submodule(f"base_model.model.{name}")


def shifted(weight: Tensor, delta: Tensor) -> Tensor:
    """W' = U diag(relu(σ + δ)) Vᵀ (eq. 2), by any solver's U and V."""
    u, s, vh = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
    return (u * torch.relu(s + delta) @ vh).reshape(weight.shape)


def merged(model: nn.Module, name: str) -> Tensor:
    return copy.deepcopy(model).merge_and_unload().get_submodule(name).weight.detach()


def test_the_weights_are_those_of_the_paper_s_equation() -> None:
    model = trained("svdiff norms")
    for name in LAYERS:
        delta = layer(model, name).svdiff_delta["default"].detach()
        assert torch.allclose(merged(model, name), shifted(base().get_submodule(name).weight, delta), atol=1e-5)
    delta = layer(model, "norm").svdiff_delta["default"].detach()
    assert torch.allclose(merged(model, "norm"), base().norm.weight + delta, atol=1e-6)


def test_a_scalar_on_a_norm_is_svdiff_pytorch_s() -> None:
    model = trained("svdiff scalar norms")
    delta = layer(model, "norm").svdiff_delta["default"].detach()
    assert delta.shape == (1,)
    assert torch.allclose(merged(model, "norm"), shifted(base().norm.weight[None], delta)[0], atol=1e-6)


def test_no_singular_value_falls_below_0() -> None:
    model = fresh("svdiff")
    layer(model).svdiff_delta["default"].data.fill_(-100.0)
    assert torch.allclose(merged(model, "lin"), torch.zeros(16, 12), atol=1e-5)


def test_active_adapters_add_their_shifts_before_the_relu() -> None:
    """Equation 4; and an adapter made of them, with weights, does the same (eq. 4 and 5)."""
    model = trained("svdiff")
    model.add_adapter("other", SvdiffConfig(target_modules=LAYERS))
    stir(model, 5, "other")
    for name in LAYERS:
        layer(model, name).svdiff_delta["default"].data -= 0.5
    one, two = (layer(model).svdiff_delta[name].detach() for name in ("default", "other"))
    model.base_model.set_adapter(["default", "other"])
    weight = base().lin.weight
    assert torch.allclose(layer(model).delta(["default", "other"]), shifted(weight, one + two) - weight, atol=1e-5)
    joint = output(model)
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.base_model.add_weighted_adapter(["default", "other"], [0.3, 0.7], "between")
    model.set_adapter("sum")
    assert torch.allclose(output(model), joint, atol=1e-5)
    expected = shifted(weight, 0.3 * one + 0.7 * two) - weight
    assert torch.allclose(layer(model).get_delta_weight("between"), expected, atol=1e-5)
    for adapters, weights, name in ((["default"], [1.0, 2.0], "x"), (["none"], [1.0], "x"), (["sum"], [1.0], "other")):
        with pytest.raises(ValueError, match=r"weights|no adapter|is taken"):
            model.base_model.add_weighted_adapter(adapters, weights, name)


def test_shifts_and_single_numbers_on_one_norm_add_up() -> None:
    model = trained("svdiff scalar norms")
    model.add_adapter("other", SvdiffConfig(target_modules=["norm"]))
    stir(model, 5, "other")
    model.base_model.set_adapter(["default", "other"])
    expected = output(model)
    model.merge_adapter()
    assert torch.allclose(output(model), expected, atol=1e-5)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="don't change it in the same way"):
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


def test_a_strength_stands_before_the_shift() -> None:
    model = trained("svdiff")
    delta = layer(model).svdiff_delta["default"].detach()
    model.base_model.set_scale("default", -0.5)
    weight = base().lin.weight
    assert torch.allclose(layer(model).get_delta_weight("default"), shifted(weight, -0.5 * delta) - weight, atol=1e-5)


def test_embeddings_are_changed_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4))
    model = stir(get_peft_model(copy.deepcopy(net), SvdiffConfig(target_modules=["0"])))
    ids = torch.arange(9)
    expected = nn.functional.embedding(ids, shifted(net[0].weight, layer(model, "0").svdiff_delta["default"].detach()))
    assert torch.allclose(model(ids), net[1](expected), atol=1e-5)
    with pytest.raises(TypeError, match="max_norm"):
        get_peft_model(nn.Sequential(nn.Embedding(9, 6, max_norm=1.0)), SvdiffConfig(target_modules=["0"]))


@pytest.mark.parametrize("part", [nn.ReLU(), nn.GroupNorm(2, 4, affine=False), nn.ConvTranspose2d(4, 4, 3)])
def test_modules_without_a_matrix_are_refused(part: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"0: SVDiff can't change {type(part).__name__} layers; it takes Linear"):
        get_peft_model(nn.Sequential(part), SvdiffConfig(target_modules=["0"]))


def test_another_base_is_refused_unless_it_is_a_port(tmp_path: Path) -> None:
    model = trained("svdiff norms")
    model.save_pretrained(tmp_path)
    other = base()
    other.norm.weight.data += 0.2
    with pytest.raises(ValueError, match="norm: the base is not the one that this SVDiff adapter was trained on"):
        PeftModel.from_pretrained(other, tmp_path)
    config = SvdiffConfig.from_pretrained(tmp_path)
    config.base_changed = "port"
    PeftModel.from_pretrained(other, tmp_path, config=config)
    PeftModel.from_pretrained(base().bfloat16(), tmp_path)


def test_repeated_singular_values_mean_the_same_on_another_machine(tmp_path: Path) -> None:
    """Each number belongs to one direction, which equal singular values leave open; and those of 0, too."""
    net = base(net=Degenerate).bfloat16().float()
    model = stir(get_peft_model(copy.deepcopy(net), SvdiffConfig(target_modules=["a", "b", "c"])))
    model.save_pretrained(tmp_path)
    expected = {name: merged(model, name) for name in "abc"}
    for name, weight in expected.items():
        assert not torch.allclose(weight, net.get_submodule(name).weight, atol=1e-2)
    for dtype in other_machines():
        loaded = PeftModel.from_pretrained(copy.deepcopy(net).to(dtype), tmp_path)
        for name, weight in expected.items():
            change = layer(loaded, name).get_delta_weight("default").float()
            assert torch.allclose(change, weight - net.get_submodule(name).weight, atol=1e-5)


def test_equal_shifts_of_equal_singular_values_need_no_basis() -> None:
    """Of an orthogonal weight, σ = 1 throughout: one shift d makes it (1 + d) W, whatever the singular vectors."""
    net = nn.Sequential(nn.Linear(12, 12, bias=False))
    net[0].weight.data = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0]
    model = get_peft_model(copy.deepcopy(net), SvdiffConfig(target_modules=["0"]))
    layer(model, "0").svdiff_delta["default"].data.fill_(0.5)
    torch.testing.assert_close(merged(model, "0"), 1.5 * net[0].weight.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_base_without_values_is_refused(low_memory: bool) -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="0: SVDiff needs the weight's values: load the base before the adapter"):
        get_peft_model(net, SvdiffConfig(target_modules=["0"]), low_cpu_mem_usage=low_memory)


def test_it_converts_to_a_lora_of_full_rank_exactly() -> None:
    model = trained("svdiff", target_modules=["lin", "turned"])
    config, state = convert_to_lora(model, 10)
    lora = get_peft_model(base(), LoraConfig(**{**config.to_dict(), "rank_pattern": {}, "alpha_pattern": {}}))
    set_peft_model_state_dict(lora, state)
    expected = layer(model, "turned").get_delta_weight("default")
    assert torch.allclose(layer(lora, "turned").get_delta_weight("default"), expected, atol=1e-5)


def test_its_community_file_is_written_and_read(tmp_path: Path) -> None:
    model = trained("svdiff scalar norms")
    file = save_spectral_shifts(model, tmp_path)
    assert file.name == "spectral_shifts.safetensors"
    stored = load_file(file)
    assert set(stored) == {f"{name}.delta" for name in (*LAYERS, "norm", "group")}
    assert stored["norm.delta"].shape == (1,)
    net = base()
    assert load_spectral_shifts(net, tmp_path).norm_shift == "scalar"
    assert torch.equal(output(net), output(model))
    adapter = load_adapter(file)
    for name in (*LAYERS, "norm"):
        weight = base().get_submodule(name).weight.detach()
        found = adapter.updates[ModuleRef("unet", name)].merged(weight)
        assert torch.allclose(found, merged(model, name), atol=1e-5)


def test_a_number_per_element_of_a_norm_is_not_the_community_s(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="norm: svdiff-pytorch has one number on a norm"):
        save_spectral_shifts(trained("svdiff norms"), tmp_path)
    with pytest.raises(OutputError, match="there is no SVDiff adapter 'none'"):
        save_spectral_shifts(trained("svdiff"), tmp_path, "none")


@pytest.mark.parametrize(
    ("options", "why"),
    [({"modules_to_save": ["head"]}, r"whole modules \(head\)"), ({"bias": "svdiff_only"}, "biases")],
)
def test_what_its_community_file_has_no_place_for_is_told(options: dict[str, object], why: str, tmp_path: Path) -> None:
    model = trained("svdiff", **options)
    for tuned in (model, model.base_model.model):
        with pytest.raises(OutputError, match=f"default: svdiff-pytorch's files hold shifts alone.* {why} too"):
            save_spectral_shifts(tuned, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_file_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_spectral_shifts(trained("svdiff"), tmp_path / "x.safetensors")
    before = file.read_bytes()

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("regraft.tuners.svdiff.files.save_file", full)
    with pytest.raises(OutputError, match="the disk is full"):
        save_spectral_shifts(trained("svdiff", 3), file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_files_that_don_t_fit_are_refused_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    net = base()
    for tensors, why in (
        ({"none.delta": torch.zeros(3)}, "none: the model has no such module with a weight"),
        ({"lin.weight": torch.zeros(3)}, "lin.weight: is no shift"),
        ({"conv.delta": torch.zeros(8), "lin.delta": torch.zeros(3)}, "lin: has 3 numbers where the module has 12"),
        ({"norm.delta": torch.zeros(3)}, "norm: has 3 numbers where the module has 16"),
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match=why):
            load_spectral_shifts(net, tmp_path / "x.safetensors")
    assert [(name, type(module)) for name, module in net.named_modules()] == [
        (name, type(module)) for name, module in base().named_modules()
    ]
    assert not hasattr(net, "peft_config")


def _shifts(net: nn.Module, names: dict[str, str], seed: int) -> dict[str, Tensor]:
    """Shifts of svdiff-pytorch's for these modules → their names in the file; large enough that the relu cuts some."""
    drawn = torch.Generator().manual_seed(seed)
    found = {}
    for path, name in names.items():
        weight = net.get_submodule(path).weight
        count = 1 if weight.dim() == 1 else min(weight.flatten(1).shape)
        found[f"{name}.delta"] = torch.randn(count, generator=drawn)
    return found


_UNET = "down_blocks.0.attentions.0.transformer_blocks.0"
_UNET_NAMES = {name: name for name in ("conv_in", f"{_UNET}.attn1.to_q", f"{_UNET}.attn2.to_k", f"{_UNET}.norm1")}
_CLIP_NAMES = {
    name: f"text_model.{name}"
    for name in ("embeddings.token_embedding", "encoder.layers.0.self_attn.q_proj", "encoder.layers.0.layer_norm1")
}


@pytest.mark.parametrize(
    ("make", "names", "file"),
    [
        (tiny_unet, _UNET_NAMES, "spectral_shifts.safetensors"),
        (tiny_clip, _CLIP_NAMES, "spectral_shifts_te.safetensors"),
    ],
    ids=["U-Net", "text encoder"],
)
def test_community_files_of_one_model_add_up_and_interpolate(
    make: Callable[[], nn.Module], names: dict[str, str], file: str, tmp_path: Path
) -> None:
    """Equations 4 and 5, relu(σ + δ₁ + δ₂) and relu(σ + α δ₁ + (1 − α) δ₂), on diffusers' and transformers' classes."""
    plain, net = make(), make()
    one, two = (_shifts(plain, names, seed) for seed in (1, 2))
    for folder, shifts in (("one", one), ("two", two)):
        (tmp_path / folder).mkdir()
        save_file(shifts, tmp_path / folder / file)
        load_spectral_shifts(net, tmp_path / folder, folder)

    def expect(first: float, second: float) -> None:
        for path, name in names.items():
            found = net.get_submodule(path)
            weight = plain.get_submodule(path).weight.detach()
            rows = weight if weight.dim() > 1 else weight[None]
            shift = first * one[f"{name}.delta"] + second * two[f"{name}.delta"]
            expected = shifted(rows, shift).reshape(weight.shape)
            active = found.active_adapters
            assert torch.allclose(weight + found.delta(active), expected, atol=1e-5), path

    expect(0, 1)
    set_adapter(net, ["one", "two"])
    expect(1, 1)
    for layer in net.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("one", 0.3)
            layer.set_scale("two", 0.7)
    expect(0.3, 0.7)
    with pytest.raises(InputError, match="has an SVDiff adapter 'one' already"):
        load_spectral_shifts(net, tmp_path / "one", "one")
    again = load_file(save_spectral_shifts(net, tmp_path / "again", "two"))
    assert (tmp_path / "again" / file).is_file()
    assert set(again) == set(two)
    assert all(torch.allclose(again[key], 0.7 * value) for key, value in two.items())


def test_diffusers_own_switches_find_a_community_file(tmp_path: Path) -> None:
    net, plain = tiny_unet(), tiny_unet()
    save_file(_shifts(plain, _UNET_NAMES, 1), tmp_path / "x.safetensors")
    load_spectral_shifts(net, tmp_path / "x.safetensors", "one")
    name = f"{_UNET}.attn1.to_q"
    assert not torch.allclose(net.get_submodule(name).delta(["one"]), torch.zeros(()), atol=1e-3)
    net.set_adapters(["one"], weights=[0.5])
    assert net.get_submodule(name).scaling == {"one": 0.5}
    net.fuse_lora()
    expected = shifted(plain.get_submodule(name).weight, 0.5 * load_file(tmp_path / "x.safetensors")[f"{name}.delta"])
    assert torch.allclose(net.get_submodule(name).base_layer.weight, expected, atol=1e-5)
