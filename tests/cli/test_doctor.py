from __future__ import annotations

from importlib import metadata
from pathlib import Path
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


def test_a_token_for_the_hub_is_there_or_not_and_never_shown(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    without = run("doctor")
    assert "token not set" in without.out
    assert "hf auth login" in " ".join(without.out.split())
    assert run("doctor", "--json").record["hub_token"] is False
    secret = "hf_averysecrettoken"
    (tmp_path / "token").write_text(secret, encoding="utf-8")
    for told in (run("doctor"), run("doctor", "--json")):
        assert secret not in told.out + told.err
    assert "token set" in run("doctor").out
    (tmp_path / "token").unlink()
    monkeypatch.setenv("HF_TOKEN", secret)
    told = run("doctor", "--json")
    assert told.record["hub_token"] is True
    assert secret not in told.out + told.err


@pytest.mark.parametrize(("package", "scheme", "other"), [("s3fs", "s3://", "gs://"), ("gcsfs", "gs://", "s3://")])
def test_stores_need_packages_of_their_own(
    package: str, scheme: str, other: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if everything but one were there.
    monkeypatch.setattr(module, "_version", lambda name: None if name == package else "1")
    told = {verb["verb"]: verb for verb in run("doctor", "--json").record["verbs"]}
    assert (told[f"batch {scheme}"]["missing"], told[f"batch {scheme}"]["get"]) == (
        [package],
        [f"pip install {package}"],
    )
    assert (told[f"batch {other}"]["missing"], told["batch"]["missing"]) == ([], [])
    assert f"batch {scheme} lacks {package}" in run("doctor").out


def test_every_verb_that_is_named_is_one() -> None:
    from regraft.cli import VERBS

    assert {verb.split()[0] for verb in module._NEEDS} <= set(VERBS)
