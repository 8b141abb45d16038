"""A sentence encoder with mean pooling and a linear head: train a LoRA on it, take its features, score them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from regraft.bench.rated import Split

_MAX_TOKENS = 64
_BATCH = 32
_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained.

    Attributes:
        n_train: texts to train on.
        n_test: texts to test on.
        epochs: over the training texts.
        rank: of the LoRA.
        alpha: likewise.
        targets: linear layers of every block; the pooler is left out, because mean pooling passes it by.
        dora: with a magnitude per row beside the low-rank update.
    """

    n_train: int = 2000
    n_test: int = 800
    epochs: int = 2
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("query", "key", "value", "dense")
    dora: bool = False

    @property
    def key(self) -> str:
        """For names of cached files."""
        return f"{self.n_train}x{self.epochs}-r{self.rank}"


class Encoder:
    """A base, with or without a LoRA, that turns texts into mean-pooled vectors (n, hidden).

    Args:
        base: its folder.
        adapter: PEFT folder, or None.
        model: the base as a model, where it is loaded already.
    """

    def __init__(self, base: Path, adapter: Path | None = None, model: Any = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model: Any = AutoModel.from_pretrained(base) if model is None else model
        if adapter is not None:
            self.model = PeftModel.from_pretrained(self.model, adapter)
        self.model.eval()

    def __call__(self, texts: list[str]) -> Tensor:
        """One batch, padded to its longest text."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
        hidden = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled: Tensor = (hidden * mask).sum(1) / mask.sum(1)
        return pooled

    @torch.no_grad()
    def features(self, texts: list[str]) -> Tensor:
        """Vectors of all texts, (n, hidden), in the texts' order."""
        # Texts of like length share a batch: less padding, the same vectors.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors: dict[int, Tensor] = {}
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            vectors |= dict(zip(batch, self([texts[i] for i in batch]), strict=True))
        return torch.stack([vectors[i] for i in range(len(texts))])


def new_head(hidden: int, seed: int) -> nn.Linear:
    """A linear head, initialised by the seed alone."""
    torch.manual_seed(seed)
    return nn.Linear(hidden, 1)


def batches(texts: list[str], epochs: int, seed: int) -> Iterator[list[int]]:
    """Indices batch by batch, shuffled anew in each epoch; texts of like length share a batch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(texts), generator=generator).tolist()
        epoch = []
        for start in range(0, len(order), 8 * _BATCH):
            pool = sorted(order[start : start + 8 * _BATCH], key=lambda i: len(texts[i]))
            epoch += [pool[i : i + _BATCH] for i in range(0, len(pool), _BATCH)]
        yield from (epoch[i] for i in torch.randperm(len(epoch), generator=generator).tolist())


def train_lora(base: Path, out: Path, train: Split, recipe: Recipe, seed: int) -> None:
    """Train LoRA and head together; writes a PEFT folder to ``out`` and the head to ``out``/head.safetensors."""
    encoder = Encoder(base)
    torch.manual_seed(seed)
    targets = rf"encoder\.layer\..*\.({'|'.join(recipe.targets)})"
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=targets, use_dora=recipe.dora)
    encoder.model = get_peft_model(encoder.model, config).eval()
    head = new_head(encoder.model.config.hidden_size, seed)
    parameters = [p for p in (*encoder.model.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE)
    for indices in batches(train.texts, recipe.epochs, seed):
        logits = head(encoder([train.texts[i] for i in indices])).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, train.labels[indices])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    encoder.model.save_pretrained(out)
    state = {name: tensor.detach() for name, tensor in head.state_dict().items()}
    save_file(state, out / "head.part")
    os.replace(out / "head.part", out / "head.safetensors")


def load_head(folder: Path) -> nn.Linear:
    """The head that was trained with a LoRA."""
    state = load_file(folder / "head.safetensors")
    head = nn.Linear(state["weight"].shape[1], 1)
    head.load_state_dict(state)
    return head


def retrained_head(features: Tensor, train: Split, recipe: Recipe, seed: int) -> nn.Linear:
    """A head trained on fixed features (n, hidden) by the very recipe that LoRA and head are trained by."""
    head = new_head(features.shape[1], seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=_LEARNING_RATE)
    for indices in batches(train.texts, recipe.epochs, seed):
        loss = nn.functional.binary_cross_entropy_with_logits(head(features[indices]).squeeze(1), train.labels[indices])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return head


def best_head(features: Tensor, labels: Tensor, weight_decay: float = 1e-2) -> nn.Linear:
    """Logistic regression on standardised features (n, hidden), run until it stands still."""
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    weight = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    scaled, targets = ((features - mean) / std).double(), labels.double()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(scaled @ weight + bias, targets)
        loss = loss + weight_decay * weight.square().sum() / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    head = nn.Linear(features.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_((weight / std.double()).unsqueeze(0))
        head.bias.copy_(bias - (weight * mean / std).sum())
    return head


@torch.no_grad()
def accuracy(head: nn.Linear, features: Tensor, labels: Tensor) -> float:
    """Share of texts (n, hidden) that fall on the side of their label."""
    return float(((head(features).squeeze(1) > 0) == (labels > 0)).float().mean())
