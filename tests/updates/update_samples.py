"""One update of every kind and form, for weights of 12 × 8 or kernels of 12 × 8 × 3 × 3, from seeds."""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.tensors import InMemory, TensorRef
from regraft.updates import (
    Boft,
    Diff,
    Foura,
    FourierFT,
    Full,
    GLora,
    Ia3,
    LoHa,
    LoKr,
    LowRank,
    Oft,
    SpectralShift,
    Subspace,
    Tucker,
    Update,
    Vera,
)

OUT, IN, KERNEL = 12, 8, (3, 3)
MATRIX, CONV = (OUT, IN), (OUT, IN, *KERNEL)


def ref(*shape: int, seed: int = 0) -> TensorRef:
    return InMemory(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3)


def lora(out: int = OUT, rank: int = 3, scale: float = 0.5, seed: int = 0) -> LowRank:
    return LowRank(ref(out, rank, seed=seed), ref(rank, IN, seed=seed + 1), scale, InMemory(torch.tensor(scale * rank)))


def positive(*shape: int) -> TensorRef:
    return InMemory(1 + ref(*shape, seed=9).load().abs())


def flag(value: int) -> TensorRef:
    return InMemory(torch.tensor(value))


def weight_for(update: Update) -> Tensor:
    """A base's weight that ``update`` fits."""
    return ref(*(CONV if "conv" in _NAMES[id(update)] else MATRIX), seed=77).load()


def loha(*, shape: tuple[int, ...] = MATRIX, magnitude: TensorRef | None = None) -> LoHa:
    columns = IN * (1 if len(shape) == 2 else 9)
    halves = (ref(OUT, 3, seed=1), ref(3, columns, seed=2), ref(OUT, 2, seed=3), ref(2, columns, seed=4))
    return LoHa(*halves, 0.7, magnitude=magnitude, weight_shape=shape)


SAMPLES: dict[str, Update] = {
    "lora": lora(),
    "lora with a bias": LowRank(ref(OUT, 3), ref(3, IN, seed=1), 0.5, bias=ref(OUT, seed=2)),
    "lora conv": LowRank(ref(OUT, 3, 1, 1), ref(3, IN, 3, 3, seed=1), 0.5),
    "dora per row": LowRank(ref(OUT, 3), ref(3, IN, seed=1), 0.5, magnitude=positive(OUT)),
    "dora per row conv": LowRank(ref(OUT, 3, 1, 1), ref(3, IN, 3, 3), 0.5, magnitude=positive(OUT, 1, 1, 1)),
    "dora per column": LowRank(ref(OUT, 3), ref(3, IN, seed=1), 0.5, magnitude=positive(1, IN)),
    "tucker conv": Tucker(ref(OUT, 3, 1, 1), ref(3, 3, 3, 3, seed=1), ref(3, IN, 1, 1, seed=2), 0.5),
    "tucker dora conv": Tucker(
        ref(OUT, 3, 1, 1), ref(3, 3, 3, 3, seed=1), ref(3, IN, 1, 1, seed=2), 0.5, magnitude=positive(OUT, 1, 1, 1)
    ),
    "loha": loha(),
    "loha conv": loha(shape=CONV),
    "loha dora": loha(magnitude=positive(OUT, 1)),
    "loha tucker conv": LoHa(
        *(ref(3, OUT, seed=1), ref(3, IN, seed=2), ref(2, OUT, seed=3), ref(2, IN, seed=4)),
        *(0.7, ref(3, 3, 3, 3, seed=5), ref(2, 2, 3, 3, seed=6)),
    ),
    "lokr": LoKr(0.6, w1=ref(3, 2, seed=1), w2=ref(4, 4, seed=2)),
    "lokr with other bounds": LoKr(0.6, w1=ref(4, 2, seed=1), w2_a=ref(3, 1, seed=2), w2_b=ref(1, 4, seed=3)),
    "lokr low-rank": LoKr(
        0.6, w1_a=ref(3, 1, seed=1), w1_b=ref(1, 2, seed=2), w2_a=ref(4, 2, seed=3), w2_b=ref(2, 4, seed=4)
    ),
    "lokr conv": LoKr(0.6, w1=ref(3, 2, seed=1), w2_a=ref(4, 2, seed=2), w2_b=ref(2, 36, seed=3), weight_shape=CONV),
    "lokr tucker conv": LoKr(
        0.6, w1=ref(3, 2, seed=1), w2_a=ref(2, 4, seed=2), w2_b=ref(2, 4, seed=3), t2=ref(2, 2, 3, 3, seed=4)
    ),
    "lokr full conv": LoKr(0.6, w1=ref(4, 2, seed=1), w2=ref(3, 4, 3, 3, seed=2), magnitude=positive(1, IN, 1, 1)),
    "lokr dora with other bounds": LoKr(0.6, w1=ref(4, 2, seed=1), w2=ref(3, 4, seed=2), magnitude=positive(OUT, 1)),
    "diff": Diff(ref(OUT, IN), "x.diff"),
    "diff conv": Diff(ref(*CONV), "x.diff"),
    "full": Full(ref(OUT, IN), "x.weight"),
    "ia3 per row": Ia3(ref(OUT), flag(0)),
    "ia3 per row conv": Ia3(ref(1, OUT, 1, 1), flag(0)),
    "ia3 per column": Ia3(ref(IN), flag(1)),
    "ia3 peft": Ia3(positive(OUT, 1), flag(0), convention="peft"),
    "oft": Oft(ref(3, 4, 4), positive(OUT, 1)),
    "oft conv": Oft(ref(3, 4, 4)),
    "oft with other bounds": Oft(ref(2, 6, 6)),
    "oft constrained": Oft(ref(3, 4, 4), alpha=InMemory(torch.tensor(0.05))),
    "oft peft": Oft(ref(2, 6), convention="peft"),
    "boft": Boft(ref(2, 2, 6, 6), positive(OUT, 1)),
    "boft peft": Boft(ref(2, 4, 2, 2), positive(OUT, 1), convention="peft"),
    "glora": GLora(ref(IN, 2, seed=1), ref(2, IN, seed=2), ref(OUT, 2, seed=3), ref(2, IN, seed=4), 0.5),
    "svdiff": SpectralShift(ref(IN), weight_shape=MATRIX),
    "svdiff conv": SpectralShift(ref(OUT)),
    "lorax": Subspace(ref(3), weight_shape=MATRIX),
    "lorax full conv": Subspace(ref(4, 4), weight_shape=CONV),
    "lorax with its vectors": Subspace(ref(3), ref(OUT, 3, seed=1), ref(IN, 3, seed=2), weight_shape=MATRIX),
    "foura": Foura(ref(3, IN), ref(OUT, 3, seed=1), 0.5),
    "foura masked conv": Foura(ref(3, IN, 3, 3), ref(OUT, 3, seed=1), 0.5, InMemory(torch.tensor([1.0, 0.0, 1.0]))),
    "foura fourier": Foura(ref(3, IN // 2 + 1, 2), ref(OUT // 2 + 1, 3, 2, seed=1), 0.5, size=(OUT, IN)),
    "vera": Vera(ref(OUT), ref(3, seed=1), ref(3, IN + 2, seed=2), ref(OUT + 4, 3, seed=3), weight_shape=MATRIX),
    "vera turned": Vera(
        *(ref(IN), ref(11, seed=1), ref(11, OUT, seed=2), ref(IN + 2, 11, seed=3)),
        orientation="conv1d",
        weight_shape=MATRIX,
    ),
    "fourierft": FourierFT(ref(5), 20.0, 7, weight_shape=MATRIX),
    "fourierft turned": FourierFT(ref(OUT * IN), 3.0, 7, "conv1d", MATRIX),
}
_NAMES = {id(update): name for name, update in SAMPLES.items()}
ADDITIVE = {name: update for name, update in SAMPLES.items() if update.additive}
