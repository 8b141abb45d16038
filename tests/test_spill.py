"""Maps that wait on the disk, and files that are written one tensor after the other."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from regraft import OutputError, open_base
from regraft.adapter import ModuleRef
from regraft.fitting import fit_migration
from regraft.migration_file import load_migration, save_migration
from regraft.migrations import spill
from regraft.migrations.spill import Spill, Spilled
from regraft.narrowing import Folded
from regraft.safetensors_stream import write_stream
from regraft.tensors import InMemory
from regraft.transport import LinearMap, Transport, projection
from regraft.updates import Diff
from toys import drifted, llama, lora, rotation, save_base


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "MOST_HELD", 0)


def test_a_streamed_file_is_what_the_library_writes() -> None:
    dice = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {
        "a.half": torch.randn(3, 5, generator=dice).half(),
        "ä": torch.randn(7, generator=dice),
        "b.brain": torch.randn(1, 3, generator=dice).bfloat16(),
        "empty": torch.zeros(0),
        "wide": torch.randn(2, 2, generator=dice).double(),
    }
    metadata = {"what": 'quotes " and \\ and\nlines, é'}
    stream = io.BytesIO()
    write_stream(stream, {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}, tensors.__getitem__, metadata)
    assert stream.getvalue() == save(tensors, metadata)


def test_a_spilled_transport_is_the_same(no_room: None) -> None:
    basis = rotation(12, 1)[:, :4]
    wide = torch.randn(8, 9, generator=torch.Generator().manual_seed(2))
    terms = (
        (projection(basis), LinearMap(1.0, -basis, basis.T, torch.arange(12.0))),
        (LinearMap(0.0, wide[:, ::2]), LinearMap()),
    )
    found = Spill()(Transport(terms, rotates=True))
    assert isinstance(found, Spilled)
    assert found.to_cpu({}) is found
    for read in (found, pickle.loads(pickle.dumps(found))):
        assert read.rotates
        for here, there in zip(read.terms, terms, strict=True):
            for one, other in zip(here, there, strict=True):
                assert one.identity == other.identity
                for name in ("left", "right", "diagonal"):
                    a, b = getattr(one, name), getattr(other, name)
                    assert (a is None) == (b is None)
                    assert a is None or torch.equal(a, b)


def test_the_first_maps_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "MOST_HELD", 1000)
    take = Spill()
    transports = [Transport(((LinearMap(0.0, rotation(10, seed)), LinearMap()),)) for seed in range(4)]
    kept = [take(transport) for transport in transports]
    # 400 bytes each.
    assert [isinstance(transport, Spilled) for transport in kept] == [False, False, True, True]
    assert kept[0] is transports[0]


@pytest.mark.parametrize(("method", "options"), [("lora-x", {}), ("prolora", {}), ("lora-x", {"edge": 0.5})])
def test_a_migration_of_spilled_maps_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, float]
) -> None:
    state = llama()
    bases = [open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, drifted(state, 0.1)))]
    save_migration(fit_migration(*bases, method, **options), tmp_path / "held.safetensors")
    monkeypatch.setattr(spill, "MOST_HELD", 0)
    migration = fit_migration(*bases, method, **options)
    assert any(isinstance(entry.transport, Spilled) for entry in migration.entries.values())
    save_migration(migration, tmp_path / "maps")
    assert (tmp_path / "maps").read_bytes() == (tmp_path / "held.safetensors").read_bytes()
    load_migration(tmp_path / "maps")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.safetensors",
        "1.safetensors",
        "held.safetensors",
        "maps",
    ]


def test_a_disk_that_is_full_is_told_of(no_room: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Sequence[int]) -> int:
            # A disk takes what still fits.
            if len(data) > 100:
                return super().write(data[:100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(OutputError, match=r"No space left.*TMPDIR"):
        Spill()(Transport(((LinearMap(0.0, rotation(10, 1)), LinearMap()),)))


def test_a_fit_for_one_adapter_spills_what_it_cannot_fold(tmp_path: Path, no_room: None) -> None:
    state = llama()
    bases = [open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, drifted(state, 0.1)))]
    adapter = lora(state)
    norm = ModuleRef(next(iter(adapter.updates)).component, "model.norm.weight")
    stored = replace(
        adapter, updates={**adapter.updates, norm: Diff(InMemory(torch.ones(len(state["model.norm.weight"]))), "x")}
    )
    for given, kind in ((stored, Spilled), (adapter, Folded)):
        migration = fit_migration(*bases, "lora-x", adapter=given, narrow=True)
        assert {type(entry.transport) for entry in migration.entries.values()} == {kind}
