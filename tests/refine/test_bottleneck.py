"""Bottleneck adapters go to another base: started from themselves or their image, and taught the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regraft import InputError, open_base
from regraft.refine import RefineSettings
from regraft.refine.bottleneck import load_bottlenecks, refine_bottlenecks
from regraft.refine.bottleneck.layers import placed
from regraft.refine.bottleneck.places import Spot
from regraft.refine.bottleneck.starting import first_state
from regraft.runtime import load_model
from regraft.runtime.both import BothModels
from regraft.tensor_files import read_tensor_file
from verify import tiny
from verify.hub import HUB, SIZE, Small, saved, trained

QUICK = RefineSettings(steps=60, look=20, n_inputs=32, rate=1e-2)


@pytest.fixture(scope="module")
def smalls(old: Path) -> list[Small]:
    return trained(old)


@pytest.fixture(scope="module")
def words(smalls: list[Small], folder: Path) -> Path:
    return saved(smalls, folder / "words")


# --- What it begins from.


def first(words: Path, old: Path, new: Path) -> Any:
    bases = open_base(old), open_base(new)
    return first_state(load_bottlenecks(words), *bases, BothModels.load(*bases))


def test_in_another_width_it_does_the_same_to_the_image_of_a_state(words: Path, old: Path, tmp_path: Path) -> None:
    wide = load_model(tiny.llama(tmp_path / "wide", width=24)).main
    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1)))[0][:16]
    wide.get_input_embeddings().weight.data = load_model(old).main.get_input_embeddings().weight @ turn
    wide.save_pretrained(tmp_path / "wide")
    found = first(words, old, tmp_path / "wide")
    assert found.how == "embedding map of 48 shared tokens"
    state, residual = torch.randn(2, 5, 16)
    for spot, module in load_bottlenecks(words).modules().items():
        moved = found.modules[spot](state @ turn, residual @ turn, None)
        torch.testing.assert_close(moved, module(state, residual, None) @ turn, rtol=1e-3, atol=1e-3)
    # The library makes bottlenecks of width // factor.
    assert 24 // found.config["config"]["reduction_factor"] == SIZE


def stacked(old: Path, folder: Path, order: list[int | None]) -> Path:
    """The model with some of its blocks, and random ones between them."""
    model = load_model(old).main
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": len(order)})
    torch.manual_seed(8)
    deeper = type(model)(config)
    state = {key: value for key, value in model.state_dict().items() if ".layers." not in key}
    for j, i in enumerate(order):
        source = deeper if i is None else model
        mine = f"model.layers.{j if i is None else i}."
        state |= {
            key.replace(mine, f"model.layers.{j}."): value
            for key, value in source.state_dict().items()
            if key.startswith(mine)
        }
    deeper.load_state_dict(state)
    deeper.save_pretrained(folder)
    return folder


def test_an_added_block_begins_without_effect(words: Path, old: Path, tmp_path: Path) -> None:
    found = first(words, old, stacked(old, tmp_path / "deep", [0, None, 1]))
    own = load_bottlenecks(words).modules()
    ups = [found.modules[Spot(block, "output_adapter")].adapter_up.weight for block in range(3)]
    assert torch.equal(ups[0], own[Spot(0, "output_adapter")].adapter_up.weight)
    assert torch.equal(ups[2], own[Spot(1, "output_adapter")].adapter_up.weight)
    assert not ups[1].any()


def test_of_a_removed_block_it_is_told(words: Path, old: Path, tmp_path: Path) -> None:
    found = first(words, old, stacked(old, tmp_path / "shallow", [1]))
    assert list(found.modules) == [Spot(0, "output_adapter")]
    assert found.untrained == {"block 0": "has no counterpart in the new base, and is left out"}


def test_blocks_that_were_left_out_stay_so(tmp_path: Path) -> None:
    bases = open_base(HUB / "gpt2"), open_base(HUB / "gpt2")
    found = first_state(load_bottlenecks(HUB / "left-out"), *bases, BothModels.load(*bases))
    assert list(found.modules) == [Spot(0, "output_adapter")]
    assert found.config["config"]["leave_out"] == [1]


# --- Refined.


def test_to_its_own_base_it_stays_as_it_is(words: Path, old: Path) -> None:
    result = refine_bottlenecks(load_bottlenecks(words), open_base(old), open_base(old), settings=QUICK)
    assert result.report.recovered == pytest.approx(1.0, abs=1e-4)
    for spot, table in load_bottlenecks(words).tables.items():
        assert all(torch.equal(result.bottlenecks.tables[spot][name], tensor) for name, tensor in table.items())


def test_on_a_drifted_base_it_ends_nearer_and_is_read_again(
    words: Path, old: Path, drifted: Path, tmp_path: Path
) -> None:
    result = refine_bottlenecks(load_bottlenecks(words), open_base(old), open_base(drifted), settings=QUICK)
    assert result.report.start == "copy"
    assert result.report.recovered > 0.6
    assert result.report.recovered > result.report.looks[0].recovered + 0.05
    files = result.save(tmp_path / "refined")
    assert {file.name for file in files} == {"adapter_config.json", "pytorch_adapter.bin"}
    again = load_bottlenecks(tmp_path / "refined")
    assert again.config["model_name"] == "drifted"
    assert again.config["regraft_lineage"]["ports"][0]["refined"]["objective"] == "output"
    teacher, student = load_model(old), load_model(drifted)
    ids = torch.randint(3, 48, (8, 12), generator=torch.Generator().manual_seed(5))

    def said(model: Any, folder: Path | None) -> Tensor:
        modules = load_bottlenecks(folder).modules() if folder else {}
        with placed(model, modules), torch.no_grad():
            return model.main(input_ids=ids).logits.log_softmax(-1)

    wanted = said(teacher, words)

    def away(folder: Path | None) -> float:
        return float(F.kl_div(said(student, folder), wanted, reduction="batchmean", log_target=True))

    assert away(tmp_path / "refined") < away(words) < away(None)


def test_on_a_wider_unrelated_base_it_learns(words: Path, old: Path, tmp_path: Path) -> None:
    wide = tiny.llama(tmp_path / "wide", width=24, seed=1)
    result = refine_bottlenecks(load_bottlenecks(words), open_base(old), open_base(wide), settings=QUICK)
    assert result.report.recovered > 0.15
    result.save(tmp_path / "refined")
    assert load_bottlenecks(tmp_path / "refined").config["hidden_size"] == 24


def test_an_encoder_s_goes_by_hidden_states(tmp_path: Path) -> None:
    model = load_model(HUB / "bert").main
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.8 * parameter.std().nan_to_num() * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "drifted")
    bases = open_base(HUB / "bert"), open_base(tmp_path / "drifted")
    settings = replace(QUICK, n_inputs=16)
    result = refine_bottlenecks(load_bottlenecks(HUB / "houlsby"), *bases, settings=settings)
    assert result.report.recovered > result.report.looks[0].recovered + 0.02
    assert result.report.modules == 4


def test_across_tokenizers_and_architectures_the_texts_are_learnt(
    words: Path, numbered: tuple[Path, Path], tmp_path: Path
) -> None:
    new = tiny.gpt2(tmp_path / "gpt2")
    load_model(numbered[1]).tokenizer.save_pretrained(new)
    bases = open_base(numbered[0]), open_base(new)
    result = refine_bottlenecks(load_bottlenecks(words), *bases, settings=replace(QUICK, steps=20))
    assert result.report.objective == "sample"
    assert result.report.recovered > 0
    result.save(tmp_path / "refined")
    keys = read_tensor_file(tmp_path / "refined" / "pytorch_adapter.bin").tensors
    assert "transformer.h.1.output_adapters.adapters.words.adapter_up.weight" in keys
    assert load_bottlenecks(tmp_path / "refined").config["model_type"] == "gpt2"


def test_a_start_that_does_worse_than_nothing_is_dropped(words: Path, old: Path, tmp_path: Path) -> None:
    model = load_model(old).main
    model.lm_head.weight.data.neg_()
    model.save_pretrained(tmp_path / "other")
    bases = open_base(old), open_base(tmp_path / "other")
    result = refine_bottlenecks(load_bottlenecks(words), *bases, settings=replace(QUICK, steps=1))
    assert result.report.start == "zero"
    assert "worse than the new base alone" in result.report.start_reason


def test_bottlenecks_of_another_base_are_told(words: Path, old: Path, tmp_path: Path) -> None:
    wide = tiny.llama(tmp_path / "wide", width=24)
    with pytest.raises(InputError, match="16 numbers, and those of wide have 24"):
        refine_bottlenecks(load_bottlenecks(words), open_base(wide), open_base(old), settings=QUICK)
    with pytest.raises(InputError, match="for models of type llama"):
        refine_bottlenecks(load_bottlenecks(words), open_base(HUB / "gpt2"), open_base(old), settings=QUICK)
