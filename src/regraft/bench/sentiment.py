"""Real sentence encoders: MiniLM and what became of it, with LoRAs that sort texts by the sign of their rating."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regraft.adapter import Adapter
from regraft.bench import encoders, fetched, rated
from regraft.bench.encoders import Encoder, Recipe
from regraft.bench.worlds import PairSpec, Scorer, Scores, Which
from regraft.probes.sentences import SENTENCES
from regraft.runtime import Loaded, applied, load_model

#: Name → texts, and how it is trained.
ADAPTERS = {
    "film": ("film", Recipe(1000, 320)),
    "tweets": ("tweets", Recipe(1000, 320)),
    "products-dora": ("products", Recipe(1000, 320, rank=4, alpha=8, targets=("query", "value"), dora=True)),
}
_NAMES = tuple(ADAPTERS)
PAIRS = (
    PairSpec("minilm-tuned", "encoder", "near", "near", "all-MiniLM-L6-v2 → a fine-tune of it", _NAMES, (0,)),
    PairSpec(
        "minilm-int8", "encoder", "quantised", "near", "all-MiniLM-L6-v2 → the same in int8 per channel", _NAMES, (0,)
    ),
    PairSpec(
        "minilm-l3",
        "encoder",
        "scratch",
        "far",
        "all-MiniLM-L6-v2 → paraphrase-MiniLM-L3-v2: embeddings alike, half the depth, trained apart",
        _NAMES,
        (0,),
    ),
)
#: Heads are fitted on four fifths of the test texts and scored on the fifth that is left.
FOLDS = 5
#: Of the heads' logistic regression. Of 0.1, 0.3, 1 and 3, the one with the least held-out loss on vectors without and
#: with a LoRA together (film texts, old base, seed 100: 0.993, 0.909, 0.905, 0.954).
WEIGHT_DECAY = 1.0


class SentimentWorld:
    """See `regraft.bench.worlds.World`.

    A score is −log loss of a text's sign under a head that was fitted on this very model's vectors of the other test
    texts: what the vectors hold, with no head carried along that another base's vectors would not fit. Retention
    compares the cosines among plain sentences with those of the new base, which the old base's are furthest from.
    """

    pairs = PAIRS

    def __init__(self, cache: Path) -> None:
        self.cache = cache / "encoder"

    def base(self, pair: str, which: Which) -> Path:
        old, tuned = fetched.minilm(self.cache)
        if which == "old":
            return old
        if pair == "minilm-tuned":
            return tuned
        return (fetched.minilm_int8 if pair == "minilm-int8" else fetched.minilm_l3)(self.cache)

    def adapter(self, pair: str, name: str, seed: int) -> Path:
        return self._trained(self.base(pair, "old"), name, seed)

    def native(self, pair: str, name: str, seed: int) -> Path:
        return self._trained(self.base(pair, "new"), name, seed)

    @contextmanager
    def scorer(self, pair: str, which: Which, name: str) -> Iterator[Scorer]:
        base = self.base(pair, which)
        model = load_model(base)
        _, test = self._texts(name)
        with torch.no_grad():
            fresh = cosines(Encoder(self.base(pair, "new")).features(list(SENTENCES)))
        encoder = Encoder(base, model=model.main)

        def score(adapter: Adapter | None) -> Scores:
            with applied(model.components, adapter), torch.no_grad():
                vectors = encoder.features(test.texts)
                plain = cosines(encoder.features(list(SENTENCES)))
            losses, right = held_out(vectors, test.labels)
            return Scores(-losses, -np.square(plain - fresh).mean(1), {"accuracy": float(right.mean())})

        yield score

    def inputs(self, pair: str) -> dict[str, Any]:
        """Nothing beside the defaults: plain sentences."""
        return {}

    def loaded(self, pair: str, which: Which) -> Loaded:
        return load_model(self.base(pair, which))

    def _texts(self, name: str) -> tuple[rated.Split, rated.Split]:
        texts, recipe = ADAPTERS[name]
        # The same test texts for every seed: seeds differ by training alone.
        return rated.load_task(fetched.rated_texts(self.cache), texts, 0, recipe.n_train, recipe.n_test)

    def _trained(self, base: Path, name: str, seed: int) -> Path:
        out = self.cache / "adapters" / base.name / f"{name}-s{seed}"
        if not out.is_dir():
            stage = out.with_name(f".{out.name}.part")
            shutil.rmtree(stage, ignore_errors=True)
            encoders.train_lora(base, stage, self._texts(name)[0], ADAPTERS[name][1], seed)
            # The head is no part of what is carried.
            (stage / "head.safetensors").unlink()
            stage.rename(out)
        return out


def cosines(vectors: Tensor) -> NDArray[np.float64]:
    """Of all pairs of vectors (n, width): (n, n)."""
    unit = nn.functional.normalize(vectors.double(), dim=1)
    found: NDArray[np.float64] = (unit @ unit.T).numpy()
    return found


def held_out(vectors: Tensor, labels: Tensor, decay: float = WEIGHT_DECAY) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Log loss and whether the side is right, (n,) each, of vectors (n, width), by heads fitted on the other folds."""
    losses, right = torch.zeros(len(labels), dtype=torch.float64), torch.zeros(len(labels), dtype=torch.bool)
    fold = torch.arange(len(labels)) % FOLDS
    for k in range(FOLDS):
        inside, outside = fold != k, fold == k
        head = encoders.best_head(vectors[inside], labels[inside], decay)
        with torch.no_grad():
            logits = head(vectors[outside]).squeeze(1).double()
        wanted = labels[outside].double()
        losses[outside] = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        right[outside] = (logits > 0) == (wanted > 0)
    return losses.numpy(), right.numpy()
