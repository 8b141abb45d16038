"""Projections on leading singular vectors: without the vectors, beside those of a decomposition in double precision."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from regraft.lapack import LapackError, Tridiagonal
from regraft.methods._directions import _made, _Side, directions
from regraft.methods._filters import step_between
from toys import relative_error


def noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def with_values(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    sides = [torch.linalg.qr(noise(size, len(values), seed + i).double())[0] for i, size in enumerate((rows, columns))]
    return ((sides[0] * values) @ sides[1].T).float()


def gram(n: int) -> Tensor:
    weight = with_values(n + 20, n, torch.linspace(1.0, 0.05, n))
    return weight.T @ weight


def test_a_matrix_is_q_t_qt() -> None:
    whole = gram(90)
    form = Tridiagonal(whole.tril() + torch.full((90, 90), torch.nan).triu(1))
    middle = np.diag(form.diagonal) + np.diag(form.beside, 1) + np.diag(form.beside, -1)
    x = noise(90, 4)
    assert relative_error(form.back(torch.from_numpy(middle).float() @ form.towards(x)), whole @ x) < 1e-5
    assert relative_error(form.back(form.towards(x)), x) < 1e-5
    values = torch.linalg.eigvalsh(whole.double())
    assert relative_error(torch.from_numpy(form.values()), values) < 1e-6
    vectors = form.vectors(form.values()[40:60])
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-10)
    assert relative_error(torch.from_numpy(middle) @ vectors, vectors * torch.from_numpy(form.values()[40:60])) < 1e-10
    shifted = middle - (0.3 + 0.2j) * np.eye(90)
    columns = x.T.double().numpy()
    np.testing.assert_allclose(form.solved(columns, 0.3 + 0.2j) @ shifted.T, columns, atol=1e-10)


def test_what_has_no_eigenvalues_is_told_by_an_error() -> None:
    form = Tridiagonal(torch.full((8, 8), torch.nan))
    with pytest.raises(LapackError, match="dsterf"):
        form.values()


def test_other_threads_go_on_meanwhile() -> None:
    whole = gram(900)
    Tridiagonal(gram(8))
    stamps, done = [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.0005)

    other = threading.Thread(target=tick)
    other.start()
    begun = time.perf_counter()
    Tridiagonal(whole)
    ended = time.perf_counter()
    done.set()
    other.join()
    # With the lock held throughout there are a few, at the borders of the call.
    assert sum(begun < stamp < ended for stamp in stamps) > (ended - begun) / 0.01


@pytest.mark.parametrize("count", [1, 7, 45, 88, 89])
def test_a_step_is_one_above_a_gap_and_zero_below(count: int) -> None:
    form = Tridiagonal(gram(90))
    values = form.values()
    step = step_between(values, count)
    assert step is not None
    np.testing.assert_allclose(step.at(values), np.arange(90) >= 90 - count, atol=1e-7)
    middle = np.diag(form.diagonal) + np.diag(form.beside, 1) + np.diag(form.beside, -1)
    found, vectors = np.linalg.eigh(middle)
    kept, columns = vectors[:, -count:], noise(90, 3).T.double().numpy()
    np.testing.assert_allclose(step.of(form, columns), columns @ kept @ kept.T, atol=2e-6)
    wanted = columns @ (kept / found[-count:]) @ kept.T
    assert np.linalg.norm(step.of(form, columns, over=True) - wanted) < 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("distance", [1e-3, 1e-5, 1e-7])
def test_a_narrow_gap_takes_more_poles(distance: float) -> None:
    values = np.sort(np.append(np.linspace(0, 0.5, 30), np.linspace(0.5 + distance, 1, 30)))
    step, wide = step_between(values, 30), step_between(np.linspace(0, 1, 60), 30)
    assert step is not None
    assert wide is not None
    np.testing.assert_allclose(step.at(values), values > 0.5, atol=1e-7)
    assert len(wide.poles) < len(step.poles) < 36


def test_where_there_is_no_gap_there_is_no_step() -> None:
    assert step_between(np.array([0.0, 0.5, 0.5, 1.0]), 2) is None


@pytest.mark.parametrize("shape", [(300, 300), (420, 280), (280, 420)])
@pytest.mark.parametrize("rank", [1, 11, 12, 13, 60, 150, 250])
def test_projections_without_vectors_are_those_of_a_decomposition(shape: tuple[int, int], rank: int) -> None:
    least = min(shape)
    weight = with_values(*shape, torch.linspace(1, 0.05, least, dtype=torch.float64) ** 1.5)
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    left, right = directions(weight, rank, None)
    assert isinstance(left, _Side)
    assert left.both.spectrum is not None
    for found, basis in ((left, u[:, :rank]), (right, vh[:rank].T)):
        x = noise(len(basis), 5, 3)
        assert relative_error(found.project(x), (basis @ (basis.T @ x.double())).float()) < 2e-4
        assert (found.rank, found.rows) == (rank, len(basis))
    for found, basis in ((left, u[:, :rank]), (right, vh[:rank].T)):
        assert relative_error(found.matrix @ found.matrix.T, (basis @ basis.T).float()) < 2e-4


def test_the_rank_follows_the_energy_with_and_without_vectors() -> None:
    weight = with_values(300, 300, torch.linspace(1, 0.1, 300, dtype=torch.float64))
    assert directions(weight, None, 0.8)[0].rank == _made(weight, None, 0.8)[0].rank


@pytest.mark.parametrize("values", [torch.ones(300), torch.cat([torch.ones(200), torch.full((100,), 0.5)])])
@pytest.mark.parametrize("turned", [True, False])
def test_a_cut_among_equal_values_is_a_projection_of_its_rank(values: Tensor, turned: bool) -> None:
    weight = with_values(300, 300, values.double()) if turned else values.diag()
    left, right = directions(weight, 120, None)
    # Where not even rounding tells them apart, no filter does.
    assert isinstance(left, _Side)
    assert (left.both.spectrum is not None) == turned
    for found in (left, right):
        whole = found.project(torch.eye(300))
        assert relative_error(found.project(whole), whole) < 1e-4
        assert float(whole.trace()) == pytest.approx(120, abs=1e-3)


def test_double_precision_stays_double() -> None:
    weight = with_values(300, 300, torch.linspace(1, 0.1, 300).double()).double()
    u, _, _ = torch.linalg.svd(weight)
    x = noise(300, 5).double()
    found = directions(weight, 100, None)[0].project(x)
    assert found.dtype == torch.float64
    assert relative_error(found, u[:, :100] @ (u[:, :100].T @ x)) < 1e-10


def test_a_gap_in_the_values_is_cut_at() -> None:
    values = torch.cat([torch.linspace(1, 0.9, 200), torch.linspace(0.3, 0.2, 100)]).double()
    weight = with_values(300, 300, values)
    u, _, _ = torch.linalg.svd(weight.double())
    x = noise(300, 5)
    left, _ = directions(weight, 200, None)
    assert relative_error(left.project(x), (u[:, :200] @ (u[:, :200].T @ x.double())).float()) < 1e-5
