"""The student's base in 4 or 8 bits, by the real bitsandbytes on the CPU."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import Run
from safetensors.torch import save_file
from torch import Tensor

from regraft import Adapter, InputError, load_adapter, open_base
from regraft.adapter import MODEL, ModuleRef
from regraft.refine import RefineSettings, refine
from regraft.refine.quantised import quantise
from regraft.refine.student import student_of
from regraft.runtime import Loaded, applied, load_model
from regraft.tensors import InMemory
from verify import tiny

bitsandbytes = pytest.importorskip("bitsandbytes")

QUICK = RefineSettings(steps=24, look=8, n_inputs=16, rate=5e-3)
ROLES = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def old(folder: Path) -> Path:
    """Of widths that 4 bits can be had for."""
    return tiny.llama(folder / "wide", width=64)


@pytest.fixture(scope="module")
def new(folder: Path) -> Path:
    return tiny.llama(folder / "new", width=64, drift=0.2)


@pytest.fixture(scope="module")
def adapter(old: Path, folder: Path) -> Adapter:
    tiny.lora(load_model(old).main, ROLES, size=0.2).save(folder / "adapter")
    return load_adapter(folder / "adapter")


def said(model: Loaded) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.main(input_ids=torch.arange(3, 19)[None]).logits
    return found


@pytest.mark.parametrize(("bits", "kind", "error"), [("4bit", "Linear4bit", 0.5), ("8bit", "Linear8bitLt", 0.05)])
def test_the_layers_are_quantised_and_say_nearly_what_the_whole_ones_do(
    new: Path, bits: str, kind: str, error: float
) -> None:
    model = load_model(new)
    start = tiny.lora(model.main, ROLES)
    with applied(model.components, start):
        wanted = said(model)
    with student_of(model, start, quantize=bits) as student:  # type: ignore[arg-type]
        layer = student.model.main.model.layers[0].self_attn.q_proj
        assert type(layer).__module__ == "peft.tuners.lora.bnb"
        assert type(layer.base_layer).__name__ == kind
        assert type(student.model.main.lm_head) is torch.nn.Linear
        assert student.quantised.startswith("14 linear layers of the new base were held in " + bits[0])
        got = said(student.model)
        assert 0 < float((got - wanted).norm() / wanted.norm()) < error
        for ref, update in student.updates().items():
            torch.testing.assert_close(update.delta(), start.updates[ref].delta(), rtol=1e-4, atol=1e-6)
    with applied(model.components, start):
        assert torch.equal(said(model), wanted)


def test_dora_is_trained_over_quantised_layers(new: Path) -> None:
    model = load_model(new)
    plain = tiny.lora(model.main, ROLES)
    norms = {ref: model.main.get_submodule(ref.path).weight.detach().norm(dim=1) for ref in plain.updates}
    updates = {r: replace(u, magnitude=InMemory(1.1 * norms[r])) for r, u in plain.updates.items()}  # type: ignore[call-arg]
    start = replace(plain, updates=updates)
    with student_of(model, start, quantize="4bit") as student:
        student.model.main(input_ids=torch.arange(3, 19)[None]).logits.square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.parameters())


def test_the_whole_weights_are_let_go_of(new: Path) -> None:
    model = load_model(new)
    weight = weakref.ref(model.main.model.layers[0].mlp.up_proj.weight)
    made = student_of(model, tiny.lora(model.main, ROLES), quantize="8bit")
    del model
    with made:
        gc.collect()
        assert weight() is None


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_what_quantising_loses_is_made_up_for(adapter: Adapter, old: Path, new: Path, bits: str) -> None:
    settings = replace(QUICK, quantize=bits)
    report = refine(adapter, open_base(old), open_base(new), settings=settings).report
    assert report.quantised
    assert report.recovered > report.looks[0].recovered + 0.02


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_is_stored_quantised_is_run_as_the_weights_that_it_stands_for(
    adapter: Adapter, old: Path, new: Path, tmp_path: Path, bits: int
) -> None:
    stored = stored_in(bits, new, tmp_path / "stored")
    model, base = load_model(stored), open_base(stored)
    name = "model.layers.0.mlp.up_proj"
    weight = model.main.get_submodule(name).weight
    assert torch.equal(weight, base.weight(ModuleRef(MODEL, name)))
    if bits == 4:
        # What was rounded to nf4 once is left as it is by the second time.
        with student_of(model, tiny.lora(model.main, ROLES), quantize="4bit") as student:
            packed = student.model.main.get_submodule(name).weight
            again = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
        torch.testing.assert_close(again, weight, rtol=1e-5, atol=1e-6)
    report = refine(adapter, open_base(old), base, settings=QUICK).report
    assert report.recovered > report.looks[0].recovered


def stored_in(bits: int, base: Path, out: Path) -> Path:
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    LlamaForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32).save_pretrained(out)
    return out


def test_a_base_of_other_widths_is_told(folder: Path) -> None:
    model = load_model(tiny.llama(folder / "narrow"))
    with (
        pytest.raises(InputError, match="no linear layers"),
        student_of(model, tiny.lora(model.main, ROLES), quantize="4bit"),
    ):
        pass


def test_without_bitsandbytes_it_is_told_at_once(
    run: Run, adapter: Adapter, old: Path, new: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    ran = run("refine", folder / "adapter", "--from", old, "--to", new, "-o", tmp_path / "out", "--quantize", "4bit")
    assert ran.code == 1
    assert "bitsandbytes is not installed" in ran.err
    assert "Traceback" not in ran.err


def test_a_pipeline_with_a_quantised_denoiser_is_run_as_the_weights_that_it_stands_for(tmp_path: Path) -> None:
    whole = tiny.pipeline(tmp_path / "whole", channels=(64, 64), context=64)
    model = load_model(whole)
    stored = shutil.copytree(whole, tmp_path / "stored")
    place = stored / "unet"
    quantise(model, "4bit")
    save_file(model.main.state_dict(), place / "diffusion_pytorch_model.safetensors")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    packed = model.main.get_submodule(name).weight
    wanted = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
    for path in (stored, place):
        weight = load_model(path).main.get_submodule(name).weight
        torch.testing.assert_close(weight, wanted, rtol=1e-6, atol=1e-7)
