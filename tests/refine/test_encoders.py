"""A pipeline's text encoders are trained where the adapter changes them and the pipeline lets gradients through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft import Adapter, load_adapter, open_base
from regraft.adapter import ModuleRef
from regraft.probes.batches_diffusion import DiffusionBatch
from regraft.refine import RefineResult, RefineSettings, _untrained, refine
from regraft.refine.student import student_of
from regraft.runtime import load_model
from regraft.updates import LowRank
from verify import tiny

PROMPTS = ("a cat", "the sea", "red", "on a hill")
QUICK = RefineSettings("effect", steps=30, look=15, n_inputs=24, rate=5e-2, retention=0.0, prompts=PROMPTS)


@pytest.fixture(scope="module")
def old(folder: Path) -> Path:
    return tiny.pipeline(folder / "pipeline")


@pytest.fixture(scope="module")
def new(folder: Path) -> Path:
    return tiny.pipeline(folder / "later", drift=0.02)


@pytest.fixture(scope="module")
def adapter(old: Path, folder: Path) -> Adapter:
    """Of the text encoder alone."""
    encoder = load_model(old).components["text_encoder"]
    tiny.lora({"text_encoder": encoder}, ("q_proj", "v_proj", "fc1"), size=1.0).save(
        folder / "te.safetensors", format="diffusers"
    )
    return load_adapter(folder / "te.safetensors")


def refined(adapter: Adapter, old: Path, new: Path, **more: Any) -> RefineResult:
    return refine(adapter, open_base(old), open_base(new), settings=QUICK, **more)


def deltas(adapter: Adapter) -> dict[ModuleRef, Tensor]:
    return {ref: u.delta() for ref, u in adapter.updates.items() if isinstance(u, LowRank)}


def test_an_adapter_of_the_text_encoder_alone_is_learnt_from_nothing(adapter: Adapter, old: Path, new: Path) -> None:
    result = refined(adapter, old, new, start="zero")
    assert result.report.recovered > 0.2
    assert not result.report.untrained
    assert all(float(delta.norm()) > 0 for ref, delta in deltas(result.adapter).items() if "layers.0" in ref.path)


def test_gradients_are_those_of_the_same_loss_by_finite_differences(old: Path) -> None:
    model = load_model(old)
    start = tiny.lora(model.components, ("to_q", "q_proj"))
    batch = DiffusionBatch(
        ("sample", torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))),
        torch.tensor([900, 500, 20]),
        ("a", "sea", "a"),
        "old",
    )

    def loss(student: Any, *, gradients: bool) -> Tensor:
        return batch.predict(student.model, batch.conditions(student.model, gradients=gradients)).square().sum()

    with student_of(model, start) as student:
        assert student.encoders == {"text_encoder"}
        layer = next(layer for ref, layer in student.layers.items() if ref.component == "text_encoder")
        weight = layer.lora_B["refined"].weight
        with torch.enable_grad():
            loss(student, gradients=True).backward()
        with torch.no_grad():
            step = 1e-2 * weight.grad / weight.grad.norm()
            weight += step
            above = loss(student, gradients=False)
            weight -= 2 * step
            below = loss(student, gradients=False)
        torch.testing.assert_close((above - below) / 2e-2, weight.grad.norm(), rtol=0.05, atol=1e-3)


def test_without_such_layers_prompts_are_encoded_once(old: Path, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regraft.probes import batches_diffusion

    asked: list[bool] = []
    first_call = batches_diffusion.first_call

    def counted(*args: Any, gradients: bool = False) -> Any:
        asked.append(gradients)
        return first_call(*args, gradients=gradients)

    monkeypatch.setattr(batches_diffusion, "first_call", counted)
    tiny_lora = tiny.lora({"unet": load_model(old).main}, ("to_q", "to_k"), size=0.5)
    tiny_lora.save(new.parent / "unet.safetensors", format="diffusers")
    refined(load_adapter(new.parent / "unet.safetensors"), old, new)
    assert asked
    assert not any(asked)


def test_where_a_pipeline_encodes_without_gradients_the_port_is_kept(
    adapter: Adapter, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    monkeypatch.setattr(
        StableDiffusionPipeline, "encode_prompt", torch.no_grad()(StableDiffusionPipeline.encode_prompt)
    )
    model = load_model(old)
    start = tiny.lora(model.components, ("to_q", "q_proj"))
    with student_of(model, start) as student:
        assert not student.encoders
        assert {ref.component for ref in student.rest} == {"text_encoder"}
        assert set(_untrained(student).values()) == {
            "its pipeline runs the text_encoder without gradients: kept as it was ported"
        }
