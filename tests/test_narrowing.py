"""A migration that is narrowed to an adapter carries it as the whole one does, and holds hardly more than it."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import Run
from torch import Tensor

from regraft import ModuleRef, Settings, UsageError, fit_migration, load_adapter, open_base, port
from regraft import cache as kept
from regraft.adapter import MODEL, Adapter, TokenRef
from regraft.base import Base
from regraft.cache import cached_files
from regraft.migrations.compose import compose
from regraft.narrowing import Folded, Narrowing
from regraft.port import fit_for
from regraft.tensors import InMemory
from regraft.transport import LinearMap, Transport, projection
from regraft.updates import Diff, Full, LoHa, LowRank
from toys import StateDict, drifted, llama, lora, relative_error, rotation, save_base

METHODS = {
    "lora-x": {},
    "lora-x with an edge": {"edge": 0.5},
    "lora-x-atc": {},
    "cross-lora": {"subspace_rank": 12},
    "prolora": {},
    "prolora of all layers": {"layers": "all"},
    "dart": {},
}
#: A stack of convolutions behind the linear layers, and one of another size in the new base.
KERNELS = {"conv_in": (24, 12, 3, 3), "blocks.0.conv": (24, 24, 3, 3), "blocks.1.conv": (24, 24, 1, 1)}


def state_of(seed: int = 0) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    kernels = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.1 for name, shape in KERNELS.items()}
    return llama(seed) | kernels


def paired(folder: Path, state: StateDict, moved: StateDict) -> tuple[Base, Base]:
    return (
        open_base(save_base(state, folder / "old.safetensors")),
        open_base(save_base(moved, folder / "new.safetensors")),
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Base]:
    return paired(tmp_path_factory.mktemp("bases"), state_of(), drifted(state_of(), 0.2))


def factor(*shape: int) -> InMemory:
    return InMemory(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.05)


def adapter_of(**more: LowRank | LoHa | Diff | Full) -> Adapter:
    """A LoRA on some layers, a DoRA on others, and kernels, each of a rank of its own."""
    state, updates = state_of(), {}
    for roles, rank, dora in ((("q_proj", "down_proj"), 2, False), (("v_proj",), 5, False), (("up_proj",), 3, True)):
        updates |= lora(state, roles=roles, rank=rank, dora=dora).updates
    for name, (out, inp, *kernel) in KERNELS.items():
        updates[ModuleRef(MODEL, name)] = LowRank(factor(out, 3, 1, 1), factor(3, inp, *kernel), 0.5)
    return Adapter(updates | {ModuleRef(MODEL, name): update for name, update in more.items()}, "peft")


def same(first: Adapter, second: Adapter) -> None:
    assert list(first.updates) == list(second.updates)
    for ref, update in first.updates.items():
        other = second.updates[ref]
        assert (other.kind, other.rank, other.shape) == (update.kind, update.rank, update.shape)
        if isinstance(update, LowRank):
            assert relative_error(other.delta(), update.delta()) < 1e-5
            for one, two in ((update.magnitude, other.magnitude), (update.bias, other.bias)):
                assert (one is None) == (two is None)
                if one is not None:
                    torch.testing.assert_close(two.load(), one.load())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [None, 1, 0.9, "full"])
def test_a_narrowed_migration_carries_what_the_whole_one_does(
    bases: tuple[Base, Base], method: str, rank: int | float | str | None
) -> None:
    name, adapter, settings = method.split()[0], adapter_of(), Settings(rank=rank, force=True)
    whole, narrowed = (fit_for(adapter, *bases, name, narrow=narrow, **METHODS[method]) for narrow in (False, True))
    assert (whole.narrowed, narrowed.narrowed) == (False, True)
    before, after = (m.port(adapter, settings, old=bases[0], new=bases[1]) for m in (whole, narrowed))
    same(before.adapter, after.adapter)
    for one, two in zip(before.report.modules, after.report.modules, strict=True):
        assert (one.name, one.target, one.reason, one.rank_out) == (two.name, two.target, two.reason, two.rank_out)
        assert one.energy_kept == pytest.approx(two.energy_kept, rel=1e-4, abs=1e-5)
        assert one.cut_loss == pytest.approx(two.cut_loss, rel=1e-3, abs=1e-5)
    # By the port of one call, which narrows by itself.
    same(port(adapter, *bases, name, settings=settings, **METHODS[method]).adapter, after.adapter)


def test_other_kinds_of_a_low_rank_are_narrowed_as_the_lora_that_they_equal(bases: tuple[Base, Base]) -> None:
    name = "model.layers.0.self_attn.k_proj"
    hadamard = LoHa(factor(24, 2), factor(2, 24), factor(24, 2), factor(2, 24), 3.0)
    adapter = adapter_of(**{name: hadamard})
    narrowed = fit_for(adapter, *bases, "lora-x", narrow=True, energy=0.99)
    assert isinstance(narrowed.entries[ModuleRef(MODEL, name)].transport, Folded)
    same(fit_for(adapter, *bases, "lora-x", energy=0.99).port(adapter).adapter, narrowed.port(adapter).adapter)


def test_a_port_without_the_old_base_is_narrowed_too(bases: tuple[Base, Base]) -> None:
    adapter = replace(adapter_of(), updates=lora(state_of()).updates)
    whole, narrowed = (fit_for(adapter, None, bases[1], "lora-x", narrow=narrow) for narrow in (False, True))
    assert narrowed.narrowed
    same(whole.port(adapter).adapter, narrowed.port(adapter).adapter)


def test_without_the_old_base_no_module_takes_the_map_of_another(bases: tuple[Base, Base]) -> None:
    # In double precision every map is rounded to single: what one module's took must not be taken for the next one's.
    adapter = replace(adapter_of(), updates=lora(state_of()).updates)
    double = fit_for(adapter, None, bases[1], "lora-x", dtype=torch.float64).port(adapter).adapter
    same(fit_for(adapter, None, bases[1], "lora-x").port(adapter).adapter, double)


@pytest.mark.parametrize("method", ["copy", "auto", "procrustes"])
def test_between_equal_bases_there_is_nothing_to_narrow_and_the_bytes_stay(
    tmp_path: Path, method: str, bases: tuple[Base, Base]
) -> None:
    adapter, base = adapter_of(), bases[0]
    fitted = fit_migration(base, base, method, adapter=adapter, narrow=True)
    assert not fitted.narrowed
    ported = port(adapter, base, base, method).adapter
    for ref, update in adapter.updates.items():
        other = ported.updates[ref]
        assert torch.equal(other.up.load(), update.up.load())
        assert torch.equal(other.down.load(), update.down.load())
    # It is one for every adapter.
    fitted.save(tmp_path / "m.safetensors")


def test_a_narrowed_migration_is_neither_saved_nor_composed(tmp_path: Path, bases: tuple[Base, Base]) -> None:
    old, new = bases
    narrowed = fit_migration(old, new, "lora-x", adapter=adapter_of(), narrow=True)
    with pytest.raises(UsageError, match=r"narrowed to the adapter .* narrow=True"):
        narrowed.save(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="narrowed"):
        compose(narrowed, fit_migration(new, old, "lora-x"))
    with pytest.raises(UsageError, match="no adapter to narrow"):
        fit_migration(old, new, "lora-x", narrow=True)


def test_a_narrowed_migration_carries_no_other_adapter(bases: tuple[Base, Base]) -> None:
    old, new = bases
    own, other = lora(state_of(), seed=7), lora(state_of(), seed=11)
    migration = fit_migration(old, new, "lora-x", adapter=own, narrow=True)
    assert migration.port(own, Settings(force=True), old=old, new=new).adapter.updates
    with pytest.raises(UsageError, match="narrowed to another adapter"):
        migration.port(other, Settings(force=True), old=old, new=new)


def test_maps_that_carry_more_than_factors_are_left_whole(tmp_path: Path, bases: tuple[Base, Base]) -> None:
    first, second = (ModuleRef(MODEL, f"model.layers.{i}.self_attn.k_proj") for i in (0, 1))
    biased = {first.path: LowRank(factor(24, 2), factor(2, 24), 1.0, bias=factor(24))}
    magnitude = {second.path: LowRank(factor(24, 2), factor(2, 24), 1.0, magnitude=factor(24))}
    adapter = adapter_of(**biased, **magnitude)
    for method, rotates in (("dart", True), ("lora-x", False)):
        narrowed = fit_migration(*bases, method, adapter=adapter, narrow=True)
        assert narrowed.narrowed
        for module in (first, second):
            assert isinstance(narrowed.entries[module].transport, Folded) != rotates
        settings = Settings(force=True)
        same(fit_migration(*bases, method).port(adapter, settings).adapter, narrowed.port(adapter, settings).adapter)
    # Whole parameters move by the maps of the modules around them.
    norm = {"model.norm.weight": Diff(factor(24), "model.norm.diff")}
    assert not fit_migration(*bases, "dart", adapter=adapter_of(**norm), narrow=True).narrowed


def test_the_table_of_added_tokens_is_left_whole(bases: tuple[Base, Base]) -> None:
    table = ModuleRef(MODEL, "model.embed_tokens")
    adapter = adapter_of(**{table.path: LowRank(factor(96, 2), factor(2, 24), 1.0)})
    assert table in Narrowing.to(adapter, bases[0]).updates
    assert table not in Narrowing.to(replace(adapter, tokens={TokenRef(MODEL, "x"): factor(2, 24)}), bases[0]).updates


def test_removed_blocks_go_through_their_survivors_whole_maps(tmp_path: Path) -> None:
    state = llama(layers=4)
    pruned = {name.replace("layers.3", "layers.2"): tensor for name, tensor in state.items() if "layers.2" not in name}
    old, new = paired(tmp_path, state, drifted(pruned, 0.1))
    adapter, settings = lora(state), Settings(force=True)
    for removed in ("drop", "nearest", "fold"):
        narrowed = fit_migration(old, new, "lora-x", adapter=adapter, removed=removed, narrow=True)
        assert narrowed.narrowed
        whole = fit_migration(old, new, "lora-x", adapter=adapter, removed=removed)
        same(whole.port(adapter, settings).adapter, narrowed.port(adapter, settings).adapter)


def test_a_map_of_a_kernels_channels_and_one_that_holds_less_are_left() -> None:
    module, channels = ModuleRef(MODEL, "conv"), rotation(12, 1)
    update = LowRank(factor(24, 3, 1, 1), factor(3, 12, 3, 3), 1.0)
    transport = Transport(((LinearMap(0.0, rotation(24, 2)), LinearMap(0.0, channels)),), rotates=True)
    folded = Narrowing({module: update})(module, transport, (24, 12, 3, 3), (24, 12, 3, 3))
    assert isinstance(folded, Folded)
    assert isinstance(folded.parts[0][0], Tensor)
    assert folded.parts[0][1].left is channels
    up, down = update.factors()
    before, after = transport.factors(up, down), folded.factors(up, down)
    assert relative_error(after.up @ after.down, before.up @ before.down) < 1e-5
    thin = Transport(((projection(rotation(24, 2)[:, :2]), projection(rotation(108, 3)[:, :2])),))
    assert Narrowing({module: update})(module, thin, (24, 12, 3, 3), (24, 12, 3, 3)) is thin


def alive(cell: int) -> int:
    """Bytes of the tensors that are alive and (cell, …) or (…, cell), each storage once."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) is Tensor and cell in thing.shape]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


@pytest.mark.parametrize(("method", "terms"), [("lora-x", 1), ("prolora", 2), ("dart", 1)])
def test_a_narrowed_migration_holds_as_much_as_the_adapter(tmp_path: Path, method: str, terms: int) -> None:
    # A width that no other test's tensors have.
    state = llama(layers=6, width=53)
    old, new = paired(tmp_path, state, drifted(state, 0.1))
    adapter = lora(state, rank=2, roles=("q_proj", "v_proj"))
    before, adapters = alive(53), sum(update.up.tensor.nbytes * 2 for update in adapter.updates.values())
    narrowed = fit_migration(old, new, method, adapter=adapter, narrow=True)
    norms = sum(entry.row_norms.nbytes for entry in narrowed.entries.values())
    assert alive(53) - before <= terms * adapters + norms


def test_the_command_keeps_small_fits_alone_and_narrows_the_others(
    tmp_path: Path, bases: tuple[Base, Base], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    adapter = lora(state_of())
    adapter.save(tmp_path / "lora")
    pair = ("--from", str(bases[0].path), "--to", str(bases[1].path), "-m", "prolora")

    def ported(name: str, *flags: str) -> Adapter:
        assert run("port", str(tmp_path / "lora"), *pair, "-o", str(tmp_path / name), *flags).code == 0
        return load_adapter(tmp_path / name)

    plain = ported("apart", "--no-cache")
    assert cached_files() == []
    with monkeypatch.context() as patch:
        patch.setattr("regraft.cli.port.MOST_KEPT", 1000)
        same(plain, ported("large"))
    assert cached_files() == []
    same(plain, ported("small"))
    assert len(cached_files()) == 1
    assert kept.size_at_most(bases[0], [ModuleRef(MODEL, "conv_in")]) == 4 * (24 + 108) * 24
