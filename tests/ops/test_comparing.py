"""Two adapters beside each other."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
from adapters_made import saved, unet_lora, with_magnitude

from regraft import ModuleRef
from regraft.ops.diff import compare, diff_adapters
from regraft.ops.merge import Settings, merge

NAMES = ("a", "b")


def test_an_adapter_equals_itself_in_every_module(tmp_path: Path) -> None:
    saved(unet_lora(), tmp_path / "a.safetensors")
    report = diff_adapters(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    assert report.equal == len(report.modules) == 4
    assert report.distance == 0.0
    assert report.cosine == pytest.approx(1.0)


def test_norm_angle_and_distance_are_those_of_the_whole_changes() -> None:
    one, two = unet_lora(seed=1), unet_lora(seed=2, rank=3, scale=2.0)
    report = compare(one, two, names=NAMES)
    for row in report.modules:
        ref = ModuleRef("unet", row.name.removeprefix("unet."))
        a, b = one.updates[ref].delta().double(), two.updates[ref].delta().double()
        assert row.norms == pytest.approx((float(a.norm()), float(b.norm())), rel=1e-5)
        assert row.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-6)
        assert row.distance == pytest.approx(float((a - b).norm()), rel=1e-5)
        assert row.ranks == (6, 3)
    assert [row.distance for row in report.modules] == sorted((row.distance for row in report.modules), reverse=True)


def test_a_scaled_adapter_has_another_norm_and_the_same_angle() -> None:
    one = unet_lora()
    two = replace(one, updates={ref: replace(u, scale=u.scale * 2) for ref, u in one.updates.items()})
    report = compare(one, two, names=NAMES)
    assert report.equal == 0
    assert all(row.cosine == pytest.approx(1.0) for row in report.modules)
    assert report.distance == pytest.approx(report.norms[0])


def test_what_only_one_has_is_named_and_counts_in_full() -> None:
    one, two = unet_lora(seed=1), unet_lora(seed=1)
    ref = next(iter(one.updates))
    two = replace(two, updates={r: u for r, u in two.updates.items() if r != ref})
    report = compare(one, two, names=NAMES)
    assert report.only_first == [str(ref)]
    assert report.only_second == []
    assert report.distance == pytest.approx(one.updates[ref].norm())
    assert report.norms[1] == pytest.approx(sqrt(report.norms[0] ** 2 - one.updates[ref].norm() ** 2))


def test_other_formats_of_one_adapter_are_found_to_be_one(tmp_path: Path) -> None:
    saved(unet_lora(scale=1.0), tmp_path / "kohya.safetensors")
    saved(unet_lora(scale=1.0), tmp_path / "diffusers.safetensors", "diffusers")
    report = diff_adapters(tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors")
    assert report.formats == ("kohya", "diffusers")
    assert report.distance == pytest.approx(0.0, abs=1e-9)
    assert not report.only_first
    assert not report.only_second


def test_a_concatenation_with_itself_is_twice_the_change() -> None:
    one = unet_lora()
    twice, _ = merge([one, one], Settings((1.0, 1.0)))
    report = compare(one, twice, names=NAMES)
    assert report.norms[1] == pytest.approx(2 * report.norms[0])
    assert report.cosine == pytest.approx(1.0)


def test_magnitudes_are_told_beside_the_directions() -> None:
    one = with_magnitude(unet_lora())
    two = with_magnitude(unet_lora(), seed=4)
    report = compare(one, two, names=NAMES)
    assert all(row.cosine == pytest.approx(1.0) and "magnitudes differ by" in row.reason for row in report.modules)
    report = compare(one, unet_lora(), names=NAMES)
    assert all("DoRA in only one" in row.reason for row in report.modules)
