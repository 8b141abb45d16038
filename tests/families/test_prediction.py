"""What a base predicts is read from where tools write it, and a check warns where it differs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from regraft.adapter import Adapter
from regraft.base import open_base
from regraft.check import check
from regraft.errors import InputError
from regraft.prediction import Prediction, of_base, of_family, of_metadata, of_names, of_scheduler, warnings_of
from regraft.report.html import render_check
from regraft.report.tables import check_table
from toys import llama, lora

V_ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("scheduler", "settings", "predicts"),
    [
        ("DDPMScheduler", {}, Prediction("epsilon", False)),
        ("DDIMScheduler", V_ZERO, Prediction("v", True)),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, Prediction("v", False)),
        ("PNDMScheduler", {}, Prediction("epsilon", False)),
        (
            "UniPCMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
            Prediction("flow"),
        ),
        ("FlowMatchEulerDiscreteScheduler", {}, Prediction("flow")),
        ("CogVideoXDPMScheduler", V_ZERO, Prediction("v", True)),
    ],
)
def test_a_real_schedulers_config_says_what_its_model_predicts(
    scheduler: str, settings: dict[str, Any], predicts: Prediction
) -> None:
    config = dict(getattr(diffusers, scheduler)(**settings).config)
    assert of_scheduler({"_class_name": scheduler, **config}) == predicts


@pytest.mark.parametrize(
    ("metadata", "predicts"),
    [
        ({"modelspec.prediction_type": "epsilon"}, Prediction("epsilon")),
        ({"modelspec.prediction_type": "v"}, Prediction("v")),
        ({"ss_base_model_version": "sd_v2_v", "ss_zero_terminal_snr": "True"}, Prediction("v", True)),
        ({"ss_base_model_version": "sd_v2_v", "ss_zero_terminal_snr": "False"}, Prediction("v", False)),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, Prediction("v")),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, None),
        ({}, None),
    ],
)
def test_metadata_of_trainers_says_what_they_trained(metadata: dict[str, str], predicts: Prediction | None) -> None:
    assert of_metadata(metadata) == predicts


def test_marks_among_the_tensors_say_so_too() -> None:
    assert of_names(["v_pred", "ztsnr", "x"]) == Prediction("v", True)
    assert of_names(["v_pred"]) == Prediction("v", False)
    assert of_names(["x"]) is None


def test_families_that_all_predict_alike_are_known_by_name() -> None:
    kinds = {
        name: of_family(name) for name in ("sd15", "flux", "wan22", "cogvideox-5b", "sd2", "noobai", "llama", None)
    }
    assert {name: found.kind if found else None for name, found in kinds.items()} == {
        "sd15": "epsilon",
        "flux": "flow",
        "wan22": "flow",
        "cogvideox-5b": "v",
        "sd2": None,
        "noobai": None,
        "llama": None,
        None: None,
    }


def folder(path: Path, settings: dict[str, Any]) -> Path:
    for part in ("unet", "scheduler"):
        (path / part).mkdir(parents=True)
    save_file(llama(), path / "unet" / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "DDIMScheduler", **settings}
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return path


def test_a_base_is_read_by_its_scheduler_its_marks_or_its_family(tmp_path: Path) -> None:
    assert of_base(folder(tmp_path / "a", V_ZERO), "sd15") == Prediction("v", True)
    save_file({"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, tmp_path / "noob.safetensors")
    assert of_base(tmp_path / "noob.safetensors", "sdxl") == Prediction("v", True)
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors", {"modelspec.prediction_type": "v"})
    assert of_base(tmp_path / "plain.safetensors", "sdxl") == Prediction("v")
    save_file({"x": torch.zeros(1)}, tmp_path / "mute.safetensors")
    assert of_base(tmp_path / "mute.safetensors", "sdxl") == Prediction("epsilon")
    (tmp_path / "a" / "scheduler" / "scheduler_config.json").write_text("[]")
    with pytest.raises(InputError, match="object of settings"):
        of_base(tmp_path / "a")


def test_only_a_difference_that_is_known_warns() -> None:
    epsilon, v, flow = Prediction("epsilon", False), Prediction("v", True), Prediction("flow")
    assert warnings_of(epsilon, epsilon) == []
    assert warnings_of(None, v) == []
    assert warnings_of(flow, flow) == []
    assert warnings_of(Prediction("v"), v) == []
    assert "predicts the noise, the new one v, with zero terminal SNR" in warnings_of(epsilon, v)[0]
    assert (
        "new base was trained with zero terminal SNR"
        in warnings_of(Prediction("epsilon", False), Prediction("epsilon", True))[0]
    )


def test_a_check_warns_where_the_bases_predict_otherwise(tmp_path: Path) -> None:
    old, new = open_base(folder(tmp_path / "old", {})), open_base(folder(tmp_path / "new", V_ZERO))
    report = check(lora(llama()), old, new)
    assert len(report.warnings) == 1
    assert "the old base predicts the noise, the new one v" in report.warnings[0]
    console = Console(width=300, file=io.StringIO(), record=True)
    check_table(report, console)
    assert "warning: the old base predicts the noise" in console.export_text()
    assert "the old base predicts the noise" in render_check(report)
    assert check(lora(llama()), old, old).warnings == []


def test_the_adapters_own_metadata_stand_in_for_a_base_that_is_not_at_hand(tmp_path: Path) -> None:
    new = open_base(folder(tmp_path / "new", {}))
    plain = lora(llama())
    trained = Adapter(**{**vars(plain), "metadata": {"modelspec.prediction_type": "v"}})
    assert "the old base predicts v, the new one the noise" in check(trained, None, new).warnings[0]
    assert check(plain, None, new).warnings == []
