"""What the bridges carry between the demo's v1 and v3, beside their controls.

    python -m tools.bench_bridge --cache DIR --out results/bridge.json --strip docs/bridge.png

Styles: LoRAs of v1 that no mapper has seen, through delta sampling and X-Adapter, beside the old base with the LoRA,
the new base alone, a native LoRA, SDEdit from the old base's picture, and adapters of the new base that are made of the
LoRA: by `stream`, by a refine, and of what X-Adapter shows. ControlNet: silhouettes by a ControlNet of v1 through both
bridges, beside the old base with it, the new base without, and a native one. Cost: seconds and passes of a step.

What is done is kept in the cache; figures are written as they come, so that a record can be added to with `--ways` or
`--only`.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tools.bench_bridge import control
from tools.bench_bridge.cost import costs
from tools.bench_bridge.page import page
from tools.bench_bridge.record import Record
from tools.bench_bridge.steered import steered_ways
from tools.bench_bridge.styles import DEMO, OLD, PROMPTS, WANTED, Bench, Case, Pictures
from tools.bench_bridge.ways import ABLATED, FURTHER, TRAINED_OTHERWISE, WAYS, wanted

from regraft.bench.diffusion_judge import trained_judge
from regraft.bench.diffusion_score import through_autoencoder
from regraft.bench.diffusion_train import Workshop
from regraft.runtime import quiet_libraries

STYLES = (DEMO, "woodcut")
PARTS = ("styles", "controlnet", "cost")
SHOWN = ("old + LoRA", "new alone", "X-Adapter", "delta", "SDEdit from 0.6", "native")


def styles(bench: Bench, record: Record, asked: argparse.Namespace) -> dict[str, Pictures]:
    """Every style and seed by every way; returns the pictures that the strip shows."""
    kept: dict[str, Pictures] = {}
    for seed in range(asked.seeds):
        for name in asked.styles:
            case, first = Case(bench, name, seed), seed == 0 and name == asked.styles[0]
            rows = record.part("styles", name, str(seed))
            for way, draw in wanted(first=first, ablated=asked.ablated, only=asked.ways).items():
                shown = asked.strip is not None and first and way in SHOWN
                if way in rows and not shown:
                    continue
                pictures = draw(case)
                if shown:
                    kept[way] = pictures
                if way not in rows:
                    record.put(way, bench.score(name, pictures), "styles", name, str(seed))
    return kept


def steered(bench: Bench, record: Record, seeds: int) -> None:
    """Silhouettes, by every way."""
    for seed in range(seeds):
        rows = record.part("controlnet", str(seed))
        asked = control.Conditions.of(bench.shop, WANTED, seed)
        for way, make in steered_ways(Case(bench, STYLES[0], seed), asked.pictures()).items():
            if way in rows:
                continue
            pictures = make()
            concepts, _ = bench.judge.named(pictures)
            figures = {
                "agreement": round(asked.agreement(pictures), 4),
                "concept": round(float((concepts == WANTED).mean()), 4),
            }
            record.put(way, figures, "controlnet", str(seed))


def strip(kept: dict[str, Pictures], path: Path, columns: int = 12) -> None:
    """A row for each way that is shown, three times enlarged."""
    rows = [
        np.concatenate(list(kept[way][:: len(PROMPTS) // columns][:columns]), axis=1) for way in SHOWN if way in kept
    ]
    pixels = (np.concatenate(rows, axis=0) * 255).round().astype(np.uint8)
    size = (pixels.shape[1] * 3, pixels.shape[0] * 3)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tools.bench_bridge", description=__doc__)
    made.add_argument("--cache", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--strip", type=Path)
    made.add_argument("--page", type=Path, help="write the part of docs/bridge.md")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--styles", nargs="+", default=list(STYLES))
    made.add_argument("--ablated", nargs="*", choices=list(ABLATED), default=list(ABLATED))
    made.add_argument("--only", choices=PARTS, help="this part alone")
    made.add_argument(
        "--ways",
        nargs="+",
        choices=[*WAYS, *FURTHER, *TRAINED_OTHERWISE],
        metavar="WAY",
        help="of the styles' ways, these alone",
    )
    made.add_argument("--refine-steps", type=int, help="for a trial, with another --out: steps of a refine's training")
    return made


def parts_of(asked: argparse.Namespace) -> Sequence[str]:
    """What is measured: all, one part, or with ``--ways`` the styles."""
    if asked.ways is not None:
        return ("styles",)
    return PARTS if asked.only is None else (asked.only,)


def command_of(asked: argparse.Namespace) -> str:
    """As it is told in the record: without what is this machine's."""
    given = ["--seeds", str(asked.seeds), "--styles", *asked.styles]
    given += [] if asked.ablated == list(ABLATED) else ["--ablated", *asked.ablated]
    given += [] if asked.only is None else ["--only", asked.only]
    given += [] if asked.ways is None else ["--ways", *asked.ways]
    given += [] if asked.refine_steps is None else ["--refine-steps", str(asked.refine_steps)]
    return f"python -m tools.bench_bridge --cache DIR --out results/bridge.json {shlex.join(given)}"


def main() -> None:
    asked = parser().parse_args()
    record, kept, parts = Record(asked.out), dict[str, Pictures](), parts_of(asked)
    with quiet_libraries():
        shop = Workshop(asked.cache)
        judge = trained_judge(
            asked.cache / "art", asked.cache / "diffusion" / "judge.pt", through_autoencoder(shop.base(OLD) / "vae")
        )
        bench = Bench(shop, judge, asked.refine_steps)
        if "styles" in parts:
            kept = styles(bench, record, asked)
        if "controlnet" in parts:
            steered(bench, record, asked.seeds)
        if "cost" in parts:
            record.put("cost", costs(bench))
    record.finish(command_of(asked))
    if asked.strip and kept:
        strip(kept, asked.strip)
    if asked.page:
        asked.page.write_text(page(asked.page.read_text(encoding="utf-8"), record.rows), encoding="utf-8")


if __name__ == "__main__":
    main()
