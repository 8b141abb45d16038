"""What holds for every kind of update."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from update_samples import ADDITIVE, CONV, IN, OUT, SAMPLES, lora, positive, ref, weight_for

from regraft.tensors import InMemory
from regraft.updates import Diff, Full, Kind, LoHa, LoKr, LowRank, Slice, SpectralShift, Update, scale_of

KINDS = {
    "lora",
    "dora",
    "tucker",
    "loha",
    "lokr",
    "diff",
    "full",
    "ia3",
    "oft",
    "boft",
    "glora",
    "svdiff",
    "lorax",
    "foura",
    "vera",
    "fourierft",
}


def test_every_kind_has_a_sample_and_its_contract_name() -> None:
    assert {type(update) for update in SAMPLES.values()} | {Slice} == set(get_args(Update))
    assert {update.kind for update in SAMPLES.values()} == KINDS
    assert {update.kind for update in SAMPLES.values() if update.by_parameter} == {"diff", "full"}


@pytest.mark.parametrize("name", SAMPLES)
def test_parts_are_every_tensor_and_only_these(name: str) -> None:
    update = SAMPLES[name]
    held = {field.name for field in fields(update) if isinstance(getattr(update, field.name), InMemory)}
    assert update.parts().keys() == held
    for attribute in ("alpha", "magnitude"):
        assert (getattr(update, attribute) is not None) == (attribute in held)


@pytest.mark.parametrize("name", SAMPLES)
def test_an_update_fits_its_weight_and_no_other(name: str) -> None:
    update, shape = SAMPLES[name], tuple(weight_for(SAMPLES[name]).shape)
    assert update.fits(shape)
    assert update.rows in (OUT, None)
    assert not update.fits((shape[0] + 2, shape[1] + 2, *shape[2:]))
    if update.rows is not None:
        assert not update.fits((shape[0] + 12, *shape[1:]))
    assert update.shaped(shape).shape == shape or update.kind in ("ia3", "full")


def test_flattened_kernels_fit_and_take_the_kernels_shape() -> None:
    for name in ("loha conv", "lokr conv"):
        flat = SAMPLES[name].shaped((OUT, IN * 9))
        assert flat.fits(CONV)
        assert flat.fits((OUT, IN * 9, 1, 1))
        assert flat.shaped(CONV).delta().shape == CONV
        torch.testing.assert_close(flat.merged(torch.zeros(CONV)), SAMPLES[name].delta())


@pytest.mark.parametrize("name", ADDITIVE)
def test_an_additive_change_is_the_same_on_every_weight(name: str) -> None:
    update = ADDITIVE[name]
    weight = weight_for(update)
    assert update.delta().shape == update.shape == weight.shape
    for base in (weight, weight * 3 + 1):
        torch.testing.assert_close(update.merged(base) - base, update.delta(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(SAMPLES.keys() - ADDITIVE.keys()))
def test_a_change_that_depends_on_the_weight_is_not_made_up_without_it(name: str) -> None:
    update = SAMPLES[name]
    weight = weight_for(update)
    first, second = update.merged(weight) - weight, update.merged(weight * 3 + 1) - (weight * 3 + 1)
    assert not torch.allclose(first, second, atol=1e-3)
    if update.magnitude is None:
        with pytest.raises(ValueError, match="depends on the base's weight"):
            update.delta()
        torch.testing.assert_close(update.delta(weight), first)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_norm_is_that_of_the_change(name: str) -> None:
    update = SAMPLES[name]
    weight = weight_for(update)
    assert update.norm(weight) == pytest.approx(float(update.delta(weight).norm()), rel=1e-5)
    if update.additive:
        assert update.norm() == pytest.approx(update.norm(weight))


def test_norms_of_factored_kinds_build_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Kind, weight: Tensor | None = None) -> Tensor:
        raise AssertionError("ΔW was built")

    for kind in ("lora", "tucker conv", "loha", "lokr", "lokr conv", "lokr tucker conv", "lokr full conv"):
        monkeypatch.setattr(type(SAMPLES[kind]), "delta", never)
        assert SAMPLES[kind].norm() > 0


@pytest.mark.parametrize("name", ADDITIVE)
def test_strength_scales_an_additive_change(name: str) -> None:
    update = ADDITIVE[name]
    torch.testing.assert_close(update.scaled(0.3).delta(), 0.3 * update.delta())
    assert update.scaled(1.0) is update


@pytest.mark.parametrize("name", sorted(SAMPLES.keys() - {"full"}))
def test_strength_0_is_the_base(name: str) -> None:
    update = SAMPLES[name]
    weight = weight_for(update)
    # DoRA's magnitude, and a factor per row, stay when the change is gone.
    if update.magnitude is None and getattr(update, "rescale", None) is None:
        torch.testing.assert_close(update.scaled(0.0).merged(weight), weight)


def test_a_whole_parameter_has_no_strength_of_its_own() -> None:
    with pytest.raises(ValueError, match="without the base's weight"):
        SAMPLES["full"].scaled(0.5)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_cast_keeps_the_update_and_changes_the_dtype(name: str) -> None:
    update = SAMPLES[name]
    weight, cast = weight_for(update), update.cast(torch.bfloat16)
    assert {part.dtype for part in cast.parts().values()} == {torch.bfloat16}
    assert (cast.kind, cast.shape, cast.rank) == (update.kind, update.shape, update.rank)
    torch.testing.assert_close(cast.merged(weight), update.merged(weight), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "glora", "diff"])
def test_a_linear_update_fits_a_1x1_convolution(name: str) -> None:
    update, weight = SAMPLES[name], weight_for(SAMPLES[name])
    kernel = weight[..., None, None]
    merged = update.merged(kernel)
    assert merged.shape == kernel.shape
    torch.testing.assert_close(merged[..., 0, 0], update.merged(weight))


@pytest.mark.parametrize("magnitude", [(OUT,), (OUT, 1), (1, IN)])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_dora_gives_every_row_or_column_its_magnitude(kind: str, magnitude: tuple[int, ...]) -> None:
    update = replace(SAMPLES[kind], magnitude=positive(*magnitude))
    assert isinstance(update, LowRank | LoHa | LoKr)
    assert update.magnitude is not None
    merged = update.merged(weight_for(SAMPLES[kind]))
    norms = merged.norm(dim=0 if magnitude[0] == 1 else 1)
    torch.testing.assert_close(norms, update.magnitude.load().flatten())
    assert not update.additive


@pytest.mark.parametrize("name", ["svdiff", "svdiff conv"])
def test_svdiff_moves_the_singular_values_alone(name: str) -> None:
    update, weight = SAMPLES[name].scaled(20.0), weight_for(SAMPLES[name])
    u, before, v = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
    seen = u.T @ update.merged(weight).double().flatten(1) @ v.T
    wanted = torch.relu(before + 20.0 * update.parts()["shift"].load())
    assert (wanted == 0).any()
    torch.testing.assert_close(seen, torch.diag(wanted), rtol=1e-4, atol=1e-5)


def test_svdiff_on_a_vector_moves_its_norm_or_each_number() -> None:
    weight = ref(OUT, seed=2).load()
    longer = SpectralShift(InMemory(torch.tensor([0.5]))).merged(weight)
    torch.testing.assert_close(longer, weight * (1 + 0.5 / weight.norm()))
    torch.testing.assert_close(SpectralShift(ref(OUT), 2.0).merged(weight), weight + 2.0 * ref(OUT).load())


def test_a_half_of_a_lokr_given_twice_or_not_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="each half"):
        LoKr(1.0, w1=ref(2, 2))
    with pytest.raises(ValueError, match="each half"):
        LoKr(1.0, w1=ref(2, 2), w2=ref(2, 2), w2_a=ref(2, 1), w2_b=ref(1, 2))


def test_the_scale_is_alpha_by_rank() -> None:
    assert scale_of(4.0, 8) == 0.5
    # No alpha, or LoKr with both halves full.
    assert scale_of(None, 8) == scale_of(4.0, None) == 1.0


def test_a_diff_of_a_bias_or_norm_is_a_vector() -> None:
    update = Diff(ref(OUT), "x.diff_b")
    assert update.shape == (OUT,)
    torch.testing.assert_close(update.merged(torch.ones(OUT)), 1 + ref(OUT).load())
    assert isinstance(Full(ref(OUT), "x.bias").row_parts(), dict)
    assert lora().row_parts() == {"up": (0, 1)}
