"""A ControlNet of v1 through both bridges, beside its controls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.bench_bridge import control
from tools.bench_bridge.styles import NEW, OLD, Bench, Case, Pictures
from tools.bench_bridge.ways import mapper_of

from regraft.bridge.control import Control, controlled, load_controlnet
from regraft.bridge.delta import DeltaPipeline
from regraft.bridge.x_adapter.files import load_mapper
from regraft.bridge.x_adapter.pipeline import BridgePipeline


def steered_ways(case: Case, images: list[Any]) -> dict[str, Callable[[], Pictures]]:
    """Each way to draw silhouettes, by name.

    Args:
        case: what is drawn, from which noise; its LoRA is left out.
        images: one silhouette for each prompt.
    """
    bench, seed = case.bench, case.seed
    nets = {base: _net(bench, base, seed) for base in (OLD, NEW)}
    bridge = BridgePipeline(bench.old, bench.new, load_mapper(mapper_of(bench)), nets[OLD])
    delta = DeltaPipeline(bench.old, bench.new, None, nets[OLD])
    return {
        "new alone": case.alone,
        "old + ControlNet": lambda: _controlled(case, OLD, nets[OLD], images),
        "native": lambda: _controlled(case, NEW, nets[NEW], images),
        "X-Adapter": lambda: case.through(bridge, image=images),
        "X-Adapter, read with the ControlNet": lambda: case.through(bridge, image=images, reading="plugged"),
        "delta": lambda: case.through(delta, image=images),
    }


def _net(bench: Bench, base: str, seed: int) -> Any:
    model = bench.old if base == OLD else bench.new
    return load_controlnet(control.trained(base, bench.shop, seed), model)


def _controlled(case: Case, which: str, net: Any, images: list[Any]) -> Pictures:
    model = case.bench.old if which == OLD else case.bench.new
    with controlled(model.main, Control.of(net, model, images, len(images), (16, 16), 1.0)):
        return case.plain(which, None)
