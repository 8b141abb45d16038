"""Verdicts as tests' results, and the GitHub Action around them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from running import Run

from regraft.report.junit import Case, junit
from regraft.runtime import load_model
from verify import tiny

ACTION = Path(__file__).parents[2] / "integrations" / "github" / "action.yml"


@pytest.fixture(scope="module")
def bases(folder: Path, old: Path, drifted: Path) -> tuple[Path, Path, Path]:
    return old, drifted, tiny.llama(folder / "unrelated", seed=9)


@pytest.fixture(scope="module")
def lora(folder: Path, old: Path) -> Path:
    tiny.lora(load_model(old).main, ("q_proj", "v_proj"), size=1.0).save(folder / "a lora")
    return folder / "a lora"


def test_a_share_is_held_against_the_forecast(run: Run, lora: Path, bases: tuple[Path, Path, Path]) -> None:
    old, drifted, unrelated = bases
    pair = ("--from", old, "--to", drifted)
    forecast = run("check", lora, *pair, "--json").record["forecast"]["port"]["recovery"]
    assert 0 < forecast < 1
    assert run("check", lora, *pair, "--fail-under", f"{forecast - 0.01}").code == 0
    below = run("check", lora, *pair, "--fail-under", f"{forecast + 0.01}")
    assert (below.code, f"the forecast recovery is {forecast:.2f}" in below.err) == (3, True)
    assert run("check", lora, "--from", old, "--to", unrelated, "--fail-under", "0").code == 3
    for wrong in ("1.5", "-0.1", "nan"):
        assert run("check", lora, *pair, f"--fail-under={wrong}").code == 2


def test_the_verdict_is_a_tests_result(run: Run, lora: Path, bases: tuple[Path, Path, Path], tmp_path: Path) -> None:
    old, _, unrelated = bases
    for target, failures in ((old, "0"), (unrelated, "1")):
        file = tmp_path / f"{failures}.xml"
        result = run("check", lora, "--from", old, "--to", target, "--fail-under", "refine", "--junit", file)
        assert result.code == (3 if failures == "1" else 0)
        suite = ElementTree.parse(file).getroot()[0]
        assert (suite.get("tests"), suite.get("failures")) == ("1", failures)
        assert suite[0].get("name") == str(lora)
        assert (suite[0].find("failure") is not None) is (failures == "1")
    again = run("check", lora, "--from", old, "--to", old, "--junit", tmp_path / "0.xml")
    assert (again.code, "exists already" in again.err) == (1, True)


def test_hostile_names_stay_text() -> None:
    name = 'x"><failure/>\x00\x1b[31m\ud800 & <b>'
    root = ElementTree.fromstring(
        junit(name, [Case(name, name), Case("b", name, failure=name)]).encode("utf-8", "replace")
    )
    assert [case.find("failure") is not None for case in root[0]] == [False, True]
    assert '"><failure/>' in str(root[0][0].get("name"))


def test_the_action_checks_each_adapter_and_fails_for_one(
    lora: Path, bases: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    old, _, unrelated = bases
    step = yaml.safe_load(ACTION.read_text(encoding="utf-8"))["runs"]["steps"][-1]
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "regraft").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m regraft "$@"\n')
    (tools / "regraft").chmod(0o755)
    for target, code in ((old, 0), (unrelated, 1)):
        env = {
            **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "ADAPTERS": f"{lora.parent}/a*\n", "FROM": str(old),
            "TO": str(target), "FAIL_UNDER": "refine", "OPTIONS": "--quiet", "JUNIT": str(tmp_path / f"results {code}"),
        }  # fmt: skip
        done = subprocess.run(["bash", "-c", step["run"]], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert (tmp_path / f"results {code}" / "1.xml").is_file()
        assert ("::error" in done.stdout) is (code == 1)
    env |= {"ADAPTERS": str(tmp_path / "none*")}
    done = subprocess.run(["bash", "-c", step["run"]], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, "no adapter at" in done.stdout) == (1, True)


@pytest.mark.parametrize("install", ["", "regraft[run]==0.1.0 s3fs"])
def test_the_action_installs_its_own_checkout_or_what_is_asked_for(install: str, tmp_path: Path) -> None:
    action = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
    assert action["inputs"]["install"]["default"] == ""
    step = action["runs"]["steps"][0]
    assert step["if"] == "inputs.install != 'none'"
    # A pip that tells what it is to install. A file that the brackets would match as a pattern lies there.
    (tmp_path / "regraftr==0.1.0").touch()
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "INSTALL": install, "GITHUB_ACTION_PATH": str(ACTION.parent)}
    done = subprocess.run(
        ["bash", "-euc", step["run"]], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    pip, named = done.stdout.splitlines()[:3], done.stdout.splitlines()[3:]
    assert pip == ["-m", "pip", "install"]
    if install:
        assert named == install.split()
    else:
        (place,) = named
        assert 'name = "regraft"' in (Path(place) / "pyproject.toml").read_text(encoding="utf-8")
