"""`refine` as a row of the grid: its options are its settings, and its cell tells start, objective and cost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toyworld

from regraft.bench import refined
from regraft.bench.results import assemble
from regraft.bench.run import run_grid, targets
from regraft.bench.sources import source_of
from regraft.bench.variants import Variant, parse_variants
from regraft.errors import UsageError
from regraft.refine import RefineSettings
from regraft.report.bench_schema import BenchRow

ASKED = "refine start=copy steps=20 n_inputs=16 retention=0"


def test_a_refine_is_written_out_as_methods_are() -> None:
    wanted = Variant(ASKED, "refine", {"start": "copy", "steps": 20, "retention": 0}, n_inputs=16)
    assert parse_variants([ASKED]) == [wanted]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("refine pace=3", "no option pace"),
        ("refine seed=3", "no option seed"),
        ("refine objective=best", "takes no objective=best"),
        ("refine steps=many", "takes no steps=many"),
        ("refine start=nowhere", "nowhere"),
        ("refine mapper=m.safetensors", "--mapper is a bridge's"),
    ],
)
def test_what_a_refine_does_not_take_is_told(asked: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_variants([asked])


def test_its_settings_are_of_their_own_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path and a list come as text and JSON."""

    class Done(Exception):
        pass

    def asked_for(*_: Any, settings: RefineSettings, start: str, **__: Any) -> None:
        assert (settings.mapper, settings.targets, start) == (Path("m.safetensors"), ("*q", "*v"), "zero")
        assert (settings.guidance, settings.bridge_start, settings.seed) == (2.0, 0.6, 4)
        raise Done

    monkeypatch.setattr(refined, "refine", asked_for)
    (variant,) = parse_variants(
        ['refine start=zero teacher=bridge mapper=m.safetensors targets=["*q","*v"] guidance=2 bridge-start=0.6']
    )
    group: Any = SimpleNamespace(inputs={}, seed=4, adapter=None, old=None, new=None)
    with pytest.raises(Done):
        refined.refined(group, variant)


def test_its_source_is_its_own_and_that_of_every_start() -> None:
    assert source_of("refine") not in {source_of("auto"), source_of("copy")}


def test_its_cell_tells_start_objective_and_cost(tmp_path: Path) -> None:
    variants = parse_variants([ASKED])
    wanted = targets(tmp_path, ["toy-near"], ["one"], [0], worlds=toyworld.FACTORY)
    run_grid(wanted, variants, tmp_path, jobs=0)
    rows = assemble(wanted, variants, tmp_path, command="", date="").pairs[0].adapters[0].rows
    found: dict[str, BenchRow] = {row.name: row for row in rows}
    row = found[ASKED]
    assert not row.errors
    assert row.used == "copy, output"
    assert row.figures["steps_made"] == 20
    assert row.figures["inputs"] >= 8
    assert row.figures["of_what_is_wanted"] >= row.figures["start_had"]
    assert row.seconds is not None
    # The teacher's own change is what it is taught, and that change at full strength is the copy.
    assert row.recovery.mean == pytest.approx(toyworld.COPY, abs=0.1)
