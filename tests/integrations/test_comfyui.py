"""ComfyUI's nodes against what the host expects of a node, with a stub of the host."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui_package import imported
from safetensors.torch import load_file

import regraft
from regraft.runtime import load_model
from verify import tiny


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's folders and the few functions that the nodes call, as its own loaders call them."""
    for kind in ("loras", "checkpoints", "diffusion_models"):
        (tmp_path / kind).mkdir()
    folders = ModuleType("folder_paths")

    def names(kind: str) -> list[str]:
        return sorted(str(file.relative_to(tmp_path / kind)) for file in (tmp_path / kind).rglob("*.safetensors"))

    def full(kind: str, name: str) -> str | None:
        return str(tmp_path / kind / name) if (tmp_path / kind / name).is_file() else None

    folders.get_filename_list, folders.get_full_path = names, full  # type: ignore[attr-defined]
    folders.get_folder_paths = lambda kind: [str(tmp_path / kind)]  # type: ignore[attr-defined]
    utils, sd = ModuleType("comfy.utils"), ModuleType("comfy.sd")

    def load_torch_file(path: str, safe_load: bool = False) -> Any:
        assert safe_load
        return load_file(path)

    def load_lora_for_models(model: Any, clip: Any, lora: Any, strength_model: float, strength_clip: float) -> Any:
        return ("model", model, lora, strength_model), ("clip", clip, lora, strength_clip)

    utils.load_torch_file, sd.load_lora_for_models = load_torch_file, load_lora_for_models  # type: ignore[attr-defined]
    for name, module in {"folder_paths": folders, "comfy.utils": utils, "comfy.sd": sd}.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name, drift in (("old", 0.0), ("new", 0.02)):
        unet = tiny.pipeline(tmp_path / name, drift=drift) / "unet" / "diffusion_pytorch_model.safetensors"
        (tmp_path / "diffusion_models" / f"{name}.safetensors").write_bytes(unet.read_bytes())
    other = tiny.pipeline(tmp_path / "other", seed=9) / "unet" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "checkpoints" / "other.safetensors").write_bytes(other.read_bytes())
    model = load_model(tmp_path / "old").main
    tiny.lora({"unet": model}, ("to_q", "to_v"), size=1.0).save(tmp_path / "loras" / "my.safetensors", format="kohya")
    return tmp_path


@pytest.fixture
def package(host: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported(monkeypatch)


def _arguments(node: Any, **given: Any) -> dict[str, Any]:
    """What the host hands over: the inputs' defaults, and what is connected."""
    asked = node.INPUT_TYPES()
    found: dict[str, Any] = {}
    for name, (kind, *options) in {**asked["required"], **asked.get("optional", {})}.items():
        if name in given:
            found[name] = given[name]
        elif isinstance(kind, list):
            found[name] = kind[0]
        elif options and "default" in options[0]:
            found[name] = options[0]["default"]
    return found


def test_each_node_is_what_the_host_takes_for_one(package: ModuleType) -> None:
    assert package.NODE_CLASS_MAPPINGS.keys() == package.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in package.NODE_CLASS_MAPPINGS.values():
        asked = node.INPUT_TYPES()
        assert asked.keys() <= {"required", "optional", "hidden"}
        for part in asked.values():
            assert all(isinstance(entry, tuple) and isinstance(entry[0], str | list) for entry in part.values())
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        assert callable(getattr(node(), node.FUNCTION))
        assert isinstance(node.CATEGORY, str)
    asked = package.NODE_CLASS_MAPPINGS["RegraftPortLora"].INPUT_TYPES()["required"]
    assert asked["lora"][0] == ["my.safetensors"]
    assert asked["old_base"][0] == ["other.safetensors", "new.safetensors", "old.safetensors"]
    assert asked["method"][0][0] == "auto"
    assert "effect" not in asked["method"][0]


def test_a_lora_is_ported_once_and_applied(package: ModuleType, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = package.NODE_CLASS_MAPPINGS["RegraftPortLora"]
    given = _arguments(
        node,
        model="m",
        clip="c",
        old_base="old.safetensors",
        new_base="new.safetensors",
        method="lora-x",
        strength_clip=0.5,
    )
    model, clip, file, report = getattr(node(), node.FUNCTION)(**given)
    assert (model[1], model[3], clip[1], clip[3]) == ("m", 1.0, "c", 0.5)
    bases = [regraft.open_base(host / "diffusion_models" / f"{name}.safetensors") for name in ("old", "new")]
    names = {component: tuple(bases[0].modules(component)) for component in bases[0].components}
    source = regraft.load_adapter(host / "loras" / "my.safetensors", names=names)
    wanted = regraft.port(source, *bases, "lora-x").adapter
    wanted.save(host / "wanted.safetensors")
    expected = load_file(host / "wanted.safetensors")
    assert model[2].keys() == expected.keys()
    assert all(torch.equal(model[2][name], expected[name]) for name in expected)
    assert Path(file).parent == host / "loras" / "regraft"
    assert "ported" in report
    monkeypatch.setattr(regraft, "port", None)
    assert getattr(node(), node.FUNCTION)(**given)[2:] == (file, report)
    without = _arguments(node, **{**given, "clip": None})
    text = getattr(node(), node.FUNCTION)(**without)[1]
    assert (text[1], text[3]) == (None, 0.0)


def test_what_changes_a_result_changes_the_stamp(package: ModuleType, host: Path) -> None:
    node = package.NODE_CLASS_MAPPINGS["RegraftPortLora"]
    given = {"lora": "my.safetensors", "old_base": "old.safetensors", "new_base": "new.safetensors"}
    before = node.IS_CHANGED(**given, method="copy", model="m")
    assert node.IS_CHANGED(**given, method="copy", model="m") == before
    (host / "loras" / "my.safetensors").touch()
    assert node.IS_CHANGED(**given, method="copy", model="m") != before


def test_refusals_and_lost_files_are_the_hosts_message(package: ModuleType, host: Path) -> None:
    node = package.NODE_CLASS_MAPPINGS["RegraftPortLora"]
    given = _arguments(node, model="m", old_base="old.safetensors", new_base="other.safetensors", method="auto")
    with pytest.raises(RuntimeError, match=r"unrelated|refused|survive"):
        getattr(node(), node.FUNCTION)(**given)
    assert not list((host / "loras").rglob("regraft/*"))
    assert getattr(node(), node.FUNCTION)(**{**given, "force": True})[2].endswith(".safetensors")
    with pytest.raises(RuntimeError, match=r"gone\.safetensors is not there"):
        getattr(node(), node.FUNCTION)(**{**given, "lora": "gone.safetensors"})


def test_a_check_shows_its_verdict(package: ModuleType) -> None:
    node = package.NODE_CLASS_MAPPINGS["RegraftCheckLora"]
    for new, verdict in (("old.safetensors", "survives"), ("other.safetensors", "refused")):
        given = _arguments(node, old_base="old.safetensors", new_base=new)
        shown = getattr(node(), node.FUNCTION)(**given)
        said, recovery, report = shown["result"]
        assert said == verdict
        assert shown["ui"]["text"] == [report]
        assert 0 <= recovery <= 1
