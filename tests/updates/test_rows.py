"""Cutting an update along the rows of a fused weight, and joining its parts again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from update_samples import ADDITIVE, IN, OUT, SAMPLES, lora, positive, ref, weight_for

from regraft import OutputError
from regraft.tensors import InMemory
from regraft.updates import Diff, Full, Ia3, LoHa, LowRank, Slice, SpectralShift, Update
from regraft.updates.rows import empty, join_rows, take_rows

THIRDS = [((0, 4),), ((4, 8),), ((8, 12),)]
MIXED = ((9, 12), (0, 5))
# These act across the rows of the weight, or have bounds that the ranges don't meet.
ACROSS = {
    "dora per column",
    "lokr full conv",
    "oft constrained",
    "oft with other bounds",
    "boft",
    "svdiff",
    "svdiff conv",
    "lorax",
    "lorax full conv",
}


def rows(tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    return torch.cat([tensor[start:stop] for start, stop in ranges])


@pytest.mark.parametrize("name", ADDITIVE)
def test_the_rows_of_an_update_are_the_rows_of_its_change(name: str) -> None:
    update = ADDITIVE[name]
    for ranges in (*THIRDS, MIXED):
        part = take_rows(update, ranges)
        assert part.shape == (sum(stop - start for start, stop in ranges), *update.shape[1:])
        torch.testing.assert_close(part.delta(), rows(update.delta(), ranges), rtol=1e-6, atol=1e-7)
    parts = [take_rows(update, ranges).delta() for ranges in THIRDS]
    torch.testing.assert_close(torch.cat(parts), update.delta(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(SAMPLES.keys() - ACROSS))
def test_the_rows_of_an_update_change_the_rows_of_a_weight(name: str) -> None:
    update = SAMPLES[name]
    weight = weight_for(update)
    for ranges in THIRDS:
        merged = take_rows(update, ranges).merged(rows(weight, ranges))
        torch.testing.assert_close(merged, rows(update.merged(weight), ranges), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ACROSS))
def test_what_acts_across_the_rows_takes_the_whole_weight_and_says_so(name: str) -> None:
    update = SAMPLES[name]
    weight, part = weight_for(update), take_rows(update, [(1, 5)])
    assert isinstance(part, Slice)
    torch.testing.assert_close(part.merged(weight), update.merged(weight)[1:5])
    with pytest.raises(ValueError, match="needs the whole"):
        part.merged(weight[1:5])


@pytest.mark.parametrize("name", SAMPLES)
def test_parts_of_one_update_join_to_the_very_same_tensors(name: str) -> None:
    update = SAMPLES[name]
    again = join_rows([take_rows(update, ranges) for ranges in THIRDS])
    assert type(again) is type(update)
    assert again.kind == update.kind
    for role, tensor in update.parts().items():
        assert again.parts()[role] is tensor


@pytest.mark.parametrize("name", SAMPLES)
def test_halves_taken_in_the_other_order_and_back_are_the_very_same_tensors(name: str) -> None:
    update = SAMPLES[name]
    swapped = take_rows(update, [(6, 12), (0, 6)])
    again = take_rows(swapped, [(6, 12), (0, 6)])
    if not isinstance(again, Slice):
        assert all(again.parts()[role] is tensor for role, tensor in update.parts().items())
    else:
        # The one kind that does not know how many rows the weight has.
        assert isinstance(again.of, SpectralShift)
        assert again.ranges == ((0, 12),)


def test_cutting_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    update = replace(lora(), magnitude=positive(OUT))

    def never(self: InMemory) -> Tensor:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(InMemory, "load", never)
    parts = [take_rows(update, ranges) for ranges in THIRDS]
    assert join_rows(parts).parts()["up"] is update.up


def test_rows_beyond_the_weight_are_refused() -> None:
    for name in ("lora", "lokr", "lokr with other bounds", "boft"):
        with pytest.raises(ValueError, match="not within"):
            take_rows(SAMPLES[name], [(8, 16)])


def test_parts_with_an_equal_down_keep_their_rank() -> None:
    parts = [LowRank(ref(4, 3, seed=i), ref(3, IN, seed=9), 0.5) for i in range(3)]
    whole = join_rows(parts)
    assert whole.rank == 3
    assert torch.equal(whole.delta(), torch.cat([part.delta() for part in parts]))


def test_loha_parts_that_share_their_columns_are_one_loha() -> None:
    shared = (ref(3, IN, seed=7), ref(2, IN, seed=8))
    parts = [LoHa(ref(4, 3, seed=i), shared[0], ref(4, 2, seed=i + 5), shared[1], 0.5) for i in range(3)]
    whole = join_rows(parts)
    assert whole.kind == "loha"
    torch.testing.assert_close(whole.delta(), torch.cat([part.delta() for part in parts]))


@pytest.mark.parametrize("kind", [Diff, Full])
def test_whole_parameters_join_row_by_row(kind: type[Diff] | type[Full]) -> None:
    parts = [kind(ref(4, IN, seed=i), f"{i}.weight") for i in range(3)]
    weight = ref(OUT, IN, seed=5).load()
    whole = join_rows(parts)
    pieces = zip(parts, weight.split(4), strict=True)
    assert torch.equal(whole.merged(weight), torch.cat([part.merged(piece) for part, piece in pieces]))


@pytest.mark.parametrize("scales", [(0.5, 0.5, 0.5), (0.5, 2.0, 1.0)])
@pytest.mark.parametrize("extra", ["nothing", "bias", "magnitude"])
def test_other_parts_stand_along_the_diagonal_and_change_the_weight_alike(
    scales: tuple[float, ...], extra: str
) -> None:
    parts = [lora(4, rank=i + 2, scale=scale, seed=i) for i, scale in enumerate(scales)]
    if extra == "bias":
        parts[1] = replace(parts[1], bias=ref(4))
    if extra == "magnitude":
        parts = [replace(part, magnitude=positive(4)) for part in parts]
    whole, weight = join_rows(parts), ref(OUT, IN, seed=5).load()
    assert isinstance(whole, LowRank)
    assert whole.rank == 2 + 3 + 4
    pieces = zip(parts, weight.split(4), strict=True)
    torch.testing.assert_close(whole.merged(weight), torch.cat([part.merged(piece) for part, piece in pieces]))
    assert whole.alpha is not None
    assert float(whole.alpha.load()) / whole.rank == pytest.approx(whole.scale)
    if extra == "bias":
        assert whole.bias is not None
        added = whole.scale * whole.bias.load()
        assert not added[:4].any()
        torch.testing.assert_close(added[4:8], parts[1].scale * ref(4).load())


def test_a_part_that_nobody_trained_stays_unchanged_and_costs_no_rank() -> None:
    first, last = lora(4), lora(4, seed=5)
    whole = join_rows([first, empty((4, IN)), last])
    assert whole.rank == 6
    shared = join_rows([first, empty((4, IN)), replace(last, down=first.down)])
    assert shared.rank == 3
    for update in (whole, shared):
        assert not update.delta()[4:8].any()
        torch.testing.assert_close(update.delta()[:4], first.delta())


BAD: dict[str, list[Update]] = {
    "a lora and a diff": [lora(4), Diff(ref(4, IN), "x.diff")],
    "a dora and a lora": [replace(lora(4), magnitude=positive(4)), lora(4, seed=3)],
    "two doras per column": [replace(lora(4, seed=i), magnitude=positive(1, IN)) for i in range(2)],
    "two lohas of their own": [LoHa(*(ref(*s, seed=i) for s in ((4, 2), (2, IN)) * 2), 0.5) for i in range(2)],
    "rows of two updates": [take_rows(SAMPLES["boft"], [(0, 4)]), take_rows(SAMPLES["svdiff"], [(4, 8)])],
    "columns scaled apart": [Ia3(ref(IN, seed=i), InMemory(torch.tensor(1))) for i in range(2)],
}


@pytest.mark.parametrize("name", BAD)
def test_what_can_not_be_joined_exactly_is_refused(name: str) -> None:
    with pytest.raises(OutputError, match="can't be joined exactly"):
        join_rows(BAD[name])
