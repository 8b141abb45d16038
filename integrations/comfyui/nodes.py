"""Port and check a LoRA in a workflow. What the host offers is imported where it is used."""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import regraft
from regraft.filehash import file_hashes
from regraft.methods import methods
from regraft.methods.task import Running
from regraft.pairing import names_of

CATEGORY = "loaders/regraft"
#: Of the host's folders, those that hold bases.
BASES = ("checkpoints", "diffusion_models")
# Those that go by weights alone: whole checkpoints can't be run outside of the host. The first is the default.
_METHODS = ["auto", *(name for name, method in methods().items() if name != "auto" and not method.runs)]


def _names(*kinds: str) -> list[str]:
    folders = import_module("folder_paths")
    return list(dict.fromkeys(name for kind in kinds for name in folders.get_filename_list(kind)))


def _path(name: str, *kinds: str) -> Path:
    folders = import_module("folder_paths")
    found = next((path for kind in kinds if (path := folders.get_full_path(kind, name)) is not None), None)
    if found is None:
        raise RuntimeError(f"{name} is not there any more")
    return Path(found)


def _inputs() -> dict[str, Any]:
    return {
        "lora": (_names("loras"),),
        "old_base": (_names(*BASES), {"tooltip": "The base that the LoRA was trained on."}),
        "new_base": (_names(*BASES), {"tooltip": "The base that it is to run on."}),
    }


def _stamp(*files: Path) -> str:
    """What changes when one of the files does."""
    return json.dumps([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files])


class PortLora:
    """Applies a LoRA of another base to this one, ported; the ported file stays beside the host's other LoRAs."""

    CATEGORY, FUNCTION = CATEGORY, "run"
    RETURN_TYPES = ("MODEL", "CLIP", "STRING", "STRING")
    RETURN_NAMES = ("model", "clip", "file", "report")
    DESCRIPTION = "Carries a LoRA over from the base that it was trained on, and applies it."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01})
        return {
            "required": {
                "model": ("MODEL",),
                **_inputs(),
                "method": (_METHODS,),
                "strength_model": strength,
                "strength_clip": strength,
            },
            "optional": {
                "clip": ("CLIP",),
                "force": ("BOOLEAN", {"default": False, "tooltip": "Port against a refusal."}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, lora: str, old_base: str, new_base: str, **_: Any) -> str:
        return _stamp(_path(lora, "loras"), _path(old_base, *BASES), _path(new_base, *BASES))

    def run(
        self,
        model: Any,
        lora: str,
        old_base: str,
        new_base: str,
        method: str,
        strength_model: float,
        strength_clip: float,
        clip: Any = None,
        force: bool = False,
    ) -> tuple[Any, Any, str, str]:
        """Port unless it was done before, and apply.

        Raises:
            RuntimeError: it was refused, or a file can't be used; the host shows the line.
        """
        source = _path(lora, "loras")
        try:
            file, report = ported(source, _path(old_base, *BASES), _path(new_base, *BASES), method, force=force)
        except regraft.RegraftError as error:
            raise RuntimeError(str(error)) from error
        tensors = import_module("comfy.utils").load_torch_file(str(file), safe_load=True)
        changed, text = import_module("comfy.sd").load_lora_for_models(
            model, clip, tensors, strength_model, strength_clip if clip is not None else 0.0
        )
        return changed, text, str(file), report


class CheckLora:
    """Says whether a LoRA would survive the move, before anything is ported."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "run", True
    RETURN_TYPES = ("STRING", "FLOAT", "STRING")
    RETURN_NAMES = ("verdict", "recovery", "report")
    DESCRIPTION = "Forecasts what would survive of a LoRA on another base."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": _inputs(), "optional": {"deep": ("BOOLEAN", {"default": False})}}

    @classmethod
    def IS_CHANGED(cls, lora: str, old_base: str, new_base: str, **_: Any) -> str:
        return _stamp(_path(lora, "loras"), _path(old_base, *BASES), _path(new_base, *BASES))

    def run(self, lora: str, old_base: str, new_base: str, deep: bool = False) -> dict[str, Any]:
        """Check.

        Raises:
            RuntimeError: a file can't be used; the host shows the line.
        """
        try:
            old, new = (regraft.open_base(_path(name, *BASES)) for name in (old_base, new_base))
            adapter = regraft.load_adapter(_path(lora, "loras"), names=names_of(old))
            record = regraft.check(adapter, old, new, deep=deep)
        except regraft.RegraftError as error:
            raise RuntimeError(str(error)) from error
        forecast = record.forecast.port
        said = "\n".join([record.summary, *record.reasons, *record.warnings])
        recovery = float("nan") if forecast is None else forecast.recovery
        return {"ui": {"text": [said]}, "result": (record.verdict, recovery, said)}


def ported(source: Path, old: Path, new: Path, method: str, *, force: bool) -> tuple[Path, str]:
    """The ported file of these contents, made unless it is there, and what is said of it.

    Args:
        source: of the LoRA.
        old: the base that it was trained on.
        new: the base that it is to run on.
        method: of `regraft.port`.
        force: port against a refusal.

    Raises:
        RegraftError: it was refused, or a file can't be used.
    """
    first, second = regraft.open_base(old), regraft.open_base(new)
    content = [file_hashes(source).sha256, str(first.prints), str(second.prints), method, force, regraft.__version__]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    folder = Path(import_module("folder_paths").get_folder_paths("loras")[0]) / "regraft"
    file = folder / f"{source.stem}-{new.stem}-{digest}.safetensors"
    beside = file.with_suffix(".txt")
    if file.is_file() and beside.is_file():
        return file, beside.read_text(encoding="utf-8")
    adapter = regraft.load_adapter(source, names=names_of(first))
    result = regraft.port(
        adapter, first, second, method, settings=regraft.Settings(force=force, running=Running(weights_only=True))
    )
    said = "\n".join([result.report.summary, *result.report.reasons])
    folder.mkdir(parents=True, exist_ok=True)
    result.save(file, overwrite=True)
    beside.write_text(said, encoding="utf-8")
    return file, said


NODE_CLASS_MAPPINGS = {"RegraftPortLora": PortLora, "RegraftCheckLora": CheckLora}
NODE_DISPLAY_NAME_MAPPINGS = {"RegraftPortLora": "Port LoRA (regraft)", "RegraftCheckLora": "Check LoRA (regraft)"}
