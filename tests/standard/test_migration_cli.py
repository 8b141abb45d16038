"""``regraft migration make | show | validate | compose``: thin, but with the right words and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import Run

from regraft import load_migration
from toys import drifted, llama, lora, save_base


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    first = llama(layers=1)
    second = drifted(first, 0.05)
    save_base(first, tmp_path / "v1.safetensors")
    save_base(second, tmp_path / "v2.safetensors")
    save_base(drifted(second, 0.05, seed=3), tmp_path / "v3.safetensors")
    lora(first).save(tmp_path / "lora")
    return tmp_path


def make(run: Run, old: str, new: str, *more: str):
    bases = ("--from", f"{old}.safetensors", "--to", f"{new}.safetensors")
    return run("migration", "make", *bases, "-o", f"{old}-{new}.safetensors", *more)


def test_make_compose_show_and_port(here: Path, run: Run) -> None:
    made = make(run, "v1", "v2", "-m", "copy", "--license", "Apache-2.0", "--json")
    assert made.code == 0
    assert made.record["transports"] == {"identity": 9}
    assert made.record["license"] == "Apache-2.0"
    assert make(run, "v2", "v3", "-m", "lora-x", "--subspace-rank", "4", "--quiet").out == ""
    names = ("v1-v2.safetensors", "v2-v3.safetensors")
    assert run("migration", "compose", *names, "-o", "v1-v3.safetensors").code == 0
    shown = run("migration", "show", "v1-v3.safetensors").out
    assert "v1.safetensors → v3.safetensors, by copy + lora-x" in shown
    assert "composed of 2 migrations" in shown
    assert "license: none stated" in shown
    assert run("port", "lora", "--migration", "v1-v3.safetensors", "-o", "out", "--force").code == 0
    listed = run("migration", "show", ".", "--json").record
    assert [Path(row["file"]).name for row in listed["migrations"]] == [
        "v1-v2.safetensors",
        "v1-v3.safetensors",
        names[1],
    ]
    assert run("migration", "validate", *names, "v1-v3.safetensors", "--json").record["files"][2]["valid"]


def test_a_large_migration_is_warned_of_when_made_and_when_shown(here: Path, run: Run) -> None:
    made = make(run, "v1", "v2", "-m", "prolora")
    assert "above a tenth of the base's size" in made.err
    assert "% of the new base" in made.out
    assert "large: above a tenth" in run("migration", "show", "v1-v2.safetensors").out


def test_full_precision_is_kept_when_asked_for(here: Path, run: Run) -> None:
    assert make(run, "v1", "v2", "-m", "prolora", "--precision", "full", "-q").code == 0
    half = make(run, "v1", "v3", "-m", "prolora", "-q")
    assert half.code == 0
    kinds = [
        {
            map_.left.dtype.itemsize
            for e in load_migration(file).entries.values()
            for term in e.transport.terms
            for map_ in term
        }
        for file in ("v1-v2.safetensors", "v1-v3.safetensors")
    ]
    assert kinds == [{4}, {2}]


def test_migrations_out_of_order_are_refused(here: Path, run: Run) -> None:
    make(run, "v1", "v2")
    make(run, "v2", "v3")
    wrong = run("migration", "compose", "v2-v3.safetensors", "v1-v2.safetensors", "-o", "x.safetensors")
    assert wrong.code == 3
    assert "begins at v1.safetensors" in wrong.err
    assert len(wrong.err.strip().splitlines()) == 1
    assert not Path("x.safetensors").exists()


def test_errors_have_the_codes_of_the_rest(here: Path, run: Run) -> None:
    assert make(run, "v1", "v2", "--precision", "quarter").code == 2
    assert run("migration", "compose", "v1.safetensors", "-o", "x.safetensors").code == 2
    missing = run("migration", "make", "--from", "none.safetensors", "--to", "v2.safetensors", "-o", "x.safetensors")
    assert missing.code == 1
    assert run("migration", "validate", "v1.safetensors").code == 1
    assert "is no migration" in run("migration", "show", "v1.safetensors").err
    make(run, "v1", "v2", "-q")
    again = make(run, "v1", "v2")
    assert (again.code, "exists already" in again.err) == (1, True)
