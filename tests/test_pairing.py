from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regraft import ModuleRef, Settings, open_base, port
from regraft.adapter import MODEL
from regraft.base import Base
from regraft.pairing import monotone_alignment, pair_bases
from regraft.plan import Selection
from toys import StateDict, deltas, drifted, llama, lora, save_base


def without_layers(state: StateDict, removed: set[int]) -> StateDict:
    """The model with whole blocks taken out and the rest numbered anew."""
    kept, out = [i for i in range(10) if i not in removed], {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) in removed:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        out[".".join(parts)] = tensor
    return out


def layer_map(old: StateDict, new: StateDict, tmp_path: Path) -> dict[int, int | None]:
    bases = [open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((old, new))]
    found = {}
    for ref, answer in pair_bases(*bases).counterparts.items():
        if "layers" in ref.path:
            found[int(ref.path.split(".")[2])] = int(answer.module.path.split(".")[2]) if answer.module else None
    return found


def test_blocks_of_another_architecture_answer_to_none(tmp_path: Path) -> None:
    stranger = {name.replace("model.layers.", "encoder.block."): tensor for name, tensor in llama().items()}
    stranger = {name.replace("model.", "encoder."): tensor for name, tensor in stranger.items()}
    assert set(layer_map(llama(), stranger, tmp_path).values()) == {None}


@pytest.mark.parametrize("removed", [{0}, {1, 2}, {0, 2, 4}])
def test_removed_blocks_are_found_by_their_weights(tmp_path: Path, removed: set[int]) -> None:
    old = llama(layers=5)
    kept = [i for i in range(5) if i not in removed]
    expected = {i: kept.index(i) if i in kept else None for i in range(5)}
    assert layer_map(old, drifted(without_layers(old, removed), 0.3), tmp_path) == expected


@pytest.mark.parametrize("removed", [{0}, {1, 2}, {0, 2, 4}])
def test_added_blocks_are_found_by_their_weights(tmp_path: Path, removed: set[int]) -> None:
    new = llama(layers=5)
    kept = [i for i in range(5) if i not in removed]
    assert layer_map(without_layers(new, removed), drifted(new, 0.3), tmp_path) == dict(enumerate(kept))


def test_a_removed_block_is_a_planned_skip_with_its_share_and_reason(tmp_path: Path) -> None:
    state = llama(layers=4)
    adapter = lora(state)
    old = open_base(save_base(state, tmp_path / "old.safetensors"))
    new = open_base(save_base(without_layers(state, {1}), tmp_path / "new.safetensors"))
    report = port(adapter, old, new).report
    skipped = [row for row in report.modules if row.status == "skipped"]
    assert {row.name.split(".")[2] for row in skipped} == {"1"}
    assert all("no counterpart" in row.reason for row in skipped)
    squares = {ref: float(delta.square().sum()) for ref, delta in deltas(adapter).items()}
    lost = sum(square for ref, square in squares.items() if ".1." in ref.path) / sum(squares.values())
    assert report.skipped_share == pytest.approx(lost, rel=1e-4)
    targets = {row.name: row.target for row in report.modules if row.status == "ported"}
    assert targets["model.layers.3.mlp.down_proj"] == "model.layers.2.mlp.down_proj"


def test_a_base_saved_under_another_prefix_is_paired_by_name(tmp_path: Path) -> None:
    state = llama()
    bare = {
        name.removeprefix("model."): tensor for name, tensor in drifted(state, 0.1).items() if "lm_head" not in name
    }
    old = open_base(save_base(state, tmp_path / "old.safetensors"))
    new = open_base(save_base(bare, tmp_path / "new.safetensors"))
    result = port(lora(state), old, new)
    assert result.report.counts.ported == 9
    # The adapter keeps its own spelling: it is loaded on the same class as before.
    assert set(result.adapter.updates) == set(lora(state).updates)


def test_a_component_that_the_new_base_lacks_is_skipped_and_named(tmp_path: Path) -> None:
    from dataclasses import replace

    state = llama()
    adapter = lora(state)
    two = {ModuleRef("unet", ref.path): update for ref, update in adapter.updates.items()}
    two |= {ModuleRef("text_encoder", ref.path): update for ref, update in adapter.updates.items()}
    for component in ("unet", "text_encoder"):
        save_base(state, tmp_path / "old" / component / "model.safetensors")
    save_base(drifted(state, 0.1), tmp_path / "new" / "unet" / "model.safetensors")
    result = port(
        replace(adapter, updates=two, format="diffusers"), open_base(tmp_path / "old"), open_base(tmp_path / "new")
    )
    assert {ref.component for ref in result.adapter.updates} == {"unet"}
    skipped = [row for row in result.report.modules if row.status == "skipped"]
    assert len(skipped) == 9
    assert all(row.reason == "the new base has no text_encoder" for row in skipped)


def test_a_bare_file_of_one_component_takes_that_component_of_an_adapter(tmp_path: Path) -> None:
    from dataclasses import replace

    state = llama()
    adapter = lora(state)
    two = {ModuleRef("unet", ref.path): update for ref, update in adapter.updates.items()}
    two[ModuleRef("text_encoder", "encoder.block.0.q")] = adapter.updates[
        ModuleRef(MODEL, "model.layers.0.self_attn.q_proj")
    ]
    bases = [open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, drifted(state, 0.1)))]
    report = port(replace(adapter, updates=two, format="diffusers"), *bases).report
    assert report.counts.ported == 9
    assert report.counts.skipped == 1


def test_few_modules_of_a_bare_file_are_carried_as_all_are(tmp_path: Path) -> None:
    from dataclasses import replace

    state = llama()
    adapter = lora(state)
    named = {ModuleRef("unet", ref.path): update for ref, update in adapter.updates.items()}
    bases = [open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, drifted(state, 0.1)))]
    few = Settings(selection=Selection(include=("*layers.0.self_attn.q_proj",)))
    report = port(replace(adapter, updates=named, format="diffusers"), *bases, settings=few).report
    assert report.counts.ported == 1
    skipped = {row.reason for row in report.modules if row.status == "skipped"}
    assert skipped == {"left out by --include"}


def test_alignment_is_monotone_and_best() -> None:
    from itertools import combinations

    scores = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    found = monotone_alignment(scores)
    best = max(combinations(range(6), 3), key=lambda columns: sum(float(scores[i, j]) for i, j in enumerate(columns)))
    assert found == list(enumerate(best))
    assert monotone_alignment(scores.T) == [(j, i) for i, j in found]


def test_blocks_of_another_width_are_aligned_by_depth_alone_and_none_of_their_weights_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their corners have one shape from 256 columns on, but nothing in common."""
    read: list[ModuleRef] = []
    monkeypatch.setattr(Base, "corner", lambda self, ref, *_: read.append(ref))
    monkeypatch.setattr(Base, "weight", lambda self, ref: read.append(ref))
    old, new = llama(layers=3, width=272, mlp=264), llama(1, layers=6, width=288, mlp=280)
    found = layer_map(old, new, tmp_path)
    assert read == []
    assert found in ({0: 0, 1: 2, 2: 5}, {0: 0, 1: 3, 2: 5})


def test_depth_alignment_reads_the_corners_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Base, "weight", lambda *_: pytest.fail("a whole weight was read"))
    old = llama(layers=4)
    assert layer_map(old, drifted(without_layers(old, {1}), 0.3), tmp_path) == {0: 0, 1: None, 2: 1, 3: 2}
