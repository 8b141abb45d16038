"""The U-Nets that are made from v1 keep what they promise to keep."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("diffusers")

from regraft.base import open_base
from regraft.bench.diffusion_models import deepened, drift, open_unet, pruned, write_base
from regraft.demo import data_folder
from regraft.runtime import load_model

OUTPUTS = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")


@pytest.fixture(scope="module")
def v1():
    return open_unet(data_folder() / "v1").eval()


@torch.no_grad()
def prediction(unet) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    states, words = torch.randn((2, 8, 16, 16), generator=random), torch.randn((2, 16, 64), generator=random)
    return unet(states, torch.tensor([30, 800]), words).sample


def block_names(unet) -> set[str]:
    return {found[1] for name in unet.state_dict() if (found := re.match(r"(.*transformer_blocks\.\d+)\.", name))}


def test_a_deepened_unet_predicts_just_what_v1_does(v1):
    assert torch.equal(prediction(deepened(v1)), prediction(v1))


def test_a_deepened_unet_has_each_block_twice_and_the_copy_differs_in_its_outputs_alone(v1):
    grown = deepened(v1)
    state = grown.state_dict()
    assert len(block_names(grown)) == 2 * len(block_names(v1))
    for name, tensor in state.items():
        if "transformer_blocks.1." not in name:
            continue
        silent = any(f".{output}." in name for output in OUTPUTS)
        original = state[name.replace("transformer_blocks.1.", "transformer_blocks.0.")]
        assert torch.equal(tensor, torch.zeros_like(tensor) if silent else original), name


def test_the_copies_of_a_deepened_unet_can_learn(v1):
    grown = deepened(v1)
    random = torch.Generator().manual_seed(0)
    states, words = torch.randn((1, 8, 16, 16), generator=random), torch.randn((1, 16, 64), generator=random)
    grown(states, 500, words).sample.square().sum().backward()
    block = grown.mid_block.attentions[0].transformer_blocks[1]
    for output in OUTPUTS:
        assert block.get_submodule(output).weight.grad.norm() > 0, output


def test_a_pruned_unet_keeps_the_bytes_of_every_weight_that_it_has(v1):
    before, after = v1.state_dict(), pruned(v1).state_dict()
    assert set(after) < set(before)
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_pruning_takes_the_middles_attention_and_the_second_block_of_each_up_block(v1):
    assert block_names(v1) - block_names(pruned(v1)) == {
        "mid_block.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.1.transformer_blocks.0",
        "up_blocks.2.attentions.1.transformer_blocks.0",
    }


@pytest.mark.parametrize("made", [deepened, pruned])
def test_a_written_base_is_read_back_as_it_was(made, v1, tmp_path):
    unet, like = made(v1), data_folder() / "v1"
    expected = prediction(unet)
    write_base(tmp_path / "base", like, unet)
    loaded = load_model(tmp_path / "base")
    # v1's weights are float16 on the disk already; the loaded one has another attention kernel.
    assert torch.allclose(prediction(loaded.main), expected, atol=1e-4)
    assert set(open_base(tmp_path / "base").components["unet"]) == set(unet.state_dict())
    kept = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "base" / kept).read_bytes() == (like / kept).read_bytes()


def test_a_written_text_encoder_has_the_names_of_the_published_ones(v1, tmp_path):
    from regraft.bench.diffusion_models import open_text

    like = data_folder() / "v1"
    text, _ = open_text(like)
    write_base(tmp_path / "base", like, open_unet(like), text)
    old, new = open_base(like).components["text_encoder"], open_base(tmp_path / "base").components["text_encoder"]
    assert {name: ref.load().tolist() for name, ref in new.items()} == {
        name: ref.load().tolist() for name, ref in old.items() if not name.endswith("position_ids")
    }


def test_drift_is_nought_to_itself_and_one_to_its_double(v1):
    double = open_unet(data_folder() / "v1")
    with torch.no_grad():
        for parameter in double.parameters():
            parameter.mul_(2)
    assert drift(v1, v1) == 0
    assert drift(v1, double) == pytest.approx(1)
