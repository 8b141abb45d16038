"""A new base whose input layer has more channels takes an update on the channels that both have."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regraft import Adapter, Base, InputError, ModuleRef, fit_migration, load_migration, open_base, port
from regraft.adapter import MODEL
from regraft.fitting import remeasure
from regraft.tensors import InMemory
from regraft.updates import Diff, LoHa, LowRank, Update
from toys import StateDict, drifted, llama, lora, save_base

# Stands for an input layer; its kernel is flattened as a patch embedding's is.
MODULE = "model.layers.0.mlp.gate_proj"
WEIGHT = f"{MODULE}.weight"
REF = ModuleRef(MODEL, MODULE)


def values(*shape: int, seed: int = 0) -> InMemory:
    return InMemory(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05)


def wider(state: StateDict, *, kernel: tuple[int, ...] = ()) -> StateDict:
    """The state trained on a little, with 8 inputs added to one module."""
    moved = drifted(state, 0.05)
    added = values(40, 8, *kernel, seed=9).load()
    return {**moved, WEIGHT: torch.cat([moved[WEIGHT], added], 1)}


def opened(folder: Path, *states: StateDict) -> list[Base]:
    return [open_base(save_base(state, folder / f"{i}.safetensors")) for i, state in enumerate(states)]


def with_update(update: Update, path: str = MODULE) -> Adapter:
    adapter = lora(llama(), roles=("v_proj",))
    return replace(adapter, updates={**adapter.updates, ModuleRef(MODEL, path): update})


def check_wide(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == (40, 32, *wanted.shape[2:])
    torch.testing.assert_close(got[:, :24], wanted, rtol=1e-5, atol=1e-7)
    assert not got[:, 24:].any()


UPDATES: dict[str, Update] = {
    "lora": LowRank(values(40, 4), values(4, 24, seed=1), 2.0),
    "loha": LoHa(values(40, 2), values(2, 24, seed=1), values(40, 2, seed=2), values(2, 24, seed=3), 2.0),
}


@pytest.mark.parametrize("method", ["copy", "auto"])
@pytest.mark.parametrize("name", UPDATES)
def test_the_added_inputs_stay_the_bases_own(name: str, method: str, tmp_path: Path) -> None:
    state = llama()
    result = port(with_update(UPDATES[name]), *opened(tmp_path, state, wider(state)), method)
    carried = result.adapter.updates[REF]
    check_wide(carried.delta(), UPDATES[name].delta())
    row = next(row for row in result.report.modules if row.name == MODULE)
    assert "added stay its own" in row.reason
    assert row.energy_kept == pytest.approx(1.0)
    assert row.similarity is not None
    assert row.similarity > 0.9
    assert result.report.verdict == "survives"


def test_a_kernel_is_widened_by_channel(tmp_path: Path) -> None:
    kernel = values(40, 24, 2, 2, seed=5).load()
    state = {**llama(), WEIGHT: kernel}
    update = LowRank(values(40, 4, 1, 1), values(4, 24, 2, 2, seed=1), 2.0)
    result = port(with_update(update), *opened(tmp_path, state, wider(state, kernel=(2, 2))), "copy")
    check_wide(result.adapter.updates[REF].delta(), update.delta())


def test_a_stored_change_is_widened_too(tmp_path: Path) -> None:
    state, update = llama(), Diff(values(40, 24), f"{MODULE}.diff")
    result = port(with_update(update, WEIGHT), *opened(tmp_path, state, wider(state)), "copy")
    check_wide(result.adapter.updates[ModuleRef(MODEL, WEIGHT)].delta(), update.delta())


def test_a_dora_keeps_the_relative_change_of_every_row(tmp_path: Path) -> None:
    state = llama()
    bases = opened(tmp_path, state, wider(state))
    lora = UPDATES["lora"]
    assert isinstance(lora, LowRank)
    magnitude = InMemory(state[WEIGHT].norm(dim=1) * 1.2)
    carried = port(with_update(replace(lora, magnitude=magnitude)), *bases, "copy").adapter.updates[REF]
    assert carried.magnitude is not None
    wanted = bases[1].weight(REF).norm(dim=1) * 1.2
    torch.testing.assert_close(carried.magnitude.load(), wanted)


def test_a_migration_file_holds_the_widening(tmp_path: Path) -> None:
    state = llama()
    fitted = fit_migration(*opened(tmp_path, state, wider(state)), "copy")
    migration = load_migration(fitted.save(tmp_path / "m.safetensors"))
    carried = migration.port(with_update(UPDATES["lora"])).adapter.updates[REF]
    check_wide(carried.delta(), UPDATES["lora"].delta())


def test_a_migration_tells_of_an_adapter_what_a_fit_of_its_own_tells(tmp_path: Path) -> None:
    """Of weights of one shape and of a widened one, for a LoRA and for a DoRA's magnitude."""
    state = llama()
    bases = opened(tmp_path, state, wider(state))
    lora = UPDATES["lora"]
    assert isinstance(lora, LowRank)
    adapter = with_update(replace(lora, magnitude=InMemory(state[WEIGHT].norm(dim=1) * 1.2)))
    own = fit_migration(*bases, "copy", adapter=adapter)
    file = fit_migration(*bases, "copy").save(tmp_path / "m.safetensors")
    told = remeasure(load_migration(file), *bases, adapter)
    assert {own.entries[ref].shape_new for ref in adapter.updates} >= {(40, 24 + 8)}
    for ref in adapter.updates:
        wanted, found = own.entries[ref], told.entries[ref]
        assert found.nearness.adapter_distance is not None
        assert asdict(found.nearness) == pytest.approx(asdict(wanted.nearness))
        assert wanted.row_norms is not None
        assert found.row_norms is not None
        torch.testing.assert_close(found.row_norms, wanted.row_norms)


def test_a_layer_of_another_width_is_no_widening(tmp_path: Path) -> None:
    state = llama()
    other = {**wider(state), WEIGHT: values(40, 32, seed=4).load()}
    with pytest.raises(InputError, match="carries equal sizes only"):
        port(with_update(UPDATES["lora"]), *opened(tmp_path, state, other), "copy")
