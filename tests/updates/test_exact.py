"""The same change in another form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from update_samples import ADDITIVE, IN, OUT, SAMPLES, lora, ref, weight_for

from regraft.tensors import InMemory
from regraft.updates import LoHa, Slice, Tucker
from regraft.updates.columns import widen
from regraft.updates.exact import as_lowrank, refactor
from regraft.updates.rows import take_rows

FACTORED = [
    name for name, update in SAMPLES.items() if update.kind in ("lora", "dora", "tucker", "loha", "lokr", "vera")
]


@pytest.mark.parametrize("name", FACTORED)
def test_a_factored_update_is_a_lora_exactly(name: str) -> None:
    update = SAMPLES[name]
    lora, weight = as_lowrank(update), weight_for(update)
    assert lora is not None
    assert lora.shape == update.shape
    torch.testing.assert_close(lora.delta(), update.delta(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lora.merged(weight), update.merged(weight), rtol=1e-5, atol=1e-5)


RANKS = {
    "lora": 3,
    "tucker conv": 3,
    "loha": 3 * 2,
    "loha tucker conv": 3 * 2,
    "lokr low-rank": 1 * 2,
    "lokr with other bounds": 2 * 1,
    # (3, 2) ⊗ (4, 4): at most the weight's own rank.
    "lokr": 8,
    "vera": 3,
    # 11 directions of a weight that has 8.
    "vera turned": 8,
}


@pytest.mark.parametrize("name", RANKS)
def test_the_rank_is_the_product_of_the_halves_ranks(name: str) -> None:
    lora = as_lowrank(SAMPLES[name])
    assert lora is not None
    assert lora.rank == RANKS[name]


def test_alpha_still_gives_the_scale() -> None:
    loha = SAMPLES["loha"]
    assert isinstance(loha, LoHa)
    lora = as_lowrank(replace(loha, alpha=InMemory(torch.tensor(2.1))))
    assert lora is not None
    assert lora.alpha is not None
    assert float(lora.alpha.load()) / lora.rank == pytest.approx(loha.scale)


@pytest.mark.parametrize("name", ["diff conv", "fourierft", "fourierft turned"])
def test_a_dense_change_is_a_lora_only_when_asked(name: str) -> None:
    update = SAMPLES[name]
    assert as_lowrank(update) is None
    lora = as_lowrank(update, dense=True)
    assert lora is not None
    assert torch.equal(lora.delta(), update.delta())


@pytest.mark.parametrize("name", ["full", "ia3 per row", "oft", "boft", "glora", "svdiff"])
def test_what_depends_on_the_weight_is_no_lora(name: str) -> None:
    assert as_lowrank(SAMPLES[name]) is None


def test_a_slice_of_a_lokr_is_a_lora_too() -> None:
    part = take_rows(SAMPLES["lokr with other bounds"], [(1, 6)])
    assert isinstance(part, Slice)
    lora = as_lowrank(part)
    assert lora is not None
    torch.testing.assert_close(lora.delta(), part.delta())


def test_a_full_rank_factorisation_is_the_change_itself() -> None:
    delta = ref(OUT, IN, 3, 3).load()
    made, kept = refactor(delta)
    assert kept == pytest.approx(1.0)
    assert made.rank == OUT
    torch.testing.assert_close(made.delta(), delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("double", [False, True])
def test_the_energy_kept_is_that_of_the_change_that_is_left(double: bool) -> None:
    delta = ref(OUT, IN).load()
    for rank in range(1, IN + 1):
        made, kept = refactor(delta, rank=rank, double=double)
        assert made.rank == rank
        left = (delta - made.delta()).norm() ** 2 / delta.norm() ** 2
        assert kept == pytest.approx(1 - float(left), abs=1e-5)


@pytest.mark.parametrize("energy", [0.2, 0.6, 0.95, 1.0])
def test_the_rank_is_the_lowest_that_keeps_the_energy(energy: float) -> None:
    delta = ref(OUT, IN).load()
    made, kept = refactor(delta, energy=energy, double=True)
    assert kept >= energy - 1e-9
    if made.rank > 1:
        assert refactor(delta, rank=made.rank - 1, double=True).energy_kept < energy


def test_a_change_of_low_rank_is_given_at_that_rank() -> None:
    assert refactor(lora(rank=3).delta(), double=True).update.rank == 3
    assert refactor(torch.zeros(OUT, IN)).update.rank == 1


@pytest.mark.parametrize("name", ADDITIVE)
def test_a_widened_update_leaves_the_added_inputs_alone(name: str) -> None:
    update = ADDITIVE[name]
    wide = widen(update, IN + 4)
    assert wide is not None
    assert wide.shape == (OUT, IN + 4, *update.shape[2:])
    torch.testing.assert_close(wide.delta()[:, :IN], update.delta(), rtol=1e-5, atol=1e-6)
    assert not wide.delta()[:, IN:].any()
    assert widen(update, IN) is update


def test_widening_is_refused_where_it_is_not_exact() -> None:
    for name in ("dora per row", "oft", "full"):
        assert widen(SAMPLES[name], IN + 4) is None
    with pytest.raises(ValueError, match="can't be padded"):
        widen(lora(), IN - 1)


def test_a_tucker_lora_keeps_its_stored_up() -> None:
    tucker = SAMPLES["tucker conv"]
    assert isinstance(tucker, Tucker)
    made = as_lowrank(tucker)
    assert made is not None
    assert made.up is tucker.up
