"""The bias of a LoRA's factor B (PEFT's ``lora_bias``), by methods that look at the whole adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regraft import Adapter, open_base, port
from regraft.carry import Settings
from regraft.methods.task import Rank, Running
from regraft.runtime import applied, load_model
from regraft.tensors import InMemory
from regraft.updates import LowRank
from verify import tiny


def with_biases(adapter: Adapter) -> Adapter:
    dice = torch.Generator().manual_seed(3)
    updates = {}
    for ref, update in adapter.updates.items():
        assert isinstance(update, LowRank)
        updates[ref] = replace(update, bias=InMemory(torch.randn(update.shape[0], generator=dice)))
    return replace(adapter, updates=updates)


def hidden(base: Path, adapter: Adapter) -> Tensor:
    model = load_model(base)
    with torch.no_grad(), applied(model.components, adapter):
        return model.main(input_ids=torch.arange(3, 19)[None]).last_hidden_state


@pytest.mark.parametrize("rank", [None, "full"])
@pytest.mark.parametrize("method", ["casa", "effect"])
def test_on_the_same_base_the_bias_comes_along(method: str, rank: Rank, tmp_path: Path) -> None:
    base = tiny.bert(tmp_path / "base")
    adapter = with_biases(tiny.lora(load_model(base).main, ("query", "output.dense")))
    settings = Settings(running=Running(n_inputs=8), rank=rank)
    result = port(adapter, open_base(base), open_base(base), method, settings=settings).adapter
    for ref, update in result.updates.items():
        own = adapter.updates[ref]
        assert isinstance(update, LowRank)
        assert isinstance(own, LowRank)
        assert update.bias is not None
        torch.testing.assert_close(update.scale * update.bias.load(), own.scale * own.bias.load())
        torch.testing.assert_close(update.delta(), own.delta(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(hidden(base, result), hidden(base, adapter), rtol=1e-2, atol=1e-2)
