"""lora-x, lora-x-atc, cross-lora, prolora and dart: their identities, and what they reduce to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft import InputError, UsageError, open_base, port
from regraft.carry import Settings
from regraft.methods import Skip, get_method
from regraft.methods._layers import role_of, transport_plan
from regraft.methods._subspace import index_matched, phi, subspaces
from regraft.methods.cross_lora import cross_lora
from regraft.methods.dart import dart
from regraft.methods.lora_x import lora_x
from regraft.methods.prolora import _carried
from regraft.transport import Chained, rank_for_energy
from test_pairing import without_layers
from test_removed import module
from toys import StateDict, deltas, drifted, llama, lora, permutation, relative_error, rotation, save_base


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def ported(old: StateDict, new: StateDict, folder: Path, method: str, **options):
    bases = [open_base(save_base(s, folder / f"{i}.safetensors")) for i, s in enumerate((old, new))]
    return port(lora(old), *bases, method, settings=Settings(force=True), **options)


def test_between_weights_of_another_size_lora_x_moves_deltas_from_one_singular_pair_to_that_of_its_index() -> None:
    old, new = weight(12, 8), weight(15, 10, 1)
    u, _, vh = torch.linalg.svd(old, full_matrices=False)
    scaled = u[:, :6] @ torch.diag(torch.arange(1.0, 7.0)) @ vh[:6]
    moved = lora_x(old, new, subspace_rank=6).dense(scaled)
    found = torch.linalg.svdvals(moved)
    torch.testing.assert_close(found[:6], torch.arange(6.0, 0.0, -1.0), rtol=1e-4, atol=1e-4)
    left, right = subspaces(new, 6, None)
    # Each pair gets its own, whatever the signs: the deltas of one pair have no sign of their own.
    torch.testing.assert_close((left.T @ moved @ right).diagonal().abs(), torch.arange(1.0, 7.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20), (300, 270)])
@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
def test_a_soft_edge_keeps_of_each_direction_what_its_singular_value_says(shape: tuple[int, int], scale: float) -> None:
    new, delta = weight(*shape), weight(*shape, 2)
    u, s, vh = torch.linalg.svd(new.double(), full_matrices=False)
    kept = s**2 / (s**2 + 0.7**2 * (s**2).mean())
    wanted = (u * kept) @ (u.T @ delta.double() @ vh.T) @ (vh.T * kept).T
    found = lora_x(None, new * scale, edge=0.7)
    assert relative_error(found.dense(delta), wanted.float()) < 1e-5
    up, down = weight(shape[0], 3, 4), weight(3, shape[1], 5)
    moved = found.factors(up, down)
    assert relative_error(moved.up @ moved.down, found.dense(up @ down)) < 1e-4


def test_a_soft_edge_at_a_gap_is_the_projection_and_far_below_all_values_a_copy() -> None:
    turn, other, delta = rotation(24, 1), rotation(24, 2), weight(24, 24, 3)
    gap = turn @ torch.diag(torch.tensor([1e3] * 9 + [1e-3] * 15)) @ other
    sharp = lora_x(None, gap, subspace_rank=9).dense(delta)
    assert relative_error(lora_x(None, gap, edge=1e-2).dense(delta), sharp) < 2e-3
    assert relative_error(lora_x(None, turn, edge=1e-3).dense(delta), delta) < 1e-3
    assert torch.equal(lora_x(None, torch.zeros(24, 24), edge=1.0).dense(delta), delta)


@pytest.mark.parametrize("edge", [0.0, -1.0, float("nan"), float("inf"), 1e20])
def test_a_soft_edge_is_above_nothing_and_no_wall(edge: float) -> None:
    for new in (weight(8, 8), torch.zeros(8, 8)):
        with pytest.raises(UsageError, match="--edge"):
            lora_x(None, new, edge=edge)


@pytest.mark.parametrize("shape", [(600, 400), (400, 600)])
@pytest.mark.parametrize("edge", [0.003, 0.01, 0.05])
def test_a_small_edge_is_the_one_that_was_asked_for(shape: tuple[int, int], edge: float) -> None:
    dice = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(n, 400, generator=dice, dtype=torch.float64))[0] for n in shape)
    s = 1 / torch.arange(1, 401, dtype=torch.float64)
    kept = s**2 / (s**2 + edge**2 * (s**2).mean())
    found = lora_x(None, ((u * s) @ v.T).float(), edge=edge)
    up, down = weight(shape[0], 4, 6), weight(4, shape[1], 7)
    assert isinstance(found, Chained)
    ((left, right),) = found.images(up, down)
    for one, basis, x in ((left, u, up), (right.T, v, down.T)):
        wanted = (basis * kept) @ (basis.T @ x.double())
        if len(basis) == 400:
            assert relative_error(one, wanted.float()) < 2e-3
        else:
            # What float32 rounds the weight to lies in no direction of its own.
            assert relative_error((basis.T @ one.double()).float(), (basis.T @ wanted).float()) < 2e-3


def test_a_soft_edge_has_no_cut_and_carries_one_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--edge excludes"):
        lora_x(None, weight(8, 8), edge=1.0, energy=0.5)
    skipped = lora_x(weight(8, 8), weight(9, 8), edge=1.0)
    assert isinstance(skipped, Skip)
    assert not skipped.planned
    assert "(9, 8) in the new base" in skipped.reason
    result = ported(llama(), drifted(llama(), 0.1), tmp_path, "lora-x", edge=0.5)
    kept = [row.energy_kept for row in result.report.modules if row.status == "ported"]
    assert kept
    assert all(share is not None and 0 < share < 1 for share in kept)


def test_the_signs_of_singular_pairs_are_flipped_jointly() -> None:
    old = weight(12, 8)
    u, v = subspaces(old, 8, None)
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    # One side of one size tells the signs: the same weight with flipped pairs and three rows added is recovered.
    taller = torch.cat([u * flips, torch.zeros(3, 8)])
    delta = weight(12, 8, 3)
    moved = index_matched(u, v, taller, v * flips).dense(delta)
    torch.testing.assert_close(moved[:12], u @ u.T @ delta, rtol=1e-4, atol=1e-5)


def test_cross_lora_between_weights_of_one_size_is_lora_x_at_its_rank() -> None:
    old, new, delta = weight(20, 16), weight(20, 16, 1), weight(20, 16, 2)
    torch.testing.assert_close(
        cross_lora(old, new, subspace_rank=5).dense(delta), lora_x(None, new, subspace_rank=5).dense(delta)
    )


def test_cross_lora_at_its_own_rank_of_a_small_square_weight_is_a_copy() -> None:
    delta = weight(16, 16, 2)
    torch.testing.assert_close(cross_lora(weight(16, 16), weight(16, 16, 1)).dense(delta), delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora-x", "cross-lora", "lora-x-atc", "prolora", "dart"])
def test_equal_bases_give_a_copy_at_full_rank(method: str, tmp_path: Path) -> None:
    options = {"subspace_rank": 1.0} if "subspace_rank" in get_method(method).options else {}
    result = ported(llama(), llama(), tmp_path, method, **options)
    wide = [ref for ref in result.adapter.updates if "q_proj" in ref.path or "v_proj" in ref.path]
    got, wanted = deltas(result.adapter), deltas(lora(llama()))
    for ref in wide if method != "dart" else got:
        assert relative_error(got[ref], wanted[ref]) < 1e-3


@pytest.mark.parametrize("gauge", [rotation, permutation])
@pytest.mark.parametrize("side", ["out", "in"])
def test_dart_recovers_a_rotated_side(side: str, gauge) -> None:
    old, delta = weight(24, 24), weight(24, 24, 2)
    turn = gauge(24, 5)
    new, wanted = (turn @ old, turn @ delta) if side == "out" else (old @ turn.T, delta @ turn.T)
    assert relative_error(dart(old, new).dense(delta), wanted) < 1e-4


def test_dart_recovers_a_rotation_into_a_larger_space() -> None:
    old, delta, turn = weight(24, 40), weight(24, 40, 2), rotation(30, 5)[:, :24]
    assert relative_error(dart(old, turn @ old).dense(delta), turn @ delta) < 1e-4


def test_dart_keeps_the_size_of_an_update() -> None:
    delta = weight(10, 14, 2)
    assert float(dart(weight(10, 14), weight(10, 14, 1)).dense(delta).norm()) == pytest.approx(
        float(delta.norm()), rel=1e-4
    )


def test_prolora_keeps_only_the_modules_that_the_paper_would(tmp_path: Path) -> None:
    state = llama()
    new = drifted(state, 0.1)
    new["model.layers.1.self_attn.q_proj.weight"] = llama(9)["model.layers.1.self_attn.q_proj.weight"]
    result = ported(state, new, tmp_path, "prolora", threshold="paper", subspace_rank=6)
    skipped = {row.name for row in result.report.modules if row.status == "skipped"}
    assert skipped == {"model.layers.1.self_attn.q_proj"}
    u, _ = subspaces(state["model.layers.0.self_attn.q_proj.weight"], 6, None)
    assert phi(u, u) == pytest.approx(1.0, abs=1e-5)


def test_prolora_finds_each_new_layers_old_one_among_all(tmp_path: Path) -> None:
    old = llama(layers=5)
    result = ported(old, drifted(without_layers(old, {1, 3}), 0.1), tmp_path, "prolora", layers="all")
    places = {row.name: row.target for row in result.report.modules if row.status == "ported"}
    for new, layer in enumerate((0, 2, 4)):
        assert places[f"model.layers.{layer}.mlp.down_proj"] == f"model.layers.{new}.mlp.down_proj"


def test_lora_x_atc_undoes_a_shuffle_of_layers_and_tells_its_cost(tmp_path: Path) -> None:
    old = llama(layers=4)
    order = [2, 0, 3, 1]
    new = {
        n.replace(f"layers.{i}.", f"layers.{order.index(i)}.") if (i := _layer(n)) is not None else n: t
        for n, t in old.items()
    }
    result = ported(old, new, tmp_path, "lora-x-atc", subspace_rank=4)
    assert {row.name: row.target for row in result.report.modules} == {
        f"model.layers.{i}.{name}": f"model.layers.{order.index(i)}.{name}"
        for i in range(4)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    assert "cost 0.000" in result.report.method_reason


def _layer(name: str) -> int | None:
    return int(name.split(".")[2]) if ".layers." in name else None


def test_a_transport_plan_is_optimal_and_keeps_both_margins() -> None:
    cost = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    plan = transport_plan(cost)
    torch.testing.assert_close(plan.sum(1), torch.full((4,), 0.25).double(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 1 / 6).double(), rtol=1e-3, atol=1e-4)
    from scipy.optimize import linprog

    rows = torch.kron(torch.eye(4), torch.ones(1, 6)).numpy()
    columns = torch.kron(torch.ones(1, 4), torch.eye(6)).numpy()
    import numpy as np

    best = linprog(cost.flatten().numpy(), A_eq=np.vstack([rows, columns]), b_eq=[0.25] * 4 + [1 / 6] * 6).fun
    assert float((plan * cost).sum()) == pytest.approx(best, abs=0.02)


def test_rows_and_columns_where_nothing_may_go_leave_the_plan_of_the_others_as_it_is() -> None:
    cost = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    wider = torch.full((4, 6), float("inf"))
    wider[:3, 1:5] = cost
    plan = transport_plan(wider)
    assert torch.equal(plan[:3, 1:5], transport_plan(cost))
    assert float(plan.sum()) == pytest.approx(1.0)
    assert not transport_plan(torch.full((2, 3), float("inf"))).any()


def test_a_role_is_the_path_behind_its_block() -> None:
    assert role_of(module(3, "mlp.down_proj"))[1] == "mlp.down_proj"


@pytest.mark.parametrize("method", ["prolora"])
def test_another_size_is_refused(method: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="equal sizes only"):
        ported(llama(), llama(1, width=30, mlp=50), tmp_path, method)


def test_a_threshold_in_words_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--threshold .much."):
        ported(llama(), llama(), tmp_path, "prolora", threshold="much")


def _spectrum(rows: int, columns: int, least: float = 0.05) -> Tensor:
    """A weight whose singular values fall smoothly from 1, without a gap to cut at."""
    dice = torch.Generator().manual_seed(5)
    u = torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=dice, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, min(rows, columns), generator=dice, dtype=torch.float64))[0]
    values = least + (1 - least) * torch.linspace(1.0, 0.0, min(rows, columns), dtype=torch.float64) ** 3
    return (u * values) @ v.T


@pytest.mark.parametrize("shape", [(300, 300), (700, 280), (280, 900)])
@pytest.mark.parametrize("asked", [{"rank": 90, "energy": None}, {"rank": None, "energy": 0.9}])
def test_large_weights_subspaces_are_those_of_the_full_decomposition(shape: tuple[int, int], asked: Any) -> None:
    weight = _spectrum(*shape)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    found_u, found_v = subspaces(weight.float(), **asked)
    r = found_u.shape[1]
    assert r == (asked["rank"] or rank_for_energy(s, 0.9))
    for exact, found in ((u[:, :r], found_u), (vh[:r].T, found_v)):
        assert _apart(found.T @ found, torch.eye(r)) < 2e-3
        probe = torch.randn(len(exact), 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        wanted = exact @ (exact.T @ probe)
        apart = found.double() @ (found.double().T @ probe) - wanted
        assert float(apart.norm() / wanted.norm()) < 1e-3
    # Pairs of one index belong together.
    assert _apart(found_u.T @ weight.float() @ found_v, torch.diag(s[:r]).float()) < 1e-3


@pytest.mark.parametrize("shape", [(300, 300), (700, 280), (280, 900), (40, 24)])
@pytest.mark.parametrize("method", ["lora-x", "lora-x edge", "prolora"])
@pytest.mark.parametrize("scale", [1.0, 1e-10])
def test_a_few_directions_are_carried_as_the_multiplied_maps_carry_them(
    shape: tuple[int, int], method: str, scale: float
) -> None:
    new = (_spectrum(*shape) * scale).float()
    old = (_spectrum(*shape) * scale + 0.1 * scale * weight(*shape, 3).double() / math.sqrt(shape[0])).float()
    if method == "prolora":
        found = _carried(old, new, None, None, None)
    else:
        found = lora_x(None, new, edge=0.35 if method.endswith("edge") else None)
    assert isinstance(found, Chained)
    up, down = weight(shape[0], 4, 6), weight(4, shape[1], 7)
    images = found.images(up, down)
    assert len(images) == len(found.terms)
    for (left, right), (moved_up, moved_down) in zip(found.terms, images, strict=True):
        assert relative_error(moved_up, left @ up) < 1e-3
        assert relative_error(moved_down, right.on_the_right(down)) < 1e-3


@pytest.mark.parametrize("least", [0.032, 0.01, 0.0])
@pytest.mark.parametrize("scale", [1.0, 1e-23])
def test_small_directions_and_small_weights_keep_their_bases_orthonormal(least: float, scale: float) -> None:
    for shape in ((640, 640), (300, 700)):
        weight = (_spectrum(*shape, least=least) * scale).float()
        for basis in subspaces(weight, min(shape) - 10, None):
            assert _apart(basis.T @ basis, torch.eye(basis.shape[1])) < 2e-3


def _apart(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.matrix_norm(one - other, 2))
