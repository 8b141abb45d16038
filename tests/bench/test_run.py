"""The grid: every cell once, none twice, none half; an error is a cell, and the figures are those known by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toyworld

from regraft.bench import run
from regraft.bench.cells import Cell, read
from regraft.bench.controls import CONTROLS, FEW
from regraft.bench.group import Group
from regraft.bench.results import assemble, kept, load, save
from regraft.bench.variants import Variant, default_variants, parse_variants
from regraft.errors import UsageError
from regraft.methods import methods
from regraft.report.bench_schema import BenchPair, BenchReport, BenchRow

METHODS = ("auto", "lora-x half rank", "procrustes")


def pair(record: BenchReport, name: str) -> BenchPair:
    return next(pair for pair in record.pairs if pair.name == name)


def row(record: BenchReport, name: str, of: str = "toy-near") -> BenchRow:
    return next(row for row in pair(record, of).rows if row.name == name)


def written(cache: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in cache.rglob("cells/**/*.json") if file.name != "group.json"}


def test_what_is_known_by_hand_comes_out(toy_record: BenchReport) -> None:
    for name, wanted in {
        "none": 0.0,
        "empty": 0.0,
        "native": 1.0,
        "copy": toyworld.COPY,
        "auto": toyworld.COPY,
    }.items():
        assert row(toy_record, name).recovery.mean == pytest.approx(wanted, abs=1e-3), name
    assert row(toy_record, "best copy").recovery.mean == pytest.approx(toyworld.BEST, abs=1e-3)
    assert pair(toy_record, "toy-near").adapters[0].rows[2].figures == {"strength": 0.85}
    assert row(toy_record, "copy").retention.mean == pytest.approx(0.5, abs=1e-3)
    assert row(toy_record, "native").retention.mean == pytest.approx(1 - toyworld.WANTED / 2, abs=1e-3)


def test_random_updates_recover_nothing(toy_record: BenchReport) -> None:
    found = row(toy_record, "random").recovery.mean
    assert found is not None
    assert found < 0.1


def test_the_reverted_target_wins_the_task_and_loses_the_upgrade(toy_record: BenchReport) -> None:
    found = row(toy_record, "reverted")
    assert found.teacher_share.mean == 1.0
    assert found.retention.mean == 0.0


def test_what_a_method_loses_to_the_copy_is_seen(toy_record: BenchReport) -> None:
    lost = row(toy_record, "lora-x half rank").versus_copy
    assert lost.high is not None
    assert lost.high < 0
    assert row(toy_record, "copy").versus_copy.mean == 0.0


def test_a_refused_port_is_forced_and_said_to_be_refused(toy_record: BenchReport) -> None:
    found = row(toy_record, "auto", "toy-far")
    assert found.refused
    assert found.recovery.mean is not None
    assert not row(toy_record, "auto").refused
    assert pair(toy_record, "toy-far").adapters[0].check.verdict == "refused"


def test_what_cannot_be_carried_is_told_as_text(toy_record: BenchReport) -> None:
    found = row(toy_record, "copy", "toy-far")
    assert found.missing
    assert "no module is left to carry" in found.errors[0]


def test_errors_name_no_folder_of_this_machine(toy_cache: Path, toy_record: BenchReport) -> None:
    assert str(toy_cache) not in toy_record.to_json()


def test_seconds_memory_and_energy_are_told(toy_record: BenchReport) -> None:
    found = row(toy_record, "copy")
    assert found.seconds is not None
    assert found.energy_kept == 1.0
    assert found.effect_cosine is not None
    assert found.effect_cosine.mean == pytest.approx(1.0, abs=0.05)


def test_resumed_runs_make_no_cell_twice(toy_cache: Path) -> None:
    before = written(toy_cache)
    wanted = run.targets(toy_cache, pairs=["toy-near"], worlds=toyworld.FACTORY)
    run.run_grid(wanted, parse_variants(METHODS), toy_cache, jobs=0, resume=True)
    assert written(toy_cache) == before


def test_a_killed_run_loses_at_most_the_cell_it_was_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = run.targets(tmp_path, ["toy-near"], ["one"], [0], worlds=toyworld.FACTORY)
    whole, calls = run.write, 0

    def killed(content: Any, file: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        whole(content, file)

    monkeypatch.setattr(run, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run.run_grid(target, [], tmp_path, jobs=0)
    kept = written(tmp_path)
    assert len(kept) == 3
    monkeypatch.setattr(run, "write", whole)
    run.run_grid(target, [], tmp_path, jobs=0, resume=True)
    after = written(tmp_path)
    assert len(after) == 1 + len(CONTROLS)
    assert all(after[file] == time for file, time in kept.items())


def test_with_few_controls_the_shares_are_the_same(toy_cache: Path, toy_record: BenchReport) -> None:
    wanted = run.targets(toy_cache, worlds=toyworld.FACTORY)
    few = assemble(wanted, parse_variants(METHODS), toy_cache, command="", date="2026-11-25", controls=FEW)
    (pair, *_), (whole, *_) = few.pairs, toy_record.pairs
    assert [row.name for row in pair.rows] == ["none", "copy", "reverted", "native", *METHODS]
    shares = {row.name: row.recovery for row in whole.rows}
    assert all(row.recovery == shares[row.name] for row in pair.rows)
    assert not few.missing


def test_few_controls_are_all_that_is_measured_and_none_of_the_others_is_missed(tmp_path: Path) -> None:
    target, *others = run.targets(tmp_path, worlds=toyworld.FACTORY)
    given = {"command": "", "date": "2026-11-25"}
    copy = parse_variants(["copy"])
    run.run_grid([target], copy, tmp_path, jobs=0, controls=FEW)
    names = {cell.row for file in (tmp_path / "cells").rglob("*.json") if (cell := read(file, Cell)) and cell.task}
    assert names == set(FEW)
    few = assemble([target], copy, tmp_path, controls=FEW, **given)
    run.run_grid(others, copy, tmp_path, jobs=0)
    whole = assemble(others, copy, tmp_path, **given)
    assert not kept(whole, few, run.known_pairs(tmp_path, toyworld.FACTORY)).missing


def test_half_a_cell_counts_as_none(toy_cache: Path) -> None:
    target = run.targets(toy_cache, ["toy-near"], ["one"], [0], worlds=toyworld.FACTORY)[0]
    shelf = run.stored(target, toy_cache)
    assert shelf is not None
    file = shelf.file("none")
    text = file.read_text(encoding="utf-8")
    file.write_text(text[: len(text) // 2], encoding="utf-8")
    assert shelf.read("none") is None
    run.run_grid([target], parse_variants(METHODS), toy_cache, jobs=0, resume=True)
    assert json.loads(file.read_text(encoding="utf-8"))["task"] == json.loads(text)["task"]


def test_a_method_that_breaks_is_a_cell_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = run.targets(tmp_path, ["toy-near"], ["one"], [0], worlds=toyworld.FACTORY)
    sound = Group.method

    def broken(self: Group, variant: Variant) -> Cell:
        if variant.method == "procrustes":
            raise ZeroDivisionError("division by zero")
        return sound(self, variant)

    variants = parse_variants(["procrustes", "auto"])
    monkeypatch.setattr(Group, "method", broken)
    run.run_grid(target, variants, tmp_path, jobs=0)
    record = assemble(target, variants, tmp_path, command="", date="")
    assert row(record, "procrustes").errors == ["ZeroDivisionError: division by zero"]
    assert row(record, "auto").recovery.mean is not None
    monkeypatch.setattr(Group, "method", sound)
    run.run_grid(target, variants, tmp_path, jobs=0, resume=True)
    assert row(assemble(target, variants, tmp_path, command="", date=""), "procrustes").errors == []


def test_a_world_that_breaks_leaves_its_group_out_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burnt(self: toyworld.ToyWorld, pair: str, name: str, seed: int) -> Path:
        if name == "one":
            raise OSError("no space left on device")
        return self._lora(pair, name, seed, toyworld.WANTED)

    monkeypatch.setattr(toyworld.ToyWorld, "native", burnt)
    wanted = run.targets(tmp_path, ["toy-near"], (), [0], worlds=toyworld.FACTORY)
    run.run_grid(wanted, [], tmp_path, jobs=0)
    assert "no space left" in (tmp_path / "bench.log").read_text(encoding="utf-8")
    record = assemble(wanted, [], tmp_path, command="", date="")
    assert [adapter.name for adapter in record.pairs[0].adapters] == ["two"]
    assert record.missing == len(CONTROLS)


def test_the_record_is_the_same_each_time_and_reads_back(
    toy_cache: Path, toy_record: BenchReport, tmp_path: Path
) -> None:
    wanted = run.targets(toy_cache, worlds=toyworld.FACTORY)
    again = assemble(wanted, parse_variants(METHODS), toy_cache, command="regraft bench", date="2026-11-25")
    save(toy_record, tmp_path / "one.json")
    save(again, tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert load(tmp_path / "one.json") == toy_record


def test_seeds_are_pooled_and_told_apart(toy_record: BenchReport) -> None:
    one = pair(toy_record, "toy-near").adapters[0]
    assert one.seeds == [0, 1]
    assert [seed.rows[1].recovery.mean for seed in one.by_seed] == pytest.approx([toyworld.COPY] * 2, abs=1e-3)
    assert pair(toy_record, "toy-far").adapters[0].by_seed == []


def test_a_changed_adapter_is_another_cell(toy_cache: Path) -> None:
    target = run.targets(toy_cache, ["toy-near"], ["one"], [0], worlds=toyworld.FACTORY)[0]
    shelf = run.stored(target, toy_cache)
    assert shelf is not None
    shelf.content["adapter"] = "another"
    assert shelf.read("none") is None


def test_what_is_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no pair is named 'toy-neer'"):
        run.targets(tmp_path, ["toy-neer"], worlds=toyworld.FACTORY)
    with pytest.raises(UsageError, match="no option"):
        parse_variants(["copy pull=1"])
    with pytest.raises(UsageError, match="no method"):
        parse_variants(["magic"])


def test_pairs_can_be_asked_for_by_their_world_and_seeds_of_tuning_by_number(tmp_path: Path) -> None:
    wanted = run.targets(tmp_path, ["language"], ["two"], [100], worlds=toyworld.FACTORY)
    assert [(target.spec.name, target.seed) for target in wanted] == [("toy-near", 100)]


def test_options_are_read_from_a_variants_name() -> None:
    (found,) = parse_variants(["lora-x subspace-rank=0.25 rank=full"])
    assert (found.method, dict(found.options), found.rank) == ("lora-x", {"subspace_rank": 0.25}, "full")


def test_by_default_every_method_of_the_tier_is_measured() -> None:
    names = {variant.method for variant in default_variants()} | {"copy"}
    assert names >= {
        name for name, method in methods().items() if method.tier == "port" and "adapters" not in method.needs
    }


@pytest.mark.slow
def test_processes_fill_the_same_cells_as_one_does(tmp_path: Path, toy_cache: Path) -> None:
    wanted = run.targets(tmp_path, worlds=toyworld.FACTORY)
    run.run_grid(wanted, parse_variants(METHODS), tmp_path, jobs=2)
    one, two = (
        {
            file.relative_to(cache / "cells"): json.loads(file.read_bytes()).get("task")
            for file in map(Path, written(cache))
        }
        for cache in (toy_cache, tmp_path)
    )
    assert {str(file): task for file, task in one.items()} == {str(file): task for file, task in two.items()}
