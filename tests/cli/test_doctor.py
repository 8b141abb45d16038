from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest
import torch
from running import Run

from regraft import doctor as module
from regraft.report.doctor_schema import DoctorReport
from regraft.report.json_schema import parse


def test_it_tells_what_is_here(run: Run) -> None:
    result = run("doctor", "--json")
    assert result.code == 0, result.err
    record = parse(DoctorReport, result.out)
    assert record.torch == torch.__version__
    versions = {package.name: package.version for package in record.packages}
    assert versions["peft"] == metadata.version("peft")
    assert record.devices[0].name == "cpu"
    assert 0 < record.free_mb <= record.memory_mb
    told = {verb.verb: verb.missing for verb in record.verbs}
    assert told["refine"] == []


def test_what_a_verb_lacks_is_told_with_the_command_that_gets_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without(name: str) -> Any:
        if name in ("peft", "gguf"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(module.metadata, "version", without)
    record = run("doctor", "--json").record
    told = {verb["verb"]: verb for verb in record["verbs"]}
    assert told["refine"]["missing"] == ["peft"]
    assert told["refine"]["get"] == ["pip install 'regraft[run]'"]
    assert "auto chooses by weights" in told["port"]["part"]
    printed = run("doctor").out
    assert "refine lacks peft" in printed
    assert "pip install 'regraft[run]'" in printed
    assert "every verb has what it needs" not in printed
    assert run("doctor", "--quiet").out == ""


def test_every_verb_that_is_named_is_one() -> None:
    from regraft.cli import VERBS

    assert {verb.split()[0] for verb in module._NEEDS} <= set(VERBS)
