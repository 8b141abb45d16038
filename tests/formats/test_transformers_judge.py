"""transformers' own ``load_adapter`` runs a PEFT folder that we wrote from another format."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from regraft import load_adapter


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ).eval()


@torch.no_grad()
def test_transformers_computes_the_same_from_our_folder(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True)
    model = get_peft_model(llama(), config)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = torch.randn_like(value)
    model.save_pretrained(tmp_path / "theirs")
    load_adapter(tmp_path / "theirs").save(tmp_path / "ours")
    tokens = torch.arange(8)[None]

    ran = llama()
    ran.load_adapter(str(tmp_path / "ours"))
    expected = model.eval()(tokens).logits
    assert torch.allclose(ran(tokens).logits, expected, atol=1e-5)
    assert not torch.allclose(llama()(tokens).logits, expected, atol=1e-3)
