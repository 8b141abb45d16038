"""Factors in the frequency domain, folded: scipy's and torch's transforms say what they do to a signal."""

from __future__ import annotations

import pytest
import scipy.fft
import torch

from regraft.frequency import folded_down, folded_up, frequencies, inverse_dct


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_the_inverse_dct_is_scipy_s(size: int) -> None:
    values = torch.randn(3, size)
    for dim in (0, 1):
        expected = scipy.fft.idct(values.double().numpy(), axis=dim, norm="ortho")
        assert torch.allclose(inverse_dct(values, dim).double(), torch.from_numpy(expected), atol=1e-5)


@pytest.mark.parametrize(("ins", "outs"), [(8, 8), (7, 10), (10, 7), (9, 5)])
def test_folded_factors_do_what_the_transforms_around_the_factors_do(ins: int, outs: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, ins)
    a, b = torch.randn(3, ins), torch.randn(outs, 3)
    seen = torch.from_numpy(scipy.fft.dct(x.double().numpy(), norm="ortho")).float()
    expected = torch.from_numpy(scipy.fft.idct((seen @ a.T @ b.T).double().numpy(), norm="ortho")).float()
    found = x @ folded_down(a, ins, "dct").T @ folded_up(b, outs, "dct").T
    assert torch.allclose(found, expected, atol=1e-4)

    a, b = torch.randn(3, frequencies(ins, "fft"), 2), torch.randn(frequencies(outs, "fft"), 3, 2)
    seen = torch.fft.rfft(x, norm="ortho") @ torch.view_as_complex(a).T @ torch.view_as_complex(b).T
    expected = torch.fft.irfft(seen, outs, norm="ortho")
    down, up = folded_down(a, ins, "fft"), folded_up(b, outs, "fft")
    assert (down.shape, up.shape) == ((6, ins), (outs, 6))
    assert torch.allclose(x @ down.T @ up.T, expected, atol=1e-4)


def test_a_kernel_is_transformed_along_its_channels() -> None:
    a = torch.randn(2, 6, 3, 3)
    folded = folded_down(a, 6, "dct")
    assert torch.allclose(folded[..., 1, 2], folded_down(a[..., 1, 2], 6, "dct"), atol=1e-6)
    a = torch.randn(2, 4, 3, 3, 2)
    folded = folded_down(a, 6, "fft")
    assert folded.shape == (4, 6, 3, 3)
    assert torch.allclose(folded[..., 1, 2], folded_down(a[..., 1, 2, :], 6, "fft"), atol=1e-6)
