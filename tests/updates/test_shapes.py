"""VeRA and FourierFT: a change that takes the shape of the weight, which their files don't tell."""

from __future__ import annotations

from dataclasses import replace
from math import pi

import pytest
import torch
from torch import Tensor
from update_samples import IN, MATRIX, OUT, SAMPLES, lora, ref, weight_for

from regraft.tensors import InMemory
from regraft.updates import ByShape, FourierFT, Vera, with_shapes
from regraft.updates.exact import as_lowrank, is_factored
from regraft.updates.vera import Seed, projections

NAMES = ["vera", "vera turned", "fourierft", "fourierft turned"]


def waiting(name: str) -> ByShape:
    update = SAMPLES[name].shaped(None)
    assert isinstance(update, ByShape)
    return update


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_that_is_not_told_is_not_made_up(name: str) -> None:
    update, weight = waiting(name), weight_for(SAMPLES[name])
    assert not update.additive
    assert as_lowrank(update, dense=True) is None
    assert not is_factored(update)
    for make in (update.delta, update.norm):
        with pytest.raises(ValueError, match="depends on the base's weight: on its shape"):
            make()
    torch.testing.assert_close(update.delta(weight), SAMPLES[name].delta())
    torch.testing.assert_close(update.delta(weight[..., None, None])[..., 0, 0], SAMPLES[name].delta())


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_is_told_where_it_fits(name: str) -> None:
    told = with_shapes({"x": waiting(name), "y": lora()}, {"x": MATRIX, "y": (3, 3)})
    assert told["x"].additive
    torch.testing.assert_close(told["x"].delta(), SAMPLES[name].delta())
    assert told["y"].shape == MATRIX
    wrong = (OUT + 1, IN + 1) if name.startswith("vera") else (2, 2)
    assert not with_shapes({"x": waiting(name)}, {"x": wrong})["x"].additive


def test_vera_is_the_product_of_its_paper() -> None:
    lambda_b, lambda_d = ref(OUT).load(), ref(3, seed=1).load()
    a, b = ref(3, IN + 2, seed=2).load(), ref(OUT + 4, 3, seed=3).load()
    wanted = torch.diag(lambda_b) @ b[:OUT] @ torch.diag(lambda_d) @ a[:, :IN]
    torch.testing.assert_close(SAMPLES["vera"].delta(), wanted)


def test_fourierft_is_the_sum_of_its_waves() -> None:
    places = torch.randperm(OUT * IN, generator=torch.Generator().manual_seed(7))[:5]
    rows, columns = torch.arange(OUT)[:, None], torch.arange(IN)[None]
    wanted = torch.zeros(MATRIX)
    for place, value in zip(places.tolist(), ref(5).load(), strict=True):
        u, v = divmod(place, IN)
        wanted += 20.0 / (OUT * IN) * value * torch.cos(2 * pi * (rows * u / OUT + columns * v / IN))
    torch.testing.assert_close(SAMPLES["fourierft"].delta(), wanted, rtol=1e-4, atol=1e-6)


def drawn(count: int = 2) -> dict[str, Vera]:
    """Modules of 12 × 8 and 6 × 20 of a file of ``count``, without their projections."""
    seed = Seed(3, count)
    sizes = {"wide": 6, "high": OUT}
    return {name: Vera(ref(out), ref(3, seed=1), None, None, seed) for name, out in sizes.items()}


SHAPES = {"wide": (6, 20), "high": MATRIX}


def test_projections_are_drawn_at_the_largest_modules_size() -> None:
    told = with_shapes(drawn(), SHAPES)
    a, b = projections(3, 3, OUT, 20)
    for name, update in told.items():
        assert torch.equal(update.delta(), replace(drawn()[name], a=a, b=b).delta(torch.zeros(SHAPES[name])))
    first, second = told.values()
    assert isinstance(first, Vera)
    assert isinstance(second, Vera)
    assert first.a is second.a


@pytest.mark.parametrize("lacking", ["a module", "a shape"])
def test_projections_are_not_drawn_where_a_module_is_not_known(lacking: str) -> None:
    updates = drawn(3) if lacking == "a module" else drawn()
    shapes = SHAPES if lacking == "a module" else {"high": MATRIX}
    told = with_shapes(updates, shapes)["high"]
    assert not told.additive
    with pytest.raises(ValueError, match="random projections are not in its file"):
        told.delta(torch.zeros(MATRIX))


def test_a_cast_copies_no_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    update = SAMPLES["vera"]
    read: list[Tensor] = []
    load = InMemory.load
    monkeypatch.setattr(InMemory, "load", lambda self: read.append(self.tensor) or load(self))  # type: ignore[func-returns-value]
    update.cast(torch.float16)
    assert {tuple(tensor.shape) for tensor in read} == {(OUT,), (3,)}


def test_coefficients_that_no_place_is_left_for_do_not_fit() -> None:
    update = FourierFT(ref(OUT * IN + 1), 1.0, 7)
    assert not update.fits(MATRIX)
    assert update.fits((OUT + 1, IN))
