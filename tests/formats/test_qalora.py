"""QA-LoRA, judged by PEFT's own forward of it: A reads means over groups of inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import save_file
from torch import Tensor, nn

from regraft import InputError, load_adapter, open_base, port
from regraft.updates import LowRank


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 12), nn.Linear(8, 6)


@pytest.fixture(params=[1, 4])
def tuned(request: pytest.FixtureRequest) -> Any:
    """PEFT has the variant for GPTQ layers alone, which need a GPU: here it is put on plain ones."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["one", "two"], use_qalora=True, qalora_group_size=request.param
    )
    model = peft.get_peft_model(Net(), config)
    for layer in (model.base_model.model.one, model.base_model.model.two):
        QALoraLinearVariant.init(layer, "default", config)
        nn.init.normal_(layer.lora_A["default"].weight)
        nn.init.normal_(layer.lora_B["default"].weight)
    return model


def effect(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = QALoraLinearVariant.forward(layer, "default", x, torch.zeros(len(x), layer.out_features))
    return found


def test_the_change_is_what_peft_s_forward_adds(tuned: Any, tmp_path: Path) -> None:
    tuned.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert len(adapter.updates) == 2
    for ref, update in adapter.updates.items():
        layer = tuned.base_model.model.get_submodule(ref.path)
        assert isinstance(update, LowRank)
        assert update.rank == 3
        x = torch.randn(5, layer.in_features)
        torch.testing.assert_close(x @ update.delta().T, effect(layer, x), rtol=1e-4, atol=1e-5)


def test_it_is_written_as_a_lora_that_any_base_takes(tuned: Any, tmp_path: Path) -> None:
    tuned.save_pretrained(tmp_path / "first")
    load_adapter(tmp_path / "first").save(tmp_path / "second")
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert config["use_qalora"] is False
    plain = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "second"))
    for name in ("one", "two"):
        layer, first = plain.base_model.model.get_submodule(name), tuned.base_model.model.get_submodule(name)
        x = torch.randn(5, layer.in_features)
        torch.testing.assert_close(x @ layer.get_delta_weight("default").T, effect(first, x), rtol=1e-4, atol=1e-5)


def test_it_is_ported_as_the_lora_that_it_equals(tuned: Any, tmp_path: Path) -> None:
    state = Net().state_dict()
    save_file(state, tmp_path / "old.safetensors")
    drifted = {key: value + 0.02 * torch.randn_like(value) for key, value in state.items()}
    save_file(drifted, tmp_path / "new.safetensors")
    tuned.save_pretrained(tmp_path / "adapter")
    bases = [open_base(tmp_path / f"{name}.safetensors") for name in ("old", "new")]
    port(load_adapter(tmp_path / "adapter"), *bases, "copy").save(tmp_path / "ported")
    plain = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "ported"))
    for name in ("one", "two"):
        layer, first = plain.base_model.model.get_submodule(name), tuned.base_model.model.get_submodule(name)
        x = torch.randn(5, layer.in_features)
        torch.testing.assert_close(x @ layer.get_delta_weight("default").T, effect(first, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [0, -4, 10**9, "many", True, None])
def test_groups_without_a_size_are_told(tuned: Any, tmp_path: Path, group: Any) -> None:
    tuned.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "qalora_group_size": group}))
    with pytest.raises(InputError, match="qalora_group_size"):
        load_adapter(tmp_path)
