"""The benchmark's language models: a v1, what became of it in eight ways, and adapters on each of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from regraft.adapter import Adapter
from regraft.bench import language_recipes as recipes
from regraft.bench.language_models import CONTEXT, with_tokens
from regraft.bench.language_recipes import BaseRecipe
from regraft.bench.language_text import Text, load_domain, write_whole
from regraft.bench.language_tokens import character_tokenizer, encode, pair_tokenizer, spelling
from regraft.bench.language_train import AdapterRecipe, Log, drift, losses, tokens_of, train, train_adapter
from regraft.bench.worlds import PairSpec, Scorer, Scores, Which
from regraft.errors import InputError
from regraft.runtime.applied import applied
from regraft.runtime.libraries import library, quiet_libraries
from regraft.runtime.load import load_model

if TYPE_CHECKING:
    from regraft.bridge.logits import LogitBridge

#: Held-out texts in a score, of `CONTEXT` characters each.
WINDOWS = 64


class LanguageWorld:
    """See `regraft.bench.worlds.World`. What is missing is trained on first use; each thing is trained once.

    Args:
        cache: the benchmark's cache.
        bases: by name; ``v1`` is the old one of every pair.
        adapters: by name.
        pairs: their new base is their name without ``lm-``.
        text: a domain's text by name; by default cut out of packages.
    """

    def __init__(
        self,
        cache: Path,
        *,
        bases: Mapping[str, BaseRecipe] = recipes.BASES,
        adapters: Mapping[str, AdapterRecipe] = recipes.ADAPTERS,
        pairs: tuple[PairSpec, ...] = recipes.PAIRS,
        text: Callable[[str], Text] | None = None,
    ) -> None:
        self.cache = cache / "language"
        self.bases, self.adapters, self.pairs = bases, adapters, pairs
        self._text = text or (lambda name: load_domain(name, self.cache))

    def base(self, pair: str, which: Which) -> Path:
        return self._base(self._name(pair, which))

    def adapter(self, pair: str, name: str, seed: int) -> Path:
        return self._adapter(self._name(pair, "old"), name, seed)

    def native(self, pair: str, name: str, seed: int) -> Path:
        return self._adapter(self._name(pair, "new"), name, seed)

    def trained_in(self, pair: str, name: str, seed: int) -> float | None:
        """Processor time of the native adapter's training, in seconds."""
        found = self.record(self.native(pair, name, seed)).get("training_seconds")
        return None if found is None else float(found)

    @contextmanager
    def scorer(self, pair: str, which: Which, name: str) -> Iterator[Scorer]:
        model = load_model(self.base(pair, which))
        task, third = self._tests(name)

        def score(adapter: Adapter | None) -> Scores:
            with applied(model.components, adapter):
                both = losses(model.main, model.tokenizer, [*task, *third])
            values = -both.numpy().astype(np.float64)
            return Scores(values[: len(task)], values[len(task) :])

        yield score

    def bridged(self, pair: str, name: str, bridge: LogitBridge) -> Scores:
        """As `scorer` has it, of logit arithmetic."""
        task, third = (np.array([_likelihood(bridge, text) for text in texts]) for texts in self._tests(name))
        return Scores(task, third)

    def _tests(self, name: str) -> tuple[list[str], list[str]]:
        """Held-out texts of an adapter's task, and of what the new bases alone were trained on."""
        task, third = (self._text(domain) for domain in (self._recipe(name).domain, recipes.THIRD))
        return task.windows(WINDOWS, CONTEXT), third.windows(WINDOWS, CONTEXT)

    def inputs(self, pair: str) -> dict[str, Any]:
        """Nothing beside the defaults: texts are sampled from the models themselves."""
        self._spec(pair)
        return {}

    def make(self, pairs: Iterable[str] = (), log: Log | None = None) -> None:
        """Train what is missing of some pairs (by default all), the first seed of each pair before the others."""
        specs = [self._spec(name) for name in pairs] or list(self.pairs)
        for spec in specs:
            self.base(spec.name, "new")
        jobs = [(seed, spec, name) for spec in specs for name in spec.adapters for seed in spec.seeds]
        for seed, spec, name in sorted(jobs, key=lambda job: job[0]):
            for folder in (self.adapter(spec.name, name, seed), self.native(spec.name, name, seed)):
                if log is not None:
                    log(str(folder))

    def record(self, folder: Path) -> dict[str, Any]:
        """What training noted of a base or an adapter: losses, drift, seconds."""
        found: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        return found

    def _spec(self, pair: str) -> PairSpec:
        for spec in self.pairs:
            if spec.name == pair:
                return spec
        known = ", ".join(spec.name for spec in self.pairs)
        raise InputError(f"no pair of language models is named {pair!r}", remedy=f"Known: {known}.")

    def _name(self, pair: str, which: Which) -> str:
        name = self._spec(pair).name
        return recipes.OLD if which == "old" else name.removeprefix("lm-")

    def _recipe(self, name: str) -> AdapterRecipe:
        if name not in self.adapters:
            raise InputError(f"no adapter is named {name!r}", remedy=f"Known: {', '.join(self.adapters)}.")
        return self.adapters[name]

    def _called(self, base: str) -> str:
        """A base's folder: its name and its recipe's digest, so that a cache never holds what another recipe made."""
        recipe = self.bases[base]
        start = self.bases[recipes.OLD].digest if recipe.size is None else ""
        return f"{base}-{recipes.digest(recipe.digest, start)}"

    def _base(self, name: str) -> Path:
        folder = self.cache / "bases" / self._called(name)
        return self._once(folder, lambda fresh, log: self._train_base(name, fresh, log))

    def _adapter(self, base: str, name: str, seed: int) -> Path:
        recipe = self._recipe(name)
        return self._once(
            self.cache / "adapters" / self._called(base) / f"{name}-s{seed}-{recipes.digest(recipe)}",
            lambda folder, log: self._train_adapter(base, recipe, seed, folder, log),
        )

    def _once(self, folder: Path, build: Callable[[Path, Log], dict[str, Any]]) -> Path:
        """``folder``, built elsewhere and renamed, by one process alone: others wait for it."""
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with library("filelock").FileLock(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir():
                return folder
            began = perf_counter(), process_time()
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as place:
                fresh = Path(place) / folder.name
                fresh.mkdir()
                notes = build(fresh, lambda line: self._say(f"{folder.relative_to(self.cache)}: {line}"))
                notes["wall_seconds"] = round(perf_counter() - began[0], 1)
                notes["cpu_seconds"] = round(process_time() - began[1], 1)
                write_whole(fresh / "training.json", json.dumps(notes, indent=1))
                fresh.rename(folder)
        self._say(f"{folder.relative_to(self.cache)}: {json.dumps(notes)}")
        return folder

    def _say(self, line: str) -> None:
        with (self.cache / "training.log").open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now(timezone.utc):%H:%M:%S} {line}\n")

    def _train_base(self, name: str, folder: Path, log: Log) -> dict[str, Any]:
        recipe = self.bases[name]
        texts = {domain: self._text(domain) for domain in recipe.domains}
        teacher = self._load(recipes.OLD) if recipe.size is None else None
        model, tokenizer = self._start(recipe, texts)
        ids = [encode(tokenizer, text.train) for text in texts.values()]
        before = {key: value.detach().clone() for key, value in model.state_dict().items()}
        train(model, ids, recipe.course, seed=0, log=log, teacher=teacher if recipe.distilled else None)
        with quiet_libraries():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        model.eval()
        return {
            "course": asdict(recipe.course),
            "parameters": sum(p.numel() for p in model.parameters()),
            # Against what training began with; of a base of v1's shapes, that is v1.
            "drift": None if teacher is None else drift(before, model.state_dict()),
            "held_out": {
                domain: float(losses(model, tokenizer, self._text(domain).windows(WINDOWS, CONTEXT)).mean())
                for domain in recipes.MIX
            },
        }

    def _start(self, recipe: BaseRecipe, texts: Mapping[str, Text]) -> tuple[Any, Any]:
        """The model that training begins with, and its tokenizer."""
        model = recipes.start_of(recipe, None if recipe.size is not None else self._load(recipes.OLD))
        if not recipe.tokens:
            return model, character_tokenizer()
        tokenizer = pair_tokenizer((text.train[:300_000] for text in texts.values()), recipe.tokens)
        return with_tokens(model, spelling(tokenizer)), tokenizer

    def _train_adapter(self, base: str, recipe: AdapterRecipe, seed: int, folder: Path, log: Log) -> dict[str, Any]:
        loaded = load_model(self._base(base))
        text = self._text(recipe.domain)
        windows = text.windows(WINDOWS, CONTEXT)
        before = losses(loaded.main, loaded.tokenizer, windows)
        loaded.main.name_or_path = f"regraft-bench/{base}"
        ids, began = encode(loaded.tokenizer, text.train), process_time()
        wrapped = train_adapter(loaded.main, ids, recipe, seed, log)
        seconds = process_time() - began
        # Told to save embeddings or not, PEFT does not look for the base on the hub.
        wrapped.save_pretrained(folder, save_embedding_layers=False)
        after = losses(wrapped, loaded.tokenizer, windows)
        return {
            "course": asdict(recipe.course),
            "before": float(before.mean()),
            "after": float(after.mean()),
            "gain": float((before - after).mean()),
            # Without what had to be made before it: `_once` counts that, too.
            "training_seconds": round(seconds, 1),
        }

    def _load(self, name: str) -> Any:
        return load_model(self._base(name)).main.requires_grad_(True)


def _likelihood(bridge: LogitBridge, text: str) -> float:
    """Log-likelihood of all characters but the first, in nats for each; see `losses`."""
    from regraft.bridge.logits import log_probabilities

    ids = tokens_of(bridge.new.tokenizer, text)
    found = log_probabilities(bridge, ids)[:-1].gather(1, ids[1:, None])
    return float(found.sum(dtype=torch.float64)) / (len(text) - 1)
