"""An old base that makes nothing useful with the adapter is told before anything is trained."""

from __future__ import annotations

import pytest
import torch

from regraft import InputError
from regraft.probes.batches import Batch, Maker, TextBatch
from regraft.probes.batches_diffusion import DiffusionBatch
from regraft.refine.useful import check_useful

SAME = torch.tensor([[1, 5, 5, 5], [2, 5, 5, 5]])


def texts(ids: torch.Tensor, maker: Maker = "adapter") -> TextBatch:
    return TextBatch({"old": ids, "new": ids}, maker, True)


def states(value: float, maker: Maker = "adapter") -> DiffusionBatch:
    return DiffusionBatch(("sample", torch.full((1, 4, 2, 2), value)), torch.tensor([5]), ("",), maker)


@pytest.mark.parametrize(
    ("batch", "said"), [(texts(SAME), "same text every time"), (states(float("nan")), "no numbers")]
)
def test_what_cannot_be_learnt_from_is_told(batch: Batch, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_useful([batch], None)


@pytest.mark.parametrize(
    "batch",
    [
        texts(torch.arange(8).reshape(2, 4)),
        texts(SAME[:1]),
        texts(SAME, "old"),
        states(1.0),
        states(float("nan"), "new"),
    ],
)
def test_anything_else_may_be(batch: Batch) -> None:
    check_useful([batch], None)
