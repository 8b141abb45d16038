"""Every family with a table goes through every format of shared grammar, under its own shapes and names."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from regraft import Adapter, ModuleRef, OutputError
from regraft.families import families, get_family
from regraft.formats import AdapterFile, formats, get_format
from regraft.tensors import InMemory
from regraft.updates import LowRank

FAMILIES = [name for name, family in families().items() if family.components and family.main in ("unet", "transformer")]
TARGETS = ("kohya", "lycoris", "musubi", "onetrainer", "comfyui", "original", "omi", "diffusers")
# Block numbers above this are left out: one block of each sort is enough.
_LATER = re.compile(r"\.(?:[2-9]|\d\d)\.")


@cache
def adapter_of(name: str) -> Adapter:
    """A LoRA of rank 1 on the matrices of a family's main model."""
    family = get_family(name)
    assert family is not None
    generator = torch.Generator().manual_seed(0)
    updates = {}
    for path, shape in family.tables[family.main].items():
        if len(shape) == 2 and not _LATER.search(f".{path}.") and min(shape) > 1:
            up, down = torch.randn(shape[0], 1, generator=generator), torch.randn(1, shape[1], generator=generator)
            updates[ModuleRef(family.main, path)] = LowRank(InMemory(up), InMemory(down), 0.5)
    return Adapter(updates, "made", family=name)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_reads_back_as_the_same(name: str, target: str) -> None:
    adapter = adapter_of(name)
    write = get_format(target).write
    assert write is not None
    try:
        written = write(adapter)
    except OutputError as refusal:
        # Not every model has a name for each of its modules in its makers' code, and OMI is for a few models alone.
        if "no name for" not in str(refusal) and not (target == "omi" and "of this model" in str(refusal)):
            raise
        return
    file = AdapterFile(
        Path("made"), {key: InMemory(tensor) for key, tensor in written.tensors.items()}, written.metadata
    )
    format = next(format for format in formats().values() if format.detect(file))
    again = format.read(file, None)
    assert again.unrecognised == ()
    after = {ref.path: update for ref, update in again.updates.items()}
    for (_, path), update in adapter.updates.items():
        assert path in after, path
        got, wanted = after[path].factors(), update.factors()
        # Fused weights with parts of their own A have a higher rank: their rows are compared by a probe.
        probe = torch.randn(update.shape[1], 2, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(
            after[path].scale * (got[0] @ (got[1] @ probe)), update.scale * (wanted[0] @ (wanted[1] @ probe)), atol=1e-3
        ), path
    assert {path for path, update in after.items() if update.factors()[0].any()} == {
        ref.path for ref in adapter.updates
    }
