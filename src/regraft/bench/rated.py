"""Sentiment tasks: the sign of a text's mean rating, near-zero ratings left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FILES = {
    "film": "movieReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
}
_UNDECIDED = 0.5


@dataclass(frozen=True)
class Split:
    """Texts and their labels, 1 for a positive rating; labels (n,)."""

    texts: list[str]
    labels: Tensor


def load_task(folder: Path, task: str, seed: int, n_train: int, n_test: int) -> tuple[Split, Split]:
    """Training and test texts of a task, drawn anew for each seed; never a text in both.

    Args:
        folder: see `packages.rated_texts`.
        task: a key of `FILES`.
        seed: of the draw.
        n_train: texts to train on.
        n_test: texts to test on; the same ones for every ``n_train``.
    """
    lines = (folder / FILES[task]).read_text(encoding="utf-8", errors="replace").splitlines()
    ratings = {}
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) > _UNDECIDED:
            ratings[text.strip()] = float(rating)
    texts = list(ratings)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()

    def split(indices: list[int]) -> Split:
        chosen = [texts[i] for i in indices]
        return Split(chosen, torch.tensor([float(ratings[text] > 0) for text in chosen]))

    return split(order[n_test : n_test + n_train]), split(order[:n_test])
