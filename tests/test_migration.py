from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from regraft import InputError, Refused, Settings, fit_migration, load_migration, open_base, port
from regraft.base import Base
from regraft.cache import cached_files, clear_cache, find_cached, keep
from regraft.migration_file import KEY, check_fingerprints
from regraft.migrations.precision import BOUND, halved, rounded
from regraft.plan import source_modules
from toys import deltas, drifted, llama, lora, permutation, regauged, relative_error, rotation, save_base


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Base, Base]:
    state = llama()
    return (
        open_base(save_base(state, tmp_path / "old.safetensors")),
        open_base(save_base(drifted(state, 0.1), tmp_path / "new.safetensors")),
    )


@pytest.mark.parametrize("method", ["copy", "lora-x", "prolora", "procrustes", "auto"])
def test_a_saved_migration_ports_like_the_fit_itself(tmp_path: Path, bases: tuple[Base, Base], method: str) -> None:
    old, new = bases
    fitted = fit_migration(old, new, method)
    loaded = load_migration(fitted.save(tmp_path / "m.safetensors"))
    adapter = lora(llama(), dora=method == "copy")
    direct, through_file = port(adapter, old, new, method).adapter, loaded.port(adapter).adapter
    for ref, update in direct.updates.items():
        again = through_file.updates[ref]
        torch.testing.assert_close(again.delta(), update.delta(), rtol=1e-5, atol=1e-7)
        if update.magnitude is not None:
            torch.testing.assert_close(again.magnitude.load(), update.magnitude.load())


def test_identity_costs_nothing_and_shared_maps_are_stored_once(tmp_path: Path) -> None:
    state = llama()
    old = open_base(save_base(state, tmp_path / "old.safetensors"))
    same = fit_migration(old, old, "copy").save(tmp_path / "same.safetensors")
    with safe_open(same, "pt") as handle:
        assert sum(handle.get_tensor(name).numel() for name in handle.keys()) == 0  # noqa: SIM118
    moved = regauged(state, rotation(24, 3), permutation(40, 5))
    new = open_base(save_base(moved, tmp_path / "new.safetensors"))
    file = fit_migration(old, new, "procrustes").save(tmp_path / "m.safetensors")
    with safe_open(file, "pt") as handle:
        maps = [handle.get_slice(name).get_shape() for name in handle.keys() if name.startswith("map.")]  # noqa: SIM118
    # One map for the residual stream, and one for each of three layers' hidden units.
    assert sorted(maps) == [[24, 24], [40, 40], [40, 40], [40, 40]]
    adapter = lora(state)
    again, direct = load_migration(file).port(adapter).adapter, port(adapter, old, new, "procrustes").adapter
    for ref, delta in deltas(direct).items():
        assert relative_error(deltas(again)[ref], delta) < 1e-5


def test_a_foreign_or_stale_migration_is_refused_by_fingerprint(tmp_path: Path, bases: tuple[Base, Base]) -> None:
    old, new = bases
    migration = fit_migration(old, new, "copy")
    check_fingerprints(migration, old, new)
    other = open_base(save_base(drifted(llama(), 0.1, seed=9), tmp_path / "other.safetensors"))
    with pytest.raises(Refused, match="another new base"):
        check_fingerprints(migration, old, other)
    with pytest.raises(Refused, match="another old base"):
        check_fingerprints(migration, new, new)


def test_the_same_base_in_another_precision_is_the_same_base(tmp_path: Path, bases: tuple[Base, Base]) -> None:
    old, new = bases
    half = {name: tensor.half() for name, tensor in drifted(llama(), 0.1).items()}
    check_fingerprints(fit_migration(old, new, "copy"), old, open_base(save_base(half, tmp_path / "half.safetensors")))


def maps_in(file: Path) -> list[torch.Tensor]:
    with safe_open(file, "pt") as handle:
        return [handle.get_tensor(name) for name in handle.keys() if name.startswith("map.")]  # noqa: SIM118


def test_a_rounded_migration_is_half_as_large_and_as_exact_as_a_half_precision_adapter(tmp_path: Path) -> None:
    state = llama()
    old = open_base(save_base(state, tmp_path / "old.safetensors"))
    moved = drifted(regauged(state, rotation(24, 3), permutation(40, 5)), 0.05)
    new = open_base(save_base(moved, tmp_path / "new.safetensors"))
    for method in ("procrustes", "lora-x", "prolora"):
        exact = fit_migration(old, new, method)
        file = halved(exact).save(tmp_path / f"{method}.safetensors")
        single = exact.save(tmp_path / f"{method}-single.safetensors")
        assert {tensor.dtype for tensor in maps_in(file)} == {torch.float16}
        assert 2 * sum(t.nbytes for t in maps_in(file)) == sum(t.nbytes for t in maps_in(single))
        delta = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
        loaded = load_migration(file)
        for module, entry in exact.entries.items():
            if entry.transport is None or entry.shape_old != (24, 24):
                continue
            # Four factors at most lie on an update's way: U and Uᵀ on each side.
            error = relative_error(loaded.entries[module].transport.dense(delta), entry.transport.dense(delta))
            assert error < 4 * BOUND
        forced = Settings(force=True)
        before, after = (m.port(lora(state), forced).adapter for m in (exact, loaded))
        for ref, update in deltas(before).items():
            assert relative_error(deltas(after)[ref], update) < 4 * BOUND


def test_a_map_that_half_precision_would_spoil_stays_in_single() -> None:
    huge, tiny = torch.tensor([[1e6, 1.0]]), torch.full((2, 2), 1e-7)
    assert rounded(huge).dtype == rounded(tiny).dtype == torch.float32
    assert rounded(rotation(8, 0)).dtype == torch.float16


def test_the_same_migration_gives_the_same_bytes(tmp_path: Path, bases: tuple[Base, Base]) -> None:
    first, second = (
        halved(fit_migration(*bases, "procrustes")).save(tmp_path / f"{name}.safetensors") for name in ("a", "b")
    )
    assert first.read_bytes() == second.read_bytes()
    again = load_migration(first).save(tmp_path / "again.safetensors")
    assert again.read_bytes() == first.read_bytes()


def test_a_migration_names_no_folder_of_its_maker(tmp_path: Path, bases: tuple[Base, Base]) -> None:
    file = fit_migration(*bases, "copy").save(tmp_path / "m.safetensors")
    assert str(tmp_path).encode() not in file.read_bytes()


def test_a_migration_of_version_zero_is_told_to_be_fitted_again(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"empty": torch.zeros(0)}, file, metadata={KEY: json.dumps({"version": 0, "modules": []})})
    with pytest.raises(InputError, match=r"version 0, which is no longer read\. Fit it again"):
        load_migration(file)


def test_a_later_major_version_is_told_apart_from_damage(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"empty": torch.zeros(0)}, file, metadata={KEY: json.dumps({"version": "2.0", "new": True})})
    with pytest.raises(InputError, match="Update regraft"):
        load_migration(file)


def test_a_file_that_is_no_migration_is_named(tmp_path: Path, bases: tuple[Base, Base]) -> None:
    with pytest.raises(InputError, match=r"old\.safetensors: is no migration"):
        load_migration(bases[0].path)


def test_the_cache_gives_back_what_it_was_given_for_its_own_key_alone(bases: tuple[Base, Base]) -> None:
    old, new = bases
    adapter = lora(llama())
    wanted = source_modules(adapter, old)
    fitted = fit_migration(old, new, "prolora", adapter=adapter)
    assert find_cached(old, new, "prolora", fitted.options, wanted) is None
    keep(fitted, old, new, "prolora", fitted.options)
    found = find_cached(old, new, "prolora", fitted.options, wanted)
    assert found is not None
    ported, again = fitted.port(adapter).adapter, found.port(adapter).adapter
    for ref, delta in deltas(ported).items():
        torch.testing.assert_close(deltas(again)[ref], delta)
    assert find_cached(new, old, "prolora", fitted.options, wanted) is None
    assert find_cached(old, new, "prolora", {**fitted.options, "energy": 0.5}, wanted) is None
    wider = source_modules(lora(llama(), roles=("k_proj",)), old)
    assert find_cached(old, new, "prolora", fitted.options, wider) is None
    keep(
        fit_migration(old, new, "prolora", adapter=lora(llama(), roles=("k_proj",))),
        old,
        new,
        "prolora",
        fitted.options,
    )
    assert find_cached(old, new, "prolora", fitted.options, [*wanted, *wider]) is not None
    assert len(cached_files()) == 1
    assert clear_cache() > 0
    assert cached_files() == []


def test_fingerprints_tell_versions_apart_and_structures_alike(bases: tuple[Base, Base], tmp_path: Path) -> None:
    old, new = bases
    assert old.structure == new.structure
    assert old.fingerprint != new.fingerprint
    copy = open_base(save_base(llama(), tmp_path / "renamed.safetensors"))
    assert copy.fingerprint == old.fingerprint
    deeper = open_base(save_base(llama(layers=4), tmp_path / "deeper.safetensors"))
    assert deeper.structure != old.structure
