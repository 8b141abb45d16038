"""The bench of `regraft batch`: its arithmetic, what it goes on from, and the page that it writes."""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tools.bench_batch import __main__ as bench
from tools.bench_batch.library import MIXED, make_small
from tools.bench_batch.measure import phases
from tools.bench_batch.on_paper import Measured, measured, on_paper
from tools.bench_batch.page import BEGIN, END, page

from regraft import load_adapter

ROOT = Path(__file__).parents[2]


def done(seconds: float, rows_seconds: float, **more: Any) -> dict[str, Any]:
    """A run's figures."""
    plain = {"start_up_seconds": 3.0, "fit_seconds": 2.0, "closing_seconds": 1.0, "closing_mb": 10.0}
    plain |= {"worker_mb_own": 90, "driver_mb_own": 300, "driver_ms_a_row": 1.0, "driver_kb_a_row": 2.0}
    plain |= {"kills": 0, "begun_again": 0, "given_up": 0, "rows": 4, "keys": 4}
    return {**plain, "content": "x", "seconds": seconds, "rows_seconds": rows_seconds, **more}


def library(count: int = 4, **two: Any) -> dict[str, Any]:
    """A library's record with both plain runs."""
    found = {"adapters": count, "floor": {"seconds": 2.0, "mb_read": 8.0, "mb_written": 12.0}}
    for part, figures in (("workers_1", done(40.0, 30.0)), ("workers_2", done(25.0, 16.0, **two))):
        found[part] = {**figures, **bench.rates(count, figures)}
    return found


def test_a_run_falls_into_its_phases() -> None:
    # 5 s of start, 7 of fit; the first row takes 2, is done at 14, and the last at 50.
    told = phases(100.0, 114.0, 150.0, 153.0, fit=7.0, first=2.0)
    assert told == {
        **{"seconds": 53.0, "start_up_seconds": 5.0, "fit_seconds": 7.0},
        **{"rows_seconds": 38.0, "closing_seconds": 3.0},
    }


def test_efficiency_and_the_floor_are_told_both_ways() -> None:
    told = bench.compared(library())
    assert told["efficiency_2_workers"] == {"over_all": 0.8, "of_rows": 0.938}
    assert told["times_the_floor"]["workers_1"] == {"over_all": 20.0, "of_rows": 15.0}
    one = bench.compared({name: part for name, part in library().items() if name != "workers_2"})
    assert set(one) == {"times_the_floor"}


@pytest.mark.parametrize(
    ("killed", "verdict"),
    [
        ({"kills": 2}, True),
        ({"kills": 0}, None),
        ({"kills": 2, "content": "other"}, False),
        ({"kills": 2, "keys": 3}, False),
        ({"kills": 2, "rows": 5}, False),
        ({"kills": 2, "given_up": 1}, False),
    ],
)
def test_without_a_kill_nothing_is_claimed(killed: dict[str, Any], verdict: bool | None) -> None:
    assert bench.verdict(done(20.0, 12.0, **killed), library()) is verdict


def test_workers_are_killed_within_the_time_that_a_small_library_takes() -> None:
    assert bench.interval({"rows_seconds": 30.0}, None) == 6
    assert bench.interval({"rows_seconds": 1000.0}, None) == 20
    assert bench.interval({"rows_seconds": 30.0}, 2.5) == 2.5


def test_a_million_on_paper() -> None:
    # 100 workers at 3.6 s an adapter: a million take 10 h; then a minute of start, 9 of fit, and 50 of tables.
    found = Measured(3.6, 2.0, 4.0, start_up_seconds=60, fit_seconds=540, driver_ms=1, closing_ms=3, driver_kb=5)
    told = on_paper(found, adapters=1_000_000, machines=50, workers=2)
    assert told["wall_hours"] == 11
    assert told["machine_hours"] == 550
    assert told["bound_by"] == "workers"
    # 20,000 adapters of 6 MB each on a machine within 36,000 s.
    assert told["mb_a_second_of_a_machine"] == pytest.approx(120_000 / 36_000, abs=0.01)
    assert told["driver_gb"] == 5
    # With 5,000 workers they would take 12 minutes, and a driver that notes one a millisecond 17.
    many = on_paper(found, adapters=1_000_000, machines=50, workers=100, pairs=2)
    assert many["bound_by"] == "driver"
    assert many["wall_hours"] == pytest.approx((60 + 2 * 540 + 1000 + 3000) / 3600, abs=1e-3)


def test_what_tables_take_for_a_row_is_the_slope_between_two_libraries() -> None:
    large, small = library(104, closing_seconds=3.0, closing_mb=30.0, driver_ms_a_row=0.5), library(4)
    found = measured(small, large)
    assert (found.worker_seconds, found.mb_read, found.mb_written) == (8.0, 2.0, 3.0)
    assert (found.driver_ms, found.closing_ms) == (0.5, pytest.approx(20.0))
    assert found.driver_kb == pytest.approx(2 + 200)
    assert measured(small).closing_ms == 250
    assert measured(small, library(4, closing_seconds=3.0)) == measured(small)


def test_the_small_library_is_of_every_format_and_kind(tmp_path: Path) -> None:
    _, loras = make_small(tmp_path, len(MIXED))
    read = [load_adapter(file) for file in sorted(loras.iterdir())]
    kinds = [next(iter(adapter.updates.values())).kind for adapter in read]
    assert kinds == [kind for _, kind in MIXED]
    assert any(adapter.format == "peft" for adapter in read)
    assert len({adapter.format for adapter in read}) >= 5


def test_a_part_that_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = argparse.Namespace(
        cache=tmp_path, out=tmp_path / "batch.json", kill_every=None, adapters=4, full_size=0, page=None
    )
    record: dict[str, Any] = {"reduced": library()}
    ran: list[str] = []

    def measure_part(part: str, *_: Any) -> dict[str, Any]:
        (tmp_path / "out").mkdir(exist_ok=True)
        ran.append(part)
        return {part: done(30.0, 20.0)}

    monkeypatch.setattr(bench, "measure_part", measure_part)

    def make(place: Path, count: int) -> Any:
        return ((place, place), place)

    bench.measure_library(record, "reduced", 4, make, asked)
    assert ran == ["killed"]
    assert json.loads(asked.out.read_text(encoding="utf-8"))["reduced"]["killed"]["seconds"] == 30
    bench.measure_library(record, "reduced", 4, make, asked)
    assert ran == ["killed"]
    # Another number of adapters is another library.
    monkeypatch.setattr(bench, "compared", lambda found: {})
    monkeypatch.setattr(bench, "write", lambda record, asked: None)
    bench.measure_library(record, "reduced", 5, make, asked)
    assert ran == ["killed", *bench.PARTS]


def test_parts_keep_the_date_and_the_version_that_they_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a record from before each had its own, they are the record's."""
    out = tmp_path / "batch.json"
    asked = argparse.Namespace(cache=tmp_path, out=out, kill_every=None, adapters=4, full_size=0, page=None)
    first = {"reduced": library(), "date": "2026-01-02", "regraft_version": "0.0.1"}

    def measure_part(part: str, *_: Any) -> dict[str, Any]:
        (tmp_path / "out").mkdir(exist_ok=True)
        return {part: {**done(30.0, 20.0), "every_s": 6.0, "nothing_lost_nothing_twice": True}}

    monkeypatch.setattr(bench, "measure_part", measure_part)
    monkeypatch.setattr(bench, "__version__", "0.0.2")
    bench.measure_library(first, "reduced", 4, lambda place, count: ((place, place), place), asked)
    record = json.loads(out.read_text(encoding="utf-8"))
    today = date.today().isoformat()
    told = {part: (record["reduced"][part]["date"], record["reduced"][part]["regraft_version"]) for part in bench.PARTS}
    before, now = ("2026-01-02", "0.0.1"), (today, "0.0.2")
    assert told == {"workers_1": before, "workers_2": before, "killed": now}
    assert (record["date"], record["regraft_version"]) == now
    assert f"2026-01-02, regraft 0.0.1; {today}, regraft 0.0.2." in page(f"{BEGIN}{END}", record)


def test_two_libraries_of_one_size_are_written(tmp_path: Path) -> None:
    asked = argparse.Namespace(out=tmp_path / "batch.json", adapters=4, full_size=4, kill_every=None)
    bench.write({"reduced": library(), "full_size": library()}, asked)
    assert "on_paper" in json.loads(asked.out.read_text(encoding="utf-8"))


def test_the_page_says_what_was_given_up_and_what_was_not_tested() -> None:
    machine = {"processor": "x", "cores": 2, "python": "3", "torch": "2"}
    record = {"machine": machine, "command": "c", "date": "d", "on_paper": [on_paper(measured(library()), workers=2)]}
    found = library()
    found |= bench.compared(found)
    none = {**done(30.0, 20.0), "every_s": 6.0, "nothing_lost_nothing_twice": None}
    marked = f"before\n{BEGIN}{END}\nafter\n"
    text = page(marked, {**record, "reduced": {**found, "killed": none}})
    assert "nothing was tested" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    some = {**none, "kills": 3, "given_up": 1, "nothing_lost_nothing_twice": False}
    assert "3 killed, 0 rows begun again, 1 given up" in page(marked, {**record, "reduced": {**found, "killed": some}})


def test_the_committed_page_is_that_of_the_committed_record() -> None:
    file, text = ROOT / "results" / "batch.json", (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    assert BEGIN in text
    assert END in text
    if not file.exists():
        pytest.skip("no results in this checkout")
    assert page(text, json.loads(file.read_text(encoding="utf-8"))) == text
