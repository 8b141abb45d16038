"""The calibrated curve: exact where nothing changed, monotone, and never surer than what was measured."""

from __future__ import annotations

from math import exp

import numpy as np
import pytest

from regraft.forecast.curve import LEAST, MOST, NOISE, Curve, fit_curve, interval, width_that_holds

NAMES = ("drift", "removed")


def test_a_copy_between_equal_bases_is_expected_to_recover_all() -> None:
    assert Curve(NAMES, (3.0, 2.0)).recovery({"drift": 0.0, "removed": 0.0}) == 1.0


def test_more_damage_never_forecasts_more() -> None:
    curve = Curve(NAMES, (3.0, 0.0))
    found = [curve.recovery({"drift": drift, "removed": 0.5}) for drift in (0.0, 0.1, 0.5, 2.0)]
    assert found == sorted(found, reverse=True)


def test_the_weights_that_made_the_rows_are_found() -> None:
    figures = np.random.default_rng(0).uniform(0, 1, (60, 2))
    recoveries = np.exp(-figures @ [2.0, 0.7])
    curve = fit_curve(NAMES, figures, recoveries, np.ones(60), belief={"drift": 2.5, "removed": 0.5})
    assert curve.weights == pytest.approx((2.0, 0.7), abs=0.1)


def test_a_figure_that_goes_with_a_gain_gets_no_weight_below_zero() -> None:
    figures = np.array([[0.1, 1.0], [0.5, 0.9], [1.0, 0.0], [0.2, 0.1]])
    recoveries = np.array([0.99, 0.8, 0.1, 0.5])
    curve = fit_curve(NAMES, figures, recoveries, np.ones(4), belief={})
    assert min(curve.weights) >= 0


def test_what_no_row_shows_rests_on_belief() -> None:
    figures = np.array([[0.1, 0.0], [0.3, 0.0], [0.6, 0.0]])
    curve = fit_curve(NAMES, figures, np.exp(-figures[:, 0]), np.ones(3), belief={"drift": 1.0, "removed": 2.0})
    assert curve.weights[1] == pytest.approx(2.0)


@pytest.mark.parametrize("damage", [0.0, 0.1, 1.0, 8.0])
def test_a_wider_interval_holds_a_narrower_one(damage: float) -> None:
    ends = [interval(damage, width) for width in (0.0, 0.5, 1.0, 4.0)]
    lows, highs = [low for low, _ in ends], [high for _, high in ends]
    assert lows == sorted(lows, reverse=True)
    assert highs == sorted(highs)
    assert ends[0] == pytest.approx((exp(-damage), exp(-damage)))


def test_even_without_damage_two_trainings_differ_and_where_all_is_lost_that_is_certain() -> None:
    assert interval(0.0, 1.0) == pytest.approx((1 - NOISE, 1 + NOISE))
    assert interval(0.0, 1e3) == (0.9, MOST)
    assert interval(99.0, 1e-3) == pytest.approx((LEAST, NOISE * 1e-3))
    assert interval(1e6, 1e3)[1] == pytest.approx(2 * NOISE)


def test_the_offset_that_made_the_rows_is_found() -> None:
    figures = np.random.default_rng(0).uniform(0, 1, (60, 2))
    curve = fit_curve(NAMES, figures, np.exp(-0.4 - figures @ [2.0, 0.7]), np.ones(60), belief={}, offset=True)
    assert curve.offset == pytest.approx(0.4, abs=0.05)
    assert curve.recovery({}) == pytest.approx(exp(-curve.offset))


@pytest.mark.parametrize(("damage", "recovery"), [(0.2, 0.3), (0.2, 0.95), (1.5, 0.6), (0.5, 0.05)])
def test_the_width_is_the_smallest_that_holds_a_recovery(damage: float, recovery: float) -> None:
    width = width_that_holds(damage, recovery)
    low, high = interval(damage, width * 1.001)
    assert low <= recovery <= high
    low, high = interval(damage, width * 0.98)
    assert not low <= recovery <= high
