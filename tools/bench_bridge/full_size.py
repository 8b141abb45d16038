"""X-Adapter at the geometry of SD 1.5 and SDXL, on random weights: a step of training, one of sampling, their memory.

    python -m tools.bench_bridge.full_size --out results/bridge-full-size.json --page docs/bridge.md [--device cuda]

bfloat16 bases, a float32 mapper of the released shape, AdamW; activations of the new base are computed twice. The file
holds a run for each device; another of the same device takes its place.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from regraft.bench.table import markdown, replaced
from regraft.bridge.x_adapter.files import RELEASED
from regraft.bridge.x_adapter.lesson import changes_of
from regraft.bridge.x_adapter.mapper import Mapper, MapperConfig
from regraft.bridge.x_adapter.places import changed, heard
from regraft.memory import peak_mb
from regraft.runtime.libraries import library

BEGIN, END = "<!-- full size: written by `python -m tools.bench_bridge.full_size` -->", "<!-- /full size -->"
DEVICES = ("cpu", "cuda")

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


def unet(config: Mapping[str, Any], seed: int, device: str) -> Any:
    """A U-Net of random weights, built without ever holding them in float32."""
    torch.manual_seed(seed)
    kind = library("diffusers").UNet2DConditionModel
    with torch.device("meta"):
        made = kind(**config).to(torch.bfloat16)
    made = made.to_empty(device=device)
    for name, parameter in made.named_parameters():
        # The size that torch's own initialisation has, near enough: a pass stays finite.
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 / 2)
        else:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
    return made.requires_grad_(False).eval()


def call(model: Any, rows: int) -> dict[str, Any]:
    """What a U-Net is told beside its states: a prompt of 77 tokens, and for SDXL's a pooled one and six sizes."""
    config, there = model.config, {"dtype": torch.bfloat16, "device": model.device}
    told: dict[str, Any] = {"encoder_hidden_states": torch.randn(rows, 77, config.cross_attention_dim, **there)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        told["added_cond_kwargs"] = {
            "text_embeds": torch.randn(rows, pooled, **there),
            "time_ids": torch.zeros(rows, 6, device=model.device),
        }
    return told


def both(old: Any, new: Any, mapper: Mapper, rows: int) -> Tensor:
    """A pass of both, as `regraft.bridge.x_adapter.lesson` and the pipeline make it."""
    places = [level.old for level in mapper.config.levels]
    (states, time, size), (new_states, new_time, new_size) = (_states(model, rows) for model in (old, new))
    with torch.no_grad(), heard(old, places, size) as maps:
        old(states, time, **call(old, rows))
        given = list(maps)
    changes = changes_of(mapper, given, torch.full((rows, 2), 0.5, device=old.device), 1.0)
    with changed(new, changes, new_size):
        prediction: Tensor = new(new_states, new_time, **call(new, rows), return_dict=False)[0]
    return prediction


def _states(model: Any, rows: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    size = model.config.sample_size
    states = torch.randn(rows, 4, size, size, dtype=torch.bfloat16, device=model.device)
    return states, torch.tensor(500, device=model.device), (size, size)


def measured(
    device: str,
    old_config: Mapping[str, Any] = SD15,
    new_config: Mapping[str, Any] = SDXL,
    shape: MapperConfig = RELEASED,
) -> dict[str, Any]:
    """Seconds and peaks of memory of what is built, of a step of sampling, and of one of training.

    Args:
        device: to run on. Of the CPU the peaks are the process's, of another the tensors' on it.
        old_config: of the old U-Net.
        new_config: of the new one.
        shape: of the mapper between them.
    """

    def timed(work: Callable[[], Any]) -> tuple[Any, float, int]:
        began = perf_counter()
        made = work()
        if device == "cuda":
            torch.cuda.synchronize()
        return made, round(perf_counter() - began, 1 if device == "cpu" else 3), _peak(device)

    def build() -> tuple[Any, Any, Mapper]:
        return unet(old_config, 0, device), unet(new_config, 1, device), Mapper(shape).to(device)

    def sample() -> bool:
        with torch.no_grad():
            return bool(both(old, new, mapper.eval(), 2).isfinite().all())

    def train() -> list[float]:
        with torch.autocast(device, torch.bfloat16):
            predicted = both(old, new, mapper, 1).float()
            loss = mse_loss(predicted, torch.randn_like(predicted))
        loss.backward()  # type: ignore[no-untyped-call]
        lengths = [float(p.grad.norm()) for p in mapper.parameters() if p.grad is not None]
        optimizer.step()
        return lengths

    (old, new, mapper), built, weights = timed(build)
    finite, sampled, sampling = timed(sample)
    assert finite
    new.enable_gradient_checkpointing()
    new.train()
    optimizer = torch.optim.AdamW(mapper.train().parameters(), lr=1e-5)
    lengths, trained, training = timed(train)
    assert len(lengths) == len(list(mapper.parameters()))
    assert all(length == length for length in lengths)
    return {
        "command": f"python -m tools.bench_bridge.full_size --out results/bridge-full-size.json --device {device}",
        "on": f"threads: {torch.get_num_threads()}" if device == "cpu" else torch.cuda.get_device_name(),
        "mapper_parameters": sum(p.numel() for p in mapper.parameters()),
        "built_s": built,
        "peak_mb": {"weights": weights, "sampling step": sampling, "training step": training},
        "sampling_step_s": sampled,
        "training_step_s": trained,
    }


def _peak(device: str) -> int:
    return round(peak_mb() if device == "cpu" else torch.cuda.max_memory_allocated() / 1e6)


def section(runs: Mapping[str, Any]) -> str:
    """A table of all devices' runs, and what it is of, as Markdown."""
    rows = [
        [
            f"{device}, {run['on']}",
            *(f"{mb / 1000:.1f} GB" for mb in run["peak_mb"].values()),
            f"{run['sampling_step_s']:.4g} s",
            f"{run['training_step_s']:.4g} s",
        ]
        for device, run in runs.items()
    ]
    numbers = next(iter(runs.values()))["mapper_parameters"] / 1e6
    told = (
        "At the geometry of SD 1.5 and SDXL, on random weights ([results](../results/bridge-full-size.json)): both "
        f"U-Nets in bfloat16, the released mapper's {numbers:.0f} million numbers in float32; a step of sampling of "
        "two pictures at 1024 × 1024, a step of training of one with activations computed twice. Memory is the most "
        "at any time."
    )
    heads = ["device", "loaded", "sampling", "training", "a step of sampling", "of training"]
    commands = [f"`{run['command']}`" for run in runs.values()]
    return "\n\n".join([told, markdown(heads, rows), *commands])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tools.bench_bridge.full_size", description=__doc__)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--device", choices=DEVICES, default="cpu")
    made.add_argument("--page", type=Path, help="write the part of docs/bridge.md")
    return made


def main() -> None:
    made = parser()
    asked = made.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        made.error("there is no device cuda here; use --device cpu")
    runs = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    runs[asked.device] = measured(asked.device)
    asked.out.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    if asked.page:
        asked.page.write_text(
            replaced(asked.page.read_text(encoding="utf-8"), BEGIN, END, section(runs)), encoding="utf-8"
        )
    print(runs[asked.device])


if __name__ == "__main__":
    main()
