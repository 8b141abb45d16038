"""Tiny models from configs with fixed seeds, and adapters for them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.tensors import InMemory
from regraft.updates import LowRank, Update

WORDS = ("the", "a", "of", "and", "to", "in", "is", "it", "on", "that", "was", "for", "with", "as", "river", "rain")

#: Words of a vocabulary as large as `llama`'s, and the same numbered otherwise.
NUMBERED = [f"w{i}" for i in range(45)]
ORDER = torch.randperm(45, generator=torch.Generator().manual_seed(2)).tolist()


def _save(model: Any, folder: Path, drift: float) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(drift * parameter.std().nan_to_num() * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def llama(folder: Path, *, seed: int = 0, drift: float = 0.0, width: int = 16, vocab: int = 48) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=vocab,
        max_position_embeddings=40,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(LlamaForCausalLM(config), folder, drift)


def gpt2(folder: Path, *, seed: int = 0, drift: float = 0.0) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=48, n_positions=40, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    return _save(GPT2LMHeadModel(config), folder, drift)


def bert(folder: Path, *, seed: int = 0, drift: float = 0.0, width: int = 16, head: bool = False) -> Path:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=48,
        max_position_embeddings=40,
        initializer_range=0.2,
    )
    return _save((BertForMaskedLM if head else BertModel)(config), folder, drift)


def write_tokenizer(folder: Path, words: Iterable[str] = WORDS) -> None:
    """A word tokenizer without normalisation tricks, so that ids can be told by hand."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def unet_model(seed: int = 0, *, context: int = 8, channels: tuple[int, int] = (8, 16), latents: int = 4) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latents,
        out_channels=latents,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=context,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def unet(folder: Path, *, seed: int = 0, drift: float = 0.0, **sizes: Any) -> Path:
    return _save(unet_model(seed, **sizes), folder, drift)


def clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def pipeline(folder: Path, *, seed: int = 0, drift: float = 0.0, prediction: str = "epsilon", **sizes: Any) -> Path:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(folder.parent / "tokenizer_files")
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=16,
            bos_token_id=52,
            eos_token_id=53,
            initializer_range=0.3,
            initializer_factor=5.0,
        )
    )
    vae = AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2)  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet_model(seed, **sizes),
        scheduler=DDIMScheduler(prediction_type=prediction, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    torch.manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]:
            parameter.add_(drift * parameter.std().nan_to_num() * torch.randn(parameter.shape))
    pipe.save_pretrained(folder)
    return folder


def lora(
    models: dict[str, nn.Module] | nn.Module, targets: Iterable[str], *, seed: int = 7, rank: int = 2, size: float = 0.1
) -> Adapter:
    """A LoRA on every module whose name ends in one of ``targets``."""
    generator = torch.Generator().manual_seed(seed)
    components = models if isinstance(models, dict) else {MODEL: models}
    updates: dict[ModuleRef, Update] = {}
    for component, model in components.items():
        for path, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if not path.endswith(tuple(targets)) or weight is None or weight.dim() < 2:
                continue
            out, *rest = weight.shape
            up = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator)
            down = torch.randn(rank, *rest, generator=generator)
            updates[ModuleRef(component, path)] = LowRank(InMemory(size * up), InMemory(down), scale=0.5)
    assert updates
    return Adapter(updates, format="peft")
