"""What the bridges carry between the demo's v1 and v3, beside their controls.

    python -m tools.bench_bridge --cache DIR --out results/bridge.json --strip docs/bridge.png

Styles: LoRAs of v1 that no mapper has seen, through delta sampling and X-Adapter, beside the old base with the LoRA,
the new base alone, a native LoRA, and SDEdit from the old base's picture. ControlNet: silhouettes by a ControlNet of v1
through both bridges, beside the old base with it, the new base without, and a native one. What is done is kept in the
cache; figures are written as they come.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tools.bench_bridge import control
from tools.bench_bridge.page import page
from tools.bench_bridge.styles import (
    DEMO,
    GUIDANCE,
    NEW,
    OLD,
    PROMPTS,
    STEPS,
    WANTED,
    Bench,
    Case,
    Pictures,
    mean,
    shares,
    timed,
)

from regraft._version import __version__
from regraft.bench import diffusion_art as art
from regraft.bench.diffusion_judge import trained_judge
from regraft.bench.diffusion_score import through_autoencoder
from regraft.bench.diffusion_train import Workshop
from regraft.bridge.control import Control, controlled
from regraft.bridge.delta import DeltaPipeline
from regraft.bridge.x_adapter.files import load_mapper
from regraft.bridge.x_adapter.pipeline import BridgePipeline
from regraft.bridge.x_adapter.settings import MapperSettings
from regraft.runtime import quiet_libraries
from regraft.runtime.room import fast_half

STYLES = (DEMO, "woodcut")
TRAINED = MapperSettings(
    prompts=tuple(art.PROMPTS), pictures=384, steps=1500, look=250, precision="bf16" if fast_half() else "no"
)
#: Mappers that differ from it in one thing, seed 0.
ABLATED: dict[str, dict[str, Any]] = {
    "at equal noise, untimed (the paper's)": {"lead": 1.0, "timed": False},
    "on plain pictures alone": {"varied": 0},
    "with captions for the new base in half": {"prompted": 0.5},
    "with guided fusion": {"fusion": "guided"},
    "with SPADE fusion": {"fusion": "spade"},
}


def ways(case: Case, mapper: Path, *, ablate: bool) -> dict[str, Callable[[], Pictures]]:
    """Each way to draw a case's pictures, by name."""
    found: dict[str, Callable[[], Pictures]] = {
        "old + LoRA": case.teacher,
        "new alone": lambda: case.plain(NEW, None),
        "native": case.native,
        "X-Adapter": lambda: case.x_adapter(mapper),
        "delta": lambda: case.delta(1.0),
        **{f"SDEdit from {start}": lambda start=start: case.sdedit(start) for start in (0.8, 0.6, 0.4)},
    }
    if ablate:
        found |= {f"delta, λ {value}": lambda value=value: case.delta(value) for value in (0.5, 0.7, 1.3)}
        found |= {
            "delta, λ falling from 1.5 to 0.5": lambda: case.delta(lambda done: 1.5 - done),
            "delta, λ rising from 0.5 to 1.5": lambda: case.delta(lambda done: 0.5 + done),
        }
        for name, settings in {
            "with the prompt and guidance": {"new_prompt": PROMPTS, "new_guidance_scale": GUIDANCE},
            "with the prompt": {"new_prompt": PROMPTS},
            "with guidance": {"new_guidance_scale": GUIDANCE},
            "T0 1": {"start": 1.0},
            "T0 0.6": {"start": 0.6},
            "read with the LoRA": {"reading": "plugged"},
            "heard while drawing (the paper's)": {"reading": "drawing"},
            "lead 1": {"lead": 1.0},
            "lead 0.3": {"lead": 0.3},
            "scale 0.7": {"strength": 0.7},
            "scale 1.3": {"strength": 1.3},
        }.items():
            found[f"X-Adapter, {name}"] = lambda settings=settings: case.x_adapter(mapper, **settings)
    return found


class Record:
    """Figures on disk, written as they come."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}

    def part(self, *names: str) -> dict[str, Any]:
        place = self.rows
        for name in names:
            place = place.setdefault(name, {})
        return place

    def write(self) -> None:
        self.out.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def styles(bench: Bench, record: Record, asked: argparse.Namespace, kept: dict[str, Pictures]) -> None:
    """Every style and seed by every way."""
    mapper = bench.mapper("mapper", 0, TRAINED)
    for seed in range(asked.seeds):
        for name in asked.styles:
            case = Case(bench, name, seed)
            first = seed == 0 and name == asked.styles[0]
            wanted = ways(case, mapper, ablate=first)
            if first:
                wanted |= {f"X-Adapter trained {title}": _ablated(case, title) for title in asked.ablated}
            rows = record.part("styles", name, str(seed))
            for way, make in wanted.items():
                shown = first and way in SHOWN
                if way in rows and not shown:
                    continue
                pictures, seconds = timed(make)
                if shown:
                    kept[way] = pictures
                if way in rows:
                    continue
                rows[way] = {**bench.score(name, pictures), "seconds": round(seconds, 3)}
                print(name, seed, way, rows[way], flush=True)
                record.write()


def _ablated(case: Case, title: str) -> Callable[[], Pictures]:
    return lambda: case.x_adapter(case.bench.mapper(title, 0, replace(TRAINED, **ABLATED[title])))


SHOWN = ("old + LoRA", "new alone", "X-Adapter", "delta", "SDEdit from 0.6", "native")


def steered(bench: Bench, record: Record, seeds: int) -> None:
    """Silhouettes, by every way."""
    for seed in range(seeds):
        rows = record.part("controlnet", str(seed))
        wanted = control.Conditions.of(bench.shop, WANTED, seed)
        for way, make in _steered_ways(Case(bench, STYLES[0], seed), wanted.pictures()).items():
            if way in rows:
                continue
            pictures, seconds = timed(make)
            concepts, _ = bench.judge.named(pictures)
            rows[way] = {
                "agreement": round(wanted.agreement(pictures), 4),
                "concept": round(float((concepts == WANTED).mean()), 4),
                "seconds": round(seconds, 3),
            }
            print("controlnet", seed, way, rows[way], flush=True)
            record.write()


def _steered_ways(case: Case, images: list[Any]) -> dict[str, Callable[[], Pictures]]:
    bench, seed = case.bench, case.seed
    nets = {base: _net(bench, base, seed) for base in (OLD, NEW)}
    mapper = load_mapper(bench.mapper("mapper", 0, TRAINED))
    bridge = BridgePipeline(bench.old, bench.new, mapper, nets[OLD])
    delta = DeltaPipeline(bench.old, bench.new, None, nets[OLD])
    return {
        "new alone": lambda: case.plain(NEW, None),
        "old + ControlNet": lambda: _controlled(case, OLD, nets[OLD], images),
        "native": lambda: _controlled(case, NEW, nets[NEW], images),
        "X-Adapter": lambda: case.through(bridge, image=images),
        "X-Adapter, read with the ControlNet": lambda: case.through(bridge, image=images, reading="plugged"),
        "delta": lambda: case.through(delta, image=images),
    }


def _net(bench: Bench, base: str, seed: int) -> Any:
    from regraft.bridge.control import load_controlnet

    model = bench.old if base == OLD else bench.new
    return load_controlnet(control.trained(base, bench.shop, seed), model)


def _controlled(case: Case, which: str, net: Any, images: list[Any]) -> Pictures:
    model = case.bench.old if which == OLD else case.bench.new
    with controlled(model.main, Control.of(net, model, images, len(images), (16, 16), 1.0)):
        return case.plain(which, None)


def _command(asked: argparse.Namespace) -> str:
    given = [f"--seeds {asked.seeds}", "--styles " + " ".join(asked.styles)]
    given += (
        ["--ablated " + " ".join(f"'{title}'" for title in asked.ablated)] if asked.ablated != list(ABLATED) else []
    )
    return f"python -m tools.bench_bridge --cache DIR --out results/bridge.json {' '.join(given)}"


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """Means over styles and seeds; gains as shares of the native adapter's."""
    cases = [case for seeds in rows.get("styles", {}).values() for case in seeds.values() if "native" in case]
    found: dict[str, Any] = {}
    for way in dict.fromkeys(way for case in cases for way in case):
        here = [case for case in cases if way in case]
        found[way] = {
            **mean([case[way] for case in here]),
            "share": mean([shares(case, way) for case in here]),
            "cases": len(here),
        }
    steered = [case for case in rows.get("controlnet", {}).values() if "native" in case]
    nets: dict[str, Any] = {}
    for way in dict.fromkeys(way for case in steered for way in case):
        here = [case for case in steered if way in case]
        gains = [
            (case[way]["agreement"] - case["new alone"]["agreement"])
            / (case["native"]["agreement"] - case["new alone"]["agreement"])
            for case in here
        ]
        nets[way] = {**mean([case[way] for case in here]), "share": round(float(np.mean(gains)), 4), "cases": len(here)}
    return {"styles": found, "controlnet": nets}


def strip(kept: dict[str, Pictures], path: Path, columns: int = 12) -> None:
    """A row for each way that is shown, three times enlarged."""
    rows = [
        np.concatenate(list(kept[way][:: len(PROMPTS) // columns][:columns]), axis=1) for way in SHOWN if way in kept
    ]
    pixels = (np.concatenate(rows, axis=0) * 255).round().astype(np.uint8)
    size = (pixels.shape[1] * 3, pixels.shape[0] * 3)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strip", type=Path)
    parser.add_argument("--page", type=Path, help="write the part of docs/bridge.md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--styles", nargs="+", default=list(STYLES))
    parser.add_argument("--ablated", nargs="*", choices=list(ABLATED), default=list(ABLATED))
    parser.add_argument("--only", choices=["styles", "controlnet"])
    asked = parser.parse_args()
    record, kept = Record(asked.out), {}
    with quiet_libraries():
        shop = Workshop(asked.cache)
        judge = trained_judge(
            asked.cache / "art", asked.cache / "diffusion" / "judge.pt", through_autoencoder(shop.base(OLD) / "vae")
        )
        bench = Bench(shop, judge)
        if asked.only != "controlnet":
            styles(bench, record, asked, kept)
        if asked.only != "styles":
            steered(bench, record, asked.seeds)
    record.rows |= {
        "command": _command(asked),
        "date": date.today().isoformat(),
        "regraft_version": __version__,
        "pair": [OLD, NEW],
        "pictures": len(PROMPTS),
        "steps": STEPS,
        "guidance": GUIDANCE,
        "summary": summary(record.rows),
    }
    record.write()
    if asked.strip and kept:
        strip(kept, asked.strip)
    if asked.page:
        asked.page.write_text(page(asked.page.read_text(encoding="utf-8"), record.rows), encoding="utf-8")


if __name__ == "__main__":
    main()
