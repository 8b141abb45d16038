"""What a diffusion model predicts: the noise, v, or the flow; and whether it was trained with zero terminal SNR.

Two bases of one architecture may differ in it. No weight shows that, and a port between them looks broken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from regraft.errors import InputError, reading
from regraft.families import get_family
from regraft.tensor_files import read_safetensors

Kind = Literal["epsilon", "v", "flow", "sample"]

_WORDS: dict[str, Kind] = {
    "epsilon": "epsilon",
    "v": "v",
    "v_prediction": "v",
    "flow": "flow",
    "flow_prediction": "flow",
    "sample": "sample",
}
_TITLES = {"epsilon": "the noise", "v": "v", "flow": "the flow", "sample": "the sample itself"}


@dataclass(frozen=True)
class Prediction:
    """What a model predicts.

    Attributes:
        kind: ``epsilon`` (the noise), ``v`` (Salimans & Ho 2022), ``flow``, or ``sample``.
        zero_terminal_snr: whether its noise schedule ends in pure noise (Lin et al. 2024); None where it is not said.
        usual: known from the family alone, fine-tunes of which may predict otherwise.
    """

    kind: Kind
    zero_terminal_snr: bool | None = None
    usual: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        snr = ", with zero terminal SNR" if self.zero_terminal_snr else ""
        return f"{_TITLES[self.kind]}{snr}{', as its family usually does' if self.usual else ''}"


def of_scheduler(config: Mapping[str, Any]) -> Prediction | None:
    """What a ``scheduler_config.json`` of diffusers says; None where it says nothing.

    A class for flow matching predicts the flow whatever its ``prediction_type``; `DDPMScheduler` and its kin predict
    the noise where the setting is left out, as in diffusers.
    """
    name = str(config.get("_class_name", ""))
    if "FlowMatch" in name or config.get("use_flow_sigmas"):
        return Prediction("flow")
    kind = _WORDS.get(str(config.get("prediction_type", "epsilon")))
    if kind is None or not (name or "prediction_type" in config):
        return None
    return Prediction(kind, bool(config.get("rescale_betas_zero_snr", False)))


def of_metadata(metadata: Mapping[str, str]) -> Prediction | None:
    """What a safetensors header says: ``modelspec.*`` of a checkpoint or adapter, ``ss_*`` of sd-scripts; else None."""
    kind = _WORDS.get(metadata.get("modelspec.prediction_type", "").lower().replace("-", "_"))
    versions = (metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "").partition("/")[0])
    if kind is None and (versions[0].endswith("_v") or versions[1].endswith("-v")):
        kind = "v"
    if kind is None:
        return None
    zero = metadata.get("ss_zero_terminal_snr")
    return Prediction(kind, None if zero is None else zero == "True")


def of_names(names: Iterable[str]) -> Prediction | None:
    """What the marks among a checkpoint's tensors say: ``v_pred`` and ``ztsnr``, as ComfyUI reads them (NoobAI)."""
    marks = {name for name in names if name in ("v_pred", "ztsnr")}
    return Prediction("v", "ztsnr" in marks) if "v_pred" in marks else None


def of_family(name: str | None) -> Prediction | None:
    """What models of a family predict where all do; None where they differ (Stable Diffusion 2) or none is known."""
    family = get_family(name)
    kind = _WORDS.get(str(family.data.get("predicts", ""))) if family else None
    return Prediction(kind, usual=True) if kind else None


def of_base(path: str | Path, family: str | None = None) -> Prediction | None:
    """What a base on disk predicts: by its scheduler, its file's header, else its family.

    Args:
        path: a folder of diffusers, or a single file.
        family: as `family_of_base` tells it.

    Raises:
        InputError: the scheduler's config is damaged.
    """
    path = Path(path)
    scheduler = path / "scheduler" / "scheduler_config.json"
    found: Prediction | None = None
    if scheduler.is_file():
        with reading(scheduler):
            config = json.loads(scheduler.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise InputError("a scheduler's config is an object of settings", file=scheduler)
        found = of_scheduler(config)
    elif path.suffix.lower() == ".safetensors" and path.is_file():
        file = read_safetensors(path)
        found = of_names(file.tensors) or of_metadata(file.metadata)
    return found or of_family(family)


def warnings_of(old: Prediction | None, new: Prediction | None) -> list[str]:
    """Why a port between two bases may look broken; empty where they predict alike, or it isn't known."""
    if old is None or new is None:
        return []
    if old.kind != new.kind:
        return [
            f"the old base predicts {old}; the new one predicts {new}: an update has another effect there, and the "
            "result may look broken though all weights fit"
        ]
    if old.zero_terminal_snr is not None and new.zero_terminal_snr is not None:
        if old.zero_terminal_snr and not new.zero_terminal_snr:
            return [
                "the old base was trained with zero terminal SNR, the new one not: very dark and bright pictures change"
            ]
        if new.zero_terminal_snr and not old.zero_terminal_snr:
            return [
                "the new base was trained with zero terminal SNR, the old one not: very dark and bright pictures change"
            ]
    return []
