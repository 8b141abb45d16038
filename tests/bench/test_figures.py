"""Recovery, share and retention are what their formulas say, and their intervals cover what they should."""

from __future__ import annotations

import numpy as np
import pytest

from regraft.bench import figures
from regraft.bench.controls import crossed
from regraft.bench.worlds import Scores
from regraft.report.schema import Interval


def scores(task: object, retention: object = (0.0,)) -> Scores:
    return Scores(np.asarray(task, dtype=float), np.asarray(retention, dtype=float))


def rows(**named: float) -> dict[str, Scores]:
    """Rows whose scores are one value on each of 8 inputs, as task and as retention."""
    return {name.replace("_", " "): scores(np.full(8, value), np.full(8, value)) for name, value in named.items()}


def test_recovery_is_the_share_of_the_native_gain() -> None:
    found = figures.of_one(rows(none=1.0, native=3.0, ported=2.5), "ported", figures.recovery, "")
    assert (found.mean, found.low, found.high) == (0.75, 0.75, 0.75)


def test_recovery_is_signed() -> None:
    assert figures.of_one(rows(none=1.0, native=3.0, ported=0.0), "ported", figures.recovery, "").mean == -0.5


def test_share_of_the_teacher_counts_from_the_new_base_alone() -> None:
    found = figures.of_one(rows(none=1.0, reverted=5.0, ported=2.0), "ported", figures.teacher_share, "")
    assert found.mean == 0.25


def test_a_port_that_makes_the_new_base_the_old_one_retains_nothing() -> None:
    table = rows(none=3.0, old=1.0, reverted=1.0, ported=2.0)
    assert figures.of_one(table, "reverted", figures.retention, "").mean == 0.0
    assert figures.of_one(table, "ported", figures.retention, "").mean == 0.5
    assert figures.of_one(table, "none", figures.retention, "").mean == 1.0


def test_where_nothing_can_be_copied_the_copy_is_the_base_alone() -> None:
    table: dict[str, Scores | None] = {**rows(none=1.0, native=3.0, ported=2.0), "copy": None}
    assert figures.of_one(table, "ported", figures.versus_copy, "").mean == 0.5


def test_a_native_adapter_that_gains_nothing_leaves_recovery_undefined() -> None:
    noise = np.random.default_rng(0).normal(size=32)
    table = {"none": scores(np.zeros(32)), "native": scores(noise - noise.mean()), "ported": scores(np.ones(32))}
    found = figures.of_one(table, "ported", figures.recovery, "no gain")
    assert found.mean is None
    assert found.reason == "no gain"


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator, covered = np.random.default_rng(1), 0
    for _ in range(200):
        gain = generator.normal(2.0, 0.5, size=64)
        ported = 0.6 * gain + generator.normal(0.0, 0.4, size=64)
        table = {"none": scores(np.zeros(64)), "native": scores(gain), "ported": scores(ported)}
        found = figures.of_one(table, "ported", figures.recovery, "")
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.6 <= found.high
    assert 180 <= covered <= 200


def test_seeds_that_differ_widen_the_interval_and_alike_ones_do_not_narrow_it() -> None:
    def seed(mean: float) -> Interval:
        return Interval(mean=mean, low=mean - 0.1, high=mean + 0.1)

    alike = figures.over_seeds([seed(0.6)] * 3)
    assert alike.mean == pytest.approx(0.6)
    assert alike.low == pytest.approx(0.5)
    apart = figures.over_seeds([seed(0.4), seed(0.6), seed(0.8)])
    assert apart.mean == pytest.approx(0.6)
    # √(0.1² + (1.96 · 0.2)² / 3)
    assert apart.high == pytest.approx(0.6 + 0.2474, abs=1e-3)


def test_a_seed_without_a_figure_is_told() -> None:
    none = Interval(mean=None, low=None, high=None, reason="no gain")
    found = figures.over_seeds([none, Interval(mean=1.0, low=0.9, high=1.1)])
    assert (found.mean, found.reason) == (1.0, "defined on 1 of 2 seeds")
    assert figures.over_seeds([none, none]).reason == "no gain"


def test_the_mean_over_adapters_covers_the_truth_about_as_often_as_it_says() -> None:
    generator, covered = np.random.default_rng(4), 0
    for _ in range(200):
        each = []
        for true in (0.3, 0.6, 0.9):
            gain = generator.normal(2.0, 0.5, size=64)
            ported = true * gain + generator.normal(0.0, 0.4, size=64)
            table = {"none": scores(np.zeros(64)), "native": scores(gain), "ported": scores(ported)}
            each.append(figures.of_one(table, "ported", figures.recovery, ""))
        found = figures.over_adapters(each, 3)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.6 <= found.high
    assert 180 <= covered < 200


def test_rows_of_one_adapter_share_its_draws() -> None:
    generator = np.random.default_rng(3)
    gain = generator.normal(2.0, 0.5, size=64)
    same = scores(0.5 * gain + generator.normal(0.0, 0.4, size=64))
    table = {"none": scores(np.zeros(64)), "native": scores(gain), "copy": same, "ported": same}
    found = figures.of_one(table, "ported", figures.versus_copy, "")
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)
    one, two = (figures.of_one(table, row, figures.recovery, "") for row in ("copy", "ported"))
    assert one == two


def test_each_adapter_counts_alike_and_those_without_a_figure_are_told() -> None:
    each = [Interval(mean=1.0, low=0.9, high=1.1), Interval(mean=0.0, low=-0.1, high=0.1)]
    assert figures.over_adapters(each, 2).mean == 0.5
    found = figures.over_adapters([*each, Interval(mean=None, low=None, high=None, reason="no gain")], 3)
    assert (found.mean, found.reason) == (0.5, "defined on 2 of 3 adapters")


def test_the_best_copys_strength_is_chosen_on_the_other_half() -> None:
    # On even inputs 0.5 is best, on odd ones 1.0: each half gets what the other wanted.
    even = np.arange(8) % 2 == 0
    found, said = crossed({0.5: scores(np.where(even, 1.0, 0.0)), 1.0: scores(np.where(even, 0.0, 1.0))})
    assert found.task.tolist() == [0.0] * 8
    assert said == {"strength": 0.75}
