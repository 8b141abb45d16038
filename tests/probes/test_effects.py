from __future__ import annotations

import numpy as np
import pytest
import torch

from regraft.errors import InputError
from regraft.probes import read_prompts
from regraft.probes.effects import compare, cosine, divergence, interval

BASE, EFFECT = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.eye(5, 7)


def test_the_same_effect_has_cosine_and_ratio_1_and_the_opposite_minus_1() -> None:
    same = compare((BASE, BASE + EFFECT), (2 * BASE, 2 * BASE + EFFECT), comparable=True)
    assert (same.cosine, same.ratio) == (pytest.approx(1), pytest.approx(1))
    opposite = compare((BASE, BASE + EFFECT), (BASE, BASE - 3 * EFFECT), comparable=True)
    assert (opposite.cosine, opposite.ratio) == (pytest.approx(-1), pytest.approx(3))


def test_logits_are_compared_up_to_a_constant_per_position() -> None:
    shifted = BASE + EFFECT + torch.arange(5.0)[:, None]
    result = compare((BASE, BASE + EFFECT), (BASE, shifted), comparable=True, logits=True)
    assert result.cosine == pytest.approx(1)
    assert result.ratio == pytest.approx(1)
    assert result.kl == pytest.approx(0, abs=1e-9)


def test_no_effect_has_no_direction() -> None:
    assert compare((BASE, BASE + EFFECT), (BASE, BASE), comparable=True).cosine is None
    assert compare((BASE, BASE + EFFECT), (BASE, BASE), comparable=True).ratio == 0
    assert compare((BASE, BASE), (BASE, BASE + EFFECT), comparable=True).ratio is None
    assert cosine(torch.zeros(3), torch.ones(3)) is None


def test_outputs_of_other_shapes_are_compared_by_relative_norm() -> None:
    wide, effect = torch.full((5, 9), 2.0), torch.full((5, 9), 0.2)
    result = compare((BASE, BASE * 1.1), (wide, wide + effect), comparable=True)
    assert result.cosine is None
    assert result.ratio == pytest.approx(1, abs=1e-5)


def test_divergence_is_the_textbooks() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    assert divergence(p.log(), q.log()) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert divergence(p.log() + 5, p.log()) == pytest.approx(0, abs=1e-9)


def test_the_interval_covers_the_mean_about_19_times_in_20() -> None:
    draws = np.random.default_rng(0).normal(0.8, 0.1, size=(300, 40))
    intervals = [interval(list(row), seed=1, undefined="") for row in draws]
    covered = [i.low <= 0.8 <= i.high for i in intervals if i.low is not None and i.high is not None]
    assert 0.89 < np.mean(covered) < 0.98


def test_the_interval_says_what_it_leaves_out() -> None:
    some = interval([1.0, None, 0.5], seed=0, undefined="no effect", note="a note")
    assert (some.mean, some.reason) == (0.75, "defined on 2 of 3 inputs; a note")
    none = interval([None, None], seed=0, undefined="no effect")
    assert (none.mean, none.low, none.high, none.reason) == (None, None, None, "no effect")
    one = interval([0.3], seed=0, undefined="")
    assert (one.low, one.mean, one.high) == (0.3, 0.3, 0.3)


def test_prompts_are_lines(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "prompts.txt"
    file.write_bytes("﻿ein Höhlenbär\r\n\n  two  \n".encode())
    assert read_prompts(file) == ["ein Höhlenbär", "two"]
    file.write_text("\n \n")
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="is no UTF-8 text"):
        read_prompts(file)
    with pytest.raises(InputError, match="no such file"):
        read_prompts(tmp_path / "none.txt")


def test_equal_values_have_an_interval_of_no_width_and_others_the_textbooks() -> None:
    equal = interval([0.1] * 7, seed=0, undefined="")
    assert equal.low == equal.mean == equal.high == pytest.approx(0.1)
    values = np.random.default_rng(1).normal(size=9)
    draws = np.random.default_rng(3).integers(0, 9, size=(1000, 9))
    some = interval(list(values), seed=3, undefined="")
    assert (some.low, some.high) == pytest.approx(tuple(np.quantile(values[draws].mean(1), [0.025, 0.975])))
