"""What a step costs by each way: seconds of the whole call by its steps, and passes of both denoisers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from tools.bench_bridge.styles import DEMO, OLD, PROMPTS, STEPS, Bench, Case, timed
from tools.bench_bridge.ways import mapper_of

from regraft.bridge.delta import DeltaPipeline
from regraft.bridge.x_adapter.files import load_mapper
from regraft.bridge.x_adapter.pipeline import BridgePipeline

#: Pictures that are drawn at once, runs that are timed after one that is not, and threads.
PICTURES, RUNS, THREADS = 16, 3, 1


@dataclass
class Passes:
    """What a denoiser was run on.

    Attributes:
        calls: how often.
        rows: pictures in all of them; guidance runs each twice.
    """

    calls: int = 0
    rows: int = 0


def costs(bench: Bench) -> dict[str, Any]:
    """Of the new base alone, delta sampling and X-Adapter, on the demo's style LoRA.

    Each is built and run once, which is where passes are counted; then runs are timed and their median taken.
    """
    case = Case(bench, DEMO, 0, PROMPTS[:PICTURES])
    adapter = bench.adapter(OLD, DEMO, 0)
    rows: dict[str, dict[str, float]] = {}
    with _threads(THREADS), _watched(bench) as passes:
        # Built in here: their twins of the old base are watched as it is.
        delta = DeltaPipeline(bench.old, bench.new, adapter)
        bridge = BridgePipeline(bench.old, bench.new, load_mapper(mapper_of(bench)))
        bridge.load_lora_weights(adapter)
        ways = {
            "new alone": case.alone,
            "delta": lambda: case.through(delta),
            "X-Adapter": lambda: case.through(bridge),
        }
        for way, make in ways.items():
            passes.update(old=Passes(), new=Passes())
            make()
            found = {f"{side}_passes": round(one.calls / STEPS, 3) for side, one in passes.items()}
            pictures = sum(one.rows for one in passes.values()) / (PICTURES * STEPS)
            seconds = median(timed(make)[1] for _ in range(RUNS)) * PICTURES / STEPS
            rows[way] = {**found, "pictures": round(pictures, 3), "seconds": round(seconds, 4)}
            print("cost", way, rows[way], flush=True)
    return {"threads": THREADS, "pictures": PICTURES, "runs": RUNS, "steps": STEPS, "ways": rows}


@contextmanager
def _watched(bench: Bench) -> Iterator[dict[str, Passes]]:
    """What both denoisers, and twins that are made of them inside, are run on."""
    passes = {"old": Passes(), "new": Passes()}

    def noting(side: str) -> Any:
        def note(_module: object, _inputs: object, output: Any) -> None:
            passes[side].calls += 1
            passes[side].rows += len(output[0])

        return note

    hooks = [model.main.register_forward_hook(noting(side)) for side, model in (("old", bench.old), ("new", bench.new))]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
