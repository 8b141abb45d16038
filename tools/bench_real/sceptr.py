"""SCEPTR → its fine-tune (near), siblings trained apart (far), another width (far and resized): verdict and effect."""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.bench import fetched, protein

from . import commands, results

OLD = "SCEPTR"
#: New base → how it stands to the old one.
PAIRS = {
    "SCEPTR_finetuned": "near: fine-tuned from it, last layer and input projection changed",
    "SCEPTR_synthetic_data": "far: same shapes, trained apart on synthetic receptors",
    "SCEPTR_shuffled_data": "far: same shapes, trained apart on shuffled receptors",
    "SCEPTR_small": "far and resized: width 32 in place of 64",
}
#: Which layers the LoRA changes.
ADAPTERS = {"all layers": [0, 1, 2], "last layer": [2]}
#: Against a refusal, a few suffice to show what it keeps a user from.
_FORCED = ("copy", "auto", "lora-x, energy 0.9", "prolora, energy 0.9", "procrustes")
_N_TEST = 256


class Effect:
    """What an adapter does to a base's vectors of the test receptors.

    Attributes:
        change: with − without, (n, width).
        similarities: the same for the cosines of all pairs of receptors, (pairs,).
        task: correlation of the vectors' part along the trained direction with the property, with the adapter.
        task_without: the same without it.
    """

    def __init__(self, file: Path, lora: protein.Lora, inputs: Tensor, hydropathy: Tensor) -> None:
        model = protein.load_protein(file)
        without, with_lora = protein.outputs(model, inputs), protein.outputs(model, inputs, lora)
        upper = torch.triu_indices(len(inputs), len(inputs), offset=1).unbind()
        self.change = with_lora - without
        self.similarities = (with_lora @ with_lora.T - without @ without.T)[upper]
        along = protein.direction(without.shape[1])
        self.task, self.task_without = (_correlation(v @ along, hydropathy) for v in (with_lora, without))

    def beside(self, old: Effect) -> dict[str, float | None]:
        """Figures of this effect beside that of the old base with its own adapter."""
        same = self.change.shape == old.change.shape
        cosine = torch.nn.functional.cosine_similarity(self.change, old.change, dim=1).mean() if same else None
        return {
            "task": self.task,
            "effect_cosine": float(cosine) if cosine is not None else None,
            "effect_norm_ratio": float((self.change.norm(dim=1) / old.change.norm(dim=1)).mean()),
            "similarity_correlation": _correlation(self.similarities, old.similarities),
        }


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def trained(cache: Path, file: Path, layers: str, seed: int) -> Path:
    """A LoRA trained on one base."""
    folder = cache / "sceptr" / f"{file.stem}-{layers.replace(' ', '-')}-seed{seed}"
    if not (folder / "adapter_config.json").exists():
        protein.train_lora(file, ADAPTERS[layers], seed).save(folder)
    return folder


def measure(
    files: dict[str, Path], cache: Path, new: str, layers: str, seed: int, methods: list[str]
) -> dict[str, Any]:
    """One pair, adapter and seed: verdict, what a port without ``--force`` does, and each method's effect."""
    test = protein.receptors(_N_TEST, seed)
    lora = trained(cache, files[OLD], layers, seed)
    old = Effect(files[OLD], protein.load_lora(lora), *test)
    ran = commands.check(lora, files[OLD], files[new], commands.forked)
    record = ran.record or {}
    found: dict[str, Any] = {
        "check": {
            "exit_code": ran.code,
            **{key: record.get(key) for key in ("verdict", "similarity", "distance", "method")},
            **({"error": ran.error} if ran.code else {}),
        },
        "old": {"task": old.task, "task_without": old.task_without},
    }
    force: list[str] = []
    if record.get("verdict") == "refused":
        out = cache / "sceptr" / "refused"
        refused = commands.port(lora, files[OLD], files[new], out, commands.METHODS["auto"], commands.forked)
        found["port_without_force"] = {"exit_code": refused.code, "error": refused.error, "wrote": out.exists()}
        force = ["--force"]
    rows: dict[str, Any] = found.setdefault("new", {})
    for name in methods:
        out = cache / "sceptr" / f"{new}-{layers}-{name}-seed{seed}".replace(" ", "-").replace(",", "")
        ran = commands.port(lora, files[OLD], files[new], out, [*commands.METHODS[name], *force], commands.forked)
        if ran.code:
            rows[name] = {"exit_code": ran.code, "error": ran.error}
            continue
        ported = Effect(files[new], protein.load_lora(out), *test)
        counts = (ran.record or {}).get("counts")
        rows[name] = ported.beside(old) | {"exit_code": 0, "counts": counts, "cpu_seconds": round(ran.seconds, 1)}
    native = trained(cache, files[new], layers, seed)
    own = Effect(files[new], protein.load_lora(native), *test)
    rows["native"] = own.beside(old)
    rows["none"] = {"task": own.task_without}
    return found


def summarise(seeds: dict[str, Any]) -> dict[str, Any]:
    """Mean ± std over seeds of every figure of every row; verdicts side by side."""
    first = next(iter(seeds.values()))
    rows = {}
    for name in first["new"]:
        mine = [found["new"][name] for found in seeds.values()]
        figures = ("task", "effect_cosine", "effect_norm_ratio", "similarity_correlation")
        rows[name] = {key: results.spread(row.get(key) for row in mine) for key in figures}
    checks = [found["check"] for found in seeds.values()]
    return {
        "verdicts": [check["verdict"] for check in checks],
        "similarity": results.spread(check["similarity"] for check in checks),
        "distance": results.spread(check["distance"] for check in checks),
        "old": {key: results.spread(found["old"][key] for found in seeds.values()) for key in ("task", "task_without")},
        "new": rows,
    }


def bench(cache: Path, out: Path, seeds: list[int]) -> None:
    """Measure all pairs, seed by seed; ``out`` is written after each, and a figure in the cache is not made again."""
    files = fetched.sceptr(cache)
    for seed, (new, relation) in product(seeds, PAIRS.items()):
        near = relation.startswith("near")
        for layers in ADAPTERS if near else ("all layers",):
            file = _figures(cache, new, layers, seed)
            if not file.exists():
                started = time.perf_counter()
                found = measure(files, cache, new, layers, seed, list(commands.METHODS if near else _FORCED))
                results.write(file, found)
                print(f"{new}, {layers}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
            results.write(out, collected(cache, seeds, out.name))


def _figures(cache: Path, new: str, layers: str, seed: int) -> Path:
    return cache / "sceptr" / f"{new}-{layers.replace(' ', '-')}-seed{seed}.json"


def collected(cache: Path, seeds: list[int], name: str) -> dict[str, Any]:
    """The content of the result file, from what lies in the cache."""
    pairs = []
    for (new, relation), layers in product(PAIRS.items(), ADAPTERS):
        files = {str(seed): _figures(cache, new, layers, seed) for seed in seeds}
        found = {seed: json.loads(file.read_bytes()) for seed, file in files.items() if file.exists()}
        if found:
            pair = {"new": new, "relation": relation, "adapter": layers}
            pairs.append(pair | {"summary": summarise(found), "seeds": found})
    return {
        **results.header(f"python -m tools.bench_real sceptr --cache DIR --out results/{name}"),
        "old": f"{OLD} (sceptr 1.2.0)",
        "pairs": pairs,
    }
