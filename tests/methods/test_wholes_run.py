"""Methods that run both bases with an adapter that changes whole parameters, too: norms and biases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regraft import Adapter, ModuleRef, open_base, port
from regraft.carry import Settings
from regraft.methods.task import Running
from regraft.runtime import load_model
from regraft.tensors import InMemory
from regraft.updates import Diff
from verify import tiny

FEW = Settings(running=Running(n_inputs=8), force=True)


def with_norm(adapter: Adapter, component: str, path: str, width: int) -> Adapter:
    """A LyCORIS file that changes a norm's weight beside the modules."""
    change = Diff(InMemory(torch.full((width,), 0.3)), path)
    return Adapter({**adapter.updates, ModuleRef(component, f"{path}.weight"): change}, "lycoris")


def spelt(adapter: Adapter, component: str, prefix: str = "") -> Adapter:
    """The same adapter under another component's name, its paths without a prefix."""
    return replace(
        adapter,
        updates={ModuleRef(component, ref.path.removeprefix(prefix)): u for ref, u in adapter.updates.items()},
    )


@pytest.mark.parametrize("method", ["scaled-copy", "effect", "auto"])
def test_a_model_alone_takes_modules_and_norms_of_an_adapter_that_names_its_component(
    method: str, tmp_path: Path
) -> None:
    old, new = tiny.llama(tmp_path / "old"), tiny.llama(tmp_path / "new", drift=0.3)
    adapter = spelt(tiny.lora(load_model(old).main, ("q_proj", "down_proj"), size=0.3), "transformer")
    adapter = with_norm(adapter, "transformer", "model.layers.0.input_layernorm", 16)
    result = port(adapter, open_base(old), open_base(new), method, settings=FEW)
    assert result.report.method != "copy"
    assert set(result.adapter.updates) == set(adapter.updates)


@pytest.mark.parametrize("method", ["scaled-copy", "effect", "casa", "auto"])
def test_a_norm_is_carried_once_where_the_adapter_leaves_a_prefix_out(method: str, tmp_path: Path) -> None:
    old, new = tiny.gpt2(tmp_path / "old"), tiny.gpt2(tmp_path / "new", drift=0.3)
    adapter = spelt(tiny.lora(load_model(old).main, ("c_attn",), size=0.3), "model", "transformer.")
    adapter = with_norm(adapter, "model", "h.0.ln_1", 16)
    result = port(adapter, open_base(old), open_base(new), method, settings=FEW)
    assert set(result.adapter.updates) == set(adapter.updates)
