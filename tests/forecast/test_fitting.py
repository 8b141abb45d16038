"""Fitting and judging: pair by pair, so that no pair tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log

import numpy as np
import pytest

from regraft.forecast.calibration import Calibration
from regraft.forecast.curve import Array, interval, width_that_holds
from regraft.forecast.features import BELIEF, FIGURES, LEAST_WEIGHT
from regraft.forecast.fitting import Held, fit, leave_one_pair_out, score
from regraft.forecast.rows import Row, Table, over_seeds

NAMES = FIGURES["weights"]


def row(pair: str, adapter: str, damage: float, recovery: float | None = None, seed: int = 0, **more: float) -> Row:
    figures = {**dict.fromkeys(NAMES, 0.0), NAMES[-1]: damage, **more}
    return Row(pair, adapter, seed, figures, {"copy": exp(-damage) if recovery is None else recovery})


def world(noise: float = 0.0, pairs: int = 10) -> list[Row]:
    rng = np.random.default_rng(1)
    return [
        row(f"pair {i}", f"adapter {j}", d := 0.3 * i * (1 + 0.1 * j), exp(-d) + noise * rng.standard_normal())
        for i in range(pairs)
        for j in range(3)
    ]


def line(recovery_of: Mapping[int, float] = {}, pairs: int = 10, adapters: Mapping[int, int] = {}) -> list[Row]:
    """Pairs along the law, but for those whose recovery is told."""
    return [
        row(f"pair {i}", f"adapter {j}", 0.1 * i, recovery_of.get(i))
        for i in range(1, pairs + 1)
        for j in range(adapters.get(i, 1))
    ]


def point(damage: float, **more: float) -> Array:
    return np.array([row("", "", damage, **more).figures[name] for name in NAMES])


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
    rows = world(noise=0.05)
    changed = [row(r.pair, r.adapter, r.figures[NAMES[-1]], 0.0) if r.pair == "pair 3" else r for r in rows]
    before, after = (
        [(h.expected, h.low, h.high) for h in leave_one_pair_out(some, "copy", NAMES) if h.row.pair == "pair 3"]
        for some in (rows, changed)
    )
    assert before == after


def test_a_held_out_forecast_is_that_of_a_fit_to_the_other_pairs() -> None:
    rest, new = world(noise=0.05), row("new", "x", 0.4, added=1.0)
    fitted, table = fit(rest, "copy", NAMES), Table.of(rest, "copy", NAMES)
    (held,) = (h for h in leave_one_pair_out([*rest, new], "copy", NAMES) if h.row.pair == "new")
    assert held.expected == fitted.curve.recovery(new.figures)
    assert (held.low, held.high) == fitted.interval(point(0.4, added=1.0), table)
    # It is far from all others, and would not be from itself.
    assert fitted.novelty(point(0.4, added=1.0), table) > 1


def test_noisier_pairs_give_wider_intervals() -> None:
    widths = [fit(world(noise), "copy", NAMES).width for noise in (0.0, 0.1)]
    assert widths[0] < widths[1]


def test_the_width_is_what_would_have_held_the_worst_of_a_few_pairs() -> None:
    def needed(rows: list[Row], pair: str) -> float:
        (worst,) = (h for h in leave_one_pair_out(rows, "copy", NAMES) if h.row.pair == pair)
        return width_that_holds(-log(worst.expected), worst.measured)

    rows, apart = line({7: 0.25}), [*line(), row("apart", "x", 3.0, 0.4)]
    assert fit(rows, "copy", NAMES).width == pytest.approx(needed(rows, "pair 7"), rel=1e-6)
    # Intervals are wider there anyhow.
    assert fit(apart, "copy", NAMES).width < 0.5 * needed(apart, "apart")


def test_one_pair_of_many_is_left_out_of_the_width_however_many_adapters_it_has() -> None:
    few, many = (fit(line({5: 0.1}, 20, {5: n}), "copy", NAMES).width for n in (1, 20))
    assert many == pytest.approx(few, rel=0.1)
    assert few < fit(line({5: 0.1, 15: 0.9}, 20), "copy", NAMES).width


def test_the_interval_widens_away_from_what_was_measured() -> None:
    rows = line({i: max(0.0, exp(-0.1 * i) - 0.03 * (i % 3)) for i in range(1, 9)}, 8)
    fitted, table = fit(rows, "copy", NAMES), Table.of(rows, "copy", NAMES)

    def plain(at: Array) -> tuple[float, float]:
        return interval(fitted.curve.damage(dict(zip(NAMES, at, strict=True))), fitted.width)

    amid, beyond = point(0.4), point(0.4, added=1.0)
    assert fitted.novelty(amid, table) == 0
    assert fitted.interval(amid, table) == plain(amid)
    assert fitted.novelty(beyond, table) > 1
    assert fitted.interval(beyond, table)[0] < plain(beyond)[0] - 0.1


def test_more_damage_than_any_row_shows_is_nothing_to_hope_from() -> None:
    rows = line({7: 0.25})
    fitted, table = fit(rows, "copy", NAMES), Table.of(rows, "copy", NAMES)
    most = fitted.interval(point(1.0), table)[1]
    assert [fitted.interval(point(far), table)[1] for far in (1.5, 2.0, 4.0)] == pytest.approx([most] * 3)


def test_beyond_some_more_of_a_figure_is_nothing_new() -> None:
    rows = line()
    fitted, table = fit(rows, "copy", NAMES), Table.of(rows, "copy", NAMES)
    near, far = (fitted.novelty(point(damage), table) for damage in (4.0, 40.0))
    assert near < far < 2 * near < 2 * fitted.novelty(point(4.0), Table.of([], "copy", NAMES))


def test_what_no_row_shows_rests_on_belief_and_drift_never_counts_for_nothing() -> None:
    harmless = [row(f"pair {i}", "x", 0.0, 1.0, drift=0.5 * i) for i in range(10)]
    weights = dict(zip(NAMES, fit(harmless, "copy", NAMES).curve.weights, strict=True))
    assert weights["removed"] == pytest.approx(BELIEF["removed"])
    assert weights["drift"] == pytest.approx(LEAST_WEIGHT["drift"], abs=1e-3)


def test_forecasts_are_scored_and_a_refusal_is_right_only_where_nothing_came_over() -> None:
    def one(measured: float, high: float) -> Held:
        return Held(row("a", "x", 1.0), measured, 1 - measured, 0.0, high)

    found = score([one(0.05, 0.1), one(0.9, 1.0), one(0.5, 0.1), one(0.1, 0.6)], floor=0.2)
    assert found.refusals == pytest.approx(0.5)
    assert found.wrongly_refused == pytest.approx(0.25)
    assert (found.pairs, found.adapters, found.held) == (1, 4, 0.75)
    assert found.spearman == pytest.approx(-1)
    assert found.error == pytest.approx((0.9 + 0.8 + 0.0 + 0.8) / 4)


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
