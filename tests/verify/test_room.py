"""What does not fit into memory is told before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regraft import InputError, open_base
from regraft.runtime import load_model, room
from regraft.runtime.both import BothModels
from regraft.training import TrainSettings, train
from verify import tiny


def test_the_need_is_that_of_the_loaded_weights(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    held = sum(p.numel() * p.element_size() for p in load_model(base).main.parameters())
    assert room.needed([open_base(base)]) == held


def test_half_precision_on_disk_counts_as_what_it_is_loaded_as(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    load_model(base).main.to(torch.float16).save_pretrained(tmp_path / "half")
    assert room.needed([open_base(tmp_path / "half")]) == room.needed([open_base(base)])


def test_bases_that_do_not_fit_are_told_with_their_sizes_and_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (open_base(tiny.llama(tmp_path / name)) for name in ("old", "new"))
    monkeypatch.setattr("regraft.runtime.both.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(room, "free_bytes", lambda device: room.needed([old, new]) // 2)
    with pytest.raises(InputError, match="free on cpu"):
        BothModels.load(old, new)


def test_a_base_to_be_trained_on_in_half_precision_needs_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.llama(tmp_path / "base")
    tiny.write_tokenizer(base)
    (tmp_path / "a.txt").write_text("the rain is in the river")
    opened = open_base(base)
    monkeypatch.setattr(room, "free_bytes", lambda device: int(0.8 * room.needed([opened])))
    settings = TrainSettings(steps=1, rank=2)
    with pytest.raises(InputError, match=r"of memory, and .* free on cpu.*--dtype bfloat16"):
        train(tmp_path / "a.txt", opened, tmp_path / "whole", settings)
    train(tmp_path / "a.txt", opened, tmp_path / "half", replace(settings, dtype="bfloat16"))
