"""Tiny pipelines of one text reader: by noise prediction, and by flow matching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from regraft.runtime import Loaded, load_model
from verify import tiny


def pipeline(folder: Path, *, scheduler: Any = None, scaling: float | None = None, **settings: Any) -> Loaded:
    """A tiny Stable Diffusion, perhaps with another scheduler, or the same latents at another scale."""
    model = load_model(tiny.pipeline(folder, **settings))
    if scheduler is not None:
        model.pipeline.scheduler = scheduler.from_config(model.pipeline.scheduler.config)
    if scaling is not None:
        model.pipeline.vae.register_to_config(scaling_factor=scaling)
    return model


def flow(folder: Path, *, seed: int = 0, patch: int = 1) -> Loaded:
    """A tiny Stable Diffusion 3; without its third text encoder it can't be read back from a folder."""
    made = _flow(folder, seed, patch)
    parts = {"transformer": made.transformer, "text_encoder": made.text_encoder, "text_encoder_2": made.text_encoder_2}
    for part in (*parts.values(), made.vae):
        part.eval().requires_grad_(False)
    return Loaded(parts, "denoiser", type(made).__name__, folder, pipeline=made)


def flow_folder(folder: Path, *, seed: int = 0, patch: int = 1) -> Path:
    """The same with all three, on disk."""
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    made = _flow(folder, seed, patch)
    tiny.write_tokenizer(folder.parent / "t5_files")
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "t5_files")
    tokenizer.pad_token = tokenizer.eos_token
    third = T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=len(tokenizer)))
    made.register_modules(text_encoder_3=third, tokenizer_3=tokenizer)
    made.save_pretrained(folder)
    return folder


def _flow(folder: Path, seed: int, patch: int) -> Any:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = tiny.clip_tokenizer(folder / "tokenizer_files")
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, projection_dim=8,
            vocab_size=len(tokenizer), max_position_embeddings=16, bos_token_id=52, eos_token_id=53,
            initializer_range=0.3, initializer_factor=5.0,
        )
    )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=patch, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, shift_factor=0.1)  # fmt: skip
    made = StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=text,
        tokenizer=tokenizer, text_encoder_2=text, tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made
