"""What the models made is read again by a run of other training settings, and a full disk costs nothing but that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regraft import Adapter, load_adapter, open_base
from regraft.errors import OutputError
from regraft.probes.batches import Batches, TextBatch
from regraft.refine import RefineSettings, kept, refine
from regraft.refine.drawn import PictureBatch
from regraft.refine.kept import inputs_file, read_or_made
from regraft.runtime import load_model
from verify import tiny

QUICK = RefineSettings(steps=2, look=2, n_inputs=16)


@pytest.fixture(scope="module")
def adapter(old: Path, folder: Path) -> Adapter:
    tiny.lora(load_model(old).main, ("q_proj",), size=0.4).save(folder / "adapter")
    return load_adapter(folder / "adapter")


def no_more() -> Batches:
    raise AssertionError("made again")


def made() -> Batches:
    rows = torch.arange(3)
    text = TextBatch({"old": torch.ones(2, 5).long(), "new": torch.zeros(2, 4).long()}, "adapter", True, {"old": rows})
    states = torch.randn(2, 4, 8, 8)
    picture = PictureBatch(("sample", states), torch.tensor([5, 9]), ("a cat", ""), "new", 3, target=-states, left=0.5)
    return Batches((text, picture), (text,), "by hand")


def test_what_is_read_is_what_was_made(tmp_path: Path) -> None:
    first, unkept = read_or_made(tmp_path / "folder" / "inputs.pt", made)
    assert unkept == ""
    again, _ = read_or_made(tmp_path / "folder" / "inputs.pt", no_more)
    assert again.made == first.made
    text, picture = again.fit
    assert isinstance(text, TextBatch)
    assert isinstance(picture, PictureBatch)
    assert text.kept is not None
    assert torch.equal(text.ids["old"], torch.ones(2, 5).long())
    assert torch.equal(text.kept["old"], torch.arange(3))
    assert torch.equal(picture.target, -picture.latents[1])
    assert (picture.prompts, picture.made_by, picture.left) == (("a cat", ""), "new", 0.5)


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    file = tmp_path / "inputs.pt"
    file.write_bytes(b"no inputs")
    assert read_or_made(file, made)[0].made == "by hand"
    assert read_or_made(file, no_more)[0].made == "by hand"


def test_a_full_disk_loses_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OutputError("the disk is full", file=path)

    monkeypatch.setattr(kept, "whole", full)
    found, unkept = read_or_made(tmp_path / "inputs.pt", made)
    assert found.made == "by hand"
    assert "the disk is full" in unkept
    assert not (tmp_path / "inputs.pt").exists()


def test_inputs_depend_on_what_makes_them_and_on_no_training_setting(
    adapter: Adapter, old: Path, drifted: Path
) -> None:
    here, there = open_base(old), open_base(drifted)

    def named(settings: RefineSettings, with_: Adapter = adapter, sampled: bool = False) -> Path:
        return inputs_file(with_, here, there, settings, sampled)

    same = {named(QUICK), named(replace(QUICK, steps=9, rate=1.0, rank=4, retention=0.5, budget=5.0))}
    assert len(same) == 1
    quieter = replace(adapter, updates={ref: update.scaled(0.5) for ref, update in adapter.updates.items()})
    changed = [replace(QUICK, n_inputs=17), replace(QUICK, seed=1), replace(QUICK, filter=0.5)]
    changed += [replace(QUICK, retention=0.0), replace(QUICK, prompts=("a",))]
    others = {named(QUICK, quieter), named(QUICK, sampled=True), *map(named, changed)}
    others.add(inputs_file(adapter, here, here, QUICK, False))
    assert len(others) == 8
    assert not others & same


def test_a_second_run_writes_no_new_texts(
    adapter: Adapter, old: Path, drifted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = open_base(old), open_base(drifted)
    first = refine(adapter, *bases, start=None, settings=QUICK)
    monkeypatch.setattr("regraft.refine.inputs_of", lambda *args, **more: no_more())
    again = refine(adapter, *bases, start=None, settings=replace(QUICK, steps=1, rate=1e-3))
    assert again.report.inputs == first.report.inputs
    assert again.report.looks[0].recovered == first.report.looks[0].recovered
