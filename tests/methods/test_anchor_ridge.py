"""An adapter as a mix of adapters that exist on both bases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regraft import Adapter, InputError, UsageError, open_base, port
from regraft.base import Base
from regraft.carry import Settings
from regraft.methods.anchor_ridge import solve_mix, span_problem
from regraft.updates import LowRank
from test_removed import module
from toys import deltas, llama, lora, relative_error, save_base


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Base, Base]:
    """Two unrelated models, and three adapters that exist on both."""
    folder = tmp_path_factory.mktemp("anchors")
    states = llama(0), llama(1)
    for which, state in zip(("old", "new"), states, strict=True):
        (folder / which).mkdir()
        for i in range(3):
            lora(state, seed=10 + i if which == "old" else 20 + i).save(folder / which / str(i))
    bases = [open_base(save_base(state, folder / f"{i}.safetensors")) for i, state in enumerate(states)]
    return folder, bases[0], bases[1]


def ported(world: tuple[Path, Base, Base], adapter: Adapter, **options):
    folder, old, new = world
    options = {"anchors": str(folder), "ridge": 1e-9, **options}
    return port(adapter, old, new, "anchor-ridge", settings=Settings(force=True), **options)


@pytest.mark.parametrize("mix", ["adapter", "module"])
def test_an_adapter_that_is_an_anchor_comes_out_as_its_new_version(world: tuple[Path, Base, Base], mix: str) -> None:
    result = ported(world, lora(llama(0), seed=11), mix=mix)
    wanted = deltas(lora(llama(1), seed=21))
    for ref, delta in deltas(result.adapter).items():
        assert relative_error(delta, wanted[ref]) < 1e-3


def test_a_mix_of_anchors_comes_out_as_the_same_mix(world: tuple[Path, Base, Base]) -> None:
    one, other = (lora(llama(0), seed=seed) for seed in (10, 12))
    mixed = {}
    for ref, update in one.updates.items():
        assert isinstance(update, LowRank)
        both = torch.cat([update.up.load() * 0.7, other.updates[ref].up.load() * -0.4], dim=1)
        mixed[ref] = update.with_factors(both, torch.cat([update.down.load(), other.updates[ref].down.load()]))
    result = ported(world, Adapter(mixed, "peft"), **{})
    wanted = [deltas(lora(llama(1), seed=seed)) for seed in (20, 22)]
    ref = module(1, "mlp.down_proj")
    # Cut to the anchors' rank.
    best = 0.7 * wanted[0][ref] - 0.4 * wanted[1][ref]
    u, s, vh = torch.linalg.svd(best)
    assert relative_error(deltas(result.adapter)[ref], u[:, :4] * s[:4] @ vh[:4]) < 1e-3
    assert result.report.figures["in_span"] == pytest.approx(1.0, abs=1e-4)


def test_what_no_anchor_has_is_not_in_their_span(world: tuple[Path, Base, Base]) -> None:
    assert ported(world, lora(llama(0), seed=99)).report.figures["in_span"] < 0.1


def test_ridge_shrinks_the_mix() -> None:
    anchors = [torch.randn(6, 5, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    problem = span_problem(anchors[0], anchors)
    torch.testing.assert_close(solve_mix(*problem[:2], 1e-12), torch.tensor([1.0, 0.0]).double(), rtol=1e-4, atol=1e-6)
    assert float(solve_mix(*problem[:2], 1.0).norm()) < 0.7


def test_without_anchors_it_is_a_usage_error(world: tuple[Path, Base, Base], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="both bases"):
        ported(world, lora(llama(0)), anchors=None)
    with pytest.raises(UsageError, match="can't be read"):
        ported(world, lora(llama(0)), anchors="a.safetensors")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").touch()
    with pytest.raises(InputError, match="partner"):
        ported(world, lora(llama(0)), anchors=str(tmp_path))
