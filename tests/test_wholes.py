"""Parameters that an adapter stores whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regraft import Adapter, InputError, ModuleRef, fit_migration, load_migration, open_base, port
from regraft.adapter import MODEL
from regraft.tensors import InMemory
from regraft.updates import Diff, Full
from toys import StateDict, drifted, llama, lora, save_base


def with_wholes(adapter: Adapter, **values: torch.Tensor) -> Adapter:
    extra = {ModuleRef(MODEL, path): Full(InMemory(value), path) for path, value in values.items()}
    return replace(adapter, updates={**adapter.updates, **extra})


def value(adapter: Adapter, path: str) -> torch.Tensor:
    update = adapter.updates[ModuleRef(MODEL, path)]
    assert isinstance(update, Full)
    return update.value.load()


def without_layer(state: StateDict, removed: int) -> StateDict:
    out = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) == removed:
                continue
            parts[2] = str(int(parts[2]) - (int(parts[2]) > removed))
        out[".".join(parts)] = tensor
    return out


def test_the_change_is_carried_not_the_value(tmp_path: Path) -> None:
    state = llama()
    moved = {name: t + 0.25 if "layernorm" in name else t for name, t in drifted(state, 0.1).items()}
    norm = "model.layers.1.input_layernorm.weight"
    adapter = with_wholes(lora(state), **{norm: state[norm] + 0.5})
    bases = [open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, moved))]
    torch.testing.assert_close(value(port(adapter, *bases).adapter, norm), moved[norm] + 0.5)


@pytest.mark.parametrize("component", [MODEL, "unet"])
def test_an_adapter_of_changes_of_whole_parameters_alone_is_carried(component: str, tmp_path: Path) -> None:
    state = llama()
    bases = [open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, drifted(state, 0.1)))]
    paths = [f"model.layers.{i}.{name}.weight" for i in range(3) for name in ("input_layernorm", "self_attn.q_proj")]
    updates = {ModuleRef(component, path): Diff(InMemory(state[path] * 0.1), path) for path in paths}
    result = port(Adapter(dict(updates), "lycoris"), *bases, "copy")
    assert {ref.path for ref in result.adapter.updates} == set(paths)
    for ref, update in result.adapter.updates.items():
        torch.testing.assert_close(update.delta(), state[ref.path] * 0.1)


def test_a_whole_parameter_goes_where_its_block_goes(tmp_path: Path) -> None:
    state = llama(layers=4)
    norms = {i: f"model.layers.{i}.input_layernorm.weight" for i in range(4)}
    adapter = with_wholes(lora(state), **{norms[i]: state[norms[i]] + i + 1 for i in range(4)})
    old = open_base(save_base(state, tmp_path / "old.safetensors"))
    new = open_base(save_base(without_layer(state, 1), tmp_path / "new.safetensors"))
    result = port(adapter, old, new)
    carried = {path for _, path in result.adapter.updates if "layernorm" in path}
    assert carried == {norms[0], norms[1], norms[2]}
    for target, source in ((0, 0), (1, 2), (2, 3)):
        torch.testing.assert_close(value(result.adapter, norms[target]), torch.full((24,), 2.0 + source))
    skipped = {row.name for row in result.report.modules if row.status == "skipped"}
    assert norms[1] in skipped


def test_added_tokens_are_carried_as_they_are_and_the_rest_as_a_change(tmp_path: Path) -> None:
    state, key = llama(), "model.embed_tokens.weight"
    new_state = drifted(state, 0.1)
    grown = torch.cat([state[key] + 1.0, torch.full((4, 24), 7.0)])
    adapter = with_wholes(lora(state), **{key: grown})
    bases = [open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, new_state))]
    result = port(adapter, *bases)
    carried = value(result.adapter, key)
    torch.testing.assert_close(carried[:96], new_state[key] + 1.0)
    assert torch.equal(carried[96:], grown[96:])
    row = next(row for row in result.report.modules if row.name == key)
    assert "4 added rows" in row.reason


def test_another_shape_is_not_dropped_in_silence(tmp_path: Path) -> None:
    state, key = llama(), "model.norm.weight"
    adapter = with_wholes(lora(state), **{key: torch.ones(23)})
    bases = [open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, drifted(state, 0.1)))]
    with pytest.raises(InputError, match="shapes differ"):
        port(adapter, *bases)


def test_a_trained_head_goes_along_through_a_migration_without_the_bases(tmp_path: Path) -> None:
    state, head = llama(), torch.randn(2, 24)
    bases = [open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, drifted(state, 0.1)))]
    migration = load_migration(fit_migration(*bases).save(tmp_path / "m.safetensors"))
    ported = migration.port(with_wholes(lora(state), **{"classifier.weight": head})).adapter
    assert torch.equal(value(ported, "classifier.weight"), head)
    changed_norm = with_wholes(lora(state), **{"model.norm.weight": torch.zeros(24)})
    with pytest.raises(InputError, match="takes both bases"):
        migration.port(changed_norm)
