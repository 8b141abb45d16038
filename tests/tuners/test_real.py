"""The tuners on models of transformers and diffusers, and on a quantised base."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from regraft import InputError, load_adapter
from regraft.loading import base_in
from regraft.tuners import load_spectral_shifts
from tuners.cases import stir
from tuners.real import TUNERS, quantised, tiny_gpt2, tiny_llama, tiny_unet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IDS = torch.arange(12).reshape(2, 6)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@torch.no_grad()
def noise(unet: nn.Module) -> Tensor:
    torch.manual_seed(3)
    return unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 4, 16)).sample


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_language_models_by_peft_s_default_modules(make: Any, tuner: str, tmp_path: Any) -> None:
    kind, options = TUNERS[tuner]
    base = make()
    model = stir(get_peft_model(make(), kind(task_type="CAUSAL_LM", **options))).eval()
    assert not torch.allclose(logits(model), logits(base), atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    expected = logits(model)
    assert torch.allclose(logits(model.merge_and_unload()), expected, atol=1e-4)


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_unet_of_diffusers(tuner: str) -> None:
    kind, options = TUNERS[tuner]
    config = kind(target_modules=["to_q", "to_v", "conv1", "proj_in"], **options)
    plain = noise(tiny_unet())
    unet = inject_adapter_in_model(config, tiny_unet())
    assert torch.equal(noise(unet), plain)
    stir(unet)
    state = get_peft_model_state_dict(unet)
    assert any(".conv1." in key for key in state)
    again = inject_adapter_in_model(config, tiny_unet())
    set_peft_model_state_dict(again, state)
    assert torch.equal(noise(again), noise(unet))
    full = noise(unet)
    # diffusers' own switches find the strength and the adapters.
    unet.peft_config = {"default": config}
    unet._hf_peft_config_loaded = True
    unet.set_adapters(["default"], weights=[0.0])
    assert torch.allclose(noise(unet), plain, atol=1e-6)
    unet.set_adapters(["default"], weights=[1.0])
    assert torch.allclose(noise(unet), full, atol=1e-6)
    unet.disable_adapters()
    assert torch.equal(noise(unet), plain)
    unet.enable_adapters()
    unet.fuse_lora() if hasattr(unet, "fuse_lora") else None
    assert torch.allclose(noise(unet), full, atol=1e-4)


@pytest.mark.parametrize("tuner", TUNERS)
def test_diffusers_own_add_adapter_and_fuse(tuner: str) -> None:
    kind, options = TUNERS[tuner]
    plain, unet = noise(tiny_unet()), tiny_unet()
    unet.add_adapter(kind(target_modules=["to_q", "to_v", "conv1"], **options), "mine")
    assert torch.equal(noise(unet), plain)
    changed = noise(stir(unet))
    assert not torch.allclose(changed, plain, atol=1e-3)
    unet.fuse_lora()
    assert any(getattr(module, "merged_adapters", []) == ["mine"] for module in unet.modules())
    assert torch.allclose(noise(unet), changed, atol=1e-4)
    unet.unfuse_lora()
    assert not any(getattr(module, "merged_adapters", []) for module in unet.modules())
    assert torch.allclose(noise(unet), changed, atol=1e-4)
    unet.delete_adapters("mine")
    assert torch.allclose(noise(unet), plain, atol=1e-5)


@pytest.mark.parametrize("tuner", [*TUNERS, "foura adaptive"])
def test_checkpointed_gradients_are_the_same(tuner: str) -> None:
    kind, options = TUNERS[tuner.replace("foura adaptive", "foura")]
    options = {**options, "gate": "adaptive"} if "adaptive" in tuner else options

    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model = stir(get_peft_model(tiny_llama(), kind(target_modules=["q_proj", "down_proj"], **options))).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}

    whole, checkpointed = gradients(False), gradients(True)
    assert whole.keys() == checkpointed.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tuner", TUNERS)
def test_texts_are_generated_with_it(tuner: str) -> None:
    """Token by token with a cache of keys and values, as merged into the base."""
    kind, options = TUNERS[tuner]
    model = stir(get_peft_model(tiny_llama(), kind(target_modules=["q_proj", "v_proj", "down_proj"], **options))).eval()
    asked: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = model.generate(input_ids=IDS[:1], **asked)
    with model.disable_adapter():
        assert not torch.equal(written, model.generate(input_ids=IDS[:1], **asked))
    assert torch.equal(written, model.generate(input_ids=IDS[:1], use_cache=False, **asked))
    assert torch.equal(written, model.merge_and_unload().generate(input_ids=IDS[:1], **asked))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tuner", TUNERS)
def test_a_quantised_base_is_decomposed_as_it_is_read(tuner: str, bits: int, tmp_path: Any) -> None:
    kind, options = TUNERS[tuner]
    config = kind(target_modules=["0"], **options)
    net, x = quantised(bits), torch.randn(3, 64)
    with torch.no_grad():
        plain = net(x)
        model = get_peft_model(quantised(bits), config)
        assert torch.allclose(model(x), plain, atol=1e-5)
        stir(model)
        layer = model.base_model.model[0]
        expected = plain + x @ layer.get_delta_weight("default").T.float()
        assert not torch.allclose(expected, plain, atol=1e-2)
        assert torch.allclose(model(x), expected, atol=1e-3)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(quantised(bits), tmp_path)
        assert torch.allclose(loaded(x), model(x), atol=1e-5)
        found = model(x)
        layer.merge()
        # Quantised again: near, not equal.
        assert (model(x) - found).norm() < 0.3 * found.norm()
        layer.unmerge()
        assert (model(x) - found).norm() < 0.3 * found.norm()


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_community_file_goes_onto_a_base_however_that_is_packed(storage: torch.dtype, tmp_path: Any) -> None:
    save_file({"0.delta": torch.linspace(0.5, 1.0, 64)}, tmp_path / "x.safetensors")
    net, x = quantised(4, storage), torch.randn(3, 64)
    with torch.no_grad():
        # By another one: on some CPUs a run packs the weight anew.
        plain = quantised(4, storage)(x)
        load_spectral_shifts(net, tmp_path / "x.safetensors")
        change = net[0].get_delta_weight("default").float()
        assert torch.allclose(torch.linalg.svdvals(change), torch.linspace(1.0, 0.5, 64), atol=1e-3)
        assert torch.allclose(net(x), plain + x @ change.T, atol=1e-3)
    with pytest.raises(InputError, match=r"0\.weight: is quantised in memory"):
        base_in(quantised(4, storage))


_APART = "it slows every import of transformers: `.ci/run` installs it for these tests alone, as regraft[quantised]"


def hqq_quantised() -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 64, bias=False)
    config = BaseQuantizeConfig(nbits=8, group_size=64)
    return torch.nn.Sequential(HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu")).eval()


@pytest.mark.parametrize("tuner", TUNERS)
def test_hqq_s_layers_are_read_merged_and_given_back(tuner: str, tmp_path: Any) -> None:
    pytest.importorskip("hqq", reason=_APART)
    kind, options = TUNERS[tuner]
    x = torch.randn(3, 64)
    with torch.no_grad():
        plain = hqq_quantised()(x)
        model = get_peft_model(hqq_quantised(), kind(target_modules=["0"], **options))
        assert torch.allclose(model(x), plain, atol=1e-5)
        stir(model)
        expected = plain + x @ model.base_model.model[0].get_delta_weight("default").T.float()
        assert not torch.allclose(expected, plain, atol=1e-2)
        found = model(x)
        assert torch.allclose(found, expected, atol=1e-3)
        model.save_pretrained(tmp_path)
        assert torch.allclose(PeftModel.from_pretrained(hqq_quantised(), tmp_path)(x), found, atol=1e-5)
        merged = model.merge_and_unload()
    assert type(merged[0]).__name__ == "HQQLinear"
    # Quantised again: near, not equal.
    assert (merged(x) - found).norm() < 0.1 * found.norm()


@pytest.mark.parametrize("tuner", TUNERS)
def test_torchao_s_weights_are_read_and_merged(tuner: str, tmp_path: Any) -> None:
    pytest.importorskip("torchao", reason=_APART)
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import LlamaForCausalLM, TorchAoConfig

    kind, options = TUNERS[tuner]
    tiny_llama().save_pretrained(tmp_path / "base")

    def opened() -> Any:
        asked = TorchAoConfig(Int8WeightOnlyConfig())
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=asked).eval()

    with torch.no_grad():
        plain = logits(opened())
        model = get_peft_model(opened(), kind(target_modules=["q_proj"], **options))
        assert torch.allclose(logits(model), plain, atol=1e-4)
        stir(model)
        found = logits(model)
        assert not torch.allclose(found, plain, atol=1e-2)
        model.save_pretrained(tmp_path / "adapter")
        assert torch.allclose(logits(PeftModel.from_pretrained(opened(), tmp_path / "adapter")), found, atol=1e-4)
        merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj.weight).__name__ == "Int8Tensor"
    assert (logits(merged) - found).norm() < 0.1 * (found - plain).norm()


@pytest.mark.parametrize("tuner", TUNERS)
def test_transformers_own_loader_takes_them_and_another_base_is_refused(tuner: str, tmp_path: Any) -> None:
    kind, options = TUNERS[tuner]
    model = tiny_llama()
    model.add_adapter(kind(target_modules=["q_proj"], **options))
    stir(model)
    model.save_pretrained(tmp_path)
    again = tiny_llama()
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), logits(model))
    other = tiny_llama()
    weight = other.model.layers[1].self_attn.q_proj.weight
    weight.data += 0.1 * torch.randn_like(weight)
    other.load_adapter(tmp_path)
    if tuner.startswith("foura"):
        logits(other)
        return
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: the base is not the one"):
        logits(other)


@pytest.mark.parametrize("tuner", ["lorax", "svdiff"])
def test_a_base_that_moved_a_little_is_loaded_with_a_warning(tuner: str, tmp_path: Any) -> None:
    """Such an adapter's change is of other directions by then: it is more than ten times as far off as the weights."""
    kind, options = TUNERS[tuner]
    model = stir(get_peft_model(tiny_llama(), kind(target_modules=["q_proj", "v_proj", "up_proj"], **options)))
    model.save_pretrained(tmp_path / "peft")
    own = tiny_llama()
    own.add_adapter(kind(target_modules=["up_proj"], **options))
    stir(own)
    own.save_pretrained(tmp_path / "transformers")

    def moved(share: float) -> Any:
        other = tiny_llama()
        torch.manual_seed(6)
        for weight in other.parameters():
            weight.data += share * weight.std() * torch.randn_like(weight)
        return other

    said = r"weights differ by about (1|0\.\d|1\.\d)% from those that this (LoRA-X|SVDiff) adapter was trained on"
    near = moved(0.007)
    with pytest.warns(UserWarning, match=said) as heard:
        loaded = PeftModel.from_pretrained(near, tmp_path / "peft")
    first = len([1 for warning in heard if "adapter was trained on" in str(warning.message)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter was trained on")
        logits(loaded)
    assert first == 1, "once for all layers"
    other = moved(0.015)
    other.load_adapter(tmp_path / "transformers")
    with pytest.warns(UserWarning, match=said):
        logits(other)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter was trained on")
        logits(PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path / "peft"))
    ref, update = next(iter(load_adapter(tmp_path / "peft").updates.items()))
    weight = moved(0.015).get_submodule(ref.path).weight.detach()
    with pytest.warns(UserWarning, match="adapter was trained on"):
        update.merged(weight)


def test_layers_that_give_no_weight_back_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    backend = ForwardOnlyQuantizationBackend("gptq")
    monkeypatch.setattr("regraft.tuners._layer.resolve_quantization_backend", lambda *_, **__: backend)
    for tuner in ("lorax", "svdiff"):
        kind, options = TUNERS[tuner]
        with pytest.raises(TypeError, match="needs the weight, and gptq layers give none back"):
            get_peft_model(nn.Sequential(nn.Linear(8, 8)), kind(target_modules=["0"], **options))
