"""Every method on the demo's near upgrade, v1 → v2: ``python -m tools.bench_demo --out results/demo.json``.

Style share of the demo's own prompts and seeds, and the effect beside the original's (`regraft verify`). LoRAs that
are ported go through the real command, and diffusers loads them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from regraft import load_adapter, verify
from regraft.demo import data_folder
from regraft.demo.style import style_share
from regraft.probes.controls import random_like
from regraft.report.schema import Interval
from regraft.runtime import load_model, quiet_libraries

WAYS: dict[str, tuple[str, ...]] = {
    "copy": ("-m", "copy"),
    "auto": ("-m", "auto"),
    "lora-x, half rank": ("-m", "lora-x", "--subspace-rank", "0.5"),
    "lora-x, energy 0.9": ("-m", "lora-x"),
    "prolora, half rank": ("-m", "prolora", "--subspace-rank", "0.5"),
    "prolora, energy 0.9": ("-m", "prolora"),
    "scaled-copy": ("-m", "scaled-copy"),
    "effect": ("-m", "effect"),
    "effect, rank 32": ("-m", "effect", "--rank", "32"),
    "ridge": ("-m", "ridge"),
    "theseus": ("-m", "theseus"),
    "cross-lora": ("-m", "cross-lora"),
    "casa": ("-m", "casa"),
    "dart": ("-m", "dart"),
    "procrustes": ("-m", "procrustes"),
    "procrustes, every space rotated": (),
}


def shares(base: Path, lora: Path | None, report: dict[str, Any], size: int) -> float:
    """Mean style share of the demo's pictures, with a LoRA that diffusers loads."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    images = pipeline(
        report["prompts"],
        num_inference_steps=report["steps"],
        guidance_scale=report["guidance"],
        height=size,
        width=size,
        generator=[torch.Generator().manual_seed(seed) for seed in report["seeds"]],
        output_type="np",
    ).images
    return round(float(style_share(images).mean()), 3)


def ported(way: str, flags: tuple[str, ...], lora: Path, data: Path, out: Path) -> Path:
    """The LoRA ported by the command, or from the library where an option is not on the command line."""
    file = out / f"{way.replace(' ', '-').replace(',', '')}.safetensors"
    if flags:
        bases = ["--from", str(data / "v1"), "--to", str(data / "v2")]
        command = [
            sys.executable,
            "-m",
            "regraft",
            "port",
            str(lora),
            *bases,
            "-o",
            str(file),
            "--no-cache",
            "-q",
            *flags,
        ]
        subprocess.run(command, check=True)
    else:
        from regraft import open_base, port

        bases_ = open_base(data / "v1"), open_base(data / "v2")
        port(load_adapter(lora), *bases_, "procrustes", keep_identity=2.0).save(file)
    return file


def figures(interval: Interval) -> dict[str, float | None]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data = data_folder()
    facts = json.loads((data / "demo.json").read_text(encoding="utf-8"))
    report, size, lora = facts["report"], facts["size"], data / "loras" / "style-v1.safetensors"
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        out = Path(folder)
        files: dict[str, Path | None] = {"no adapter": None}
        files |= {way: ported(way, flags, lora, data, out) for way, flags in WAYS.items()}
        original = load_adapter(lora)
        files["random, same norm"] = out / "random.safetensors"
        random = random_like(load_model(data / "v2").components, original, seed=0)
        random.save(files["random, same norm"])
        files["native"] = data / "loras" / "style-v2.safetensors"
        for name, file in files.items():
            row: dict[str, Any] = {"style_share": shares(data / "v2", file, report, size)}
            if file is not None:
                found = verify(original, load_adapter(file), data / "v1", data / "v2")
                row |= {"effect_cosine": figures(found.effect_cosine), "norm_ratio": figures(found.effect_norm_ratio)}
            rows[name] = row
            print(name, row, flush=True)
        teacher = {
            "v1, no adapter": shares(data / "v1", None, report, size),
            "v1, the LoRA": shares(data / "v1", lora, report, size),
        }
    result = {
        "command": " ".join(["python", "-m", "tools.bench_demo", *sys.argv[1:]]),
        "pair": "the demo's v1 → v2",
        "drift": facts["drift_v1_v2"],
        "style_share_on_v1": teacher,
        "on_v2": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
