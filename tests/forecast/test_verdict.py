"""What a forecast says of itself, and the third stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regraft import check, load_adapter, open_base
from regraft.demo import data_folder
from regraft.forecast import FLOOR
from regraft.forecast.calibration import shipped
from regraft.forecast.probing import linear_cka
from regraft.methods.task import Running
from regraft.runtime import load_model
from toys import drifted, llama, lora, rotation, save_base
from verify import tiny


def checked(tmp_path: Path, drift: float):
    state = llama()
    old = open_base(save_base(state, tmp_path / "o.safetensors"))
    return check(lora(state), old, open_base(save_base(drifted(state, drift), tmp_path / "n.safetensors")))


def test_equal_bases_are_forecast_to_keep_all(tmp_path: Path) -> None:
    port = checked(tmp_path, 0.0).forecast.port
    assert port.recovery == pytest.approx(1.0, abs=1e-3)
    assert port.low > 0.8


def test_the_record_says_what_the_forecast_rests_on(tmp_path: Path) -> None:
    report = checked(tmp_path, 0.1)
    assert report.forecast.port.basis == "weights"
    assert report.forecast.port.pairs == shipped().fits["auto", "weights"].pairs
    said = f"it rests on {report.forecast.port.adapters} adapters on {report.forecast.port.pairs} pairs of bases"
    assert any(said in reason for reason in report.reasons)


def test_a_forecast_lies_in_its_interval_and_falls_with_drift(tmp_path: Path) -> None:
    found = [checked(tmp_path / str(d), d).forecast.port for d in (0.02, 0.1, 0.4, 3.0)]
    assert all(f.low <= f.recovery <= f.high for f in found)
    assert [f.recovery for f in found] == sorted((f.recovery for f in found), reverse=True)


def test_a_refusal_is_an_interval_below_the_floor(tmp_path: Path) -> None:
    refused, kept = checked(tmp_path / "far", 30.0), checked(tmp_path / "near", 0.4)
    assert (refused.verdict, refused.forecast.port.high < FLOOR) == ("refused", True)
    assert (kept.verdict, kept.forecast.port.high < FLOOR) == ("refine", False)
    assert any("bridge" in reason or "--method" in reason for reason in refused.reasons)


def test_cka_sees_through_a_rotation_and_no_further() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(400, 24, generator=generator) for _ in range(2))
    assert linear_cka(x, 3 * x @ rotation(24, 1) + 2) == pytest.approx(1.0, abs=1e-5)
    assert linear_cka(x, y) < 0.15
    assert linear_cka(x, torch.ones(400, 3)) is None


@pytest.mark.slow
def test_the_third_stage_runs_both_models() -> None:
    data = data_folder()
    style, old = load_adapter(data / "loras" / "style-v1.safetensors"), open_base(data / "v1")
    same = check(style, old, old, probe=Running(n_inputs=4)).forecast.port
    assert same.basis == "activations"
    assert same.recovery == pytest.approx(1.0, abs=1e-3)


def test_the_advice_from_afar_is_a_refine_within_a_family_and_a_bridge_beyond(tmp_path: Path) -> None:
    old = tiny.llama(tmp_path / "old")
    unrelated, other = tiny.llama(tmp_path / "unrelated", seed=9), tiny.pipeline(tmp_path / "sd")
    adapter = tiny.lora(load_model(old).main, ("q_proj",), size=0.5)
    afar = check(adapter, open_base(old), open_base(unrelated))
    assert (afar.verdict, afar.tier) == ("refused", "refine")
    drawing = tiny.lora({"unet": load_model(other).main}, ("to_q",), size=0.5)
    beyond = check(drawing, open_base(other), open_base(old))
    assert (beyond.verdict, beyond.tier) == ("refused", "bridge")
