"""Recording the cross-attention of real denoisers, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regraft import InputError
from regraft.training.unmix import Apart, recorded_attention, unmix_loss
from verify import tiny

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
SIZE, TOKENS = (8, 6), 5


@pytest.fixture
def unet() -> Any:
    return tiny.unet_model()


def inputs(n: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(n, 4, *SIZE, generator=generator),
        "timestep": torch.full((n,), 300),
        "encoder_hidden_states": torch.randn(n, TOKENS, 8, generator=generator),
    }


def with_lora(unet: Any) -> Any:
    """PEFT's layers on the attention, with an effect."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))
    torch.manual_seed(3)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return unet


def processors(unet: Any) -> dict[str, Any]:
    return dict(unet.attn_processors)


@pytest.mark.parametrize("adapted", [False, True])
def test_maps_are_softmax_of_the_module_s_own_queries_and_keys(unet: Any, adapted: bool) -> None:
    unet = with_lora(unet) if adapted else unet
    attention, seen = unet.get_submodule(LAYER), {}
    for part in ("to_q", "to_k"):
        getattr(attention, part).register_forward_hook(lambda _m, _i, out, part=part: seen.update({part: out}))
    with recorded_attention(unet) as maps:
        unet(**inputs())
    found, heads = maps[LAYER], attention.heads
    q, k = (seen[part].unflatten(2, (heads, -1)).transpose(1, 2) for part in ("to_q", "to_k"))
    assert heads > 1
    assert torch.allclose(found, (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1), atol=1e-6)
    assert found.shape == (2, heads, SIZE[0] * SIZE[1], TOKENS)


def test_all_cross_attention_is_recorded_and_no_self_attention(unet: Any) -> None:
    with recorded_attention(unet) as maps:
        unet(**inputs())
    assert set(maps) == {name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name}


@pytest.mark.parametrize("adapted", [False, True])
def test_the_output_is_the_same_while_recorded(unet: Any, adapted: bool) -> None:
    unet = with_lora(unet) if adapted else unet
    expected = unet(**inputs()).sample
    with recorded_attention(unet):
        assert torch.allclose(unet(**inputs()).sample, expected, atol=1e-5)


def test_a_transformer_with_cross_attention_is_recorded_too() -> None:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        cross_attention_dim=8, caption_channels=6, norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, TOKENS, 6),
        "timestep": torch.tensor([3, 700]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 2),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    expected = model(**given).sample
    with recorded_attention(model) as maps:
        assert torch.allclose(model(**given).sample, expected, atol=1e-5)
    assert {found.shape for found in maps.values()} == {(2, 2, 16, TOKENS)}


def test_a_masked_token_is_not_attended_to(unet: Any) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 1]] * 2)
    expected = unet(**inputs(), encoder_attention_mask=mask).sample
    with recorded_attention(unet) as maps:
        assert torch.allclose(unet(**inputs(), encoder_attention_mask=mask).sample, expected, atol=1e-5)
    assert all(found[..., 3].max() < 1e-6 for found in maps.values())


def test_processors_come_back_even_after_an_error(unet: Any) -> None:
    before = processors(unet)
    with recorded_attention(unet):
        assert {name for name, kept in processors(unet).items() if kept is not before[name]} == {
            name for name in before if "attn2" in name
        }
    assert processors(unet) == before
    with pytest.raises(RuntimeError, match="on the way"), recorded_attention(unet):
        raise RuntimeError("on the way")
    assert processors(unet) == before


def test_a_wrapped_model_is_recorded_too(unet: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q"]))
    with recorded_attention(model) as maps:
        model(**inputs())
    assert f"base_model.model.{LAYER}" in maps


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_lora(unet: Any, checkpointing: bool) -> None:
    unet = with_lora(unet).train()
    (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
    marks = torch.zeros(2, 2, TOKENS)
    marks[:, 0, 1] = marks[:, 1, 3] = 1.0
    others = torch.zeros(2, 2, *SIZE)
    others[:, 0, :, 3:], others[:, 1, :, :3] = 1.0, 1.0
    with recorded_attention(unet) as maps:
        unet(**inputs())
        loss = unmix_loss(maps, Apart(marks, others), SIZE)
        loss.backward()
    for part in ("to_q", "to_k"):
        layer = unet.get_submodule(f"{LAYER}.{part}")
        for factor in (layer.lora_A, layer.lora_B):
            assert factor["default"].weight.grad.norm() > 0
    # A small step against the gradient lowers the loss by what the gradient says.
    trained = [parameter for parameter in unet.parameters() if parameter.grad is not None]
    step = 1e-3 / sum(parameter.grad.square().sum() for parameter in trained).sqrt()
    expected = step * sum(parameter.grad.square().sum() for parameter in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter -= step * parameter.grad
        with recorded_attention(unet) as maps:
            unet(**inputs())
        assert loss - unmix_loss(maps, Apart(marks, others), SIZE) == pytest.approx(float(expected), rel=0.1)


def test_a_denoiser_without_cross_attention_is_refused() -> None:
    from diffusers import DiTTransformer2DModel

    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=4
    )
    with pytest.raises(InputError, match="a DiTTransformer2DModel has no cross-attention"), recorded_attention(dit):
        pass


def test_attention_with_more_to_it_is_refused(unet: Any) -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor

    before = processors(unet)
    unet.get_submodule(LAYER).set_processor(IPAdapterAttnProcessor(8, 8))
    with (
        pytest.raises(InputError, match=rf"{LAYER}: its attention \(IPAdapterAttnProcessor\)"),
        recorded_attention(unet),
    ):
        pass
    others = {name: kept for name, kept in processors(unet).items() if LAYER not in name}
    assert others == {name: kept for name, kept in before.items() if LAYER not in name}
