"""A small judge of sampled pictures: which concept it shows, and whether it is drawn in a look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regraft.bench import diffusion_art as art
from regraft.bench.diffusion_data import save
from regraft.bench.resume import batch_indices, cosine_rate

SEED, STEPS, BATCH, RATE = 5, 700, 64, 3e-3
_CONCEPTS, _LOOKS = list(art.CONCEPTS), ["plain", *art.LOOKS]

# A pixel this near to the palette counts wholly, from there less, and nothing at twice the distance. It is
# half as wide again as the demo's: other palettes than cyano's lose more in the autoencoder.
_NEAR = 0.06


class Judge(nn.Module):
    """Convolutions with two heads: 16 concepts, and plain or one of the looks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_block(3, 24), *_block(24, 48), *_block(48, 64), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2)
        )
        self.heads = nn.ModuleList([nn.Linear(256, len(_CONCEPTS)), nn.Linear(256, len(_LOOKS))])

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (n, 3, 32, 32) in [0, 1] → logits of concepts (n, 16) and of looks (n, 1 + looks)."""
        seen = self.body(pixels * 2 - 1)
        return self.heads[0](seen), self.heads[1](seen)

    @torch.no_grad()
    def named(self, pictures: art.Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The concept and the look (0 is plain) seen in each picture (n, 32, 32, 3)."""
        concepts, looks = self(torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float())
        return concepts.argmax(1).numpy(), looks.argmax(1).numpy()

    @torch.no_grad()
    def features(self, pictures: art.Floats) -> Tensor:
        """What the heads read of each picture (n, 32, 32, 3), at length 1: (n, 256)."""
        pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float()
        return nn.functional.normalize(self.body(pixels * 2 - 1), dim=1)


def look_number(look: str) -> int:
    """Its place among the judge's looks."""
    return _LOOKS.index(look)


def style_share(pictures: art.Floats, look: str) -> float:
    """How much of the pictures (n, 32, 32, 3) lies on the look's palette, as `regraft.demo.style` measures it."""
    paper, ink = (np.array(colour) for colour in (art.LOOKS[look].paper, art.LOOKS[look].ink))
    along = ink - paper
    place = np.clip((pictures - paper) @ along / (along @ along), 0, 1)
    distance = np.linalg.norm(pictures - (paper + place[..., None] * along), axis=-1)
    return float(np.clip(2 - distance / _NEAR, 0, 1).mean())


def trained_judge(drawings: Path, kept: Path, through: Callable[[art.Pixels], art.Floats] | None = None) -> Judge:
    """The judge, trained on both art sets, plain and in every look, unless the file ``kept`` holds it.

    Args:
        drawings: the folder of the art.
        kept: where it is kept.
        through: the autoencoder there and back, for a share of the pictures: what is judged came through it.
    """
    torch.manual_seed(SEED)
    judge = Judge()
    if kept.exists():
        judge.load_state_dict(torch.load(kept, weights_only=True))
        return judge.eval()
    pixels, concepts, looks = _lesson(drawings, through)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * cosine_rate(step, STEPS, warmup=30)
        chosen = batch_indices(SEED, step, BATCH, len(pixels))
        batch = pixels[chosen].float() / 255
        # Noise, so that the judge goes by shape and not by a clean edge that samples do not have.
        by_concept, by_look = judge(batch + 0.05 * torch.randn_like(batch))
        loss = nn.functional.cross_entropy(by_concept, concepts[chosen])
        loss = loss + nn.functional.cross_entropy(by_look, looks[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    save(kept, judge.state_dict())
    return judge.eval()


def accuracy(judge: Judge, drawings: Path, through: Callable[[art.Pixels], art.Floats]) -> dict[str, dict[str, float]]:
    """By art set, the shares of drawings that nothing was trained on whose concept and whose look it names rightly.

    Args:
        judge: trained.
        drawings: the folder of the art.
        through: the autoencoder there and back, as sampled pictures come.
    """
    told: dict[str, dict[str, float]] = {}
    for name in art.ART:
        rgba = art.drawings(name, drawings, test=True)
        right: list[NDArray[np.bool_]] = []
        for look in _LOOKS:
            made = art.styled(rgba, look) if look in art.LOOKS else art.plain(rgba)
            concepts, looks = judge.named(through(made.pixels))
            right.append(np.stack([concepts == made.prompts // len(art.BACKGROUNDS), looks == _LOOKS.index(look)]))
        concept, look_right = np.mean([found.mean(axis=1) for found in right], axis=0)
        told[name] = {"concept": round(float(concept), 4), "look": round(float(look_right), 4)}
    return told


def _lesson(drawings: Path, through: Callable[[art.Pixels], art.Floats] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (n, 3, 32, 32) in [0, 255], their concepts and their looks."""
    sheets: list[tuple[art.Pixels, NDArray[np.int64], int]] = []
    for name in art.ART:
        rgba = art.drawings(name, drawings)[:, :96]
        for look in _LOOKS:
            made = art.styled(rgba, look) if look in art.LOOKS else art.plain(rgba)
            # The plain ones come on six backgrounds each.
            some = slice(None) if look in art.LOOKS else slice(None, None, 2)
            sheets.append((made.pixels[some], made.prompts[some], _LOOKS.index(look)))
            if through is not None:
                few = slice(None, None, 3) if look in art.LOOKS else slice(None, None, 12)
                back = (through(made.pixels[few]) * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
                sheets.append((np.ascontiguousarray(back), made.prompts[few], _LOOKS.index(look)))
    pixels = torch.from_numpy(np.concatenate([sheet for sheet, _, _ in sheets]))
    concepts = torch.from_numpy(np.concatenate([prompts for _, prompts, _ in sheets])) // len(art.BACKGROUNDS)
    looks = torch.cat([torch.full((len(sheet),), look) for sheet, _, look in sheets])
    return pixels, concepts, looks


def _block(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
