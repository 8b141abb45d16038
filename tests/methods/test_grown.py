"""The inverse of growth: an update on a model that was widened or deepened exactly gives the old model's outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from regraft import Adapter, ModuleRef, open_base, port
from regraft.adapter import MODEL
from regraft.carry import Settings
from test_removed import module
from toys import StateDict, deltas, drifted, llama, lora, relative_error, save_base

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 2


def logits(state: StateDict, adapter: Adapter | None, ids: Tensor, layers: int, heads: int = 4) -> Tensor:
    """A small Llama without position code, (n, positions) → (n, positions, vocab); RMS taken over the old width."""
    delta = {} if adapter is None else deltas(adapter)

    def w(name: str) -> Tensor:
        weight, ref = state[f"model.{name}.weight"], ModuleRef(MODEL, f"model.{name}")
        return weight + delta[ref] if ref in delta else weight

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return gain * x / x.square().sum(-1, keepdim=True).sqrt()

    x = state["model.embed_tokens.weight"][ids]
    for i in range(layers):
        block = f"layers.{i}"
        h = norm(x, state[f"model.{block}.input_layernorm.weight"])
        q, k, v = (h @ w(f"{block}.self_attn.{name}_proj").T for name in "qkv")
        size = 6
        parts = []
        for a in range(q.shape[-1] // size):
            span = slice(a * size, (a + 1) * size)
            mixed = (q[..., span] @ k[..., span].transpose(1, 2)).softmax(-1)
            parts.append(mixed @ v[..., span])
        x = x + torch.cat(parts, -1) @ w(f"{block}.self_attn.o_proj").T
        h = norm(x, state[f"model.{block}.input_layernorm.weight"])
        gate, up = h @ w(f"{block}.mlp.gate_proj").T, h @ w(f"{block}.mlp.up_proj").T
        x = x + (torch.nn.functional.silu(gate) * up) @ w(f"{block}.mlp.down_proj").T
    return norm(x, state["model.norm.weight"]) @ state["lm_head.weight"].T


def widened(state: StateDict, *, uneven: float = 0.0) -> StateDict:
    """Net2Net: channels 0, 1 and 5, the second head and ten MLP units copied; channel copies hold x / √count."""
    dice = torch.Generator().manual_seed(3)
    channels = torch.tensor([*range(24), 0, 1, 5, 5])
    heads = torch.tensor([*range(24), *range(6, 12)])
    units = torch.tensor([*range(40), *range(10, 20)])

    def count(source: Tensor) -> Tensor:
        return torch.bincount(source)[source].float()

    def shared(weight: Tensor, source: Tensor) -> Tensor:
        wide = weight[:, source] / count(source)
        for old in source[count(source) == 2].unique().tolist():
            first, second = (source == old).nonzero().flatten().tolist()
            part = uneven * torch.randn(len(weight), generator=dice) * wide[:, first]
            wide[:, first] += part
            wide[:, second] -= part
        return wide

    root = count(channels).sqrt()
    out = {}
    for name, weight in state.items():
        role = name.split(".")[-2]
        if weight.dim() == 1:
            out[name] = weight[channels]
        elif role == "embed_tokens":
            out[name] = weight[:, channels] / root
        elif role == "o_proj":
            out[name] = shared(weight, heads)[channels] / root[:, None]
        elif role == "down_proj":
            out[name] = shared(weight, units)[channels] / root[:, None]
        else:
            rows = {"q_proj": heads, "k_proj": heads, "v_proj": heads, "gate_proj": units, "up_proj": units}.get(role)
            wide = shared(weight, channels) * root
            out[name] = wide if rows is None else wide[rows]
    return {name: weight.contiguous() for name, weight in out.items()}


def deepened(state: StateDict, *, silent: bool) -> StateDict:
    """Every block followed by its copy, whose output projections are zero if ``silent``."""
    out = {}
    for name, weight in state.items():
        if ".layers." not in name:
            out[name] = weight
            continue
        number = int(name.split(".")[2])
        for at in (2 * number, 2 * number + 1):
            zero = silent and at % 2 and name.split(".")[-2] in ("o_proj", "down_proj")
            out[name.replace(f"layers.{number}", f"layers.{at}")] = weight * 0 if zero else weight.clone()
    return out


@pytest.fixture(scope="module")
def old() -> StateDict:
    return llama(layers=LAYERS)


def ported(old: StateDict, new: StateDict, adapter: Adapter, folder: Path, method: str = "grown", **options):
    bases = [open_base(save_base(s, folder / f"{i}.safetensors")) for i, s in enumerate((old, new))]
    return port(adapter, *bases, method, settings=Settings(force=True), **options)


IDS = torch.randint(0, 96, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("uneven", [0.0, 0.3])
def test_on_an_exactly_widened_model_the_update_does_what_it_did(old: StateDict, uneven: float, tmp_path: Path) -> None:
    new, adapter = widened(old, uneven=uneven), lora(old, roles=ROLES, scale=8.0)
    assert relative_error(logits(new, None, IDS, LAYERS), logits(old, None, IDS, LAYERS)) < 1e-4
    carried = ported(old, new, adapter, tmp_path).adapter
    wanted = logits(old, adapter, IDS, LAYERS)
    assert relative_error(logits(old, None, IDS, LAYERS), wanted) > 0.1
    assert relative_error(logits(new, carried, IDS, LAYERS), wanted) < 1e-4


def test_units_are_found_after_more_training(old: StateDict, tmp_path: Path) -> None:
    adapter = lora(old, roles=ROLES)
    exact = deltas(ported(old, widened(old), adapter, tmp_path / "exact").adapter)
    moved = ported(old, drifted(widened(old, uneven=0.3), 0.3), adapter, tmp_path / "moved").adapter
    for ref, delta in deltas(moved).items():
        assert relative_error(delta, exact[ref]) < 1e-5


def test_on_a_model_deepened_by_silent_copies_the_update_does_what_it_did(old: StateDict, tmp_path: Path) -> None:
    new, adapter = deepened(old, silent=True), lora(old, roles=ROLES, scale=8.0)
    carried = ported(old, new, adapter, tmp_path).adapter
    wanted = logits(old, adapter, IDS, LAYERS)
    assert relative_error(logits(new, carried, IDS, 2 * LAYERS), wanted) < 1e-4
    names = {ref.path for ref in carried.updates}
    assert "model.layers.1.mlp.up_proj" in names
    assert "model.layers.1.mlp.down_proj" not in names


def test_plain_copies_of_a_block_all_take_its_update(old: StateDict, tmp_path: Path) -> None:
    adapter = lora(old, roles=("down_proj",))
    new = drifted(deepened(old, silent=False), 0.2)
    result = ported(old, new, adapter, tmp_path)
    got, before = deltas(result.adapter), deltas(adapter)
    for layer in range(2 * LAYERS):
        assert torch.equal(got[module(layer, "mlp.down_proj")], before[module(layer // 2, "mlp.down_proj")])
    assert all("also on" in row.reason for row in result.report.modules)
    first = ported(old, new, adapter, tmp_path / "first", copies="first").adapter
    assert len(first.updates) == LAYERS


@pytest.mark.parametrize("amount", [0.0, 0.3])
def test_where_nothing_grew_it_is_a_copy(old: StateDict, amount: float, tmp_path: Path) -> None:
    adapter = lora(old, roles=ROLES)
    for ref, delta in deltas(ported(old, drifted(old, amount), adapter, tmp_path).adapter).items():
        assert torch.equal(delta, deltas(adapter)[ref])


def test_a_larger_model_that_did_not_grow_from_the_old_one_takes_nothing(old: StateDict, tmp_path: Path) -> None:
    from regraft import InputError

    with pytest.raises(InputError, match="grew from"):
        ported(old, llama(5, layers=LAYERS, width=30, mlp=50), lora(old, roles=ROLES), tmp_path)


@pytest.mark.parametrize(
    "grow", [lambda state: widened(state, uneven=0.3), lambda state: deepened(state, silent=False)]
)
def test_auto_finds_by_itself_what_a_base_grew_from(old: StateDict, grow, tmp_path: Path) -> None:
    adapter = lora(old, roles=ROLES)
    report = ported(old, drifted(grow(old), 0.2), adapter, tmp_path, "auto").report
    assert report.method == "grown"
    assert report.verdict != "refused"
