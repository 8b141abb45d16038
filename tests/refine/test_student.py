"""The student says what the adapter says that it was started from, and gives it back unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.errors import InputError
from regraft.refine.student import student_of
from regraft.runtime import Loaded, applied, load_model
from regraft.tensors import InMemory
from regraft.updates import Diff, FourierFT, GLora, Ia3, LoKr, LowRank, Oft, SpectralShift, Subspace, Update, Vera
from regraft.updates.vera import Seed
from verify import tiny


def with_magnitudes(adapter: Adapter, model: Loaded) -> Adapter:
    """The same as DoRA, its magnitudes a tenth above the norms of the base's rows."""
    updates = {}
    for ref, update in adapter.updates.items():
        assert isinstance(update, LowRank)
        weight = model.main.get_submodule(ref.path).weight.detach()
        updates[ref] = replace(update, magnitude=InMemory(1.1 * weight.norm(dim=1)))
    return replace(adapter, updates=updates)


def with_biases(adapter: Adapter) -> Adapter:
    """The same with a bias on every second update, as PEFT's ``lora_bias`` has it, and with a scale."""
    updates = {}
    for i, (ref, update) in enumerate(adapter.updates.items()):
        assert isinstance(update, LowRank)
        bias = InMemory(torch.linspace(-0.5, 0.5, update.shape[0]))
        updates[ref] = replace(update, scale=2 * update.scale, bias=bias if i % 2 else None)
    return replace(adapter, updates=updates)


def random(*shape: int, seed: int = 0) -> InMemory:
    return InMemory(0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def text_output(model: Loaded) -> Tensor:
    with torch.no_grad():
        return model.main(input_ids=torch.arange(3, 19)[None]).logits


@pytest.mark.parametrize("kind", ["lora", "dora", "bias"])
def test_a_student_says_what_its_start_says_and_leaves_the_base_alone(tmp_path: Path, kind: str) -> None:
    model = load_model(tiny.llama(tmp_path / "base"))
    start = tiny.lora(model.main, ("q_proj", "down_proj"))
    if kind == "dora":
        start = with_magnitudes(start, model)
    if kind == "bias":
        start = with_biases(start)
    plain = text_output(model)
    with applied(model.components, start):
        wanted = text_output(model)
    with student_of(model, start) as student:
        torch.testing.assert_close(text_output(student.model), wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(text_output(model), plain)
        back = replace(start, updates=student.updates())
    with applied(model.components, back):
        torch.testing.assert_close(text_output(model), wanted, rtol=1e-4, atol=1e-5)


def test_biases_of_a_start_are_trained(tmp_path: Path) -> None:
    model = load_model(tiny.llama(tmp_path / "base"))
    start = with_biases(tiny.lora(model.main, ("q_proj", "down_proj")))
    with student_of(model, start) as student:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.5)
        said = text_output(student.model)
        back = replace(start, updates=student.updates())
    with applied(model.components, back):
        torch.testing.assert_close(text_output(model), said, rtol=1e-4, atol=1e-5)


def test_a_dora_with_a_bias_is_kept_as_it_is(tmp_path: Path) -> None:
    model = load_model(tiny.llama(tmp_path / "base"))
    start = with_biases(with_magnitudes(tiny.lora(model.main, ("q_proj", "down_proj")), model))
    with applied(model.components, start):
        wanted = text_output(model)
    with student_of(model, start) as student:
        torch.testing.assert_close(text_output(student.model), wanted, rtol=1e-4, atol=1e-5)
        assert {ref for ref, u in start.updates.items() if getattr(u, "bias", None) is not None} == set(student.rest)


def test_convolutions_are_trained_in_their_own_shape(tmp_path: Path) -> None:
    model = load_model(tiny.unet(tmp_path / "unet"))
    start = tiny.lora({"unet": model.main}, ("conv1", "to_q"))
    with student_of(model, start) as student:
        assert set(student.layers) == set(start.updates)
        for ref, update in student.updates().items():
            torch.testing.assert_close(update.delta(), start.updates[ref].delta(), rtol=1e-4, atol=1e-6)


def test_gpt2s_transposed_layers_are_trained_as_they_lie(tmp_path: Path) -> None:
    model = load_model(tiny.gpt2(tmp_path / "gpt2"))
    start = tiny.lora(model.main, ("c_attn", "c_fc"))
    with applied(model.components, start):
        wanted = text_output(model)
    with student_of(model, start) as student:
        torch.testing.assert_close(text_output(student.model), wanted, rtol=1e-4, atol=1e-5)
        for ref, update in student.updates().items():
            torch.testing.assert_close(update.delta(), start.updates[ref].delta(), rtol=1e-4, atol=1e-6)


def numbers(*shape: int, seed: int = 0) -> InMemory:
    return InMemory(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3)


@pytest.mark.parametrize("kind", ["lokr", "vera", "vera drawn", "fourierft"])
def test_what_equals_a_lora_is_trained_as_one(kind: str, tmp_path: Path) -> None:
    model = load_model(tiny.llama(tmp_path / "base"))
    made: dict[str, Update] = {
        "lokr": LoKr(1.0, w1=numbers(4, 4), w2=numbers(4, 4, seed=1)),
        "vera": Vera(numbers(16), numbers(3, seed=1), numbers(3, 16, seed=2), numbers(16, 3, seed=3)),
        "vera drawn": Vera(numbers(16), numbers(3, seed=1), None, None, Seed(5, 2)),
        "fourierft": FourierFT(numbers(20), 100.0, 7),
    }
    start = replace(tiny.lora(model.main, ("o_proj",)), config=None)
    refs = list(start.updates)[:2]
    start = replace(start, updates=dict.fromkeys(refs, made[kind]))
    with applied(model.components, start):
        wanted = text_output(model)
    assert not torch.allclose(text_output(model), wanted, atol=1e-3)
    with student_of(model, start) as student:
        assert set(student.layers) == set(refs)
        torch.testing.assert_close(text_output(student.model), wanted, rtol=1e-3, atol=1e-4)
        assert all(isinstance(update, LowRank) for update in student.updates().values())


def test_a_higher_rank_adds_directions_without_effect_that_can_be_trained(tmp_path: Path) -> None:
    model = load_model(tiny.llama(tmp_path / "base"))
    start = tiny.lora(model.main, ("q_proj",), rank=2)
    with student_of(model, start, rank=5) as student:
        for ref, update in student.updates().items():
            assert isinstance(update, LowRank)
            assert update.rank == 5
            torch.testing.assert_close(update.delta(), start.updates[ref].delta(), rtol=1e-4, atol=1e-6)
            assert update.down.load()[2:].abs().min() > 0


def test_further_modules_begin_at_zero(tmp_path: Path) -> None:
    model = load_model(tiny.llama(tmp_path / "base"))
    start = tiny.lora(model.main, ("q_proj",))
    with student_of(model, start, targets=("*.o_proj",)) as student:
        added = ModuleRef(MODEL, "model.layers.0.self_attn.o_proj")
        assert added in student.layers
        assert not student.updates()[added].delta().any()
    with pytest.raises(InputError, match="no module of the new base matches"), student_of(model, start, targets=("x",)):
        pass


def test_what_cannot_be_trained_stays_as_it_was_ported(tmp_path: Path) -> None:
    model = load_model(tiny.llama(tmp_path / "base"))
    start = tiny.lora(model.main, ("q_proj",))
    norm = ModuleRef(MODEL, "model.norm.weight")
    shift = Diff(InMemory(torch.full((16,), 0.5)), "model.norm.diff")
    start = replace(start, updates={**start.updates, norm: shift})
    with applied(model.components, start):
        wanted = text_output(model)
    with student_of(model, start) as student:
        assert student.updates()[norm] is shift
        torch.testing.assert_close(text_output(student.model), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["svdiff", "lorax", "oft", "ia3", "glora", "diff"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_what_acts_on_the_weight_is_trained_as_its_lora(kind: str, make: Any, tmp_path: Path) -> None:
    model = load_model(make(tmp_path / "base"))
    path = "model.layers.1.self_attn.q_proj" if make is tiny.llama else "transformer.h.1.attn.c_proj"
    made: dict[str, Update] = {
        "svdiff": SpectralShift(random(16)),
        "lorax": Subspace(random(3)),
        "oft": Oft(random(4, 4, 4)),
        "ia3": Ia3(random(16), InMemory(torch.tensor(0))),
        "glora": GLora(random(16, 2), random(2, 16, seed=1), random(16, 2, seed=2), random(2, 16, seed=3), 1.0),
        "diff": Diff(random(16, 16), f"{path}.diff"),
    }
    ref = ModuleRef(MODEL, path)
    start = Adapter({ModuleRef(MODEL, f"{path}.weight") if kind == "diff" else ref: made[kind]}, "lycoris")
    plain = text_output(model)
    with applied(model.components, start):
        wanted = text_output(model)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    with student_of(model, start) as student:
        assert {home: update.kind for home, update in student.updates().items()} == {ref: "lora"}
        torch.testing.assert_close(text_output(student.model), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [1, 16])
def test_a_norm_s_shift_is_kept_as_the_change_of_its_weight(count: int, tmp_path: Path) -> None:
    """Beside LoRAs: no file holds those and spectral shifts, too."""
    model = load_model(tiny.llama(tmp_path / "base"))
    layer, norm = ModuleRef(MODEL, "model.layers.1.self_attn.q_proj"), ModuleRef(MODEL, "model.norm")
    shifts: dict[ModuleRef, Update] = {layer: SpectralShift(random(16)), norm: SpectralShift(random(count, seed=1))}
    start = Adapter(shifts, "svdiff")
    with applied(model.components, start):
        wanted, weight = text_output(model), model.main.get_submodule(norm.path).weight.detach().clone()
    before = model.main.get_submodule(norm.path).weight.detach().clone()
    assert not torch.allclose(weight, before, atol=1e-3)
    with student_of(model, start) as student:
        assert set(student.layers) == {layer}
        torch.testing.assert_close(text_output(student.model), wanted, rtol=1e-3, atol=1e-4)
        parameter = ModuleRef(MODEL, f"{norm.path}.weight")
        assert set(student.updates()) == {layer, parameter}
        torch.testing.assert_close(student.updates()[parameter].delta(), weight - before, rtol=1e-5, atol=1e-6)


def test_an_adapter_of_whole_parameters_alone_has_nothing_to_train(tmp_path: Path) -> None:
    model = load_model(tiny.llama(tmp_path / "base"))
    norm = ModuleRef(MODEL, "model.norm.weight")
    start = Adapter({norm: Diff(InMemory(torch.ones(16)), "model.norm.diff")}, format="peft")
    shift = Adapter({ModuleRef(MODEL, "model.norm"): SpectralShift(random(16))}, "svdiff")
    for whole in (start, shift):
        with pytest.raises(InputError, match="no linear layer or convolution that could"), student_of(model, whole):
            pass
