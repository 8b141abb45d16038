"""The updates of blocks that a pruned base lacks: dropped, added to the nearest, or folded into it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regraft import ModuleRef, UsageError, fit_migration, open_base, port
from regraft.adapter import MODEL
from regraft.base import Base
from regraft.carry import Settings
from regraft.joining import total
from regraft.migrations.compose import compose
from regraft.pairing import pair_bases
from regraft.tensors import InMemory
from regraft.updates import Diff, LowRank
from test_pairing import without_layers
from toys import deltas, drifted, llama, lora, relative_error, save_base

LAYERS = 4


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Base]:
    """A Llama, and the same one trained on without its block 1."""
    folder, state = tmp_path_factory.mktemp("pruned"), llama(layers=LAYERS)
    pruned = drifted(without_layers(state, {1}), 0.1)
    return open_base(save_base(state, folder / "old.safetensors")), open_base(
        save_base(pruned, folder / "new.safetensors")
    )


def module(layer: int, name: str) -> ModuleRef:
    return ModuleRef(MODEL, f"model.layers.{layer}.{name}")


def orthogonal(weight: Tensor) -> Tensor:
    return torch.linalg.qr(weight)[0].contiguous()


def test_a_removed_blocks_survivor_is_its_nearest_neighbour(bases: tuple[Base, Base]) -> None:
    pairing = pair_bases(*bases)
    assert pairing.survivors[module(1, "mlp.up_proj")] == module(0, "mlp.up_proj")
    assert {ref.path.split(".")[2] for ref in pairing.survivors} == {"1"}
    assert not pairing.origins


def test_added_blocks_are_traced_to_the_blocks_that_they_copy(tmp_path: Path) -> None:
    old = llama(layers=2)
    blocks = {n: t for n, t in old.items() if "layers" in n}
    again = {re.sub(r"layers.(\d)", lambda i: f"layers.{int(i[1]) + 2}", n): t.clone() for n, t in blocks.items()}
    new = drifted({**old, **again}, 0.2)
    files = [open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((old, new))]
    pairing = pair_bases(*files)
    found = {answer.module: ref for ref, answer in pairing.counterparts.items()} | dict(pairing.origins)
    assert all(found[module(j, "mlp.up_proj")] == module(j % 2, "mlp.up_proj") for j in range(4))


def test_nearest_adds_the_update_to_the_survivors(bases: tuple[Base, Base]) -> None:
    adapter = lora(llama(layers=LAYERS))
    result = port(adapter, *bases, "copy", settings=Settings(rank=8), removed="nearest")
    got, before = deltas(result.adapter), deltas(adapter)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        assert relative_error(got[module(0, name)], before[module(0, name)] + before[module(1, name)]) < 1e-5
        assert torch.equal(got[module(1, name)], before[module(2, name)])
    assert result.report.counts.skipped == 0
    assert result.report.options["removed"] == "nearest"


def test_the_sum_is_cut_to_the_adapters_rank_and_the_loss_reported(bases: tuple[Base, Base]) -> None:
    adapter = lora(llama(layers=LAYERS))
    result = port(adapter, *bases, "copy", removed="nearest")
    assert {update.rank for update in result.adapter.updates.values()} == {4}
    before = deltas(adapter)
    spectrum = torch.linalg.svdvals(before[module(0, "mlp.down_proj")] + before[module(1, "mlp.down_proj")]).square()
    rows = [row for row in result.report.modules if row.target and row.target.endswith("layers.0.mlp.down_proj")]
    assert len(rows) == 2
    for row in rows:
        assert row.cut_loss == pytest.approx(float(spectrum[4:].sum() / spectrum.sum()), rel=1e-3)


def test_drop_is_the_default_and_skips_them(bases: tuple[Base, Base]) -> None:
    adapter = lora(llama(layers=LAYERS))
    dropped, plain = (port(adapter, *bases, "copy", **given) for given in ({"removed": "drop"}, {}))
    assert dropped.report.counts.skipped == plain.report.counts.skipped == 3
    for ref, delta in deltas(plain.adapter).items():
        assert torch.equal(delta, deltas(dropped.adapter)[ref])


def without_block(names: tuple[str, ...], state: dict[str, Tensor], tmp_path: Path) -> dict[ModuleRef, Tensor]:
    """The update of block 1's modules alone, folded into block 0 of a base that lost block 1."""
    old = open_base(save_base(state, tmp_path / "old.safetensors"))
    new = open_base(save_base(without_layers(state, {1}), tmp_path / "new.safetensors"))
    full = lora(state, roles=tuple(name.split(".")[-1] for name in names))
    alone = {ref: update for ref, update in full.updates.items() if ".1." in ref.path}
    from dataclasses import replace

    return deltas(port(replace(full, updates=alone), old, new, "copy", removed="fold").adapter)


def test_folded_into_a_block_of_the_same_weights_an_update_stays_as_it_is(tmp_path: Path) -> None:
    """Up to the ridge: the survivor's own hidden units answer to the removed block's."""
    state = llama(layers=3)
    same = {**state, **{n.replace("layers.0", "layers.1"): t.clone() for n, t in state.items() if "layers.0" in n}}
    # Square and well-conditioned, so that the survivor's units can express the removed block's.
    for i in (0, 1):
        for name in ("v_proj", "o_proj"):
            same[f"model.layers.{i}.self_attn.{name}.weight"] = orthogonal(
                state[f"model.layers.0.self_attn.{name}.weight"]
            )
    got = without_block(("self_attn.v_proj", "self_attn.o_proj"), same, tmp_path)
    wanted = deltas(lora(same, roles=("v_proj", "o_proj")))
    for name in ("self_attn.v_proj", "self_attn.o_proj"):
        # (1 + ridge)⁻¹ of it.
        assert relative_error(got[module(0, name)] * 1.1, wanted[module(1, name)]) < 1e-4


def test_folding_keeps_what_the_update_writes_to_the_stream(tmp_path: Path) -> None:
    """With linear units: D_n ΔU_n = D_r ΔU of a reader, and ΔD_n U_n = ΔD U_r of a writer."""
    state = llama(layers=3)
    for i in (0, 1):
        for name in ("v_proj", "o_proj"):
            key = f"model.layers.{i}.self_attn.{name}.weight"
            state[key] = orthogonal(state[key])
    got = without_block(("self_attn.v_proj", "self_attn.o_proj"), state, tmp_path)
    delta = deltas(lora(state, roles=("v_proj", "o_proj")))

    def w(layer: int, name: str) -> Tensor:
        return state[f"model.layers.{layer}.self_attn.{name}.weight"]

    written = w(0, "o_proj") @ got[module(0, "self_attn.v_proj")]
    assert relative_error(written * 1.1, w(1, "o_proj") @ delta[module(1, "self_attn.v_proj")]) < 1e-4
    written = got[module(0, "self_attn.o_proj")] @ w(0, "v_proj")
    assert relative_error(written * 1.1, delta[module(1, "self_attn.o_proj")] @ w(1, "v_proj")) < 1e-4


def test_a_query_of_a_removed_block_is_not_folded(tmp_path: Path) -> None:
    old = open_base(save_base(llama(layers=3), tmp_path / "old.safetensors"))
    new = open_base(save_base(without_layers(llama(layers=3), {1}), tmp_path / "new.safetensors"))
    report = port(lora(llama(layers=3), roles=("q_proj",)), old, new, "copy", removed="fold").report
    assert [row.name for row in report.modules if row.status == "skipped"] == ["model.layers.1.self_attn.q_proj"]


def test_an_unknown_policy_is_a_usage_error(bases: tuple[Base, Base]) -> None:
    with pytest.raises(UsageError, match="drop, nearest, fold"):
        port(lora(llama(layers=LAYERS)), *bases, "copy", removed="keep")


def test_a_migration_in_which_updates_meet_is_not_written_nor_composed(
    bases: tuple[Base, Base], tmp_path: Path
) -> None:
    migration = fit_migration(*bases, "copy", removed="nearest")
    with pytest.raises(UsageError, match="shares"):
        migration.save(tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="shares"):
        compose(migration, fit_migration(bases[1], bases[1], "copy"))


def test_a_sum_of_updates_is_their_sum() -> None:
    parts = [
        LowRank(InMemory(torch.randn(6, r)), InMemory(torch.randn(r, 5)), scale) for r, scale in ((2, 2.0), (1, 0.5))
    ]
    whole, lost = total(parts, 3)
    torch.testing.assert_close(whole.delta(), parts[0].delta() + parts[1].delta(), rtol=1e-4, atol=1e-5)
    assert whole.rank == 3
    assert lost == pytest.approx(0.0, abs=1e-9)


def test_magnitudes_that_meet_are_not_joined_and_that_is_said(bases: tuple[Base, Base]) -> None:
    adapter = lora(llama(layers=LAYERS), dora=True)
    result = port(adapter, *bases, "copy", settings=Settings(rank=8), removed="nearest")
    got, before = result.adapter.updates[module(0, "mlp.down_proj")], adapter.updates
    wanted = before[module(0, "mlp.down_proj")].delta() + before[module(1, "mlp.down_proj")].delta()
    assert relative_error(got.delta(), wanted) < 1e-5
    assert got.magnitude is not None
    # Every row grew by a tenth, as in the block that it comes from.
    torch.testing.assert_close(got.magnitude.load(), 1.1 * bases[1].weight(module(0, "mlp.down_proj")).norm(dim=1))
    rows = [row for row in result.report.modules if row.target == str(module(0, "mlp.down_proj"))]
    assert all("magnitudes that meet are not joined" in row.reason for row in rows)


def test_whole_changes_that_meet_add_up(bases: tuple[Base, Base]) -> None:
    adapter = lora(llama(layers=LAYERS), roles=("q_proj",))
    changes = {layer: torch.full((24, 40), float(layer + 1)) for layer in range(LAYERS)}
    paths = {layer: f"model.layers.{layer}.mlp.down_proj.weight" for layer in changes}
    diffs = {ModuleRef(MODEL, paths[i]): Diff(InMemory(change), paths[i]) for i, change in changes.items()}
    both = replace(adapter, updates={**adapter.updates, **diffs})
    result = port(both, *bases, "copy", removed="nearest").adapter.updates
    assert torch.equal(result[ModuleRef(MODEL, paths[0])].delta(), changes[0] + changes[1])
    assert torch.equal(result[ModuleRef(MODEL, paths[1])].delta(), changes[2])
