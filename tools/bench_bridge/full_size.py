"""X-Adapter at the geometry of SD 1.5 and SDXL, on random weights: a step of training, one of sampling, their memory.

    python -m tools.bench_bridge.full_size --out results/bridge-full-size.json

bfloat16 bases, a float32 mapper of the released shape, AdamW; activations of the new base are computed twice.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from regraft.bridge.x_adapter.files import RELEASED
from regraft.bridge.x_adapter.lesson import changes_of
from regraft.bridge.x_adapter.mapper import Mapper
from regraft.bridge.x_adapter.places import changed, heard
from regraft.memory import peak_mb
from regraft.runtime.libraries import library

SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def unet(config: dict[str, Any], seed: int) -> Any:
    """A U-Net of random weights, built without ever holding them in float32."""
    torch.manual_seed(seed)
    kind = library("diffusers").UNet2DConditionModel
    with torch.device("meta"):
        made = kind(**config).to(torch.bfloat16)
    made = made.to_empty(device="cpu")
    for name, parameter in made.named_parameters():
        # The size that torch's own initialisation has, near enough: a pass stays finite.
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 / 2)
        else:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
    return made.requires_grad_(False).eval()


def old_call(rows: int) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.randn(rows, 77, 768, dtype=torch.bfloat16)}


def new_call(rows: int) -> dict[str, Any]:
    extra = {"text_embeds": torch.randn(rows, 1280, dtype=torch.bfloat16), "time_ids": torch.zeros(rows, 6)}
    return {"encoder_hidden_states": torch.randn(rows, 77, 2048, dtype=torch.bfloat16), "added_cond_kwargs": extra}


def both(old: Any, new: Any, mapper: Mapper, rows: int) -> Tensor:
    """A pass of both, as `regraft.bridge.x_adapter.lesson` and the pipeline make it."""
    places = [level.old for level in mapper.config.levels]
    states = torch.randn(rows, 4, 64, 64, dtype=torch.bfloat16)
    with torch.no_grad(), heard(old, places, (64, 64)) as maps:
        old(states, torch.tensor(500), **old_call(rows))
        given = list(maps)
    changes = changes_of(mapper, given, torch.full((rows, 2), 0.5), 1.0)
    states = torch.randn(rows, 4, 128, 128, dtype=torch.bfloat16)
    with changed(new, changes, (128, 128)):
        prediction: Tensor = new(states, torch.tensor(500), **new_call(rows), return_dict=False)[0]
    return prediction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    began = perf_counter()
    old, new = unet(SD15, 0), unet(SDXL, 1)
    mapper = Mapper(RELEASED)
    built, weights = perf_counter() - began, peak_mb()
    began = perf_counter()
    with torch.no_grad():
        assert bool(both(old, new, mapper.eval(), 2).isfinite().all())
    sampled, sampling = perf_counter() - began, peak_mb()
    new.enable_gradient_checkpointing()
    new.train()
    optimizer = torch.optim.AdamW(mapper.train().parameters(), lr=1e-5)
    began = perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mse_loss(both(old, new, mapper, 1).float(), torch.randn(1, 4, 128, 128))
    loss.backward()  # type: ignore[no-untyped-call]
    lengths = [float(p.grad.norm()) for p in mapper.parameters() if p.grad is not None]
    optimizer.step()
    assert len(lengths) == len(list(mapper.parameters()))
    assert all(length == length for length in lengths)
    made = {
        "command": "python -m tools.bench_bridge.full_size --out results/bridge-full-size.json",
        "threads": torch.get_num_threads(),
        "mapper_parameters": sum(p.numel() for p in mapper.parameters()),
        "built_s": round(built, 1),
        "peak_mb": {"weights": round(weights), "sampling step": round(sampling), "training step": round(peak_mb())},
        "sampling_step_s": round(sampled, 1),
        "training_step_s": round(perf_counter() - began, 1),
    }
    asked.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
