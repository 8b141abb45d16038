"""A large long matrix is decomposed through its Gram matrix: as exactly as by an SVD."""

from __future__ import annotations

import pytest
import torch
from adapters_made import close, noise
from torch import Tensor

from regraft.updates import exact
from regraft.updates.exact import refactor


def _steep(rows: int, columns: int) -> Tensor:
    """Singular values over six decades."""
    u = torch.linalg.qr(noise(rows, rows).double())[0]
    v = torch.linalg.qr(noise(columns, rows, seed=1).double())[0]
    return ((u * torch.logspace(0, -6, rows).double()) @ v.T).float()


@pytest.mark.parametrize("turned", [False, True])
def test_both_ways_keep_the_same_energy_by_the_same_rank(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = _steep(64, 160).T if turned else _steep(64, 160)
    by_svd = [refactor(matrix, energy=energy) for energy in (0.9, 0.9995)] + [refactor(matrix, rank=5)]
    monkeypatch.setattr(exact, "_GRAM_FROM", 16)
    by_gram = [refactor(matrix, energy=energy) for energy in (0.9, 0.9995)] + [refactor(matrix, rank=5)]
    for one, two in zip(by_svd, by_gram, strict=True):
        assert one.update.rank == two.update.rank
        assert one.energy_kept == pytest.approx(two.energy_kept, abs=1e-7)
        assert close(one.update.delta(), two.update.delta())
    assert close(refactor(matrix, energy=1.0).update.delta(), matrix, 1e-4)


def test_the_numerical_rank_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_GRAM_FROM", 16)
    matrix = noise(64, 5) @ noise(5, 200, seed=1)
    assert refactor(matrix).update.rank == 5
    assert refactor(torch.zeros(64, 200)).energy_kept == 1.0


def test_a_flat_tail_is_not_cut_off_as_noise() -> None:
    matrix = torch.diag(torch.cat((torch.ones(1), torch.full((255,), 0.01)))).half()
    # 2.5 % of it lies in values each of which counts as zero beside the first, in float16.
    assert refactor(matrix, energy=0.99).energy_kept >= 0.99
    assert refactor(matrix, energy=0.97).update.rank == 1
