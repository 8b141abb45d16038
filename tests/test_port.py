"""The identities that a port must keep, on models small enough to check every one of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from regraft import Refused, Settings, fit_migration, load_adapter, open_base, port
from regraft.base import Base
from regraft.methods import methods
from regraft.plan import Selection
from toys import StateDict, deltas, drifted, llama, lora, permutation, regauged, relative_error, rotation, save_base

EXACT = {"copy": {}, "auto": {}}
FULL_RANK = {
    "lora-x": {"subspace_rank": 24},
    "prolora": {"subspace_rank": 24},
    "procrustes": {"keep_identity": 2.0},
}


@pytest.fixture
def state() -> StateDict:
    return llama()


def base_of(state: StateDict, path: Path) -> Base:
    return open_base(save_base(state, path))


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_bases_return_the_same_tensor_bytes(
    tmp_path: Path, state: StateDict, method: str, dtype: torch.dtype
) -> None:
    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(state, tmp_path / "new.safetensors")
    lora(state, dtype=dtype).save(tmp_path / "lora")
    port(load_adapter(tmp_path / "lora"), old, new, method).save(tmp_path / "out")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "out"))
    assert list(before) == list(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key])


@pytest.mark.parametrize("method", FULL_RANK)
def test_equal_bases_give_the_same_update_where_the_rule_makes_it_so(
    tmp_path: Path, state: StateDict, method: str
) -> None:
    adapter = lora(state, roles=("q_proj", "v_proj"))
    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(state, tmp_path / "new.safetensors")
    # Single precision comes to 1.3e-5 on some processors.
    ported = port(adapter, old, new, method, dtype=torch.float64, **FULL_RANK[method]).adapter
    for ref, delta in deltas(adapter).items():
        assert relative_error(deltas(ported)[ref], delta) < 1e-5


@pytest.mark.parametrize("method", ["lora-x", "prolora"])
def test_an_update_inside_the_kept_subspace_survives_the_projection(
    tmp_path: Path, state: StateDict, method: str
) -> None:
    from dataclasses import replace

    from regraft.tensors import InMemory

    adapter = lora(state)
    inside = {}
    for ref, update in adapter.updates.items():
        u, _, vh = torch.linalg.svd(state[f"{ref.path}.weight"], full_matrices=False)
        inside[ref] = replace(update, up=InMemory(u[:, :4].contiguous()), down=InMemory(vh[:4].contiguous()))
    adapter = replace(adapter, updates=inside)
    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(state, tmp_path / "new.safetensors")
    ported = port(adapter, old, new, method, subspace_rank=8).adapter
    for ref, delta in deltas(adapter).items():
        assert relative_error(deltas(ported)[ref], delta) < 1e-5


@pytest.mark.parametrize("method", ["procrustes", "auto"])
@pytest.mark.parametrize("make", [rotation, permutation], ids=["rotated", "permuted"])
def test_a_source_in_other_coordinates_is_recovered(tmp_path: Path, state: StateDict, method: str, make) -> None:
    residual, hidden = make(24, 3), permutation(40, 5)
    adapter = lora(state)
    old = base_of(state, tmp_path / "old.safetensors")
    new = base_of(regauged(state, residual, hidden), tmp_path / "new.safetensors")
    result = port(adapter, old, new, method)
    assert result.report.method == "procrustes"
    moved = {f"{ref.path}.weight": delta for ref, delta in deltas(adapter).items()}
    wanted = regauged(moved, residual, hidden)
    for ref, delta in deltas(result.adapter).items():
        assert relative_error(delta, wanted[f"{ref.path}.weight"]) < 1e-4


def test_strength_zero_is_a_zero_update(tmp_path: Path, state: StateDict) -> None:
    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(drifted(state, 0.1), tmp_path / "new.safetensors")
    for dora in (False, True):
        ported = port(lora(state, dora=dora), old, new, settings=Settings(strength=0.0)).adapter
        for ref, update in ported.updates.items():
            weight = new.weight(ref)
            torch.testing.assert_close(update.merged(weight), weight, rtol=1e-5, atol=1e-6)


def test_there_and_back_through_invertible_transports_is_the_original(tmp_path: Path, state: StateDict) -> None:
    adapter = lora(state)
    old = base_of(state, tmp_path / "old.safetensors")
    new = base_of(regauged(state, rotation(24, 3), permutation(40, 5)), tmp_path / "new.safetensors")
    there = fit_migration(old, new, "procrustes").port(adapter).adapter
    back = fit_migration(new, old, "procrustes").port(there, Settings(force=True)).adapter
    for ref, delta in deltas(adapter).items():
        assert relative_error(deltas(back)[ref], delta) < 1e-4


def test_dora_keeps_its_relative_change_of_every_row(tmp_path: Path, state: StateDict) -> None:
    grown = {name: tensor * 1.5 if tensor.dim() > 1 else tensor for name, tensor in state.items()}
    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(grown, tmp_path / "new.safetensors")
    adapter = lora(state, dora=True)
    ported = port(adapter, old, new, "copy").adapter
    for ref, update in ported.updates.items():
        before, after = adapter.updates[ref].merged(old.weight(ref)), update.merged(new.weight(ref))
        old_change = before.norm(dim=1) / old.weight(ref).norm(dim=1)
        torch.testing.assert_close(after.norm(dim=1) / new.weight(ref).norm(dim=1), old_change)


def test_selection_leaves_modules_out_and_says_by_which_option(tmp_path: Path, state: StateDict) -> None:
    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(state, tmp_path / "new.safetensors")
    result = port(lora(state), old, new, settings=Settings(selection=Selection(exclude=("*layers.0.*",))))
    left = [row for row in result.report.modules if row.status == "skipped"]
    assert {row.name.split(".")[2] for row in left} == {"0"}
    assert all("--exclude" in row.reason for row in left)
    assert result.report.counts.ported == 6


@pytest.mark.parametrize("block", ["*layers.1.*", "model.layers.1"])
def test_block_strength_scales_the_blocks_it_names_alone(tmp_path: Path, state: StateDict, block: str) -> None:
    adapter = lora(state)
    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(state, tmp_path / "new.safetensors")
    ported = port(adapter, old, new, settings=Settings(block_strength=((block, 0.5),))).adapter
    for ref, delta in deltas(ported).items():
        factor = 0.5 if ".1." in ref.path else 1.0
        torch.testing.assert_close(delta, factor * deltas(adapter)[ref])


@pytest.mark.parametrize(("rank", "expected"), [(2, 2), (6, 6), (None, 4)])
def test_the_output_has_the_wanted_rank(tmp_path: Path, state: StateDict, rank: int | None, expected: int) -> None:
    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(drifted(state, 0.1), tmp_path / "new.safetensors")
    for method in ("copy", "prolora"):
        result = port(lora(state), old, new, method, settings=Settings(rank=rank))
        assert {update.rank for update in result.adapter.updates.values()} == {expected}
        assert all(row.rank_in == 4 and row.rank_out == expected for row in result.report.modules)


def test_every_registered_method_ports_a_near_pair_and_keeps_rank_and_dtype(tmp_path: Path, state: StateDict) -> None:
    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(drifted(state, 0.1), tmp_path / "new.safetensors")
    old, new = (replace(base, configs={"model": {"num_attention_heads": 2}}) for base in (old, new))
    adapter = lora(state, dtype=torch.float16)
    # Those that run the models, or learn from other adapters, are tried in tests/methods.
    for method in (name for name, found in methods().items() if not found.runs and "adapters" not in found.needs):
        ported = port(adapter, old, new, method).adapter
        for ref, update in ported.updates.items():
            assert update.rank == adapter.updates[ref].rank
            assert update.up.dtype == update.down.dtype == torch.float16
            assert update.shape == adapter.updates[ref].shape


def test_without_an_old_base_the_methods_that_need_only_the_target_port(tmp_path: Path, state: StateDict) -> None:
    from regraft import UsageError

    new = base_of(state, tmp_path / "new.safetensors")
    for method in ("auto", "copy", "lora-x"):
        result = port(lora(state), None, new, method)
        assert result.report.counts.ported == 9
        assert result.report.verdict is None
    with pytest.raises(UsageError, match="--from"):
        port(lora(state), None, new, "prolora")


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, state: StateDict) -> None:
    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(drifted(state, 0.1), tmp_path / "new.safetensors")
    for name in ("a", "b"):
        port(lora(state), old, new, "prolora").save(tmp_path / name)
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_a_port_of_a_port_is_refused_and_both_are_recorded_when_forced(tmp_path: Path, state: StateDict) -> None:
    from regraft.lineage import ports_of

    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(drifted(state, 0.1), tmp_path / "new.safetensors")
    once = port(lora(state), old, new).adapter
    with pytest.raises(Refused, match="port of a port"):
        port(once, new, old)
    twice = port(once, new, old, settings=Settings(force=True)).adapter
    first, second = ports_of(twice)
    assert (first["to"]["fingerprint"], second["to"]["fingerprint"]) == (new.fingerprint, old.fingerprint)
    assert not first["forced"]
    assert second["forced"]


def test_a_rank_above_the_matrix_is_cut_and_padded_without_losing_the_update(tmp_path: Path) -> None:
    """A head with two classes has at most rank 2, whatever the adapter's rank is."""
    head = {"classifier.weight": torch.randn(2, 24, generator=torch.Generator().manual_seed(0))}
    old, new = base_of(head, tmp_path / "old.safetensors"), base_of(drifted(head, 0.1), tmp_path / "new.safetensors")
    adapter = lora(head, rank=8, roles=("classifier",))
    for method, options in (("copy", {}), ("prolora", {"subspace_rank": 1.0})):
        result = port(adapter, old, new, method, settings=Settings(rank=6), **options)
        (delta,) = deltas(result.adapter).values()
        (original,) = deltas(adapter).values()
        assert result.report.modules[0].rank_out == 6
        assert relative_error(delta, original) < (1e-5 if method == "copy" else 1.0)


@pytest.mark.parametrize("method", ["copy", "lora-x", "prolora", "procrustes", "auto"])
def test_convolutions_are_carried_in_their_own_shapes(tmp_path: Path, method: str) -> None:
    from regraft import ModuleRef
    from regraft.adapter import MODEL, Adapter
    from regraft.tensors import InMemory
    from regraft.updates import LowRank

    generator = torch.Generator().manual_seed(0)
    state = {"conv.weight": torch.randn(6, 5, 3, 3, generator=generator)}
    up, down = (torch.randn(shape, generator=generator) for shape in ((6, 2, 1, 1), (2, 5, 3, 3)))
    update = LowRank(InMemory(up), InMemory(down), 1.0)
    adapter = Adapter({ModuleRef(MODEL, "conv"): update}, "peft")
    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(state, tmp_path / "new.safetensors")
    options = {"subspace_rank": 1.0} if method in ("lora-x", "prolora") else {}
    (ported,) = port(adapter, old, new, method, **options).adapter.updates.values()
    assert (ported.up.shape, ported.down.shape) == (update.up.shape, update.down.shape)
    u, _, vh = torch.linalg.svd(state["conv.weight"].flatten(1), full_matrices=False)
    wanted = update.delta().flatten(1)
    if method in ("lora-x", "prolora"):
        # Out (6) is whole; in (45) has a null space, which both rules drop then (ProLoRA as a cross part).
        wanted = u @ u.T @ wanted @ vh.T @ vh
    torch.testing.assert_close(ported.delta().flatten(1), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora-x", "prolora"])
def test_what_belongs_to_an_output_unit_stays_with_it_under_a_projection(
    tmp_path: Path, state: StateDict, method: str
) -> None:
    from dataclasses import replace

    from regraft.tensors import InMemory

    adapter = lora(state, dora=True)
    uneven = {
        ref: replace(
            update,
            magnitude=InMemory(update.magnitude.load() * torch.linspace(0.5, 2, update.shape[0])),
            bias=InMemory(torch.linspace(-1, 1, update.shape[0])),
        )
        for ref, update in adapter.updates.items()
    }
    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(state, tmp_path / "new.safetensors")
    ported = port(replace(adapter, updates=uneven), old, new, method, subspace_rank=12).adapter
    for ref, update in ported.updates.items():
        torch.testing.assert_close(update.magnitude.load(), uneven[ref].magnitude.load())
        torch.testing.assert_close(update.bias.load(), uneven[ref].bias.load())


def test_dora_moves_with_its_units_where_they_were_permuted(tmp_path: Path, state: StateDict) -> None:
    from dataclasses import replace

    from regraft.tensors import InMemory

    residual, hidden = permutation(24, 3), permutation(40, 5)
    adapter = lora(state, roles=("up_proj",), dora=True)
    uneven = {
        ref: replace(update, magnitude=InMemory(update.magnitude.load() * torch.linspace(0.5, 2, 40)))
        for ref, update in adapter.updates.items()
    }
    adapter = replace(adapter, updates=uneven)
    old = base_of(state, tmp_path / "old.safetensors")
    new = base_of(regauged(state, residual, hidden), tmp_path / "new.safetensors")
    for ref, update in port(adapter, old, new, "procrustes").adapter.updates.items():
        wanted = hidden @ uneven[ref].merged(old.weight(ref)) @ residual.T
        torch.testing.assert_close(update.merged(new.weight(ref)), wanted, rtol=1e-3, atol=1e-4)


def test_a_row_of_zeros_keeps_its_magnitude(tmp_path: Path, state: StateDict) -> None:
    zeroed = {name: t.clone() for name, t in state.items()}
    for tensor in zeroed.values():
        if tensor.dim() > 1:
            tensor[0] = 0
    adapter = lora(zeroed, dora=True)
    old, new = base_of(zeroed, tmp_path / "old.safetensors"), base_of(zeroed, tmp_path / "new.safetensors")
    for ref, update in port(adapter, old, new, "copy").adapter.updates.items():
        assert torch.equal(update.magnitude.load(), adapter.updates[ref].magnitude.load())


def test_dora_passes_a_saved_migration_of_equal_bases_and_a_port_without_the_old_base(
    tmp_path: Path, state: StateDict
) -> None:
    from regraft import load_migration

    adapter = lora(state, dora=True)
    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(state, tmp_path / "new.safetensors")
    migration = load_migration(fit_migration(old, new, "copy").save(tmp_path / "m.safetensors"))
    for ported in (migration.port(adapter).adapter, port(adapter, None, new, "copy").adapter):
        for ref, update in ported.updates.items():
            assert torch.equal(update.magnitude.load(), adapter.updates[ref].magnitude.load())


def test_a_shape_that_the_method_can_not_carry_fails_unless_partial_is_allowed(
    tmp_path: Path, state: StateDict
) -> None:
    from regraft import InputError

    wider = llama(mlp=48)
    wider |= {name: tensor for name, tensor in state.items() if ".mlp." not in name}
    old, new = base_of(state, tmp_path / "old.safetensors"), base_of(wider, tmp_path / "new.safetensors")
    for method in ("copy", "auto"):
        adapter = lora(state, roles=("q_proj", "k_proj", "v_proj", "down_proj"))
        with pytest.raises(InputError, match="size"):
            port(adapter, old, new, method)
        report = port(adapter, old, new, method, settings=Settings(allow_partial=True)).report
        assert {row.name.split(".")[-1]: row.status for row in report.modules} == {
            "q_proj": "ported",
            "k_proj": "ported",
            "v_proj": "ported",
            "down_proj": "refused",
        }
