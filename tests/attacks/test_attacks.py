"""Every hostile or broken file is told in one line that names it; nothing runs, nothing is left behind."""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from attack_cases import CASES, MODULE, NAME, Case, good
from running import Ran, Run
from safetensors.torch import save_file

if os.name != "posix":
    pytest.skip("pipes, links and devices are part of the cases", allow_module_level=True)
for _name in sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py")):
    importlib.import_module(_name)

# What a terminal would obey.
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bases")
    generator = torch.Generator().manual_seed(0)
    names = [MODULE, MODULE.replace("to_q", "to_k"), MODULE.replace("attn1", "attn2")]
    old = {f"{name}.weight": torch.randn(8, 8, generator=generator) for name in names}
    save_file(old, place / "old.safetensors")
    save_file(
        {name: w + 0.01 * torch.randn(8, 8, generator=generator) for name, w in old.items()}, place / "new.safetensors"
    )
    save_file(good(), place / NAME)
    return place


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    # A folder that nobody may read would stay for pytest to stumble over.
    shutil.rmtree(tmp_path, ignore_errors=True)


def arguments(case: Case, verb: str, opened: str, bases: Path) -> list[str]:
    """The command of a verb on a case's file."""
    old, new, adapter = str(bases / "old.safetensors"), str(bases / "new.safetensors"), opened
    if case.role == "base":
        adapter, new = str(bases / NAME), opened
    if case.role == "migration":
        pair = ["--migration", opened]
        adapter = str(bases / NAME)
    else:
        pair = ["--from", old, "--to", new]
    return {
        "inspect": ["inspect", opened],
        "check": ["check", adapter, *pair],
        "port": ["port", adapter, *pair, "-o", "ported.out"],
        "convert": ["convert", adapter, "-o", "converted.safetensors", "--format", "diffusers"],
    }[verb]


def listed(place: Path) -> set[Path]:
    return {path for path in place.rglob("*") if not path.is_symlink()}


def told(ran: Ran, case: Case) -> None:
    """One line on stderr, with everything in it that a user needs; nothing on stdout."""
    assert ran.code == case.code, ran.err or ran.out
    assert ran.out == ""
    assert ran.err.startswith("regraft: ")
    assert ran.err.endswith("\n")
    assert ran.err.count("\n") == 1, ran.err
    assert not RAW.search(ran.err.removesuffix("\n"))
    assert re.search(case.says, ran.err), ran.err
    # What to do next follows what is wrong.
    assert re.search(r"[.?] [A-Z`-].+[.?…]$", ran.err.strip()), f"no remedy: {ran.err}"
    assert len(ran.err) < 2500


@pytest.mark.parametrize("name", CASES)
def test_it_is_told_in_one_line_and_nothing_is_written(name: str, here: Path, bases: Path, run: Run) -> None:
    case = CASES[name]
    opened = case.build(here)
    before = listed(here)
    for verb in case.verbs:
        told(run(*arguments(case, verb, opened, bases)), case)
        assert listed(here) == before, f"{verb} left something behind"
    for verb in case.fine:
        ran = run(*arguments(case, verb, opened, bases))
        assert (ran.code, ran.err) == (0, ""), ran.err
        assert ran.out
        assert not RAW.search(ran.out.replace("\n", ""))
    assert not (here / "exploded").exists(), "code of the file has run"


def test_there_are_150_kinds_at_least() -> None:
    assert len(CASES) >= 150
