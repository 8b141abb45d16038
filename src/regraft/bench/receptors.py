"""Real protein encoders: SCEPTR, its fine-tune, and siblings trained apart, with LoRAs that write a property."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.adapter import MODEL, Adapter
from regraft.bench import fetched, protein
from regraft.bench.sentiment import cosines
from regraft.bench.worlds import PairSpec, Scorer, Scores, Which
from regraft.runtime import Loaded, applied

#: Name → layers, rank, property.
ADAPTERS: dict[str, tuple[list[int], int, str]] = {
    "hydropathy": ([0, 1, 2], 4, "hydropathy"),
    "hydropathy-last": ([2], 4, "hydropathy"),
    "volume": ([0, 1, 2], 8, "volume"),
}
_NAMES = tuple(ADAPTERS)
_OLD = "SCEPTR"
_NEW = {
    "sceptr-tuned": "SCEPTR_finetuned",
    "sceptr-sibling": "SCEPTR_synthetic_data",
    "sceptr-small": "SCEPTR_small",
}
PAIRS = (
    PairSpec(
        "sceptr-tuned",
        "encoder",
        "near",
        "near",
        "SCEPTR → its fine-tune: last layer and input projection changed",
        _NAMES,
        (0,),
    ),
    PairSpec(
        "sceptr-sibling",
        "encoder",
        "scratch",
        "far",
        "SCEPTR → the same shapes, trained apart on synthetic receptors",
        _NAMES,
        (0,),
    ),
    PairSpec("sceptr-small", "encoder", "scratch", "far", "SCEPTR → half its width, trained apart", _NAMES, (0,)),
)
#: Receptors in a score, and in a probe; both are other ones than those of training.
N_TEST, N_PROBE = 256, 64


class ReceptorWorld:
    """See `regraft.bench.worlds.World`.

    The adapters are taught to write a property of a receptor's last loop along one direction of its vector. A score is
    −(z − y)², with y the standardised property of a test receptor and z what is read along the direction, standardised
    over the test receptors: its mean is −2 (1 − correlation), whatever else changed in the vectors. Retention compares
    the cosines among receptors with those of the new base.
    """

    pairs = PAIRS

    def __init__(self, cache: Path) -> None:
        self.cache = cache / "encoder"

    def base(self, pair: str, which: Which) -> Path:
        return fetched.sceptr(self.cache)[_OLD if which == "old" else _NEW[pair]]

    def adapter(self, pair: str, name: str, seed: int) -> Path:
        return self._trained(self.base(pair, "old"), name, seed)

    def native(self, pair: str, name: str, seed: int) -> Path:
        return self._trained(self.base(pair, "new"), name, seed)

    @contextmanager
    def scorer(self, pair: str, which: Which, name: str) -> Iterator[Scorer]:
        model = protein.load_protein(self.base(pair, which))
        inputs, values = protein.receptors(N_TEST, 1, ADAPTERS[name][2])
        fresh = cosines(protein.outputs(protein.load_protein(self.base(pair, "new")), inputs))

        def score(adapter: Adapter | None) -> Scores:
            with applied({MODEL: model}, adapter):
                vectors = protein.outputs(model, inputs)
            read = vectors @ protein.direction(vectors.shape[1])
            away = ((read - read.mean()) / read.std() - values).double().square()
            told = float(torch.corrcoef(torch.stack([read, values]))[0, 1])
            return Scores(-away.numpy(), -np.square(cosines(vectors) - fresh).mean(1), {"correlation": told})

        yield score

    def inputs(self, pair: str) -> dict[str, Any]:
        """Nothing: no library knows these models, so that only `probe` can run them."""
        return {}

    def loaded(self, pair: str, which: Which) -> Loaded:
        file = self.base(pair, which)
        return Loaded({MODEL: protein.load_protein(file)}, "encoder", "SCEPTR", file)

    def probe(self, pair: str, seed: int) -> ReceptorProbe:
        """Made-up receptors."""
        return ReceptorProbe(protein.receptors(N_PROBE, 2 + seed)[0])

    def _trained(self, base: Path, name: str, seed: int) -> Path:
        out = self.cache / "adapters" / base.stem / f"{name}-s{seed}"
        if not out.is_dir():
            layers, rank, property = ADAPTERS[name]
            stage = out.with_name(f".{out.name}.part")
            shutil.rmtree(stage, ignore_errors=True)
            depth = len(protein.load_protein(base)._self_attention_stack._standard_stack._self_attention_stack.layers)
            layers = [layer for layer in layers if layer < depth] or [depth - 1]
            protein.train_lora(base, layers, seed, rank=rank, property=property).save(stage)
            stage.rename(out)
        return out


@dataclass(frozen=True)
class ReceptorProbe:
    """A `regraft.probes.Probe` of receptors (n, tokens, 4)."""

    rows: Tensor
    made: str = "made-up receptors"
    prompts: tuple[str, ...] = ()
    logits: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def outputs(self, model: Loaded) -> Iterator[Tensor]:
        """The vector (1, width) of each receptor."""
        yield from protein.outputs(model.main, self.rows).unsqueeze(1)

    def carried_to(self, model: Loaded) -> tuple[ReceptorProbe, str | None]:
        """The same receptors: every model reads them alike."""
        return self, None
