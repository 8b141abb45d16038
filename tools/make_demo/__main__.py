"""Make the demo's models: `python -m tools.make_demo --cache DIR [--only v1 style-v1 …] [--export] [--evaluate]`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from . import autoencoder, evaluate, export, train

DATA = Path(__file__).parents[2] / "src" / "regraft" / "demo" / "data"

STAGES = [
    *autoencoder.SEEDS,
    "v1",
    "style-v1",
    "v2-early",
    "v2",
    "style-v2",
    "v2-retrained-early",
    "v2-retrained",
    "style-v2-retrained",
    "v3",
    "style-v3",
]
"""In the order of what needs what."""


def main() -> None:
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_demo", description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder for art, latents, logs and checkpoints")
    parser.add_argument("--only", nargs="*", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1 is best where cores are shared)")
    parser.add_argument("--out", type=Path, default=DATA, help=f"where --export writes and --evaluate reads ({DATA})")
    parser.add_argument("--export", action="store_true", help="write the finished models to --out")
    parser.add_argument("--evaluate", action="store_true", help="sample from --out: figures, and sheet.png in --cache")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.cache.mkdir(parents=True, exist_ok=True)
    for stage in args.only:
        start = time.monotonic()
        if stage in autoencoder.SEEDS:
            autoencoder.train(stage, args.cache)
        elif stage in train.BASES:
            train.train_base(stage, args.cache)
        else:
            train.train_lora(stage, args.cache)
        print(f"{stage}: {time.monotonic() - start:.0f} s", flush=True)
    if args.export:
        export.export(args.cache, args.out)
    if args.evaluate:
        evaluate.evaluate(args.out, args.cache)


if __name__ == "__main__":
    main()
