"""Singular vectors that every machine finds: whatever basis a solver gives, the settled one is the same."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from regraft import singular
from regraft.singular import decompose, marks_of, moved, print_of, rank_for, signs_by, strayed


def orthogonal(size: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]


def with_values(values: list[float], rows: int, columns: int, seed: int = 0) -> Tensor:
    s = torch.tensor(values, dtype=torch.float64)
    return orthogonal(rows, seed)[:, : len(s)] * s @ orthogonal(columns, seed + 1)[:, : len(s)].mT


WEIGHTS = {
    "plain": with_values([5.0, 3.0, 2.0, 1.0], 7, 4),
    "pairs": with_values([3.0, 3.0, 2.0, 1.0, 1.0, 1.0], 8, 6),
    "orthogonal": orthogonal(9, 3),
    "permutation": torch.eye(6, dtype=torch.float64)[[2, 0, 1, 5, 3, 4]],
    "low rank, tall": with_values([2.0, 2.0, 1.0], 9, 6),
    "low rank, wide": with_values([2.0, 1.0], 5, 8),
    "block": torch.block_diag(orthogonal(3, 5), 2 * orthogonal(4, 6)),
    "zero": torch.zeros(4, 3, dtype=torch.float64),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_settled_vectors_are_singular_vectors(name: str) -> None:
    weight = WEIGHTS[name]
    u, s, v = decompose(weight)
    assert torch.allclose(u * s @ v.mT, weight, atol=1e-9)
    for vectors in (u, v):
        assert torch.allclose(vectors.mT @ vectors, torch.eye(len(s), dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("name", WEIGHTS)
def test_another_solver_s_basis_is_settled_to_the_same_vectors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs, rotations among equal singular values, and rotations of the null spaces: all are a solver's to choose."""
    weight = WEIGHTS[name]
    expected = decompose(weight)
    solver = torch.linalg.svd

    def other(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = solver(matrix, full_matrices=full_matrices)
        if matrix.shape != weight.shape:
            return u, s, vh
        whole_u, _, whole_vh = solver(matrix, full_matrices=True)
        rank = int((s > 1e-9).sum())
        for value in {round(float(x), 9) for x in s[:rank]}:
            span = (s - value).abs() < 1e-6
            turn = orthogonal(int(span.sum()), 11)
            u[:, span], vh[span] = u[:, span] @ turn, turn.mT @ vh[span]
        count = len(s) - rank
        left = whole_u[:, rank:] @ orthogonal(whole_u.shape[1] - rank, 12)
        right = whole_vh[rank:].mT @ orthogonal(whole_vh.shape[0] - rank, 13)
        u[:, rank:], vh[rank:] = left[:, :count], right[:, :count].mT
        return u, s, vh

    monkeypatch.setattr(singular.torch.linalg, "svd", other)
    found = decompose(weight)
    assert torch.allclose(found.u, expected.u, atol=1e-8)
    assert torch.allclose(found.v, expected.v, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name not in ("zero", "plain")])
def test_rounding_to_float32_moves_no_vector(name: str) -> None:
    """Equal singular values become nearly equal ones, in any order."""
    weight = WEIGHTS[name]
    expected, found = decompose(weight), decompose(weight.float())
    assert torch.allclose(found.u, expected.u, atol=1e-4)
    assert torch.allclose(found.v, expected.v, atol=1e-4)


def test_more_threads_find_the_same_vectors() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(96, 160), orthogonal(128, 0).float()]
    one = [decompose(weight, 24) for weight in weights]
    torch.set_num_threads(2)
    two = [decompose(weight, 24) for weight in weights]
    for a, b in zip(one, two, strict=True):
        assert torch.allclose(a.u, b.u, atol=1e-8)
        assert torch.allclose(a.v, b.v, atol=1e-8)


def test_a_rank_inside_of_a_cluster_takes_the_first_of_its_vectors() -> None:
    whole, part = decompose(WEIGHTS["orthogonal"]), decompose(WEIGHTS["orthogonal"], 4)
    assert torch.equal(whole.u[:, :4], part.u)


def test_kernels_and_vectors_are_matrices() -> None:
    assert decompose(torch.randn(4, 3, 3, 3)).v.shape == (27, 4)
    assert decompose(torch.tensor([3.0, 4.0])).s.tolist() == pytest.approx([5.0])


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_that_there_is_not_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="is not between 1 and 4"):
        decompose(torch.randn(4, 6), rank)


def test_nan_has_no_singular_values() -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        decompose(torch.full((2, 2), float("nan")))


def test_the_rank_for_an_energy() -> None:
    weight = with_values([2.0, 1.0, 1.0, 1.0, 1.0], 6, 5)
    assert [rank_for(weight, share) for share in (0.4, 0.5, 0.6, 1.0)] == [1, 1, 2, 5]


def test_a_print_tells_another_weight_and_not_another_rounding() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 30)
    u, _, v = decompose(weight, 4)
    stored = print_of(weight, u, v)
    rounded = weight.bfloat16()
    assert moved(stored, print_of(rounded, *decompose(rounded, 4)[::2])) is None
    other = weight + 0.1 * torch.randn(40, 30)
    assert "weight differs by about" in (moved(stored, print_of(other, *decompose(other, 4)[::2])) or "")
    assert "singular directions still differ" in (moved(stored, print_of(weight, u.flip(1), v)) or "")
    assert moved(stored, print_of(weight, -u, -v)) is None


@pytest.mark.parametrize("count", [1, 10, 200])
def test_a_base_that_moved_a_little_is_told_from_a_rounded_one(count: int) -> None:
    """By the mean of all weights, which is told the better the more there are."""
    torch.manual_seed(0)
    weights = [torch.randn(40, 30) for _ in range(count)]

    def said(change: Callable[[Tensor], Tensor]) -> str | None:
        return strayed([(print_of(weight), print_of(change(weight))) for weight in weights], "LoRA-X")

    assert said(lambda weight: weight) is None
    assert said(lambda weight: weight.half()) is None
    assert said(lambda weight: weight.bfloat16()) is None
    told = said(lambda weight: weight + (0.015 if count == 1 else 0.006) * torch.randn_like(weight))
    assert told is not None
    percent = float(re.search(r"differ by about ([\d.]+)% from", told)[1])  # type: ignore[index]
    assert percent == pytest.approx(0.6, abs=0.2) or (count == 1 and 0.5 < percent < 4)
    assert strayed([], "LoRA-X") is None


def test_marks_tell_the_signs_after_a_rounding() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 80)
    u, s, _ = decompose(weight)
    turned = torch.where(torch.arange(80) % 3 == 0, -1.0, 1.0).double()
    rounded = decompose(weight.bfloat16())
    signs = signs_by(marks_of(u * turned), rounded.u)
    again = rounded.u * signs
    assert bool((((u * turned) * again).sum(0)[:40] > 0).all())
    assert torch.allclose(again * s @ (rounded.v * signs).mT, weight.double(), atol=0.05)
