"""Fitting and judging: pair by pair, so that no pair tells of itself."""

from __future__ import annotations

from math import exp

import numpy as np
import pytest

from regraft.forecast.calibration import Calibration
from regraft.forecast.features import FIGURES
from regraft.forecast.fitting import Held, fit, leave_one_pair_out, score
from regraft.forecast.rows import Row, Table, over_seeds

NAMES = FIGURES["weights"]


def row(pair: str, adapter: str, damage: float, recovery: float | None = None, seed: int = 0) -> Row:
    figures = {**dict.fromkeys(NAMES, 0.0), NAMES[-1]: damage}
    return Row(pair, adapter, seed, figures, {"copy": exp(-damage) if recovery is None else recovery})


def world(noise: float = 0.0, pairs: int = 10) -> list[Row]:
    rng = np.random.default_rng(1)
    return [
        row(f"pair {i}", f"adapter {j}", d := 0.3 * i * (1 + 0.1 * j), exp(-d) + noise * rng.standard_normal())
        for i in range(pairs)
        for j in range(3)
    ]


def test_seeds_of_one_adapter_count_once() -> None:
    rows = [row("a", "x", 0.2, 0.9, seed=0), row("a", "x", 0.4, 0.7, seed=1), row("a", "y", 1.0)]
    first, second = over_seeds(rows)
    assert first.recovery["copy"] == pytest.approx(0.8)
    assert first.figures[NAMES[-1]] == pytest.approx(0.3)
    assert second.adapter == "y"


def test_a_law_is_found_on_pairs_that_were_held_out() -> None:
    held = leave_one_pair_out(world(), "copy", NAMES)
    found = score(held, floor=0.2)
    assert found.pairs == 10
    assert found.adapters == 30
    assert found.spearman > 0.98
    assert found.error < 0.05


def test_most_held_out_recoveries_lie_in_their_intervals() -> None:
    assert score(leave_one_pair_out(world(noise=0.05), "copy", NAMES), floor=0.2).held >= 0.8


def test_a_held_out_pair_can_not_change_its_own_forecast() -> None:
    rows = world()
    changed = [row(r.pair, r.adapter, r.figures[NAMES[-1]], 0.0) if r.pair == "pair 3" else r for r in rows]
    before, after = (
        [h.expected for h in leave_one_pair_out(some, "copy", NAMES) if h.row.pair == "pair 3"]
        for some in (rows, changed)
    )
    assert before == after


def test_noisier_pairs_give_wider_intervals() -> None:
    widths = [fit(world(noise), "copy", NAMES).width for noise in (0.0, 0.1)]
    assert widths[0] < widths[1]


def test_the_interval_widens_away_from_what_was_measured() -> None:
    rows = [row(f"pair {i}", "x", 0.1 * i, max(0.0, exp(-0.1 * i) - 0.03 * (i % 3))) for i in range(1, 9)]
    fitted, table = fit(rows, "copy", NAMES), Table.of(rows, "copy", NAMES)
    amid = np.array([0.0] * (len(NAMES) - 1) + [0.4])
    beyond = np.array([0.0] * (len(NAMES) - 1) + [3.0])
    assert fitted.novelty(amid, table) == 0
    assert fitted.novelty(beyond, table) > 1


def test_a_refusal_is_right_only_where_nothing_came_over() -> None:
    def one(measured: float, high: float) -> Held:
        return Held(row("a", "x", 1.0), measured, 1 - measured, 0.0, high)

    found = score([one(0.05, 0.1), one(0.9, 1.0), one(0.5, 0.1), one(0.1, 0.6)], floor=0.2)
    assert found.refusals == pytest.approx(0.5)
    assert found.wrongly_refused == pytest.approx(0.25)


def test_a_calibration_comes_back_from_its_record() -> None:
    calibration = Calibration.fitted(world())
    figures = {**dict.fromkeys(NAMES, 0.0), NAMES[-1]: 0.7}
    again = Calibration.of(calibration.record())
    one, two = (c.forecast("copy", figures, "weights") for c in (calibration, again))
    assert one is not None
    assert two is not None
    assert (two.recovery, two.low, two.high) == pytest.approx((one.recovery, one.low, one.high), abs=1e-2)
    assert (two.pairs, two.adapters, two.basis) == (10, 30, "weights")


def test_too_few_pairs_say_nothing() -> None:
    calibration = Calibration.fitted(world(pairs=2))
    assert calibration.forecast("copy", dict.fromkeys(NAMES, 0.0), "weights") is None
    assert Calibration.fitted(world()).forecast("refine", dict.fromkeys(NAMES, 0.0), "weights") is None
