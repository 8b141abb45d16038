"""With little memory the two bases take turns on the device, and the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest

from regraft import open_base
from regraft.probes.batches import make_batches
from regraft.refine.aims import aims_of
from regraft.refine.bottleneck import load_bottlenecks, refine_bottlenecks
from regraft.refine.pictures import picture_inputs
from regraft.refine.settings import RefineSettings
from regraft.refine.virtual import load_soft_prompt, refine_soft_prompt
from regraft.runtime import load_model
from regraft.runtime.both import BothModels
from regraft.runtime.load import Loaded
from verify import tiny


def watched(monkeypatch: pytest.MonkeyPatch, models: BothModels) -> list[str]:
    """Notes each move, and fails where a model runs that is not on the device, or while the other is there, too."""
    place = {"old": "cpu", "new": "cpu"}
    moves: list[str] = []

    def move(self: Loaded, device: str) -> None:
        side = "old" if self is models.old else "new"
        if place[side] != device:
            moves.append(f"{side} to {device}")
        place[side] = device

    def alone(side: str) -> Callable[..., None]:
        def check(*_: Any, **__: Any) -> None:
            other = "new" if side == "old" else "old"
            assert (place[side], place[other]) == ("device", "cpu")

        return check

    monkeypatch.setattr(Loaded, "to", move)
    for side in ("old", "new"):
        for part in models.side("old" if side == "old" else "new").components.values():
            part.register_forward_pre_hook(alone(side))
    return moves


def test_a_language_model_runs_alone_on_the_device(old: Path, drifted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = BothModels(load_model(old), load_model(drifted), turns="device")
    adapter = tiny.lora(models.old.main, ("q_proj", "v_proj"), size=0.5)
    moves = watched(monkeypatch, models)
    inputs = make_batches(models, adapter, 8)
    aims_of(models, adapter, inputs.fit, 1.0)
    # For the inputs, and then for what both say of them.
    assert [move.removesuffix(" to device") for move in moves if "cpu" not in move] == ["old", "new", "old", "new"]


def test_a_pipeline_runs_alone_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = tiny.pipeline(tmp_path / "old"), tiny.pipeline(tmp_path / "new", drift=0.2)
    models = BothModels(*map(load_model, folders), turns="device")
    adapter = tiny.lora({"unet": models.old.main}, ("to_q",), size=0.5)
    watched(monkeypatch, models)
    inputs = picture_inputs(models, adapter, 24, 0, ("a", "b"), kept=True)
    aims_of(models, adapter, (*inputs.fit, *inputs.held_out), 0.0)


def test_a_soft_prompt_is_taught_in_turns(
    old: Path, drifted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompted = peft.get_peft_model(
        load_model(old).main, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    prompted.prompt_encoder["default"].embedding.weight.data.normal_()
    prompted.save_pretrained(tmp_path / "prompt")
    models = BothModels(load_model(old), load_model(drifted), turns="device")
    monkeypatch.setattr(BothModels, "load", lambda *args, **more: models)
    moves = watched(monkeypatch, models)
    settings = RefineSettings(steps=1, n_inputs=8, low_memory=True)
    refine_soft_prompt(load_soft_prompt(tmp_path / "prompt"), open_base(old), open_base(drifted), settings=settings)
    assert moves[-1] == "new to device"


def test_bottlenecks_are_taught_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Path(__file__).parents[1] / "data" / "adapterhub"
    models = BothModels(load_model(hub / "llama"), load_model(hub / "llama"), turns="device")
    monkeypatch.setattr(BothModels, "load", lambda *args, **more: models)
    moves = watched(monkeypatch, models)
    settings = RefineSettings(steps=1, n_inputs=8, low_memory=True)
    refine_bottlenecks(
        load_bottlenecks(hub / "pfeiffer"), open_base(hub / "llama"), open_base(hub / "llama"), settings=settings
    )
    assert moves[-1] == "new to device"


def test_on_the_machines_own_memory_there_is_nothing_to_move(old: Path, drifted: Path) -> None:
    assert BothModels.load(open_base(old), open_base(drifted), in_turns=True).turns is None
