"""FouRA: its map, its gate, and what becomes of it when the gate is fixed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import scipy.fft
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from regraft.tuners import FouraConfig
from regraft.tuners.foura.gate import adaptive_mask
from tuners.cases import LAYERS, base, data, fresh, output, stir, trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def layer(model: nn.Module, name: str = "lin") -> nn.Module:
    return model.get_submodule(f"base_model.model.{name}")


def dct(x: Tensor, inverse: bool = False) -> Tensor:
    change = scipy.fft.idct if inverse else scipy.fft.dct
    return torch.from_numpy(change(x.detach().double().numpy(), norm="ortho")).float()


def masked(model: nn.Module, closed: int) -> nn.Module:
    for name in LAYERS:
        layer(model, name).foura_mask["default"][closed] = 0.0
    return model


def test_the_output_is_the_paper_s() -> None:
    """W x + F⁻¹(B · alpha · G(z) · z), z = A F(x), the transforms by scipy, gate included."""
    model = trained("foura")
    part, x = layer(model), data()
    a, b, g = (getattr(part, f"foura_{name}")["default"].detach() for name in ("a", "b", "gate"))
    z = dct(x) @ a.T
    mask = adaptive_mask(z, g, 0.5, 8.0)
    assert 0.0 < float(mask.mean()) < 1.0
    expected = base().lin(x) + dct(32 / 4 * (mask * z) @ b.T, inverse=True)
    assert torch.allclose(part(x), expected, atol=1e-4)


def test_the_output_with_the_fourier_transform() -> None:
    model = trained("foura none fft")
    part, x = layer(model), data()
    a, b = (torch.view_as_complex(getattr(part, f"foura_{name}")["default"].detach()) for name in ("a", "b"))
    z = torch.fft.rfft(x, norm="ortho") @ a.T
    expected = base().lin(x) + torch.fft.irfft(32 / 3 * z @ b.T, 16, norm="ortho")
    assert torch.allclose(part(x), expected, atol=1e-4)


def test_the_gate_opens_where_the_entropy_is_high_and_learns() -> None:
    z = torch.tensor([[0.0, 1.0, 6.0, -6.0]], requires_grad=True)
    gate = torch.eye(4, requires_grad=True)
    mask = adaptive_mask(z, gate, 0.5, 8.0)
    assert mask.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    mask.sum().backward()
    assert gate.grad is not None
    assert float(gate.grad.abs().sum()) > 0
    assert bool(torch.isfinite(gate.grad).all())


def test_every_part_of_the_gate_learns() -> None:
    model = trained("foura").train()
    model(data()).square().sum().backward()
    for name in ("a", "b", "gate"):
        assert float(getattr(layer(model), f"foura_{name}")["default"].grad.abs().sum()) > 0


@pytest.mark.parametrize("shape", [(0, 12), (12,)], ids=["no token", "one vector"])
def test_a_gate_takes_any_number_of_inputs(shape: tuple[int, ...]) -> None:
    """An expert that no token is sent to has nothing to record; what is recorded stays a share."""
    model = trained("foura").train()
    before = layer(model, "lin").foura_usage["default"].fill_(0.5).clone()
    layer(model, "lin")(torch.ones(shape)).sum().backward()
    after = layer(model, "lin").foura_usage["default"]
    assert bool(((after >= 0) & (after <= 1)).all())
    assert torch.equal(after, before) == (shape[0] == 0)


def test_a_gate_that_depends_on_the_input_can_t_be_merged() -> None:
    model = trained("foura")
    before = output(model)
    why = "lin: the gate of the adapter default depends on the input.*freeze_gate"
    for change in (model.merge_adapter, model.merge_and_unload, lambda: layer(model).get_delta_weight("default")):
        with pytest.raises(ValueError, match=why):
            change()
    assert torch.equal(output(model), before)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, 4)


@pytest.mark.parametrize("case", ["foura", "foura fft"])
def test_a_frozen_gate_keeps_what_was_open_in_training_and_merges(case: str, tmp_path: Path) -> None:
    model = trained(case).train()
    for _ in range(200):
        model(data())
    usage = {name: layer(model, name).foura_usage["default"].clone() for name in LAYERS}
    assert any(0.05 < float(value) < 0.95 for values in usage.values() for value in values)
    kept = model.base_model.freeze_gate("default")
    assert kept == {name: int((values >= 0.5).sum()) for name, values in usage.items()}
    model.eval()
    expected = output(model)
    model.save_pretrained(tmp_path)
    keys = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert keys == {"foura_a", "foura_b", "foura_mask"} | ({"foura_size"} if "fft" in case else set())
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(output(loaded), expected)
    assert torch.allclose(output(loaded.merge_and_unload()), expected, atol=1e-4)
    with pytest.raises(ValueError, match="there is no adapter 'none'"):
        model.base_model.freeze_gate("none")


@pytest.mark.parametrize(("case", "rank"), [("foura none", 4), ("foura frozen", 3), ("foura frozen fft", 6)])
def test_a_fixed_gate_is_a_lora_exactly(case: str, rank: int) -> None:
    """Of the rank that is open; the Fourier transform's real and imaginary parts make two of each direction."""
    model = trained(case, target_modules=["lin", "turned"])
    if "frozen" in case:
        for name in ("lin", "turned"):
            layer(model, name).foura_mask["default"][1] = 0.0
    config, state = convert_to_lora(model, rank)
    lora = get_peft_model(base(), LoraConfig(**config.to_dict()))
    set_peft_model_state_dict(lora, state)
    for name in ("lin", "turned"):
        expected = layer(model, name).get_delta_weight("default")
        found = layer(lora, name).get_delta_weight("default")
        assert torch.allclose(found if found.shape == expected.shape else found.T, expected, atol=1e-5)


def test_a_mask_closes_its_directions() -> None:
    model = masked(trained("foura frozen"), 2)
    closed = output(model)
    with torch.no_grad():
        for name in LAYERS:
            layer(model, name).foura_a["default"][2] = 1000.0
    assert torch.equal(output(model), closed)


def test_gated_and_plain_adapters_add_their_outputs() -> None:
    model = trained("foura")
    model.add_adapter("other", FouraConfig(r=2, gate="none", target_modules=LAYERS))
    stir(model, 5, "other")
    x, part = data(), layer(model)
    plain = base().lin(x)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = part(x) - plain
    model.base_model.set_adapter(["default", "other"])
    assert torch.allclose(part(x), plain + alone["default"] + alone["other"], atol=1e-5)
    model.base_model.freeze_gate("other")
    assert "default" in part.foura_gate
    assert model.peft_config["other"].gate == "none"


def test_a_base_without_values_is_no_hindrance() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 8))
    model = get_peft_model(net, FouraConfig(r=2, target_modules=["0"]), low_cpu_mem_usage=True)
    assert set(get_peft_model_state_dict(model)) == {
        f"base_model.model.0.foura_{name}" for name in ("a", "b", "gate", "usage")
    }


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"r": 11}, "turned: r = 11 is above 10"),
        ({"r": 0}, "r must be"),
        ({"transform": "dft"}, "transform must be one of dct, fft"),
        ({"gate": "open"}, "gate must be one of"),
        ({"foura_alpha": 0}, "foura_alpha must be"),
        ({"gate_threshold": 2}, "gate_threshold must be"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        fresh("foura", **options)


def test_modules_that_it_can_t_take_are_refused() -> None:
    for part, why in ((nn.Embedding(8, 8), "can't change Embedding"), (nn.Conv2d(8, 8, 3, groups=2), "in groups")):
        with pytest.raises(TypeError, match=why):
            get_peft_model(nn.Sequential(copy.deepcopy(part)), FouraConfig(r=2, target_modules=["0"]))
