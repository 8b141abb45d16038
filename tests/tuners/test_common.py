"""What holds for every tuner, judged by PEFT itself; the list of cases stands in `tuners.cases`."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from tuners.cases import CASES, MERGEABLE, base, config, data, fresh, output, stir, trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name.rpartition(".")[2]: part for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)}


@pytest.mark.parametrize("case", CASES)
def test_a_new_adapter_changes_nothing(case: str) -> None:
    assert torch.equal(output(fresh(case)), output(base()))


@pytest.mark.parametrize("case", CASES)
def test_only_the_adapter_learns_and_a_loss_falls(case: str) -> None:
    model = fresh(case).train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all(model.prefix in name for name in names)
    torch.manual_seed(4)
    target = torch.randn(3, 5)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss = (model(data()) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} <= set(names)
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("case", CASES)
def test_a_saved_adapter_is_loaded_to_the_same_outputs(case: str, tmp_path: Path) -> None:
    model = trained(case)
    assert not torch.allclose(output(model), output(base()), atol=1e-3)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_memory).eval()
        assert torch.equal(output(loaded), output(model))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert not any(value.device.type == "meta" for value in (*loaded.parameters(), *loaded.buffers()))
    again = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert set(first) == set(second)
    assert all(torch.equal(second[key], value) for key, value in first.items())
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, tmp_path / "again")]
    for found in configs:
        found["target_modules"] = sorted(found["target_modules"])
        found["inference_mode"] = None
    assert configs[0] == configs[1]
    assert isinstance(PeftConfig.from_pretrained(tmp_path), CASES[case][0])


@pytest.mark.parametrize("case", CASES)
def test_the_keys_of_a_file(case: str) -> None:
    model = trained(case)
    state = get_peft_model_state_dict(model)
    targets = {f"base_model.model.{name}" for name in CASES[case][1]["target_modules"]}
    assert {key.partition(f".{model.prefix}")[0] for key in state} == targets
    assert not any("default" in key for key in state)


@pytest.mark.parametrize("case", MERGEABLE)
def test_the_output_is_that_of_the_base_plus_the_change(case: str) -> None:
    model = trained(case)
    changed = base()
    for name, layer in layers(model).items():
        weight = changed.get_submodule(name).weight
        delta = layer.get_delta_weight("default")
        assert delta.shape == weight.shape
        assert delta.norm() > 1e-3
        weight.data += delta.detach()
    assert torch.allclose(output(model), output(changed), atol=1e-5)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("case", MERGEABLE)
def test_merging_keeps_the_output_and_unmerging_the_base(case: str, safe: bool) -> None:
    model = trained(case)
    expected, plain = output(model), output(base())
    model.merge_adapter(safe_merge=safe)
    assert torch.allclose(output(model), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(output(model), expected, atol=1e-5)
    with model.disable_adapter():
        assert torch.allclose(output(model), plain, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=safe)
    assert not any(isinstance(part, BaseTunerLayer) for part in merged.modules())
    assert torch.allclose(output(merged), expected, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_disabling_and_unloading_give_the_base_back(case: str) -> None:
    model = trained(case)
    with model.disable_adapter():
        assert torch.equal(output(model), output(base()))
    assert not torch.allclose(output(model), output(base()), atol=1e-3)
    assert torch.equal(output(model.unload()), output(base()))


@pytest.mark.parametrize("case", CASES)
def test_several_adapters_are_added_switched_and_deleted(case: str, tmp_path: Path) -> None:
    model = trained(case)
    first = output(model)
    model.add_adapter("other", config(case))
    assert torch.equal(output(model), first)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "other" in name)
    stir(model, 5, "other")
    model.set_adapter("other")
    second = output(model)
    assert not torch.allclose(first, second, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    loaded.load_adapter(tmp_path / "other", "second")
    assert torch.equal(output(loaded), first)
    loaded.set_adapter("second")
    assert torch.equal(output(loaded), second)
    model.set_adapter("default")
    assert torch.equal(output(model), first)
    model.delete_adapter("other")
    assert torch.equal(output(model), first)
    assert not any("other" in name for name in (*dict(model.named_parameters()), *dict(model.named_buffers())))


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_for_each_sample_is_refused(case: str) -> None:
    """PEFT would drop the argument, and every sample would get the active adapter."""
    model = trained(case)
    model.add_adapter("other", config(case))
    with pytest.raises(ValueError, match=r"adapter_names.*set_adapter"):
        model(data(), adapter_names=["default", "other"])
    assert torch.isfinite(model(data())).all()


@pytest.mark.parametrize("case", MERGEABLE)
def test_several_active_adapters_merge_to_their_joint_output(case: str) -> None:
    model = trained(case)
    model.add_adapter("other", config(case))
    stir(model, 5, "other")
    model.base_model.set_adapter(["default", "other"])
    expected = output(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert torch.allclose(output(model), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(output(model), expected, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_strength_scales_the_change_and_0_is_the_base(case: str) -> None:
    model = trained(case)
    full = output(model)
    model.base_model.set_scale("default", 0.0)
    assert torch.equal(output(model), output(base()))
    model.base_model.set_scale("default", 0.5)
    for layer in layers(model).values():
        layer.scale_layer(2.0)
    assert torch.allclose(output(model), full, atol=1e-6)
    for layer in layers(model).values():
        layer.unscale_layer(2.0)
    assert not torch.allclose(output(model), full, atol=1e-4)


@pytest.mark.parametrize("case", MERGEABLE)
def test_no_adapter_is_added_to_a_merged_layer(case: str) -> None:
    model = trained(case)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge the adapter default before you add"):
        model.add_adapter("other", config(case))
    with pytest.raises(ValueError, match="unmerge the adapter default before you change"):
        model.base_model.set_scale("default", 0.5)


@pytest.mark.parametrize("case", CASES)
def test_a_half_precision_base(case: str, tmp_path: Path) -> None:
    x = data(dtype=torch.bfloat16)
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(base().bfloat16(), config(case), autocast_adapter_dtype=autocast).eval()
        assert torch.equal(output(model, x), output(base().bfloat16(), x))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        stir(model)
        found = output(model, x)
        assert found.dtype == torch.bfloat16
        if case in MERGEABLE:
            merged = output(copy.deepcopy(model).merge_and_unload(), x)
            assert torch.allclose(merged, found, atol=0.06)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base().bfloat16(), tmp_path, autocast_adapter_dtype=autocast).eval()
        assert torch.equal(output(loaded, x), found)


@pytest.mark.parametrize("case", CASES)
def test_whole_modules_and_biases_are_saved_beside(case: str, tmp_path: Path) -> None:
    model = trained(case, modules_to_save=["head"], bias=f"{config(case).peft_type.value.lower()}_only")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("head.modules_to_save" in name for name in names)
    assert any(name.endswith("lin.base_layer.bias") for name in names)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(output(loaded), output(model))


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_injected_without_a_wrapper(case: str) -> None:
    model = trained(case)
    state = get_peft_model_state_dict(model)
    injected = inject_adapter_in_model(config(case), base()).eval()
    result = set_peft_model_state_dict(injected, state)
    assert not result.unexpected_keys
    assert torch.equal(output(injected), output(model))
    own = get_peft_model_state_dict(injected)
    assert {f"base_model.model.{key}" for key in own} == set(state)


@pytest.mark.parametrize("case", CASES)
def test_targets_that_there_are_not_are_named(case: str) -> None:
    with pytest.raises(ValueError, match="not found in the base model"):
        fresh(case, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        fresh(case, target_modules=None)
    model = fresh(case, target_modules="all-linear")
    assert {"lin", "turned", "head"} <= set(layers(model))
    excluded = fresh(case, exclude_modules=["conv"])
    assert set(layers(excluded)) == set(CASES[case][1]["target_modules"]) - {"conv"}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_result_is_not_merged_safely(case: str) -> None:
    if case not in MERGEABLE:
        pytest.skip("its change is no matrix")
    model = trained(case)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or Inf in the merged weight"):
        model.merge_adapter(safe_merge=True)
