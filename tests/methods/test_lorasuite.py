"""LoRASuite's maps of width, depth and heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regraft import open_base, port
from regraft.base import Base
from regraft.carry import Settings
from regraft.methods._embeddings import common_tokens, width_map
from regraft.methods._heads import HeadCounts, cka, head_similarity, match_heads, split_heads
from test_pairing import without_layers
from test_removed import module
from toys import StateDict, deltas, drifted, llama, lora, relative_error, rotation, save_base

HEADS, SIZE = 4, 6
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def opened(state: StateDict, folder: Path, tokens: list[str] | None = None) -> Base:
    save_base(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": HEADS}))
    if tokens is not None:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return open_base(folder)


def ported(old: StateDict, new: StateDict, folder: Path, **options):
    bases = opened(old, folder / "old"), opened(new, folder / "new")
    return port(lora(old, roles=ROLES), *bases, "lorasuite", settings=Settings(force=True), **options)


def with_heads_permuted(state: StateDict, order: list[int]) -> StateDict:
    rows = torch.cat([torch.arange(i * SIZE, (i + 1) * SIZE) for i in order])
    out = {}
    for name, weight in state.items():
        role = name.split(".")[-2]
        out[name] = weight[rows] if role in ("q_proj", "k_proj", "v_proj") else weight
        if role == "o_proj":
            out[name] = weight[:, rows].contiguous()
    return out


def test_permuted_heads_are_found(tmp_path: Path) -> None:
    old, order = llama(), [2, 0, 3, 1]
    got = deltas(ported(old, with_heads_permuted(old, order), tmp_path, heads="rotation").adapter)
    wanted = with_heads_permuted({f"{ref.path}.weight": d for ref, d in deltas(lora(old, roles=ROLES)).items()}, order)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        assert relative_error(got[module(1, name)], wanted[f"model.layers.1.{name}.weight"]) < 1e-4


def test_equal_bases_give_a_copy_of_the_attention_and_the_papers_projection_of_the_mlp(tmp_path: Path) -> None:
    state = llama()
    got, delta = deltas(ported(state, state, tmp_path, heads="rotation").adapter), deltas(lora(state, roles=ROLES))
    for name in ("self_attn.q_proj", "self_attn.o_proj"):
        assert relative_error(got[module(0, name)], delta[module(0, name)]) < 1e-4
    up, down = (state[f"model.layers.0.mlp.{name}.weight"] for name in ("up_proj", "down_proj"))
    wanted = up @ torch.linalg.pinv(up) @ delta[module(0, "mlp.up_proj")]
    assert relative_error(got[module(0, "mlp.up_proj")], wanted) < 1e-3
    wanted = delta[module(0, "mlp.down_proj")] @ torch.linalg.pinv(down) @ down
    assert relative_error(got[module(0, "mlp.down_proj")], wanted) < 1e-3


def test_as_published_a_head_is_multiplied_by_both_models_weights(tmp_path: Path) -> None:
    state = llama()
    got, delta = deltas(ported(state, state, tmp_path).adapter), deltas(lora(state, roles=ROLES))
    q, ref = state["model.layers.0.self_attn.q_proj.weight"], module(0, "self_attn.q_proj")
    wanted = torch.cat([q[h : h + SIZE] @ q[h : h + SIZE].T @ delta[ref][h : h + SIZE] for h in range(0, 24, SIZE)])
    assert relative_error(got[ref], wanted) < 1e-4


def test_layers_are_mapped_in_order(tmp_path: Path) -> None:
    old = llama(layers=5)
    report = ported(old, drifted(without_layers(old, {1, 3}), 0.2), tmp_path).report
    places = {row.name: row.target for row in report.modules}
    for new, layer in enumerate((0, 2, 4)):
        assert places[f"model.layers.{layer}.mlp.up_proj"] == f"model.layers.{new}.mlp.up_proj"
    assert places["model.layers.1.mlp.up_proj"] is None


def test_another_width_is_mapped_by_the_embeddings(tmp_path: Path) -> None:
    """A model that is the old one in the first channels of a wider, rotated space."""
    old, turn = llama(), rotation(30, 3)[:24]
    new = {}
    for name, weight in old.items():
        role = name.split(".")[-2]
        if role in ("o_proj", "down_proj"):
            new[name] = (turn.T @ weight).contiguous()
        else:
            new[name] = (weight @ turn).contiguous() if weight.dim() > 1 else torch.ones(30)
    got, delta = deltas(ported(old, new, tmp_path, heads="rotation").adapter), deltas(lora(old, roles=ROLES))
    assert relative_error(got[module(1, "self_attn.q_proj")], delta[module(1, "self_attn.q_proj")] @ turn) < 1e-3
    assert relative_error(got[module(1, "self_attn.o_proj")], turn.T @ delta[module(1, "self_attn.o_proj")]) < 1e-3


def test_common_tokens_are_found_by_name_and_else_by_id(tmp_path: Path) -> None:
    state = llama()
    names = [f"t{i}" for i in range(96)]
    old, new = opened(state, tmp_path / "a", names), opened(state, tmp_path / "b", names[50:] + ["x"] * 3)
    olds, news = common_tokens(old, new, (96, 96))
    assert [names[i] for i in olds] == names[50:]
    assert news == list(range(46))
    assert common_tokens(old, opened(state, tmp_path / "c"), (96, 90)) == (list(range(90)), list(range(90)))


def test_a_width_map_is_recovered() -> None:
    embeddings, wanted = torch.randn(80, 12), torch.randn(12, 20)
    torch.testing.assert_close(width_map(embeddings, embeddings @ wanted), wanted, rtol=1e-3, atol=1e-3)


def test_the_similarity_of_heads_is_the_cosine_of_their_products() -> None:
    def weights(seed: int) -> list[Tensor]:
        dice = torch.Generator().manual_seed(seed)
        shapes = ((8, 10), (4, 10), (4, 10), (10, 8))
        return [torch.randn(*shape, generator=dice) for shape in shapes]

    counts = HeadCounts(queries=4, keys=2, size=2)
    one, other, width = split_heads(weights(0), counts), split_heads(weights(1), counts), torch.randn(10, 10)
    found = head_similarity(one, other, width)
    for i in range(4):
        for j in range(4):
            a = torch.cat([width.T @ one.q[i].T @ one.k[i] @ width, width.T @ one.v[i].T @ one.o[i].T @ width])
            b = torch.cat([other.q[j].T @ other.k[j], other.v[j].T @ other.o[j].T])
            assert float(found[i, j]) == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-4)
    assert match_heads(torch.eye(3)[[2, 0, 1]]) == [1, 2, 0]


def test_cka_is_one_under_rotation_and_scale_and_low_by_chance() -> None:
    x = torch.randn(400, 10)
    assert cka(x, 3 * x @ rotation(10, 1)) == pytest.approx(1.0, abs=1e-4)
    assert cka(x, torch.randn(400, 10)) < 0.2


def test_a_model_without_llama_blocks_is_left_alone(tmp_path: Path) -> None:
    from regraft import InputError

    state = {name.replace("self_attn", "mixer"): weight for name, weight in llama().items()}
    bases = opened(state, tmp_path / "old"), opened(state, tmp_path / "new")
    with pytest.raises(InputError, match="Llama-type"):
        port(lora(state, roles=("q_proj",)), *bases, "lorasuite")
