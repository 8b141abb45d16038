"""The shapes of the demo's models: real diffusers and transformers classes, only tiny."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from regraft.bench.diffusion_art import BACKGROUNDS, CONCEPTS, SIZE

TEXT_WIDTH = 64
POSITIONS = 16

# Shapes that differ between the bases. A head size that is no multiple of 16 is 3–5 × slower on a CPU,
# so heads = width / 16; diffusers takes the number of heads under the name attention_head_dim.
SHAPES = {
    "v1": {"block_out_channels": (32, 64, 64), "attention_head_dim": (2, 4, 4)},
    "v3": {
        "block_out_channels": (48, 64, 64),
        "attention_head_dim": (3, 4, 4),
        "transformer_layers_per_block": (1, 2, 2),
    },
}
SHAPES |= dict.fromkeys(["v2-early", "v2", "v2-retrained-early", "v2-retrained"], SHAPES["v1"])

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
LORA_RANK = 8


def unet(name: str) -> UNet2DConditionModel:
    """The U-Net of base `name`, freshly initialised from torch's generator."""
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
        use_linear_projection=True,
        **SHAPES[name],
    )


def autoencoder() -> AutoencoderKL:
    """3 × 32 × 32 → 8 × 16 × 16, about 170 k parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text model, trained together with the U-Net."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def scheduler() -> DDIMScheduler:
    """DDIM over v-prediction.

    The cosine schedule ends at pure noise, and trailing spacing starts there; a schedule that leaves
    some signal at its end could not learn the style's dark paper from bases that paint pale grounds.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # without effect on trailing spacing, but the pipeline warns of any other value
    )


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer in which each word of the prompts is one token; any other word is spelt."""
    letters = list(_byte_letters())
    vocab = letters + [letter + "</w>" for letter in letters]
    merges = _merges([*CONCEPTS, *BACKGROUNDS, "on"])
    vocab += [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(vocab)}))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    tokenizer = CLIPTokenizer({token: place for place, token in enumerate(vocab)}, merges, model_max_length=POSITIONS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Prompts as the Stable Diffusion pipeline pads them: (n, POSITIONS)."""
    return tokenizer(
        prompts, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt"
    ).input_ids


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, learnt until every word is one token.

    Learning in order of pair frequency matters: the tokenizer applies merges in the order learnt, so
    whole words come out only if no later word's merge can fire early inside of an earlier one.
    """
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := [pair for word in split for pair in itertools.pairwise(word)]:
        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        for word in split:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def _byte_letters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, which CLIP shares: letter → byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + place): b for place, b in enumerate(others)}
