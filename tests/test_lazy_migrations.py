"""A migration that was read from a file holds none of its maps: they come from the file as they are used."""

from __future__ import annotations

import gc
import os
import pickle
from pathlib import Path

import pytest
import torch
from running import Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft import InputError, Migration, Settings, fit_migration, load_migration, open_base
from regraft.adapter import Adapter
from regraft.base import Base
from regraft.cache import cached_files, find_cached, keep
from regraft.migrations import maps
from regraft.migrations.compose import compose
from regraft.migrations.maps import FromFile, in_memory
from regraft.migrations.precision import halved
from toys import drifted, llama, lora, permutation, regauged, rotation, save_base

METHODS = ("lora-x", "prolora", "procrustes", "dart")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Base]:
    folder, state = tmp_path_factory.mktemp("bases"), llama()
    moved = drifted(regauged(state, rotation(24, 3), permutation(40, 5)), 0.05)
    return (
        open_base(save_base(state, folder / "old.safetensors")),
        open_base(save_base(moved, folder / "new.safetensors")),
    )


def factors(migration: Migration, adapter: Adapter) -> list[Tensor]:
    ported = migration.port(adapter, Settings(force=True)).adapter
    tensors = [tensor for update in ported.updates.values() for tensor in update.factors()]
    return tensors + [u.magnitude.load() for u in ported.updates.values() if u.magnitude is not None]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_port_reads_the_very_maps_that_were_written(
    tmp_path: Path, bases: tuple[Base, Base], method: str, dora: bool
) -> None:
    rounded = halved(fit_migration(*bases, method))
    read = load_migration(rounded.save(tmp_path / "m.safetensors"))
    assert any(isinstance(entry.transport, FromFile) for entry in read.entries.values())
    adapter = lora(llama(), dora=dora)
    ported = factors(rounded, adapter)
    assert same(factors(read, adapter), ported)
    # Again, out of what is kept of shared maps; whole in memory; and in another process.
    assert same(factors(read, adapter), ported)
    assert same(factors(in_memory(read), adapter), ported)
    assert same(factors(pickle.loads(pickle.dumps(read)), adapter), ported)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_known_of_a_transport_without_its_maps_is_the_same(
    tmp_path: Path, bases: tuple[Base, Base], method: str
) -> None:
    fitted = fit_migration(*bases, method)
    file = fitted.save(tmp_path / "m.safetensors")
    read = load_migration(file)
    os.remove(file)
    for module, entry in fitted.entries.items():
        assert entry.transport is not None
        there = read.entries[module].transport
        assert (there.is_identity, there.rotates) == (entry.transport.is_identity, entry.transport.rotates)


@pytest.mark.parametrize("method", METHODS)
def test_a_migration_that_was_read_is_written_and_rounded_like_the_one_in_memory(
    tmp_path: Path, bases: tuple[Base, Base], method: str
) -> None:
    fitted = fit_migration(*bases, method)
    file = fitted.save(tmp_path / "m.safetensors")
    read = load_migration(file)
    assert read.save(tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    files = [halved(m).save(tmp_path / f"{i}.safetensors") for i, m in enumerate((fitted, read, in_memory(read)))]
    assert len({file.read_bytes() for file in files}) == 1


def test_migrations_that_were_read_compose_like_those_in_memory(tmp_path: Path, bases: tuple[Base, Base]) -> None:
    old, new = bases
    steps = [fit_migration(old, new, "procrustes"), fit_migration(new, old, "procrustes")]
    read = [load_migration(m.save(tmp_path / f"{i}.safetensors")) for i, m in enumerate(steps)]
    held = [in_memory(m) for m in read]
    first, second = (compose(*m).save(tmp_path / f"{i}-whole.safetensors") for i, m in enumerate((read, held)))
    assert first.read_bytes() == second.read_bytes()


def alive(cell: int) -> int:
    """Bytes of the (cell, …) tensors that are alive, each storage once."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) is Tensor and cell in thing.shape]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


@pytest.mark.parametrize("layers", [2, 12])
def test_what_a_migration_holds_does_not_grow_with_its_modules(tmp_path: Path, layers: int) -> None:
    # A width that no other test's tensors have.
    state = llama(layers=layers, width=37)
    old = open_base(save_base(state, tmp_path / "old.safetensors"))
    new = open_base(save_base(drifted(state, 0.1), tmp_path / "new.safetensors"))
    file = fit_migration(old, new, "lora-x").save(tmp_path / "m.safetensors")
    adapter = lora(state)
    before = alive(37)
    read = load_migration(file)
    # Norms of rows are read with the header.
    norms = sum(entry.row_norms.nbytes for entry in read.entries.values() if entry.row_norms is not None)
    assert alive(37) - before <= norms
    read.port(adapter)
    assert alive(37) - before <= norms


def test_a_shared_map_is_read_once_while_there_is_room_for_it(
    tmp_path: Path, bases: tuple[Base, Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = fit_migration(*bases, "procrustes").save(tmp_path / "m.safetensors")
    with safe_open(file, "pt") as handle:
        stored = [name for name in handle.keys() if name.startswith("map.")]  # noqa: SIM118
    adapter = lora(llama(), roles=("q_proj", "down_proj", "up_proj"))
    for room, most in ((1 << 20, len(stored)), (0, 100)):
        monkeypatch.setattr(maps, "MOST_HELD", room)
        read, seen = load_migration(file), []
        one = next(e.transport for e in read.entries.values() if isinstance(e.transport, FromFile))
        monkeypatch.setattr(
            type(one.maps), "_read", lambda self, stem, seen=seen: seen.append(stem) or _READ(self, stem)
        )
        ported = factors(read, adapter)
        assert len(stored) <= len(seen) <= most
        assert same(ported, factors(in_memory(read), adapter))
        assert bool(one.maps._held) == bool(room)


_READ = maps.FileMaps._read


def test_a_file_that_was_replaced_under_way_is_told(tmp_path: Path, bases: tuple[Base, Base]) -> None:
    file = fit_migration(*bases, "lora-x").save(tmp_path / "m.safetensors")
    read = load_migration(file)
    fit_migration(*bases, "lora-x", subspace_rank=5).save(file, overwrite=True)
    with pytest.raises(InputError, match=r"m\.safetensors.*has changed since it was opened"):
        read.port(lora(llama()), Settings(force=True))


def spoilt(file: Path) -> Path:
    """The file with a NaN in one of its maps."""
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    tensors[min(name for name in tensors if name.startswith("map."))][0, 0] = float("nan")
    save_file(tensors, file, metadata)
    return file


def test_a_map_with_nan_is_no_part_of_a_port_and_makes_the_file_invalid(
    tmp_path: Path, bases: tuple[Base, Base], run: Run
) -> None:
    file = spoilt(fit_migration(*bases, "lora-x").save(tmp_path / "m.safetensors"))
    roles = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    with pytest.raises(InputError, match=r"map\.\d+: holds NaN or Inf"):
        load_migration(file).port(lora(llama(), roles=(*roles, "embed_tokens")), Settings(force=True))
    ran = run("migration", "validate", str(file))
    assert ran.code == 1
    assert "NaN" in ran.out + ran.err


def test_a_cached_migration_with_nan_counts_as_none_and_one_that_is_found_survives_its_file(
    bases: tuple[Base, Base],
) -> None:
    fitted = fit_migration(*bases, "lora-x")
    keep(fitted, *bases, "lora-x", {})
    found = find_cached(*bases, "lora-x", {}, fitted.entries)
    spoilt(cached_files()[0])
    assert find_cached(*bases, "lora-x", {}, fitted.entries) is None
    adapter = lora(llama())
    assert same(factors(found, adapter), factors(fitted, adapter))
