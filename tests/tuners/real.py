"""Tiny models of transformers and diffusers with random weights, and one configuration of every tuner for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from regraft.tuners import FouraConfig, LoraXConfig, SvdiffConfig

#: Name → configuration class and options without target modules.
TUNERS: dict[str, tuple[type, dict[str, Any]]] = {
    "lorax": (LoraXConfig, {"r": 4}),
    "lorax full": (LoraXConfig, {"r": 4, "full": True}),
    "svdiff": (SvdiffConfig, {}),
    "foura": (FouraConfig, {"r": 4, "gate": "none"}),
    "foura fft": (FouraConfig, {"r": 4, "gate": "frozen", "transform": "fft"}),
}


def tiny_gpt2() -> nn.Module:
    """Its linear layers are Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def tiny_clip() -> nn.Module:
    """transformers 5 names its modules without the level ``text_model.``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModel(config).eval()


def quantised(bits: int, storage: torch.dtype = torch.uint8) -> nn.Module:
    """One linear layer, in bitsandbytes' NF4, packed into some dtype, or int8, on the CPU."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain = nn.Linear(64, 64, bias=False)
    if bits == 4:
        how = {"quant_type": "nf4", "compute_dtype": torch.float32, "quant_storage": storage}
        layer = bnb.nn.Linear4bit(64, 64, bias=False, **how)
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict(plain.state_dict())
    return nn.Sequential(layer).to("cpu").eval()
