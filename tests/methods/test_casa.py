"""CASA's arbitration between an update and the upgrade."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regraft import open_base, port
from regraft.carry import Settings
from regraft.methods import casa
from regraft.methods.casa import arbitrated
from test_removed import module
from toys import deltas, drifted, llama, lora, relative_error, save_base


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def ported(amount: float, folder: Path, rank: int | None = None):
    old = llama()
    bases = [open_base(save_base(s, folder / f"{i}.safetensors")) for i, s in enumerate((old, drifted(old, amount)))]
    return port(lora(old), *bases, "casa", settings=Settings(force=True, rank=rank))


def test_equal_bases_give_a_copy_alpha_included(tmp_path: Path) -> None:
    wanted = deltas(lora(llama()))
    for ref, delta in deltas(ported(0.0, tmp_path).adapter).items():
        assert relative_error(delta, wanted[ref]) < 1e-4


def test_a_zero_update_takes_the_upgrade_back_where_the_upgrade_is_thin() -> None:
    """The confound: with no adapter at all, something is written."""
    old = weight(12, 12)
    upgrade = 0.3 * weight(12, 12, 1)
    made = arbitrated(torch.zeros(12, 12), old, old + upgrade, 0.5, 0.5, 0.85)
    u, _, vh = torch.linalg.svd(old)
    inside, before = u.T @ made @ vh.T, u.T @ upgrade @ vh.T
    taken = inside.abs() > 1e-4
    assert taken.any()
    torch.testing.assert_close(inside[taken], -before[taken], rtol=1e-3, atol=1e-4)
    assert float((old + upgrade + made - old).norm()) < float(upgrade.norm())


def test_every_entry_is_the_update_or_the_update_less_the_upgrade_or_the_larger_of_both_less_the_upgrade() -> None:
    old, delta, upgrade = weight(10, 14), 0.1 * weight(10, 14, 1), 0.2 * weight(10, 14, 2)
    u, _, vh = torch.linalg.svd(old)
    made, update, change = (
        u.T @ x @ vh.T for x in (arbitrated(delta, old, old + upgrade, 0.5, 0.5, 0.85), delta, upgrade)
    )
    larger = torch.where(update.abs() > change.abs(), update, change) - change
    nearest = torch.stack([(made - x).abs() for x in (update, update - change, larger)]).min(0).values
    assert float(nearest.max()) < 1e-4


def test_the_result_has_the_adapters_rank(tmp_path: Path) -> None:
    adapter = ported(0.2, tmp_path).adapter
    assert adapter.updates[module(0, "mlp.down_proj")].rank == 4


def test_a_layer_of_more_than_16_million_entries_is_arbitrated_likewise() -> None:
    scores = torch.zeros(2**24 + 8)
    scores[:4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert float(casa._quantile(scores, 1 - 1.5 / (len(scores) - 1))) == pytest.approx(2.5, abs=1e-4)
    assert torch.equal(casa._quantile(scores[:9], 0.9), torch.quantile(scores[:9], 0.9))
