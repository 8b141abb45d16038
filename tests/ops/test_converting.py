"""Other formats: as it is, in another exact form, on the base, or not at all; never less without a word."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_made import close, factors, noise, unet_lora, with_magnitude
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from regraft import Adapter, ModuleRef, OutputError, UsageError, load_adapter
from regraft.formats import Format, Written, get_format
from regraft.ops import convert as ops
from regraft.ops._writing import check_back
from regraft.ops.convert import convert_adapter, plan_conversion
from regraft.tensors import InMemory
from regraft.updates import Diff, Full, GLora, Ia3, LoHa, LoKr, LowRank, Oft, Tucker, Update
from toys import llama, save_base

PATH = "model.layers.0.self_attn.q_proj"
REF = ModuleRef("model", PATH)


def _ref(*shape: int, seed: int = 0) -> InMemory:
    return InMemory(noise(*shape, seed=seed))


def _loha(out: int, into: int, rank: int = 2) -> LoHa:
    return LoHa(_ref(out, rank), _ref(rank, into, seed=1), _ref(out, rank, seed=2), _ref(rank, into, seed=3), 0.5)


def _lokr(out: int, into: int) -> LoKr:
    return LoKr(0.5, w1=_ref(4, 4), w2_a=_ref(out // 4, 2, seed=1), w2_b=_ref(2, into // 4, seed=2))


ADDITIVE: dict[str, Update] = {"loha": _loha(24, 24), "lokr": _lokr(24, 24), "lora": factors((24, 24), 3, 0)}
BOUND: dict[str, Update] = {
    "ia3": Ia3(_ref(24, seed=4), InMemory(torch.tensor(False))),
    "oft": Oft(_ref(6, 4, 4, seed=5)),
    "glora": GLora(_ref(24, 2), _ref(2, 24, seed=1), _ref(24, 2, seed=2), _ref(2, 24, seed=3), 1.0),
    "dora per input": replace(factors((24, 24), 3, 0), magnitude=InMemory(noise(1, 24).abs() + 1)),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return llama()


@pytest.fixture(scope="module")
def base(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(weights, tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Convert an adapter that no file holds; returns what comes back from disk, and the record."""

    def call(adapter: Adapter, format: str, **options: Any) -> tuple[Adapter, Any]:
        monkeypatch.setattr(ops, "read_whole", lambda path, names=None: adapter)
        target = tmp_path / ("out" if format == "peft" else "out.safetensors")
        report = convert_adapter(tmp_path / "in.safetensors", target, format, **options)
        names = {component: tuple(updates) for component, updates in adapter.components().items()}
        return (load_adapter(target, names=names) if target.exists() else adapter), report

    return call


def _alone(update: Update, ref: ModuleRef = REF, format: str = "lycoris") -> Adapter:
    return Adapter({ref: update}, format, family="llama")


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_what_equals_a_lora_is_written_as_one_where_the_format_lacks_it(kind: str, convert: Any) -> None:
    back, report = convert(_alone(ADDITIVE[kind]), "peft")
    update = back.updates[REF]
    assert close(update.delta(), ADDITIVE[kind].delta())
    if update.kind != kind:
        assert [(row.kind, row.becomes, row.status) for row in report.changes] == [(kind, "lora", "rewritten")]
        assert f"rank {update.rank}" in report.changes[0].reason


def test_tucker_becomes_a_lora_of_the_same_rank(convert: Any) -> None:
    tucker = Tucker(_ref(320, 4, 1, 1), _ref(4, 4, 3, 3, seed=1), _ref(4, 320, 1, 1, seed=2), 0.5)
    ref = ModuleRef("unet", "down_blocks.0.resnets.0.conv1")
    back, report = convert(Adapter({ref: tucker}, "lycoris", family="sd15"), "diffusers")
    assert back.updates[ref].rank == 4
    assert close(back.updates[ref].delta(), tucker.delta())
    assert report.changes[0].status == "rewritten"


@pytest.mark.parametrize("kind", BOUND)
def test_what_needs_the_base_is_refused_without_it_and_nothing_is_written(
    kind: str, convert: Any, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=rf"{PATH}: a \w+ would be lost.*--base"):
        convert(_alone(BOUND[kind]), "peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", BOUND)
def test_on_the_base_its_whole_change_is_refactored(
    kind: str, convert: Any, base: Path, weights: dict[str, Tensor]
) -> None:
    update, weight = BOUND[kind], weights[f"{PATH}.weight"]
    meant = update.merged(weight) - weight
    back, report = convert(_alone(update), "peft", base=base, energy=1.0)
    row = report.changes[0]
    assert row.status == "merged"
    assert row.energy_kept == pytest.approx(1.0)
    assert back.updates[REF].magnitude is None
    assert close(back.updates[REF].merged(weight) - weight, meant, 1e-4)
    back, report = convert(_alone(update), "peft", base=base, energy=0.9, overwrite=True)
    error = float((back.updates[REF].delta() - meant).square().sum() / meant.square().sum())
    assert error <= 0.1 + 1e-6
    assert 1 - error == pytest.approx(report.changes[0].energy_kept, abs=1e-5)


def test_a_rank_close_to_full_is_said_to_be(convert: Any, base: Path) -> None:
    _, report = convert(_alone(BOUND["oft"]), "peft", base=base)
    assert "of 24, close to full" in report.changes[0].reason


def test_the_dry_run_names_every_loss_and_writes_nothing(convert: Any, base: Path, tmp_path: Path) -> None:
    updates = {ModuleRef("model", f"model.layers.{i}.self_attn.q_proj"): BOUND["ia3"] for i in range(3)}
    adapter = Adapter(updates, "lycoris", family="llama")
    _, report = convert(adapter, "peft", dry_run=True)
    assert [row.status for row in report.changes] == ["lost"] * 3
    assert all("PEFT" in row.reason or "peft" in row.reason for row in report.changes)
    _, report = convert(adapter, "peft", base=base, dry_run=True)
    assert [row.status for row in report.changes] == ["merged"] * 3
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="3 modules in all"):
        convert(adapter, "peft")


class _Plain(nn.Module):
    """Two linear layers, one under DoRA."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))


def test_dora_keeps_its_magnitude_where_pefts_own_conversion_forgets_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Plain().llama
    save_base({name: t.detach().clone() for name, t in model.state_dict().items()}, tmp_path / "base.safetensors")
    plain = copy.deepcopy(model)
    dora = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, use_dora=True))
    for name, parameter in dora.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
        if "magnitude" in name:
            parameter.data = parameter.data * 1.3
    dora.save_pretrained(tmp_path / "dora")
    ids = torch.arange(8)[None]
    expected = dora(ids).logits
    # The magnitude moves the output: losing it would show.
    lost = load_adapter(tmp_path / "dora")
    stripped = {ref: replace(update, magnitude=None) for ref, update in lost.updates.items()}
    replace(lost, updates=stripped).save(tmp_path / "stripped")
    assert _gap(plain, tmp_path / "stripped", ids, expected) > 1e-2
    mixed = replace(lost, updates={**lost.updates, next(iter(lost.updates)): next(iter(stripped.values()))})
    with pytest.raises(OutputError):
        mixed.save(tmp_path / "mixed")
    convert_adapter(tmp_path / "dora", tmp_path / "again", "peft", base=tmp_path / "base.safetensors")
    assert _gap(plain, tmp_path / "again", ids, expected) <= 1e-5
    # Refactored on the base, it is a plain LoRA with the same outputs.
    adapter = load_adapter(tmp_path / "dora")
    forms = ops._Forms(adapter, ops.open_base(tmp_path / "base.safetensors"), 1.0, dry_run=False)
    updates = {ref: next(forms.of(ref, update)).updates[ref] for ref, update in adapter.updates.items()}
    replace(adapter, updates=updates).save(tmp_path / "lora")
    assert _gap(plain, tmp_path / "lora", ids, expected) <= 1e-5


def _gap(model: nn.Module, adapter: Path, ids: Tensor, expected: Tensor) -> float:
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), adapter)
    return float((loaded(ids).logits - expected).detach().abs().max())


def test_a_second_kind_beside_dora_is_put_on_the_base_or_refused(
    convert: Any, base: Path, weights: dict[str, Tensor]
) -> None:
    other = ModuleRef("model", "model.layers.1.self_attn.q_proj")
    dora = replace(factors((24, 24), 3, 5), magnitude=InMemory(noise(24).abs() + 1))
    adapter = Adapter({REF: dora, other: factors((24, 24), 2, 9)}, "kohya", family="llama")
    with pytest.raises(OutputError, match=rf"{PATH}: a dora would be lost"):
        convert(adapter, "peft")
    back, report = convert(adapter, "peft", base=base, energy=1.0)
    weight = weights[f"{PATH}.weight"]
    assert [row.name for row in report.changes] == [PATH]
    assert close(back.updates[REF].merged(weight), dora.merged(weight))


def test_dora_goes_through_kohya_and_diffusers_with_its_magnitude(convert: Any, tmp_path: Path) -> None:
    adapter = with_magnitude(unet_lora())
    for format in ("kohya", "diffusers", "kohya"):
        back, report = convert(adapter, format, overwrite=True)
        assert not report.changes
        for ref, update in back.updates.items():
            assert update.magnitude is not None
            assert torch.equal(update.magnitude.load().flatten(), adapter.updates[ref].magnitude.load().flatten())


def _holding(*kinds: str) -> Format:
    """A format of plain LoRA, without a bias, and of these kinds."""

    def write(adapter: Adapter) -> Written:
        for ref, update in adapter.updates.items():
            if update.kind not in kinds or getattr(update, "bias", None) is not None:
                raise OutputError(f"picky files can't hold a {update.kind}", key=str(ref))
        return Written({}, {})

    return Format("picky", "", 0, lambda file: False, lambda file, names: Adapter({}, "picky"), write)


def _planned(
    adapter: Adapter, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, *rest: Any, **options: Any
) -> Any:
    monkeypatch.setattr(ops, "get_format", lambda name: _holding(*kinds))
    return plan_conversion(adapter, "picky", *rest, **options)


def test_the_bias_of_b_becomes_a_change_of_the_layers_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    update = replace(factors((24, 24), 2, 0, scale=2.0), bias=_ref(24, seed=7))
    plan = _planned(_alone(update), ("lora", "diff"), monkeypatch)
    assert torch.allclose(plan.adapter.updates[ModuleRef("model", f"{PATH}.bias")].delta(), 2.0 * noise(24, seed=7))
    assert close(plan.adapter.updates[REF].delta(), update.delta())
    assert [row.status for row in _planned(_alone(update), ("lora",), monkeypatch).changes] == ["lost"]


def test_a_whole_parameter_becomes_its_change_or_a_lora_of_it(
    monkeypatch: pytest.MonkeyPatch, base: Path, weights: dict[str, Tensor]
) -> None:
    ref, change = ModuleRef("model", f"{PATH}.weight"), noise(24, 24, seed=8)
    adapter = Adapter({ref: Full(InMemory(weights[ref.path] + change), ref.path)}, "peft", family="llama")
    opened = ops.open_base(base)
    as_change = _planned(adapter, ("lora", "diff"), monkeypatch, opened).adapter.updates[ref]
    assert isinstance(as_change, Diff)
    assert close(as_change.delta(), change, 1e-4)
    as_lora = _planned(adapter, ("lora",), monkeypatch, opened, energy=1.0).adapter.updates[REF]
    assert close(as_lora.delta(), change, 1e-4)
    assert [row.status for row in _planned(adapter, ("lora", "diff"), monkeypatch).changes] == ["lost"]


def test_a_change_stored_whole_is_refactored_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, base: Path, weights: dict[str, Tensor]
) -> None:
    ref = ModuleRef("model", f"{PATH}.weight")
    adapter = Adapter({ref: Diff(_ref(24, 24), ref.path)}, "lycoris", family="llama")
    assert [row.status for row in _planned(adapter, ("lora",), monkeypatch).changes] == ["lost"]
    asked = _planned(adapter, ("lora",), monkeypatch, energy=1.0)
    assert close(asked.adapter.updates[REF].delta(), noise(24, 24))
    value = _planned(adapter, ("full",), monkeypatch, ops.open_base(base)).adapter.updates[ref]
    assert torch.allclose(value.merged(weights[ref.path]), weights[ref.path] + noise(24, 24), atol=1e-6)


def test_pefts_ia3_takes_the_layers_bias_along(tmp_path: Path, convert: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"query": nn.Linear(8, 6)})
    model.forward = lambda x: model["query"](x)  # type: ignore[method-assign]
    save_base({name: t.detach().clone() for name, t in model.state_dict().items()}, tmp_path / "base.safetensors")
    plain = copy.deepcopy(model)
    tuned = get_peft_model(model, IA3Config(target_modules=["query"], feedforward_modules=[]))
    factor = noise(6, 1) * 10 + 1
    for parameter in (p for name, p in tuned.named_parameters() if "ia3" in name):
        parameter.data = factor.clone()
    meant = tuned.merge_and_unload()
    update = Ia3(InMemory(factor), InMemory(torch.tensor(0)), "peft")
    back, _ = convert(
        _alone(update, ModuleRef("model", "query")), "peft", base=tmp_path / "base.safetensors", energy=1.0
    )
    found = back.updates[ModuleRef("model", "query")]
    assert close(found.merged(plain["query"].weight.detach()), meant["query"].weight.detach())
    assert found.bias is not None
    bias = plain["query"].bias.detach() + found.scale * found.bias.load()
    assert close(bias, meant["query"].bias.detach())


def test_a_kernel_that_a_loha_flattens_becomes_a_convolutions_lora(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ref = ModuleRef("model", "net.conv")
    adapter = Adapter({ref: _loha(6, 4 * 9)}, "lycoris")
    assert [row.status for row in _planned(adapter, ("lora",), monkeypatch).changes] == ["lost"]
    base = ops.open_base(save_base({"net.conv.weight": noise(6, 4, 3, 3)}, tmp_path / "base.safetensors"))
    found = _planned(adapter, ("lora",), monkeypatch, base).adapter.updates[ref]
    assert (found.shape, found.rank) == ((6, 4, 3, 3), 4)
    assert close(found.delta().flatten(), adapter.updates[ref].delta().flatten())


def test_tokens_that_would_be_lost_are_named(convert: Any) -> None:
    adapter = replace(unet_lora(), tokens={"<cat>": _ref(8)})
    _, report = convert(adapter, "peft", dry_run=True)
    assert [(row.name, row.status) for row in report.changes] == [("<cat>", "lost")]
    with pytest.raises(OutputError, match="<cat>"):
        convert(adapter, "peft")


def test_a_writer_that_forgets_a_part_is_caught_before_anything_is_written(tmp_path: Path) -> None:
    adapter, kohya = with_magnitude(unet_lora()), get_format("kohya")
    assert kohya.write is not None
    written = kohya.write(adapter)
    check_back(adapter, written, kohya, tmp_path)
    forgetful = [key for key in written.tensors if key.endswith("dora_scale")][:1]
    for lost in (forgetful, [key for key in written.tensors if "to_q" in key]):
        tensors = {key: tensor for key, tensor in written.tensors.items() if key not in lost}
        with pytest.raises(OutputError, match="read back"):
            check_back(adapter, Written(tensors, written.metadata), kohya, tmp_path)
    halved = {key: tensor / 2 if "lora_up" in key else tensor for key, tensor in written.tensors.items()}
    with pytest.raises(OutputError, match="another change"):
        check_back(adapter, Written(halved, written.metadata), kohya, tmp_path)


@pytest.mark.parametrize("energy", [0.0, 1.5, float("nan")])
def test_an_energy_that_is_no_share_is_a_usage_error(energy: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no share"):
        convert_adapter(tmp_path / "in", tmp_path / "out", "kohya", energy=energy)


def test_half_precision_is_asked_for_and_given(convert: Any) -> None:
    adapter = unet_lora()
    back, _ = convert(adapter, "diffusers", save_dtype=torch.bfloat16)
    for ref, update in back.updates.items():
        assert isinstance(update, LowRank)
        assert update.up.dtype == torch.bfloat16
        assert close(update.delta(), adapter.updates[ref].delta(), 2e-2)
