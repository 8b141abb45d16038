"""Hidden states as a further aim: read after paired blocks, mapped where widths or coordinates differ, and learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import Run
from torch import Tensor

from regraft import Adapter, UsageError, load_adapter, open_base
from regraft.lineage import lineage_of
from regraft.probes.batches import make_batches
from regraft.refine import RefineSettings, refine
from regraft.refine.aims import Aim, aims_of
from regraft.refine.hidden import paired_blocks, spread, with_hidden
from regraft.refine.states import picked, watching
from regraft.runtime import Loaded, applied, load_model
from regraft.runtime.both import BothModels
from verify import tiny

ROLES = ("q_proj", "v_proj", "down_proj")
QUICK = RefineSettings(steps=24, look=8, n_inputs=16, rate=5e-3)


@pytest.fixture(scope="module")
def new(folder: Path) -> Path:
    return tiny.llama(folder / "new", drift=0.2)


@pytest.fixture(scope="module")
def adapter(old: Path, folder: Path) -> Adapter:
    tiny.lora(load_model(old).main, ROLES, size=0.3).save(folder / "adapter")
    return load_adapter(folder / "adapter")


def aims(
    old: Path, new: Path, adapter: Adapter, *, stay: float = 0.0, kept: bool = False
) -> tuple[list[Aim], str, BothModels]:
    bases = open_base(old), open_base(new)
    models = BothModels.load(*bases)
    inputs = make_batches(models, adapter, 64)
    fit = aims_of(models, adapter, (*inputs.fit, *(inputs.held("new") if kept else ())), 0.0, stay=stay)
    found, told = with_hidden(models, adapter, bases, fit, stay=stay)
    return found, told, models


def states(model: Loaded, aim: Aim, side: str, block: str) -> Tensor:
    assert aim.hidden is not None
    with watching(model, [block]) as seen:
        aim.batch.run(model, side)  # type: ignore[arg-type]
    return seen[block][picked(len(seen[block]), aim.hidden.number)]


def test_of_a_base_to_itself_the_old_ones_states_with_the_adapter_are_wanted(old: Path, adapter: Adapter) -> None:
    found, told, models = aims(old, old, adapter)
    assert told == "after model.layers.0 (as it is, 100%), model.layers.1 (as it is, 100%)"
    for aim in found[:2]:
        assert aim.hidden is not None
        with applied(models.old.components, adapter):
            for block, wanted in aim.hidden.wanted.items():
                torch.testing.assert_close(wanted.float(), states(models.old, aim, "old", block), rtol=2e-3, atol=2e-3)


def rotated(base: Path, out: Path) -> Path:
    """The same model in other coordinates of its stream; norms whose weights are all 1 don't see a rotation."""
    model = load_model(base).main
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0]
    readers = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("norm"):
                assert bool((module.weight == 1).all())
            if name.endswith(readers):
                module.weight.copy_(module.weight @ turn)
            if name.endswith(("o_proj", "down_proj")):
                module.weight.copy_(turn.T @ module.weight)
    model.save_pretrained(out)
    return out


def test_a_rotation_of_the_stream_is_found_and_turns_the_change(old: Path, adapter: Adapter, tmp_path: Path) -> None:
    found, told, models = aims(old, rotated(old, tmp_path / "rotated"), adapter)
    assert told == "after model.layers.0 (mapped, 100%), model.layers.1 (mapped, 100%)"
    turn = models.old.main.lm_head.weight.pinverse() @ models.new.main.lm_head.weight
    aim, block = found[0], "model.layers.1"
    assert aim.hidden is not None
    plain = states(models.old, aim, "old", block)
    with applied(models.old.components, adapter):
        change = states(models.old, aim, "old", block) - plain
    wanted = aim.hidden.wanted[block].float() - states(models.new, aim, "new", block)
    torch.testing.assert_close(wanted, change @ turn, rtol=0.05, atol=0.02)


def test_on_inputs_of_the_new_base_all_of_the_change_or_none_is_wanted(old: Path, new: Path, adapter: Adapter) -> None:
    found, _, models = aims(old, new, adapter, stay=1.0, kept=True)
    for aim in found:
        assert aim.hidden is not None
        with watching(models.new, aim.hidden.wanted) as seen:
            aim.batch.run(models.new, "new")
        assert (float(aim.hidden.distance(seen)) < 1e-3) is aim.retention
    task = [aim.hidden.distance(read(models.new, aim)) for aim in found if aim.hidden and not aim.retention]
    assert float(torch.stack(task).mean()) == pytest.approx(1.0, abs=0.05)


def read(model: Loaded, aim: Aim) -> dict[str, Tensor]:
    assert aim.hidden is not None
    with watching(model, aim.hidden.wanted) as seen:
        aim.batch.run(model, "new")
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_change_after_the_blocks_is_learnt(
    adapter: Adapter, old: Path, new: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    # Nothing but hidden states counts.
    monkeypatch.setattr(Aim, "loss", lambda aim, outputs: 0 * outputs.sum())
    settings = replace(QUICK, hidden=1.0, checkpointing=checkpointing, retention=0.0, rate=2e-2)
    report = refine(adapter, open_base(old), open_base(new), start="zero", settings=settings).report
    assert report.hidden.startswith("after model.layers.0")
    assert report.recovered > 0.2


def test_blocks_are_paired_by_depth_where_some_were_removed(old: Path, tmp_path: Path) -> None:
    deep = load_model(old).main
    deep.config.num_hidden_layers = 4
    deep.model.layers.extend([type(deep.model.layers[0])(deep.config, i) for i in (2, 3)])
    deep.save_pretrained(tmp_path / "deep")
    bases = open_base(tmp_path / "deep"), open_base(old)
    pairs = paired_blocks(BothModels.load(*bases), *bases)
    assert pairs == {"model.layers.0": "model.layers.0", "model.layers.1": "model.layers.1"}


def test_at_most_four_are_taken_evenly_and_the_last_among_them() -> None:
    blocks = {f"h.{i}": f"h.{i}" for i in range(12)}
    assert list(spread(blocks)) == ["h.2", "h.5", "h.8", "h.11"]
    assert list(spread({"h.0": "h.0"})) == ["h.0"]


def test_encoders_and_denoisers_have_blocks_too(tmp_path: Path) -> None:
    for make, roles, blocks in (
        (tiny.bert, ("query", "value"), {"encoder.layer.0", "encoder.layer.1"}),
        (tiny.unet, ("to_q", "conv1"), {"down_blocks.1", "mid_block.attentions.0", "up_blocks.0", "up_blocks.1"}),
    ):
        folders = make(tmp_path / make.__name__ / "old"), make(tmp_path / make.__name__ / "new", drift=0.05)
        adapter = tiny.lora(load_model(folders[0]).main, roles, size=0.3)
        found, _, models = aims(*folders, adapter)
        assert found[0].hidden is not None
        assert set(found[0].hidden.wanted) == blocks
        assert float(found[0].hidden.distance(read(models.new, found[0]))) > 0


def test_where_nothing_answers_it_is_told(
    old: Path, numbered: tuple[Path, Path], adapter: Adapter, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="different tokens"):
        refine(adapter, *map(open_base, numbered), settings=replace(QUICK, hidden=1.0, retention=0.0))
    other = tiny.gpt2(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="none do, by name or by depth"):
        aims(old, other, adapter)
    with pytest.raises(UsageError, match="explain 50% of the variance"):
        aims(old, tiny.llama(tmp_path / "unrelated", seed=9, drift=3.0), adapter)


def test_the_command_and_its_report_name_it(run: Run, adapter: Adapter, old: Path, new: Path, tmp_path: Path) -> None:
    assert adapter.path is not None
    asked = ("refine", adapter.path, "--from", old, "--to", new, "--n-inputs", 16, "-o")
    ran = run(*asked, tmp_path / "out", "--steps", 2, "--hidden", 0.5, "--json")
    assert ran.code == 0, ran.err
    assert ran.record["hidden"].startswith("after model.layers.0 (as it is, ")
    lineage = lineage_of(load_adapter(tmp_path / "out"))
    assert lineage is not None
    assert lineage["ports"][-1]["refined"]["objective"] == "output+hidden"
    ran = run(*asked, tmp_path / "other", "--hidden", -1)
    assert ran.code == 2
    assert "--hidden" in ran.err
