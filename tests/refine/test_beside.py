"""A refine is held against the new base alone, a plain copy and its start, all on the same held-out inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from regraft import Adapter, InputError, load_adapter, open_base
from regraft.adapter import ModuleRef
from regraft.refine import RefineResult, RefineSettings, refine
from regraft.refine.beside import rows
from regraft.refine.loop import Course, Look
from regraft.report.refine_schema import Refined
from regraft.runtime import load_model
from verify import tiny

QUICK = RefineSettings(steps=4, look=2, n_inputs=16)


@pytest.fixture(scope="module")
def new(folder: Path) -> Path:
    return tiny.llama(folder / "new", drift=0.4)


@pytest.fixture(scope="module")
def adapter(old: Path, folder: Path) -> Adapter:
    made = tiny.lora(load_model(old).main, ("q_proj", "v_proj", "down_proj"), size=0.3)
    made.save(folder / "adapter")
    return load_adapter(folder / "adapter")


@pytest.fixture(scope="module")
def result(adapter: Adapter, old: Path, new: Path) -> RefineResult:
    # A start that is a copy in all but its name: `copy` and the start must then come to the same figure.
    from regraft import port

    start = port(adapter, open_base(old), open_base(new), "copy").adapter
    return refine(adapter, open_base(old), open_base(new), start=start, settings=QUICK)


def test_none_copy_start_and_refined_stand_in_this_order(result: RefineResult) -> None:
    titles = [row.title for row in result.report.beside]
    assert titles == ["none", "copy", result.report.start, "refined"]


def test_the_copy_is_measured_as_the_start_is(result: RefineResult) -> None:
    _, copy, start, _ = result.report.beside
    assert copy.recovered == pytest.approx(start.recovered, abs=1e-4)
    assert copy.drift == pytest.approx(start.drift, abs=1e-4)


def test_every_row_has_its_drift_on_the_new_bases_own_inputs(result: RefineResult) -> None:
    none, copy, start, refined = result.report.beside
    # Wanted there is the new base with the adapter's own change, which is the unit: without it, all of it is missing.
    assert none.drift == pytest.approx(1.0)
    assert copy.drift is not None
    assert start.drift == result.report.looks[0].drift
    assert refined.drift in {look.drift for look in result.report.looks}


def test_a_native_adapter_stands_beside_the_refined_one(adapter: Adapter, old: Path, new: Path, folder: Path) -> None:
    model = load_model(new).main
    tiny.lora(model, ("q_proj", "v_proj"), size=0.3).save(folder / "native")
    native = load_adapter(folder / "native")
    found = refine(adapter, open_base(old), open_base(new), start="zero", settings=QUICK, native=native).report
    assert [row.title for row in found.beside] == ["none", "copy", "zero", "refined", "native"]
    # Random updates of another draw: they don't make what is wanted.
    assert found.beside[-1].recovered < 0.5
    nowhere = replace(native, updates={ModuleRef("model", "no.such.module"): next(iter(native.updates.values()))})
    with pytest.raises(InputError, match="changes no module of the new base"):
        refine(adapter, open_base(old), open_base(new), start="zero", settings=QUICK, native=nowhere)


def test_a_start_that_is_the_copy_is_told_once() -> None:
    course = Course([Look(0, 0.4, None, 1.0), Look(8, 0.1, None, 2.0)])
    none, copy = Refined(title="none", recovered=0.0), Refined(title="copy", recovered=0.6)
    assert [row.title for row in rows("copy", course, none, copy)] == ["none", "copy", "refined"]
    assert [row.title for row in rows("stream", course, none, copy)] == ["none", "copy", "stream", "refined"]
    assert [row.title for row in rows("stream", course, none, None)] == ["none", "stream", "refined"]
    assert rows("stream", course, none, None)[-1].recovered == pytest.approx(0.9)
