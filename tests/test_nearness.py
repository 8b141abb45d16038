"""What one pass over two weights measures is what the formulas say."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from torch import Tensor

from regraft import InputError
from regraft.nearness import measure, similarity
from regraft.tensors import InMemory, check_finite
from regraft.updates import LowRank


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# More rows than a block has, and fewer; wider than a block.
@pytest.mark.parametrize("shape", [(700, 1000), (9, 14), (3, 300_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_pass_by_blocks_says_what_whole_matrices_do(shape: tuple[int, int], dtype: torch.dtype) -> None:
    old = numbers(*shape).to(dtype)
    new = (old.float() + 0.1 * numbers(*shape, seed=1)).to(dtype)
    update = LowRank(InMemory(numbers(shape[0], 2, seed=2)), InMemory(numbers(2, shape[1], seed=3)), 0.5)
    found = measure(old, new, update)

    w, d, delta = old.double(), new.double() - old.double(), update.delta().double()
    q_up, q_down = (torch.linalg.qr(side.double())[0] for side in (update.factors()[0], update.factors()[1].T))
    expected = (
        d.norm() / w.norm(),
        (q_up.T @ d @ q_down).norm() / (q_up.T @ w @ q_down).norm(),
        (d * delta).sum() / delta.norm() ** 2,
        d.norm() / delta.norm() / d.numel() ** 0.5,
        delta.norm() / w.norm(),
        (d @ q_down).norm() / (w @ q_down).norm(),
        (q_up.T @ d).norm() / (q_up.T @ w).norm(),
    )
    assert astuple(found.nearness)[1:] == pytest.approx([float(part) for part in expected], rel=1e-4, abs=1e-6)
    assert found.row_norms is not None
    torch.testing.assert_close(found.row_norms[1].double(), new.double().norm(dim=1), rtol=1e-5, atol=1e-5)


def test_a_merged_update_is_contained_and_a_weight_is_like_itself() -> None:
    old = numbers(40, 30)
    update = LowRank(InMemory(numbers(40, 2, seed=2)), InMemory(numbers(2, 30, seed=3)), 0.5)
    merged = measure(old, old + update.delta(), update).nearness
    assert merged.contained == pytest.approx(1.0, abs=1e-5)
    same = measure(old, old, update).nearness
    assert (same.similarity, same.distance, same.contained) == (1.0, 0.0, 0.0)
    assert measure(old, numbers(41, 30)).row_norms is None


@pytest.mark.parametrize("rows", [60, 4000])
def test_means_and_scales_alone_are_no_likeness(rows: int) -> None:
    one, other = numbers(rows, 400) + 2, numbers(rows, 400, seed=1) + 2
    assert float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)) > 0.7
    assert abs(similarity(one, other)) < 0.03
    assert similarity(one, one + 0.05 * other) > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_one_bad_number_is_found_in_any_precision(dtype: torch.dtype) -> None:
    tensor = torch.zeros(33, 7).to(dtype)
    assert check_finite(tensor, None, "key") is tensor
    for value in (float("nan"), float("inf"), -float("inf")):
        if dtype == torch.float8_e4m3fn and value == value:
            # It has no Inf.
            continue
        broken = tensor.clone()
        broken[20, 3] = value
        with pytest.raises(InputError, match="NaN or Inf"):
            check_finite(broken, None, "key")


def test_what_has_no_numbers_or_no_fractions_is_finite() -> None:
    for tensor in (torch.zeros(0, 3), torch.zeros(3, dtype=torch.int64), torch.tensor(1.5)):
        assert check_finite(tensor, None, "key") is tensor


def test_a_few_heavy_rows_are_no_likeness_of_a_large_weight() -> None:
    one, other = 0.02 * numbers(5000, 700), 0.02 * numbers(5000, 700, seed=1)
    for weight in (one, other):
        weight[[300, 2800]] += 5
    # The whole weights' cosine without the shift is 0.9.
    assert abs(similarity(one, other)) < 0.1
    assert abs(float(measure(one, other).nearness.similarity or 1.0)) < 0.1


@pytest.mark.parametrize("scale", [1e-23, 1e-25, 1e-40])
def test_weights_too_small_to_square_are_not_taken_for_equal(scale: float) -> None:
    one, other = numbers(30, 30) * scale, numbers(30, 30, seed=1) * scale
    assert measure(one, one.clone()).nearness.similarity == 1.0
    assert -1 <= float(measure(one, other).nearness.similarity or 0.0) < 0.5
