"""Effect matching: what it must give where the answer is known, and what a port by it leaves behind."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regraft import Adapter, ModuleRef, Refused, open_base
from regraft.adapter import MODEL
from regraft.carry import Settings
from regraft.methods import effect as effect_module
from regraft.methods._moments import Moments, cut_in
from regraft.methods.task import Running
from regraft.port import PortResult, port
from regraft.runtime import applied, load_model
from regraft.runtime.walk import Walks
from regraft.tensors import InMemory
from regraft.updates import Diff, LowRank
from verify import tiny

FEW = Running(n_inputs=12)
ROLES = ("q_proj", "v_proj", "down_proj")


def adapter_for(base: Path, roles: tuple[str, ...] = ROLES, **settings: Any) -> Adapter:
    return tiny.lora(load_model(base).main, roles, **settings)


def ported(adapter: Adapter, old: Path, new: Path, settings: Settings | None = None, **options: Any) -> PortResult:
    return port(
        adapter, open_base(old), open_base(new), "effect", settings=settings or Settings(running=FEW), **options
    )


def logits(base: Path, adapter: Adapter | None) -> Tensor:
    model = load_model(base)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad(), applied(model.components, adapter):
        return model.main(input_ids=ids).logits


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    return {ref.path.removesuffix(".weight"): update.delta() for ref, update in adapter.updates.items()}


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert])
def test_on_the_same_base_it_is_the_copy(make: Any, tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    roles = {tiny.llama: ROLES, tiny.gpt2: ("c_attn", "mlp.c_fc"), tiny.bert: ("query", "output.dense")}[make]
    adapter = adapter_for(base, roles)
    result = ported(adapter, base, base)
    for path, delta in deltas(result.adapter).items():
        assert error(delta, adapter.updates[ModuleRef(MODEL, path)].delta()) < 1e-4


def test_on_the_same_base_it_is_the_copy_beside_a_bias_that_the_layers_above_read(tmp_path: Path) -> None:
    base = tiny.bert(tmp_path / "base")
    adapter = tiny.lora(load_model(base).main, ("query", "output.dense"))
    bias = ModuleRef(MODEL, "encoder.layer.0.attention.output.dense.bias")
    change = Diff(InMemory(torch.randn(16, generator=torch.Generator().manual_seed(3))), "bias.diff_b")
    adapter = replace(adapter, updates={**adapter.updates, bias: change})
    result = ported(adapter, base, base).adapter
    for ref, update in adapter.updates.items():
        assert error(result.updates[ref].delta(), update.delta()) < 1e-4


def test_on_the_same_pipeline_it_is_the_copy_for_convolutions_and_text_encoders(tmp_path: Path) -> None:
    base = tiny.pipeline(tmp_path / "base")
    models = load_model(base).components
    adapter = tiny.lora(models, ("to_q", "conv1", "conv_out", "q_proj"))
    assert {ref.component for ref in adapter.updates} == {"unet", "text_encoder"}
    result = ported(adapter, base, base, Settings(running=Running(n_inputs=16)))
    for ref, update in result.adapter.updates.items():
        assert error(update.delta(), adapter.updates[ref].delta()) < 1e-3


def test_a_model_alone_takes_a_pipelines_adapter_once(tmp_path: Path) -> None:
    """Of a U-Net alone the base names no component, the adapter does."""
    base = tiny.unet(tmp_path / "base")
    adapter = tiny.lora({"unet": load_model(base).main}, ("to_q",))
    assert {ref.component for ref in adapter.updates} == {"unet"}
    result = ported(adapter, base, base, Settings(running=Running(n_inputs=4)))
    assert set(result.adapter.updates) == set(adapter.updates)


def test_with_a_full_pull_the_old_models_outputs_come_back_where_one_layer_drifted(old: Path, tmp_path: Path) -> None:
    """Only q_proj of the first layer differs, so that both read the same inputs there: the answer is exact."""
    model = load_model(old)
    with torch.no_grad():
        weight = model.main.model.layers[0].self_attn.q_proj.weight
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    model.main.save_pretrained(tmp_path / "new")
    adapter = adapter_for(old, ("layers.0.self_attn.q_proj",))
    settings = Settings(running=FEW, rank="full")
    result = ported(adapter, old, tmp_path / "new", settings, pull=1.0, ridge=1e-9)
    assert error(logits(tmp_path / "new", result.adapter), logits(old, adapter)) < 1e-3
    without = ported(adapter, old, tmp_path / "new", settings, pull=0.0)
    for path, delta in deltas(without.adapter).items():
        assert error(delta, adapter.updates[ModuleRef(MODEL, path)].delta()) < 1e-4


def test_with_a_full_pull_the_ported_model_is_nearer_to_the_old_one_than_with_a_copy(old: Path, drifted: Path) -> None:
    adapter = adapter_for(old)
    wanted = logits(old, adapter)
    copy = port(adapter, open_base(old), open_base(drifted), "copy").adapter
    settings = Settings(running=Running(n_inputs=64), rank="full")
    matched = ported(adapter, old, drifted, settings, pull=1.0).adapter
    assert error(logits(drifted, matched), wanted) < 0.9 * error(logits(drifted, copy), wanted)


def test_without_a_prior_least_squares_finds_the_matrix_that_made_the_data() -> None:
    torch.manual_seed(0)
    x, matrix = torch.randn(200, 6), torch.randn(4, 6)
    moments = Moments.of(4, 6)
    moments.add(x[:120], x[:120] @ matrix.T)
    moments.add(x[120:], x[120:] @ matrix.T)
    prior = torch.randn(4, 6)
    assert error(moments.solve(prior, 1e-9).float(), matrix) < 1e-5
    assert error(moments.solve(prior, 1e9).float(), prior) < 1e-5
    assert moments.left(matrix) == pytest.approx(0, abs=1e-3)


def test_the_cut_in_the_metric_of_the_inputs_leaves_less_error_on_them_than_a_plain_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 8) * torch.tensor([9.0, 5, 3, 1, 1, 0.5, 0.1, 0.1])
    delta, moments = torch.randn(6, 8), Moments.of(6, 8)
    moments.add(x, x @ delta.T)
    up, down, lost = cut_in(delta, 2, moments.metric(0.0))
    plain_up, plain_down, plain_lost = cut_in(delta, 2)
    assert moments.left(up @ down) < moments.left(plain_up @ plain_down)
    singular = torch.linalg.svdvals(delta)
    assert plain_lost == pytest.approx(float(singular[2:].square().sum() / singular.square().sum()), abs=1e-5)
    assert lost > plain_lost


@pytest.mark.parametrize("rank", [1, 3, 0.9])
def test_the_result_has_the_wanted_rank_and_tells_the_loss(old: Path, drifted: Path, rank: int | float) -> None:
    result = ported(adapter_for(old), old, drifted, Settings(running=FEW, rank=rank))
    rows = [row for row in result.report.modules if row.status == "ported"]
    assert len(rows) == 6
    if isinstance(rank, int):
        assert {row.rank_out for row in rows} == {rank}
    assert all(row.cut_loss is not None and 0 < row.cut_loss < 1 for row in rows)


def test_by_default_every_module_keeps_the_adapters_rank(old: Path, drifted: Path) -> None:
    result = ported(adapter_for(old, rank=3), old, drifted)
    assert {update.rank for update in result.adapter.updates.values()} == {3}
    assert result.report.method == "effect"
    assert result.report.figures["pull"] == 0.5


def test_the_pull_can_be_left_to_the_evidence(old: Path, drifted: Path) -> None:
    result = ported(adapter_for(old), old, drifted, pull="auto")
    assert result.report.figures["pull"] in (0.0, 0.5, 1.0)


def test_strength_zero_is_the_base(old: Path, drifted: Path) -> None:
    result = ported(adapter_for(old), old, drifted, Settings(running=FEW, strength=0.0))
    assert torch.equal(logits(drifted, result.adapter), logits(drifted, None))


def test_an_empty_adapter_without_a_pull_gives_nothing(old: Path, drifted: Path) -> None:
    result = ported(adapter_for(old, size=0.0), old, drifted, pull=0.0)
    assert all(float(delta.abs().max()) < 1e-5 for delta in deltas(result.adapter).values())


def test_dense_where_the_format_holds_it_and_a_lora_of_full_rank_elsewhere(old: Path, drifted: Path) -> None:
    adapter = adapter_for(old)
    full = Settings(running=FEW, rank="full")
    peft = ported(adapter, old, drifted, full).adapter
    assert {update.rank for update in peft.updates.values()} == {8, 16}  # v_proj of one key head has 8 rows
    dense = ported(Adapter(adapter.updates, "kohya"), old, drifted, full).adapter
    assert all(isinstance(update, Diff) for update in dense.updates.values())
    for path, delta in deltas(dense).items():
        assert error(deltas(peft)[path], delta) < 1e-4


def test_dora_is_matched_as_the_change_that_it_makes(old: Path) -> None:
    model = load_model(old).main
    plain = adapter_for(old, ("q_proj",))
    updates = {}
    for ref, update in plain.updates.items():
        assert isinstance(update, LowRank)
        weight = model.get_submodule(ref.path).weight
        updates[ref] = LowRank(update.up, update.down, update.scale, magnitude=InMemory(weight.norm(dim=1) * 1.2))
    dora = Adapter(updates, "peft")
    result = ported(dora, old, old, Settings(running=Running(n_inputs=64), rank="full"))
    assert error(logits(old, result.adapter), logits(old, dora)) < 1e-3


def test_auto_refuses_an_unrelated_base_before_any_model_is_loaded(
    old: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft.runtime.both.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    bases = open_base(old), open_base(tiny.llama(folder / "other", seed=5))
    with pytest.raises(Refused):
        port(adapter_for(old), *bases, "auto", settings=Settings(running=FEW))


def test_an_interrupt_leaves_neither_threads_nor_a_file(
    old: Path, drifted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(effect_module, "_solve", interrupted)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        ported(adapter_for(old), old, drifted).save(tmp_path / "out")
    assert threading.active_count() == before
    assert not (tmp_path / "out").exists()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_a_walk_stops_at_each_module_and_reads_what_was_changed_on_the_way() -> None:
    torch.manual_seed(0)
    model, x = Two(), torch.randn(5, 3)
    plain = model(x)
    places = {"first": model.first, "second": model.second}
    with Walks([lambda: model(x), lambda: model(2 * x)], places, "instead") as walks:
        stops = [walk.at("first") for walk in walks.walks]
        assert [stop[0].tolist() for stop in stops if stop] == [x.tolist(), (2 * x).tolist()]
        assert torch.equal(model(x), plain)
        walks.walks[0].answer(torch.zeros_like(model.first(x)))
        at_second = walks.walks[0].at("second")
        assert at_second is not None
        assert not at_second[0].any()
        assert torch.equal(walks.walks[0].finish(), model.second.bias.expand(5, 2))
        assert torch.equal(walks.walks[1].finish(), model(2 * x))
    assert "forward" not in model.first.__dict__
    assert torch.equal(plain, model(x))


def test_walks_through_one_model_mind_their_own_stops_and_leave_gradients_as_they_are() -> None:
    model, x = Two(), torch.randn(5, 3)
    with Walks([lambda: model(x)], {"first": model.first}, "after") as left:
        with Walks([lambda: model(-x)], {"second": model.second}, "after") as right:
            for walks, key, given in ((left, "first", x), (right, "second", model.first(-x).relu())):
                stop = walks.walks[0].at(key)
                assert stop is not None
                assert torch.equal(stop[0], given)
            assert torch.is_grad_enabled()
        assert not model.second._forward_hooks
        assert torch.equal(left.walks[0].finish(), model(x))
    assert not model.first._forward_hooks


def test_an_error_in_the_model_reaches_whoever_walks_it() -> None:
    model = Two()
    places = {"second": model.second}
    with Walks([lambda: model(torch.zeros(1, 7))], places, "after") as walks, pytest.raises(RuntimeError):
        walks.walks[0].at("second")
    assert not model.second._forward_hooks
