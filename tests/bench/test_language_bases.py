"""The ways in which one base grows out of another keep what they promise to keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regraft.bench.language_models import Size, deepened, new_model, pruned, widened, with_tokens
from regraft.bench.language_text import CHARACTERS

SIZE = Size(width=16, layers=3, mlp=24, heads=2)


@pytest.fixture(scope="module")
def old():
    return new_model(SIZE, seed=0).eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(SIZE.vocabulary, (2, 20), generator=torch.Generator().manual_seed(1))


def logits(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def blocks(model, i: int) -> dict[str, Tensor]:
    start = f"model.layers.{i}."
    return {k.removeprefix(start): v for k, v in model.state_dict().items() if k.startswith(start)}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_seed_gives_one_model_and_leaves_the_global_one_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert_same(new_model(SIZE, 3).state_dict(), new_model(SIZE, 3).state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(new_model(SIZE, 3).lm_head.weight, new_model(SIZE, 4).lm_head.weight)


@pytest.mark.parametrize(("channels", "heads", "units"), [(8, 1, 12), (16, 2, 24), (5, 0, 0), (0, 1, 0), (0, 0, 7)])
def test_a_widened_model_computes_the_same(old, ids, channels, heads, units):
    wide = widened(old, channels=channels, heads=heads, units=units, seed=0)
    assert wide.config.hidden_size == 16 + channels
    assert wide.model.layers[0].mlp.gate_proj.out_features == 24 + units
    assert wide.model.layers[0].self_attn.q_proj.out_features == 8 * (2 + heads)
    torch.testing.assert_close(logits(wide, ids), logits(old, ids), rtol=1e-4, atol=1e-5)


def test_a_widened_model_computes_the_same_where_the_norms_epsilon_counts(ids):
    model = new_model(SIZE, seed=0).eval()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.variance_epsilon = 1e-2
    model.config.rms_norm_eps = 1e-2
    wide = widened(model, channels=8, heads=0, units=0, seed=0)
    torch.testing.assert_close(logits(wide, ids), logits(model, ids), rtol=1e-4, atol=1e-5)


def test_widening_by_nothing_gives_the_same_bytes(old):
    assert_same(widened(old, channels=0, heads=0, units=0, seed=0).state_dict(), old.state_dict())


def test_copied_channels_and_units_learn_apart(old, ids):
    wide = widened(old, channels=8, heads=1, units=12, seed=0)
    wide(input_ids=ids, labels=ids).loss.backward()
    gate, embed = wide.model.layers[0].mlp.gate_proj.weight, wide.model.embed_tokens.weight
    twins = [(i, j) for i in range(24) for j in range(24, 36) if torch.equal(gate[i], gate[j])]
    assert len(twins) == 12
    assert all(not torch.allclose(gate.grad[i], gate.grad[j], rtol=0.01) for i, j in twins)
    channels = [(i, j) for i in range(16) for j in range(16, 24) if torch.equal(embed[:, i], embed[:, j])]
    assert len(channels) == 8
    assert all(not torch.allclose(embed.grad[:, i], embed.grad[:, j], rtol=0.01) for i, j in channels)


def test_a_model_deepened_by_identity_blocks_computes_the_same(old, ids):
    deep = deepened(old, (0, 2), identity=True)
    assert deep.config.num_hidden_layers == 5
    assert torch.equal(logits(deep, ids), logits(old, ids))


def test_a_deepened_model_holds_each_copied_block_twice_in_a_row(old):
    deep = deepened(old, (1,))
    for new, source in enumerate((0, 1, 1, 2)):
        assert_same(blocks(deep, new), blocks(old, source))


def test_a_pruned_model_keeps_the_other_blocks_bytes(old, ids):
    small = pruned(old, (1,))
    assert_same(blocks(small, 0), blocks(old, 0))
    assert_same(blocks(small, 1), blocks(old, 2))
    assert torch.equal(small.lm_head.weight, old.lm_head.weight)
    assert small.config.num_hidden_layers == len(small.model.layers) == 2
    assert logits(small, ids).shape == logits(old, ids).shape


def test_pruning_the_identity_blocks_away_gives_the_old_model_back(old):
    assert_same(pruned(deepened(old, (0, 2), identity=True), (1, 4)).state_dict(), old.state_dict())


def test_the_old_model_is_left_alone(old):
    before = {name: value.clone() for name, value in old.state_dict().items()}
    wide = widened(old, channels=8, heads=1, units=12, seed=0)
    short = pruned(old, (0,))
    with torch.no_grad():
        for model in (wide, short):
            for p in model.parameters():
                p.add_(1.0)
    assert_same(old.state_dict(), before)
    assert (old.config.hidden_size, old.config.num_hidden_layers) == (16, 3)


def test_a_vocabulary_of_the_same_characters_changes_nothing(old, ids):
    same = with_tokens(old, [[i] for i in range(len(CHARACTERS))])
    assert_same(same.state_dict(), old.state_dict())


def test_a_merged_token_starts_at_the_mean_of_its_characters_and_is_foretold_as_its_first(old):
    more = with_tokens(old, [*[[i] for i in range(SIZE.vocabulary)], [3, 5]])
    embed = old.model.embed_tokens.weight
    torch.testing.assert_close(more.model.embed_tokens.weight[-1], (embed[3] + embed[5]) / 2)
    assert torch.equal(more.lm_head.weight[-1], old.lm_head.weight[3])
    assert more.config.vocab_size == SIZE.vocabulary + 1
