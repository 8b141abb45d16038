from __future__ import annotations

import pytest
import torch

from regraft.transport import IDENTITY, LinearMap, Transport, cut, projection, rank_for_energy
from toys import relative_error, rotation


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MAPS = {
    "identity": LinearMap(),
    "scalar": LinearMap(0.5),
    "dense": LinearMap(0.0, matrix(6, 6)),
    "resizing": LinearMap(0.0, matrix(9, 6)),
    "projection": projection(torch.linalg.qr(matrix(6, 3))[0]),
    "complement": LinearMap(1.0, -torch.linalg.qr(matrix(6, 3))[0], torch.linalg.qr(matrix(6, 3))[0].T),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_acts_as_its_own_matrix_from_both_sides(name: str) -> None:
    map_ = MAPS[name]
    whole = map_ @ torch.eye(6)
    x = matrix(6, 4, seed=1)
    torch.testing.assert_close(map_ @ x, whole @ x)
    rows = matrix(4, whole.shape[0], seed=2)
    torch.testing.assert_close(map_.on_the_right(rows), rows @ whole)
    torch.testing.assert_close(map_.T @ rows.T, whole.T @ rows.T)
    torch.testing.assert_close(map_.squared(6), whole.square())


def test_factors_and_dense_transport_agree() -> None:
    up, down = matrix(6, 2), matrix(2, 5, seed=1)
    terms = ((MAPS["dense"], IDENTITY), (MAPS["projection"], LinearMap(0.0, matrix(5, 5, seed=3))))
    transport = Transport(terms)
    moved = transport.factors(up, down, rank=4)
    assert moved.up.shape[1] == transport.rank_out(2) == 4
    assert relative_error(moved.up @ moved.down, transport.dense(up @ down)) < 1e-5
    assert moved.cut_loss == pytest.approx(0.0, abs=1e-9)


def test_the_cut_is_the_best_approximation_and_says_what_it_lost() -> None:
    up, down = matrix(8, 4), matrix(4, 7, seed=1)
    delta = up @ down
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    best = u[:, :2] @ torch.diag(s[:2]) @ vh[:2]
    a, b = cut(up, down, 2)
    assert relative_error(a @ b, best) < 1e-5
    moved = Transport().factors(up, down, rank=2)
    assert moved.cut_loss == pytest.approx(1 - float((s[:2] ** 2).sum() / (s**2).sum()), abs=1e-6)


def test_a_higher_rank_pads_with_zeros_and_keeps_the_update() -> None:
    up, down = matrix(8, 2), matrix(2, 7, seed=1)
    moved = Transport().factors(up, down, rank=5)
    assert moved.up.shape == (8, 5)
    torch.testing.assert_close(moved.up @ moved.down, up @ down)


def test_rank_for_energy_is_the_smallest_that_keeps_the_share() -> None:
    values = torch.tensor([3.0, 2.0, 1.0])
    assert [rank_for_energy(values, share) for share in (0.1, 9 / 14, 0.65, 13 / 14, 0.93, 1.0)] == [1, 1, 2, 2, 3, 3]


def test_a_rotation_and_its_inverse_give_the_update_back() -> None:
    up, down, q, r = matrix(6, 2), matrix(2, 5, seed=1), rotation(6, 2), rotation(5, 3)
    there = Transport(((LinearMap(0.0, q), LinearMap(0.0, r)),))
    back = Transport(((LinearMap(0.0, q.T), LinearMap(0.0, r.T)),))
    moved = there.factors(up, down)
    moved = back.factors(moved.up, moved.down)
    assert relative_error(moved.up @ moved.down, up @ down) < 1e-5
