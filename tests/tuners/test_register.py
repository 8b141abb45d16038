"""PEFT knows the tuners once they are imported, and regraft itself imports none of it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from regraft import InputError
from regraft.tuners import FouraConfig, FouraModel, LoraXConfig, LoraXModel, SvdiffConfig, SvdiffModel
from regraft.tuners._register import check_version, peft_type, register

TUNERS = {
    "LORAX": (LoraXConfig, LoraXModel),
    "SVDIFF": (SvdiffConfig, SvdiffModel),
    "FOURA": (FouraConfig, FouraModel),
}


@pytest.mark.parametrize("name", TUNERS)
def test_peft_knows_them(name: str) -> None:
    config, model = TUNERS[name]
    member = PeftType(name)
    assert member is PeftType[name] is getattr(PeftType, name) is config(target_modules=["x"]).peft_type
    assert member in list(PeftType)
    assert (member.value, member.name) == (name, name)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[name] is config
    assert PEFT_TYPE_TO_TUNER_MAPPING[name] is model
    assert PEFT_TYPE_TO_PREFIX_MAPPING[name] == model.prefix


def test_registering_again_changes_nothing() -> None:
    register("LORAX", LoraXConfig, LoraXModel)
    assert peft_type("LORAX") is PeftType.LORAX
    assert list(PeftType).count(PeftType.LORAX) == 1


@pytest.mark.parametrize("version", ["0.20.4", "0.9.0"])
def test_an_older_peft_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(InputError, match=f"need peft 0.21.2 or later, and {version} is installed"):
        check_version()


def test_no_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError("peft")

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InputError, match="which is not installed"):
        check_version()


def test_importing_regraft_imports_no_peft() -> None:
    code = "import sys, regraft; sys.exit('peft' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
