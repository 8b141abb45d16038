"""The straightforward way, to hold ours against: both models whole in memory, `torch.linalg.svd` of each module.

``python -m regraft.bench.speed.plain METHOD OLD NEW ADAPTER PORTED``, where METHOD may have options (``lora-x
edge=0.35``), prints a JSON object: seconds to load, seconds of one module by shape, and how far the ported file is from
what this came to.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from regraft.bench.speed.making import by_shape
from regraft.bench.variants import parse_variants
from regraft.tensors import Shape
from regraft.transport import rank_for_energy

Factors = tuple[Tensor, Tensor]
_ENERGY = 0.9


def lora_x(old: Tensor, new: Tensor, up: Tensor, down: Tensor, edge: float | None = None) -> Factors:
    """`regraft.methods.lora_x` of one size, by a full decomposition; all float32."""
    u, s, vh = torch.linalg.svd(new, full_matrices=False)
    if edge is not None:
        kept = s**2 / (s**2 + edge**2 * (s**2).mean())
        return (u * kept) @ (u.T @ up), (down @ (vh.T * kept)) @ vh
    r = rank_for_energy(s, _ENERGY)
    return u[:, :r] @ (u[:, :r].T @ up), (down @ vh[:r].T) @ vh[:r]


def prolora(old: Tensor, new: Tensor, up: Tensor, down: Tensor) -> Factors:
    """`regraft.methods.prolora`, by full decompositions; twice the rank, not cut back."""
    u_s, s, vh_s = torch.linalg.svd(old, full_matrices=False)
    u_t, _, vh_t = torch.linalg.svd(new, full_matrices=False)
    r = rank_for_energy(s, _ENERGY)
    p_s, p_t, q_s, q_t = u_s[:, :r], u_t[:, :r], vh_s[:r].T, vh_t[:r].T
    inside = p_t @ (p_t.T @ (p_s @ (p_s.T @ up))), ((down @ q_s) @ q_s.T @ q_t) @ q_t.T
    outer_up, outer_down = up - p_s @ (p_s.T @ up), down - (down @ q_s) @ q_s.T
    outside = outer_up - p_t @ (p_t.T @ outer_up), outer_down - (outer_down @ q_t) @ q_t.T
    return torch.cat([inside[0], outside[0]], dim=1), torch.cat([inside[1], outside[1]])


def procrustes(old: Tensor, new: Tensor, up: Tensor, down: Tensor) -> Factors:
    """Schönemann's rotation of the smaller of one module's two sides, from a full decomposition of its cross-Gram."""
    if new.shape[0] <= new.shape[1]:
        u, _, vh = torch.linalg.svd(new @ old.T)
        return u @ (vh @ up), down
    u, _, vh = torch.linalg.svd(new.T @ old)
    return up, (down @ vh.T) @ u.T


#: Method → one module's factors on the new base.
WAYS: Mapping[str, Callable[..., Factors]] = {
    "lora-x": lora_x,
    "prolora": prolora,
    "procrustes": procrustes,
}
#: Methods whose plain form says what ours does, so that the results are held against each other.
EQUAL = ("lora-x", "prolora")


def way_of(method: str) -> Callable[..., Factors] | None:
    """The plain way of a method with its options; None where there is none."""
    variant = parse_variants([method])[0]
    way = WAYS.get(variant.method)
    if way is None or variant.asked.keys() - inspect.signature(way).parameters.keys():
        return None
    return partial(way, **variant.options)


def _updates(state: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Module → (B, A), float32, of a file in diffusers' or PEFT's format."""
    found: dict[str, Factors] = {}
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            module = name.removeprefix("base_model.model.").removeprefix("unet.").removeprefix("transformer.")
            found[module] = state[f"{name}.lora_B.weight"].float(), down.float()
    return found


def _apart(one: Factors, other: Factors, rank: int) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW'‖, the second cut back to ``rank`` first."""
    from regraft.transport import cut

    if other[0].shape[1] > rank:
        other = cut(*other, rank)
    delta = other[0].double() @ other[1].double()
    return float((one[0].double() @ one[1].double() - delta).norm() / delta.norm().clamp_min(1e-30))


def measure(method: str, old: Path, new: Path, adapter: Path, ported: Path) -> dict[str, Any]:
    """Port one module of each shape and time it.

    Args:
        method: of `WAYS`, with its options.
        old: weights file of the old base.
        new: of the new one.
        adapter: diffusers' or PEFT's file.
        ported: what regraft made of it by the same method.

    Returns:
        ``load_s``; ``shapes``, for each ``{shape, modules, seconds}``, how many modules both bases have of it and the
        seconds of one; ``apart``, the largest relative distance to ``ported`` (null where the plain form means
        something else).

    Raises:
        ValueError: ``ported`` lacks a module that was compared, or the method has no plain way.
    """
    way = way_of(method)
    if way is None:
        raise ValueError(f"there is no plain way of {method}")
    started = time.perf_counter()
    before, after, state = load_file(old), load_file(new), load_file(adapter)
    updates, theirs = _updates(state), _updates(load_file(ported))
    # A mapped file is read when it is touched.
    for weights in (before, after):
        for weight in weights.values():
            weight.sum()
    loaded = time.perf_counter() - started
    both = [module for module in updates if f"{module}.weight" in after]
    shapes: dict[str, Shape] = {module: tuple(before[f"{module}.weight"].shape) for module in both}
    rows, apart = [], []
    for shape, alike in by_shape(shapes).items():
        module, begun = alike[0], time.perf_counter()
        one, other = before[f"{module}.weight"].float(), after[f"{module}.weight"].float()
        result = way(one, other, *updates[module])
        rows.append({"shape": list(shape), "modules": len(alike), "seconds": time.perf_counter() - begun})
        if module not in theirs:
            raise ValueError(f"{ported} has no {module}")
        apart.append(_apart(theirs[module], result, updates[module][1].shape[0]))
    return {"load_s": loaded, "shapes": rows, "apart": max(apart) if method.split()[0] in EQUAL else None}


if __name__ == "__main__":
    name, old_file, new_file, lora_file, ported_file = sys.argv[1:]
    found = measure(name, Path(old_file), Path(new_file), Path(lora_file), Path(ported_file))
    sys.stdout.write(json.dumps(found) + "\n")
