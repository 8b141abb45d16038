"""Every kind of update is carried to a new base: by a copy as it is, by other methods as the change that it makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regraft import Adapter, Base, InputError, ModuleRef, fit_migration, load_migration, open_base, port
from regraft.adapter import MODEL
from regraft.carry import Settings
from regraft.tensors import InMemory
from regraft.updates import (
    Boft,
    Diff,
    FourierFT,
    Full,
    GLora,
    Ia3,
    LoHa,
    LoKr,
    LowRank,
    Oft,
    Slice,
    SpectralShift,
    Update,
    Vera,
    with_shapes,
)
from regraft.updates.rows import take_rows
from regraft.updates.vera import Seed
from toys import StateDict, drifted, llama, lora, permutation, regauged, save_base

MODULE = "model.layers.1.self_attn.q_proj"
NORM = "model.layers.1.input_layernorm.weight"


def values(*shape: int, seed: int = 0) -> InMemory:
    return InMemory(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05)


FACTORED: dict[str, Update] = {
    "loha": LoHa(values(24, 3), values(3, 24, seed=1), values(24, 2, seed=2), values(2, 24, seed=3), 2.0),
    "lokr": LoKr(2.0, w1=values(4, 4), w2_a=values(6, 2, seed=1), w2_b=values(2, 6, seed=2)),
    "loha dora": LoHa(
        *(values(24, 3), values(3, 24), values(24, 2), values(2, 24), 2.0),
        magnitude=InMemory(torch.rand(24, 1, generator=torch.Generator().manual_seed(4)) + 0.5),
    ),
    "part of a lokr": take_rows(LoKr(2.0, w1=values(8, 4), w2=values(9, 6, seed=1)), [(24, 48)]),
}
ON_THE_WEIGHT: dict[str, Update] = {
    "ia3": Ia3(values(24), InMemory(torch.tensor(0))),
    "oft": Oft(values(4, 6, 6)),
    "boft": Boft(values(3, 4, 6, 6)),
    "glora": GLora(values(24, 2), values(2, 24), values(24, 2), values(2, 24), 2.0),
    "svdiff": SpectralShift(values(24)),
}
BY_SHAPE: dict[str, Update] = {
    "vera": Vera(values(24), values(3, seed=1), values(3, 40, seed=2), values(30, 3, seed=3)),
    "vera drawn": Vera(values(24), values(3, seed=1), None, None, Seed(5, 1)),
    "fourierft": FourierFT(values(40), 300.0, 7),
}
ALL = FACTORED | ON_THE_WEIGHT | BY_SHAPE


def with_update(update: Update, path: str = MODULE, state: StateDict | None = None) -> Adapter:
    """An adapter of one LoRA and this update."""
    adapter = lora(state or llama(), roles=("v_proj",))
    return replace(adapter, updates={**adapter.updates, ModuleRef(MODEL, path): update})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Base]:
    folder, state = tmp_path_factory.mktemp("bases"), llama()
    one, two = (
        save_base(s, folder / name) for s, name in ((state, "1.safetensors"), (drifted(state, 0.05), "2.safetensors"))
    )
    return open_base(one), open_base(two)


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"svdiff"}))
def test_a_copy_keeps_the_very_same_tensors(name: str, bases: tuple[Base, Base]) -> None:
    update = ALL[name]
    result = port(with_update(update), *bases, "copy")
    carried = result.adapter.updates[ModuleRef(MODEL, MODULE)]
    assert type(carried) is type(update)
    row = next(row for row in result.report.modules if row.name == MODULE)
    assert row.status == "ported"
    assert row.share is not None
    assert row.share > 0
    for role, part in update.parts().items():
        if role != "magnitude":
            assert carried.parts()[role] is part


def test_a_dora_of_any_kind_takes_its_magnitude_to_the_new_weight(bases: tuple[Base, Base]) -> None:
    old, new = (base.weight(ModuleRef(MODEL, MODULE)) for base in bases)
    update = FACTORED["loha dora"]
    carried = port(with_update(update), *bases, "copy").adapter.updates[ModuleRef(MODEL, MODULE)]
    assert update.magnitude is not None
    assert carried.magnitude is not None
    before, after = update.magnitude.load().flatten(), carried.magnitude.load().flatten()
    torch.testing.assert_close(after / new.norm(dim=1), before / old.norm(dim=1))


@pytest.mark.parametrize("name", sorted(FACTORED.keys() - {"loha dora"}))
def test_a_method_that_turns_the_weights_carries_the_lora_that_an_update_equals(name: str, tmp_path: Path) -> None:
    state, residual = llama(), permutation(24, 3)
    old = open_base(save_base(state, tmp_path / "old.safetensors"))
    new = open_base(save_base(regauged(state, residual, permutation(40, 4)), tmp_path / "new.safetensors"))
    result = port(with_update(FACTORED[name]), old, new, "procrustes")
    carried = result.adapter.updates[ModuleRef(MODEL, MODULE)]
    assert isinstance(carried, LowRank)
    torch.testing.assert_close(carried.delta(), FACTORED[name].delta() @ residual.T, rtol=1e-3, atol=1e-5)
    row = next(row for row in result.report.modules if row.name == MODULE)
    assert "as the LoRA that it equals" in row.reason


def turned_bases(tmp_path: Path) -> tuple[Base, Base, Tensor]:
    """A Llama, the same function with its hidden units permuted, and how those of the residual stream were."""
    state, residual = llama(), permutation(24, 3)
    turned = regauged(state, residual, permutation(40, 4))
    old, new = (open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, turned)))
    return old, new, residual


def merged_on(update: Update, base: Base) -> Tensor:
    return update.merged(base.weight(ModuleRef(MODEL, MODULE)).float())


@pytest.mark.parametrize("name", ON_THE_WEIGHT)
def test_what_acts_on_the_weight_itself_is_turned_as_its_change(name: str, tmp_path: Path) -> None:
    old, new, residual = turned_bases(tmp_path)
    result = port(with_update(ON_THE_WEIGHT[name]), old, new, "procrustes")
    carried = result.adapter.updates[ModuleRef(MODEL, MODULE)]
    torch.testing.assert_close(
        merged_on(carried, new), merged_on(ON_THE_WEIGHT[name], old) @ residual.T, rtol=1e-3, atol=1e-5
    )
    row = next(row for row in result.report.modules if row.name == MODULE)
    assert f"a {name} converted" in row.reason


@pytest.mark.parametrize("name", ON_THE_WEIGHT)
def test_without_the_old_base_what_acts_on_the_weight_is_refused(name: str, tmp_path: Path) -> None:
    old, new, _ = turned_bases(tmp_path)
    migration = fit_migration(old, new, "procrustes")
    with pytest.raises(InputError, match="depends on the old base's weight"):
        migration.port(with_update(ON_THE_WEIGHT[name]))
    partly = migration.port(with_update(ON_THE_WEIGHT[name]), Settings(allow_partial=True))
    assert ModuleRef(MODEL, MODULE) not in partly.adapter.updates


@pytest.mark.parametrize("name", BY_SHAPE)
@pytest.mark.parametrize("rank", [None, 4])
def test_a_migration_alone_knows_the_shapes_that_a_file_leaves_out(name: str, rank: int | None, tmp_path: Path) -> None:
    old, new, residual = turned_bases(tmp_path)
    migration = fit_migration(old, new, "procrustes")
    carried = migration.port(with_update(BY_SHAPE[name]), Settings(rank=rank)).adapter.updates[ModuleRef(MODEL, MODULE)]
    assert isinstance(carried, LowRank)
    wanted = with_shapes({0: BY_SHAPE[name]}, {0: (24, 24)})[0].delta() @ residual.T
    if rank is None:
        torch.testing.assert_close(carried.delta(), wanted, rtol=1e-3, atol=1e-5)
    else:
        best = torch.linalg.svd(wanted)[1][rank:].norm()
        assert carried.rank == rank
        assert float((carried.delta() - wanted).norm()) == pytest.approx(float(best), rel=1e-3, abs=1e-5)


def test_one_of_a_shape_that_no_projection_has_is_named(bases: tuple[Base, Base]) -> None:
    narrow = Vera(values(24), values(3, seed=1), values(3, 23, seed=2), values(24, 3, seed=3))
    undrawn = Vera(values(24), values(3, seed=1), None, None, Seed(5, 2))
    for update, says in ((narrow, "the base's weight is"), (undrawn, "random projections are not in its file")):
        with pytest.raises(InputError, match=says):
            port(with_update(update), *bases, "copy")


def test_spectral_shifts_are_never_carried_by_index(bases: tuple[Base, Base]) -> None:
    shift = ON_THE_WEIGHT["svdiff"]
    carried = port(with_update(shift), *bases, "copy").adapter.updates[ModuleRef(MODEL, MODULE)]
    weight = bases[0].weight(ModuleRef(MODEL, MODULE))
    torch.testing.assert_close(carried.delta(), shift.delta(weight), rtol=1e-3, atol=1e-5)
    same = port(with_update(shift), bases[0], bases[0], "copy").adapter.updates[ModuleRef(MODEL, MODULE)]
    assert isinstance(same, SpectralShift)


@pytest.mark.parametrize("name", ["oft", "boft"])
def test_a_rotation_at_a_part_of_its_strength_is_the_lora_of_its_change(name: str, bases: tuple[Base, Base]) -> None:
    result = port(with_update(ON_THE_WEIGHT[name]), *bases, "copy", settings=Settings(strength=0.5))
    carried = result.adapter.updates[ModuleRef(MODEL, MODULE)]
    wanted = ON_THE_WEIGHT[name].scaled(0.5).delta(bases[0].weight(ModuleRef(MODEL, MODULE)))
    torch.testing.assert_close(carried.delta(), wanted, rtol=1e-3, atol=1e-5)
    with pytest.raises(InputError, match="depends on the old base's weight"):
        port(with_update(ON_THE_WEIGHT[name]), None, bases[1], "copy", settings=Settings(strength=0.5))


def test_another_rank_is_that_of_the_lora_and_its_loss_is_reported(bases: tuple[Base, Base]) -> None:
    carried = port(with_update(FACTORED["lokr"]), *bases, "copy", settings=Settings(rank=4))
    assert carried.adapter.updates[ModuleRef(MODEL, MODULE)].rank == 4
    result = port(with_update(ON_THE_WEIGHT["oft"]), *bases, "copy", settings=Settings(rank=4))
    got = result.adapter.updates[ModuleRef(MODEL, MODULE)]
    wanted = ON_THE_WEIGHT["oft"].delta(bases[0].weight(ModuleRef(MODEL, MODULE)).float())
    row = next(row for row in result.report.modules if row.name == MODULE)
    lost = float((got.delta() - wanted).norm() / wanted.norm()) ** 2
    assert got.rank == 4
    assert row.cut_loss == pytest.approx(lost, abs=1e-4)
    assert lost > 0.01


def test_another_rank_of_a_flattened_kernel_is_a_lora_of_the_convolution(tmp_path: Path) -> None:
    conv, state = "model.layers.1.conv", llama()
    state[f"{conv}.weight"] = torch.randn(24, 24, 3, 3, generator=torch.Generator().manual_seed(5))
    bases = [
        open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, drifted(state, 0.05)))
    ]
    loha = LoHa(values(24, 3), values(3, 216, seed=1), values(24, 2, seed=2), values(2, 216, seed=3), 2.0)
    adapter = with_update(loha, conv, {name: tensor for name, tensor in state.items() if tensor.dim() == 2})
    carried = port(adapter, *bases, "copy", settings=Settings(rank=7)).adapter.updates[ModuleRef(MODEL, conv)]
    assert carried.shape == (24, 24, 3, 3)
    torch.testing.assert_close(carried.delta().flatten(1), loha.delta(), rtol=1e-4, atol=1e-7)


def test_strength_reaches_every_kind(bases: tuple[Base, Base]) -> None:
    for name in ("lokr", "ia3", "glora", "vera", "fourierft"):
        carried = port(with_update(ALL[name]), *bases, "copy", settings=Settings(strength=0.5))
        weight = bases[1].weight(ModuleRef(MODEL, MODULE))
        change = carried.adapter.updates[ModuleRef(MODEL, MODULE)].delta(weight)
        torch.testing.assert_close(change, 0.5 * ALL[name].delta(weight))


def test_an_update_of_another_size_is_named(bases: tuple[Base, Base]) -> None:
    for update in (Oft(values(4, 5, 5)), LoKr(1.0, w1=values(5, 4), w2=values(6, 6)), SpectralShift(values(23))):
        with pytest.raises(InputError, match="the base's weight is"):
            port(with_update(update), *bases, "copy")


def change_of(result: Adapter, path: str) -> Tensor:
    return result.updates[ModuleRef(MODEL, path)].delta()


def test_a_stored_change_goes_along_as_it_is(bases: tuple[Base, Base], tmp_path: Path) -> None:
    change = values(24)
    adapter = with_update(Diff(change, f"{NORM}.diff"), NORM)
    for result in (
        port(adapter, *bases, "copy").adapter,
        load_migration(fit_migration(*bases).save(tmp_path / "m.safetensors")).port(adapter).adapter,
    ):
        assert torch.equal(change_of(result, NORM), change.load())


def test_a_stored_change_goes_where_its_block_goes(tmp_path: Path) -> None:
    state = llama(layers=4)
    shorter = {
        name.replace("layers.3.", "layers.1.") if "layers.3." in name else name: tensor
        for name, tensor in state.items()
        if "layers.1." not in name
    }
    bases = [open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, shorter))]
    paths = {i: f"model.layers.{i}.input_layernorm.weight" for i in range(4)}
    adapter = lora(state, roles=("v_proj",))
    diffs = {ModuleRef(MODEL, path): Diff(values(24, seed=i), path) for i, path in paths.items()}
    result = port(replace(adapter, updates={**adapter.updates, **diffs}), *bases, "copy")
    carried = {path: update for (_, path), update in result.adapter.updates.items() if update.kind == "diff"}
    for row in result.report.modules:
        if row.name in paths.values() and row.status == "ported":
            target = str(row.target)
            block = int(row.name.split(".")[2])
            assert torch.equal(carried[target].delta(), values(24, seed=block).load())
    assert len(carried) == 3


@pytest.mark.parametrize("stored", ["change", "value"])
def test_a_stored_change_is_turned_with_its_hidden_units(stored: str, tmp_path: Path) -> None:
    old, new, residual = turned_bases(tmp_path)
    changes = {NORM: values(24).load(), f"{MODULE}.weight": values(24, 24).load()}
    changes |= {"model.embed_tokens.weight": values(96, 24).load()}
    updates: dict[ModuleRef, Update] = {}
    for path, change in changes.items():
        before = old.parameter(ModuleRef(MODEL, path))
        assert before is not None
        whole = Full(InMemory(before.load() + change), path)
        updates[ModuleRef(MODEL, path)] = Diff(InMemory(change), path) if stored == "change" else whole
    adapter = lora(llama(), roles=("v_proj",))
    result = port(replace(adapter, updates={**adapter.updates, **updates}), old, new, "procrustes").adapter
    for path, change in changes.items():
        after = new.parameter(ModuleRef(MODEL, path))
        assert after is not None
        got = result.updates[ModuleRef(MODEL, path)].delta(after.load())
        wanted = residual @ change if change.dim() == 1 else change @ residual.T
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_a_projection_leaves_a_norm_as_it_is_and_says_so(bases: tuple[Base, Base]) -> None:
    change = values(24)
    result = port(with_update(Diff(change, f"{NORM}.diff"), NORM), *bases, "lora-x")
    assert torch.equal(change_of(result.adapter, NORM), change.load())
    assert "lora-x maps no vectors" in next(row.reason for row in result.report.modules if row.name == NORM)


def test_a_stored_change_is_not_resized(bases: tuple[Base, Base]) -> None:
    with pytest.raises(InputError, match="a base's parameter is"):
        port(with_update(Diff(values(23), NORM), NORM), *bases, "copy")
    with pytest.raises(InputError, match="matches no parameter"):
        port(with_update(Diff(values(24), "other.weight"), "other.weight"), *bases, "copy")


def test_parts_of_one_update_are_still_one_after_a_port(bases: tuple[Base, Base]) -> None:
    update = FACTORED["part of a lokr"]
    carried = port(with_update(update), *bases, "copy").adapter.updates[ModuleRef(MODEL, MODULE)]
    assert isinstance(carried, Slice)
    assert isinstance(update, Slice)
    assert carried.of is update.of
