"""LoRA-X: its subspaces, the base that it belongs to, and its own way to another base."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from regraft import load_adapter
from regraft.adapter import MODEL, ModuleRef
from regraft.tuners import LoraXConfig, transfer_lorax
from tuners.cases import LAYERS, Degenerate, base, data, fresh, other_machines, output, stir, trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def layer(model: nn.Module, name: str = "lin") -> nn.Module:
    return model.get_submodule(f"base_model.model.{name}")


def drifted(amount: float) -> nn.Module:
    model = base()
    torch.manual_seed(9)
    for name in LAYERS:
        weight = model.get_submodule(name).weight
        weight.data += amount * weight.std() * torch.randn_like(weight)
    return model


def test_the_change_stays_in_the_leading_subspaces() -> None:
    """U Uᵀ ΔW V Vᵀ = ΔW (eq. 2), with the singular vectors that any solver gives."""
    for case in ("lorax", "lorax full"):
        model = trained(case)
        for name in LAYERS:
            weight = base().get_submodule(name).weight.detach().flatten(1)
            u, _, vh = torch.linalg.svd(weight, full_matrices=False)
            delta = layer(model, name).get_delta_weight("default").detach().flatten(1)
            projected = u[:, :5] @ u[:, :5].mT @ delta @ vh[:5].mT @ vh[:5]
            assert torch.allclose(projected, delta, atol=1e-5)


def test_a_diagonal_moves_the_singular_values_alone() -> None:
    model = trained("lorax", r=12, target_modules=["lin"])
    weight = base().lin.weight.detach()
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    sigma = layer(model).lorax_sigma["default"].detach()
    assert torch.allclose(layer(model).get_delta_weight("default"), u * sigma @ vh, atol=1e-5)


def test_r_numbers_per_module_are_trained_and_stored(tmp_path: Path) -> None:
    model = trained("lorax")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 5 * len(LAYERS)
    model.save_pretrained(tmp_path)
    shapes = {
        key.rpartition(".")[2]: list(value.shape)
        for key, value in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    assert shapes == {"lorax_sigma": [5], "lorax_print": [16]}


def test_an_energy_s_ranks_are_written_into_the_config() -> None:
    model = trained("lorax energy")
    ranks = model.peft_config["default"].rank_pattern
    assert set(ranks) == {f"^{name}" for name in LAYERS}
    for name in LAYERS:
        s = torch.linalg.svdvals(base().get_submodule(name).weight.detach().flatten(1)).square()
        rank = ranks[f"^{name}"]
        assert s[: rank - 1].sum() < 0.7 * s.sum() <= s[:rank].sum() * (1 + 1e-6)


def test_another_base_is_refused_unless_it_is_a_port(tmp_path: Path) -> None:
    trained("lorax").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lin: the base is not the one .* \(the weight differs by about \d"):
        PeftModel.from_pretrained(drifted(0.3), tmp_path)
    config = LoraXConfig.from_pretrained(tmp_path)
    config.base_changed = "port"
    ported = PeftModel.from_pretrained(drifted(0.3), tmp_path, config=config)
    stored = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.lin.lorax_sigma"]
    assert torch.equal(layer(ported).lorax_sigma["default"], stored)
    # What is saved from there belongs to the new base.
    ported.save_pretrained(tmp_path / "ported")
    PeftModel.from_pretrained(drifted(0.3), tmp_path / "ported")


def test_stored_bases_need_no_base_to_tell_the_change(tmp_path: Path) -> None:
    model = trained("lorax stored")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(drifted(0.5), tmp_path)
    for name in LAYERS:
        expected = layer(model, name).get_delta_weight("default")
        assert torch.equal(layer(loaded, name).get_delta_weight("default"), expected)


@pytest.mark.parametrize("full", [False, True])
def test_rounding_the_base_is_no_change_of_it(full: bool, tmp_path: Path) -> None:
    """Not even for a matrix on the directions, whose signs rounding turns over now and then."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(320, 320, bias=False))
    net[0].weight.data.normal_()
    model = stir(get_peft_model(copy.deepcopy(net), LoraXConfig(r=48, full=full, target_modules=["0"])))
    model.save_pretrained(tmp_path)
    expected = layer(model, "0").get_delta_weight("default").detach()
    loaded = PeftModel.from_pretrained(copy.deepcopy(net).bfloat16(), tmp_path)
    found = layer(loaded, "0").get_delta_weight("default")
    assert (found - expected).norm() < 0.15 * expected.norm()
    read = load_adapter(tmp_path).updates[ModuleRef(MODEL, "0")].delta(net[0].weight.detach().bfloat16())
    assert torch.allclose(read, found, atol=1e-4)
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "again")
    assert torch.allclose(layer(again, "0").get_delta_weight("default"), expected, atol=1e-4)


@pytest.mark.parametrize("full", [False, True])
def test_repeated_singular_values_mean_the_same_on_another_machine(full: bool, tmp_path: Path) -> None:
    """Other threads, another dtype of the same values, and another solver's choice of basis."""
    config = LoraXConfig(r=8, full=full, target_modules=["a", "b", "c"])
    net = base(net=Degenerate).bfloat16().float()
    model = stir(get_peft_model(copy.deepcopy(net), config))
    model.save_pretrained(tmp_path)
    expected = {name: layer(model, name).get_delta_weight("default") for name in "abc"}
    for dtype in other_machines():
        loaded = PeftModel.from_pretrained(copy.deepcopy(net).to(dtype), tmp_path)
        for name, delta in expected.items():
            assert torch.allclose(layer(loaded, name).get_delta_weight("default"), delta, atol=1e-5)


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="0: LoRA-X needs the weight's values: load the base before the adapter"):
        get_peft_model(net, LoraXConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("options", [{"r": 2}, {"energy": 0.5}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_with_nan_or_inf_are_refused(value: float, options: dict[str, float]) -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    net[0].weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"^0: the weight holds NaN or Inf"):
        get_peft_model(net, LoraXConfig(target_modules=["0"], **options))


def test_a_rank_above_the_smaller_side_is_refused() -> None:
    with pytest.raises(ValueError, match="turned: r = 12 is above 10, the number of its singular values"):
        fresh("lorax", r=12)


@pytest.mark.parametrize(
    ("net", "name", "why"),
    [
        (lambda: nn.Sequential(nn.Embedding(8, 8)), "0", "0: LoRA-X can't change Embedding layers; it takes Linear"),
        (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)), "0", "0: LoRA-X can't change a convolution in groups"),
        (lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), "out_proj", "which reads this weight itself"),
    ],
)
def test_modules_that_it_can_t_take_are_named_with_the_reason(net: type, name: str, why: str) -> None:
    with pytest.raises(TypeError, match=why):
        get_peft_model(net(), LoraXConfig(r=2, target_modules=[name]))


@pytest.mark.parametrize(
    "options",
    [{"r": 0}, {"r": 2.5}, {"energy": 0}, {"energy": 1.5}, {"rank_pattern": {"a": -1}}, {"base_changed": "yes"}],
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))}.* must be "):
        LoraXConfig(target_modules=["lin"], **options)


def test_an_adapter_that_fails_leaves_the_others_whole() -> None:
    model = trained("lorax")
    before = output(model)
    with pytest.raises(ValueError, match="is above"):
        model.add_adapter("other", LoraXConfig(r=12, target_modules=LAYERS))
    assert torch.equal(output(model), before)


def test_kept_singular_vectors_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fresh("lorax", svd_cache=str(tmp_path / "kept"))
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == len(LAYERS)
    monkeypatch.setattr("regraft.tuners._vectors.decompose", None)
    second = fresh("lorax", svd_cache=str(tmp_path / "kept"))
    assert torch.equal(layer(first).lorax_u["default"], layer(second).lorax_u["default"])
    assert "svd_cache" not in first.peft_config["default"].to_dict()


def test_a_second_adapter_of_a_layer_takes_the_first_one_s_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("lorax")
    monkeypatch.setattr("regraft.tuners._vectors.decompose", None)
    model.add_adapter("other", LoraXConfig(r=3, target_modules=LAYERS))
    assert torch.equal(layer(model).lorax_u["other"], layer(model).lorax_u["default"][:, :3])


@pytest.mark.parametrize("case", ["lorax", "lorax full"])
def test_it_converts_to_a_lora_of_its_rank_exactly(case: str) -> None:
    model = trained(case, target_modules=["lin", "turned"])
    config, state = convert_to_lora(model, 5)
    lora = get_peft_model(base(), LoraConfig(**{**config.to_dict(), "fan_in_fan_out": False}))
    set_peft_model_state_dict(lora, state)
    assert torch.allclose(output(lora.eval()), output(model), atol=1e-5)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(trained(case), 5)


def test_the_transfer_to_the_same_base_is_exact() -> None:
    for case in ("lorax", "lorax full"):
        old, new = trained(case), fresh(case)
        kept = transfer_lorax(old, new)
        assert kept == pytest.approx(dict.fromkeys(LAYERS, 1.0), abs=1e-4)
        assert torch.allclose(output(new), output(old), atol=1e-5)


def test_the_transfer_to_another_base_is_the_paper_s_projection() -> None:
    """ΔW_t = U_t U_tᵀ ΔW_s V_t V_tᵀ (eq. 3); at full rank of a square weight it is a copy."""
    old = trained("lorax full")
    new = get_peft_model(drifted(0.5), LoraXConfig(r=5, full=True, target_modules=LAYERS))
    kept = transfer_lorax(old, new)
    for name in LAYERS:
        weight = drifted(0.5).get_submodule(name).weight.detach().flatten(1)
        u, _, vh = torch.linalg.svd(weight, full_matrices=False)
        change = layer(old, name).get_delta_weight("default").detach().flatten(1)
        expected = u[:, :5] @ u[:, :5].mT @ change @ vh[:5].mT @ vh[:5]
        found = layer(new, name).get_delta_weight("default").detach().flatten(1)
        assert torch.allclose(found, expected, atol=1e-5)
        assert kept[name] == pytest.approx(float(expected.square().sum() / change.square().sum()), abs=1e-4)


def test_the_transfer_to_another_size_goes_by_index() -> None:
    torch.manual_seed(0)
    old = stir(get_peft_model(nn.Sequential(nn.Linear(6, 8)), LoraXConfig(r=4, target_modules=["0"])))
    new = get_peft_model(nn.Sequential(nn.Linear(7, 9)), LoraXConfig(r=5, target_modules=["0"]))
    assert transfer_lorax(old, new) == {"0": -1.0}
    assert torch.equal(layer(new, "0").lorax_sigma["default"][:4], layer(old, "0").lorax_sigma["default"])
    wrong = get_peft_model(base(), LoraXConfig(r=4, target_modules=["lin"]))
    with pytest.raises(ValueError, match="lin: the old model has no 'default' there"):
        transfer_lorax(old, wrong)


class Stack(nn.Module):
    """Blocks of two layers, by the seeds of their weights."""

    def __init__(self, *seeds: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 12)}) for _ in seeds)
        for seed, block in zip(seeds, self.blocks, strict=True):
            for weight in block.parameters():
                weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block["b"](block["a"](x)))
        return x


@pytest.mark.parametrize("whole", [False, True])
def test_blocks_that_were_removed_or_added_are_paired_by_their_weights(whole: bool) -> None:
    def tuned(*seeds: int) -> nn.Module:
        names = ["a", "b"] if whole or len(seeds) > 4 else ["a"]
        return get_peft_model(Stack(*seeds), LoraXConfig(r=5, full=True, target_modules=names))

    def sigmas(model: nn.Module, block: int) -> Tensor:
        return model.get_submodule(f"base_model.model.blocks.{block}.a").lorax_sigma["default"]

    long, short = stir(tuned(1, 2, 3, 4, 5)), tuned(1, 3, 5)
    kept = transfer_lorax(long, short)
    assert kept == pytest.approx({f"blocks.{i}.{n}": 1.0 for i in range(3) for n in ("ab" if whole else "a")}, abs=1e-4)
    for here, there in ((0, 0), (1, 2), (2, 4)):
        assert torch.allclose(sigmas(short, here), sigmas(long, there), atol=1e-5)
    # And back: the two blocks that the short one lacks begin without effect.
    again = tuned(1, 2, 3, 4, 5)
    if not whole:
        with pytest.raises(ValueError, match=r"blocks\.0\.b: the old model has no 'default' there"):
            transfer_lorax(short, again)
        return
    kept = transfer_lorax(short, again)
    assert set(kept) == {f"blocks.{i}.{n}" for i in (0, 2, 4) for n in "ab"}
    assert not sigmas(again, 1).any()
    assert torch.allclose(sigmas(again, 2), sigmas(long, 2), atol=1e-5)


def test_blocks_are_paired_by_their_weights_where_the_same_ones_are_tuned() -> None:
    def tuned(*seeds: int, blocks: list[int]) -> nn.Module:
        names = [f"blocks.{i}.a" for i in blocks]
        return get_peft_model(Stack(*seeds), LoraXConfig(r=5, full=True, target_modules=names))

    def sigma(model: nn.Module, block: int) -> Tensor:
        return model.get_submodule(f"base_model.model.blocks.{block}.a").lorax_sigma["default"]

    # The short one is made of the blocks 0, 2 and 4 of the long one, whose last is not tuned.
    long, short = stir(tuned(1, 2, 3, 4, 5, blocks=[0, 1, 2])), tuned(1, 3, 5, blocks=[0, 1, 2])
    why = r"blocks\.2\.a: the old model has no 'default' at blocks\.4\.a, which answers to it"
    with pytest.raises(ValueError, match=why):
        transfer_lorax(long, short)
    assert not any(sigma(short, i).any() for i in range(3))
    # The other way, block 1 of the long one is an added one.
    short, long = stir(tuned(1, 3, 5, blocks=[0, 1])), tuned(1, 2, 3, 4, 5, blocks=[0, 1])
    assert set(transfer_lorax(short, long)) == {"blocks.0.a"}
    assert torch.allclose(sigma(long, 0), sigma(short, 0), atol=1e-5)
    assert not sigma(long, 1).any()


@pytest.mark.parametrize("case", ["lorax", "lorax full"])
def test_weighted_sums_of_adapters_are_sums_of_their_changes(case: str) -> None:
    """Whatever signs their singular vectors have come with."""
    model = trained(case)
    model.add_adapter("other", LoraXConfig(r=5, full=case == "lorax full", target_modules=LAYERS))
    stir(model, 5, "other")
    part = layer(model)
    turned = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    part.lorax_u["other"], part.lorax_v["other"] = part.lorax_u["other"] * turned, part.lorax_v["other"] * turned
    changes = {name: part.get_delta_weight(name).detach() for name in ("default", "other")}
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both")
    expected = 0.5 * changes["default"] + 2.0 * changes["other"]
    assert torch.allclose(part.get_delta_weight("both"), expected, atol=1e-5)
    assert torch.allclose(part.get_delta_weight("other"), changes["other"], atol=1e-6)
    part.lorax_u["other"] = part.lorax_u["other"].flip(1)
    with pytest.raises(ValueError, match="lin: x and other are on other directions"):
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "x")
    assert "x" not in model.peft_config
    assert "x" not in part.lorax_sigma


def test_gradients_reach_the_input() -> None:
    x = data().requires_grad_()
    trained("lorax")(x).sum().backward()
    assert x.grad is not None
