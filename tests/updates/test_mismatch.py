"""Parts that don't belong together are found from their shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from update_samples import MATRIX, SAMPLES, ref, weight_for

from regraft.tensors import InMemory
from regraft.updates import Oft, SpectralShift, Update
from regraft.updates.checks import mismatch
from regraft.updates.rows import take_rows


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sound_update_passes(name: str) -> None:
    assert mismatch(SAMPLES[name]) is None
    assert mismatch(take_rows(SAMPLES[name], [(0, 4)])) is None


def broken(update: Update) -> list[tuple[str, Update]]:
    """The update with one part changed in shape: one entry more, one less, none, a dimension more or less."""
    found = []
    for role, part in update.parts().items():
        tensor = part.load()
        changed = [tensor[None], tensor.flatten(), torch.cat([tensor[None]] * 2)]
        for dim in range(tensor.dim()):
            first = tensor.narrow(dim, 0, 1)
            changed += [torch.cat([tensor, first], dim), tensor.narrow(dim, 1, tensor.shape[dim] - 1)]
            changed.append(tensor.narrow(dim, 0, 0))
        found += [(role, replace(update, **{role: InMemory(other)})) for other in changed]
    return found


@pytest.mark.parametrize("name", SAMPLES)
def test_what_passes_can_be_merged_where_it_fits(name: str) -> None:
    weight = weight_for(SAMPLES[name])
    for role, update in broken(SAMPLES[name]):
        if mismatch(update) is None and update.fits(tuple(weight.shape)):
            assert update.merged(weight).shape == weight.shape, role


@pytest.mark.parametrize("name", SAMPLES)
def test_a_part_without_a_counterpart_in_size_is_named(name: str) -> None:
    update = SAMPLES[name]
    if update.kind in ("diff", "full", "ia3", "svdiff"):
        return
    for role, part in update.parts().items():
        tensor = part.load()
        if tensor.dim() > 1:
            found = mismatch(replace(update, **{role: InMemory(tensor.narrow(0, 0, 0))}))
            assert found is not None
            assert found[0] == role
            assert "is empty" in found[1]


def test_the_reason_names_the_other_part() -> None:
    update = replace(SAMPLES["lora"], down=ref(5, 8))
    assert mismatch(update) == ("up", "has 3 where down (the rank) has 5")


def test_seven_numbers_are_no_triangle() -> None:
    found = mismatch(Oft(ref(2, 7), convention="peft"))
    assert found is not None
    assert "no triangle" in found[1]


def test_a_shift_of_two_dimensions_is_refused() -> None:
    assert mismatch(SpectralShift(ref(*MATRIX))) is not None
