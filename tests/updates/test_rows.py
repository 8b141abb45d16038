"""Cutting an update along the rows of a fused weight, and joining its parts again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regraft import OutputError
from regraft.tensors import InMemory, TensorRef
from regraft.updates import Diff, LowRank, Update
from regraft.updates.rows import empty, join_rows, take_rows

OUT, IN = 12, 8


def ref(*shape: int, seed: int = 0) -> TensorRef:
    return InMemory(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3)


def lora(out: int = OUT, rank: int = 3, scale: float = 0.5, seed: int = 0) -> LowRank:
    return LowRank(ref(out, rank, seed=seed), ref(rank, IN, seed=seed + 1), scale, InMemory(torch.tensor(scale * rank)))


WHOLE: dict[str, Update] = {"lora": lora(), "diff": Diff(ref(OUT, IN), "x.diff")}
THIRDS = [((0, 4),), ((4, 8),), ((8, 12),)]


def rows(tensor: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.cat([tensor[start:stop] for start, stop in ranges])


@pytest.mark.parametrize("update", WHOLE.values(), ids=WHOLE)
def test_the_rows_of_an_update_are_the_rows_of_its_change(update: Update) -> None:
    for ranges in (*THIRDS, ((9, 12), (0, 5))):
        part = take_rows(update, ranges)
        assert torch.equal(part.delta(), rows(update.delta(), ranges))


@pytest.mark.parametrize("update", WHOLE.values(), ids=WHOLE)
def test_parts_of_one_update_join_to_the_very_same_tensors(update: Update) -> None:
    again = join_rows([take_rows(update, ranges) for ranges in THIRDS])
    assert type(again) is type(update)
    for role, tensor in update.parts().items():
        assert again.parts()[role] is tensor


def test_halves_taken_in_the_other_order_and_back_are_the_very_same_tensors() -> None:
    update = lora()
    swapped = take_rows(update, [(6, 12), (0, 6)])
    assert take_rows(swapped, [(6, 12), (0, 6)]).up is update.up


def test_parts_with_an_equal_down_keep_their_rank() -> None:
    parts = [LowRank(ref(4, 3, seed=i), ref(3, IN, seed=9), 0.5) for i in range(3)]
    whole = join_rows(parts)
    assert whole.rank == 3
    assert torch.equal(whole.delta(), torch.cat([part.delta() for part in parts]))


@pytest.mark.parametrize("scales", [(0.5, 0.5, 0.5), (0.5, 2.0, 1.0)])
def test_other_parts_stand_along_the_diagonal_and_change_the_weight_alike(scales: tuple[float, ...]) -> None:
    parts = [lora(4, rank=i + 2, scale=scale, seed=i) for i, scale in enumerate(scales)]
    whole = join_rows(parts)
    assert whole.rank == 2 + 3 + 4
    torch.testing.assert_close(whole.delta(), torch.cat([part.delta() for part in parts]))
    assert whole.alpha is not None
    assert isinstance(whole, LowRank)
    assert float(whole.alpha.load()) / whole.rank == pytest.approx(whole.scale)


def test_a_part_that_nobody_trained_stays_unchanged_and_costs_no_rank() -> None:
    whole = join_rows([lora(4), empty((4, IN)), lora(4, seed=5)])
    assert whole.rank == 6
    assert not whole.delta()[4:8].any()


def test_a_lora_and_a_diff_are_not_joined() -> None:
    with pytest.raises(OutputError, match="can't be joined"):
        join_rows([lora(4), Diff(ref(4, IN), "x.diff")])
