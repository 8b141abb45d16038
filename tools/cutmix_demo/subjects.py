"""The two subjects that are taught, pictures of their classes, and what they are told apart by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.bench import diffusion_art as art
from regraft.training.cutmix import CutMix, Phrases, Subject

SET = "fluent"
ICONS = {"tiger": "tiger-face", "panda": "panda"}
"""Two faces that the base has not seen; like in shape, unlike in colour, so that a blend is plain to see."""
NAMES = {"tiger": ("<v1>", "cat"), "panda": ("<v2>", "dog")}
"""Identifier and class: the paper's own hard case is a dog beside a panda (arXiv 2303.11305, figure 6)."""
DRAWINGS = 24

# The base reads 16 tokens and knows few words; both prompts with sides just fit.
PHRASES = Phrases(
    one="{0} on white", both="{0} and {1} on white", beside="{0} left {1} right", above="{0} top {1} bottom"
)
#: Another wording than in training, as in the paper.
ASKED = "{0} by {1} on white"


@dataclass(frozen=True)
class Drawn:
    """Pictures (n, 3, 32, 32) in [−1, 1] on white, by what they show."""

    tiger: Tensor
    panda: Tensor
    cat: Tensor
    dog: Tensor

    def subjects(self) -> list[Subject]:
        """The two, with their identifiers."""
        return [Subject(getattr(self, name), *NAMES[name]) for name in ICONS]


def drawn(cache: Path, *, test: bool = False) -> Drawn:
    """Drawings of random scale, place and turn; ``test`` makes others."""
    folder = cache / "art"
    folder.mkdir(parents=True, exist_ok=True)
    icons = art.icons(SET, folder)
    rng = np.random.default_rng(8 if test else 7)
    wanted = ICONS | {name: art.CONCEPTS[name] for name in ("cat", "dog")}
    return Drawn(**{name: _on_white(icons, icon, DRAWINGS, rng) for name, icon in wanted.items()})


def _on_white(icons: dict[str, Any], icon: str, count: int, rng: np.random.Generator) -> Tensor:
    body, width = icons["icons"][icon]["body"], icons["width"]
    sheets: list[art.Pixels] = []
    while len(sheets) < count:
        rgba = art.draw(body, width, rng)
        # One that is cut off by the border could not be put whole into a half.
        if not any(edge.any() for edge in (rgba[0, :, 3], rgba[-1, :, 3], rgba[:, 0, 3], rgba[:, -1, 3])):
            sheets.append(rgba)
    shown = torch.from_numpy(np.stack(sheets)).float() / 255
    colour, alpha = shown[..., :3], shown[..., 3:]
    on_white = colour * alpha + torch.tensor(art.BACKGROUNDS["white"]) * (1 - alpha)
    return (on_white * 2 - 1).permute(0, 3, 1, 2).contiguous()


def sampler(subjects: list[Subject], probability: float) -> CutMix:
    """Samples of the subjects, 32 × 32, whole in their halves; side by side alone, which takes fewer steps to learn."""
    return CutMix(subjects, (art.SIZE, art.SIZE), probability, "whole", PHRASES, ("beside",))
