"""The survey of two bases, and the figures made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regraft import open_base
from regraft.adapter import MODEL, ModuleRef
from regraft.base import Base
from regraft.forecast.features import FIGURES, angle, features, stage_of
from regraft.forecast.survey import leading, spread, subspace_overlap, survey
from regraft.port import fit_for
from regraft.prepare import prepare
from toys import drifted, llama, lora, permutation, regauged, rotation, save_base

TOUCHED = [ModuleRef(MODEL, f"model.layers.{i}.self_attn.q_proj") for i in range(3)]


def base(state: dict[str, torch.Tensor], file: Path) -> Base:
    return open_base(save_base(state, file))


def figures(tmp_path: Path, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], method: str = "auto", **of):
    before, after = base(old, tmp_path / "o.safetensors"), base(new, tmp_path / "n.safetensors")
    adapter = lora(old, **of)
    migration = fit_for(adapter, before, after, method)
    return features(prepare(adapter, migration, old=before, new=after).evidence)


def test_equal_weights_overlap_wholly_and_unrelated_ones_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 160, generator=generator) for _ in range(2))
    assert subspace_overlap(a, a) == pytest.approx(1.0, abs=1e-4)
    assert abs(subspace_overlap(a, b)) < 0.15


def test_leading_subspaces_are_those_of_the_svd() -> None:
    u, v = rotation(150, 1)[:, :140], rotation(140, 2)
    weight = u @ torch.diag(torch.cat([torch.linspace(6, 4, 8), torch.linspace(2, 0.1, 132)])) @ v.T
    left, right = leading(weight, 8)
    assert float((left.T @ u[:, :8]).square().sum()) == pytest.approx(8, abs=0.05)
    assert float((right.T @ v[:, :8]).square().sum()) == pytest.approx(8, abs=0.05)


def test_the_sample_is_fixed_and_deep_takes_all(tmp_path: Path) -> None:
    state = llama(layers=6)
    bases = base(state, tmp_path / "o.safetensors"), base(drifted(state, 0.2), tmp_path / "n.safetensors")
    sampled, again, deep = (survey(*bases, TOUCHED, deep=deep) for deep in (False, False, True))
    assert sampled == again
    assert sampled.modules < deep.modules
    assert deep.deep
    assert sampled.drift == pytest.approx(0.2, abs=1e-3)
    assert deep.drift == pytest.approx(0.2, abs=1e-3)


def test_blocks_that_the_new_base_added_are_counted(tmp_path: Path) -> None:
    bases = base(llama(layers=3), tmp_path / "o.safetensors"), base(llama(layers=4), tmp_path / "n.safetensors")
    assert survey(*bases, TOUCHED).added == pytest.approx(7 / 30)


def test_spread_keeps_the_ends_in_reach() -> None:
    assert spread(list(range(100)), 4) == [0, 25, 50, 75]
    assert spread([1, 2], 4) == [1, 2]


def test_an_angle_is_the_drift_where_that_is_square_to_the_weight() -> None:
    for drift in (0.0, 0.1, 1.0):
        assert angle(1 / (1 + drift**2) ** 0.5) == pytest.approx(drift, abs=1e-6)
    assert angle(0.0) == angle(-0.2) > 2


def test_equal_bases_show_no_damage(tmp_path: Path) -> None:
    found = figures(tmp_path, llama(), llama())
    assert [found[name] for name in FIGURES["weights"]] == pytest.approx([0.0] * len(FIGURES["weights"]), abs=1e-3)
    assert stage_of(found) == "weights"


def test_every_figure_grows_with_the_drift(tmp_path: Path) -> None:
    near, far = (figures(tmp_path / str(d), llama(), drifted(llama(), d)) for d in (0.1, 0.5))
    grows = ("drift", "outweighed", "inside", "inputs", "outputs", "turned", "base")
    assert all(near[name] < far[name] for name in grows)


def test_units_that_a_rotation_brings_back_did_not_drift(tmp_path: Path) -> None:
    moved = regauged(llama(), permutation(24, 1), permutation(40, 2))
    copied, rotated = (figures(tmp_path / m, llama(), moved, m) for m in ("copy", "procrustes"))
    assert rotated["drift"] < 0.1 < copied["drift"]


def test_removed_blocks_show_from_headers(tmp_path: Path) -> None:
    found = figures(tmp_path, llama(layers=4), llama(layers=3), "copy")
    assert found["removed"] == pytest.approx(0.25, abs=0.1)
