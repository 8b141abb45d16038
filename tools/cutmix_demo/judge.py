"""A small judge of regions of pictures: whole tiger, whole panda, or neither."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tools.cutmix_demo.subjects import Drawn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from regraft.bench.diffusion_art import BACKGROUNDS
from regraft.bench.resume import cosine_rate, step_generator
from regraft.training.cutmix import collage

TIGER, PANDA, NEITHER = 0, 1, 2
SIZE = 32
STEPS, BATCH, RATE = 500, 48, 3e-3
_WHITE = BACKGROUNDS["white"][0] * 2 - 1
_ALL, _FIRST, _SECOND = slice(None), slice(0, SIZE // 2), slice(SIZE // 2, SIZE)
# Rows and columns of the left, right, top and bottom half.
_HALVES = ((_ALL, _FIRST), (_ALL, _SECOND), (_FIRST, _ALL), (_SECOND, _ALL))


def boxed(region: Tensor) -> Tensor:
    """A half (n, 3, h, w) in the middle of 32 × 32 white pixels."""
    up, left = (SIZE - region.shape[2]) // 2, (SIZE - region.shape[3]) // 2
    return pad(region, (left, SIZE - region.shape[3] - left, up, SIZE - region.shape[2] - up), value=_WHITE)


def halves(pictures: Tensor) -> list[Tensor]:
    """Left, right, top and bottom of pictures (n, 3, 32, 32), each boxed."""
    return [boxed(pictures[:, :, rows, columns]) for rows, columns in _HALVES]


class Judge(nn.Module):
    """Convolutions that see a boxed half, or a whole picture."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for before, after in ((3, 24), (24, 48), (48, 64)):
            blocks += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 16, 3))

    def forward(self, seen: Tensor) -> Tensor:
        """(n, 3, 32, 32) in [−1, 1] → logits of tiger, panda and neither, (n, 3)."""
        found: Tensor = self.body(seen)
        return found

    @torch.no_grad()
    def sees(self, seen: Tensor) -> Tensor:
        """The class of each, (n,)."""
        return self(seen).argmax(1)


def trained_judge(drawn: Drawn, through: Callable[[Tensor], Tensor], seed: int = 5) -> Judge:
    """The judge, trained on regions with pictures through the autoencoder and without."""
    torch.manual_seed(seed)
    judge = Judge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * cosine_rate(step, STEPS, warmup=20)
        seen, what = lesson(drawn, BATCH, step_generator(seed, step), through if step % 2 else None)
        loss = cross_entropy(judge(seen + 0.05 * torch.randn_like(seen)), what)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return judge.eval()


@torch.no_grad()
def accuracy(judge: Judge, drawn: Drawn, through: Callable[[Tensor], Tensor], count: int = 600) -> dict[str, float]:
    """Share of right answers, by what is shown, on pictures through the autoencoder."""
    seen, what = lesson(drawn, count, step_generator(99, 0), through)
    right = judge.sees(seen) == what
    by = {"tiger": what == TIGER, "panda": what == PANDA, "neither": what == NEITHER}
    return {"all": round(float(right.float().mean()), 4)} | {
        name: round(float(right[rows].float().mean()), 4) for name, rows in by.items()
    }


def lesson(
    drawn: Drawn, count: int, random: torch.Generator, through: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Regions (n, 3, 32, 32) and their classes (n,): half of them whole subjects."""
    shown, what = zip(*(_example(drawn, random) for _ in range(count)), strict=True)
    pictures = torch.stack([picture for picture, _ in shown])
    pictures = through(pictures) if through is not None else pictures
    boxes = [
        halves(picture[None])[at] if at < 4 else picture[None] for picture, (_, at) in zip(pictures, shown, strict=True)
    ]
    return torch.cat(boxes), torch.tensor(what)


def _example(drawn: Drawn, random: torch.Generator) -> tuple[tuple[Tensor, int], int]:
    """A picture, which of its halves to look at (4 is all of it), and what is there."""
    own = int(torch.randint(2, (), generator=random))
    subject, other = (drawn.tiger, drawn.panda) if own == TIGER else (drawn.panda, drawn.tiger)
    kind = int(torch.randint(12, (), generator=random))
    one, two = _any(subject, random), _any(other, random)
    strange = _any(drawn.cat if own == TIGER else drawn.dog, random)
    at = int(torch.randint(4, (), generator=random))
    if kind < 5:
        # Whole, in the half that is looked at; what is in the other half varies.
        beside = (two, one, strange, torch.full_like(one, _WHITE))[int(torch.randint(4, (), generator=random))]
        return (_halved(one, beside, at), at), own
    if kind == 5:
        return (one, 4), own
    if kind == 6:
        return (one, at), NEITHER  # a piece of a large one
    if kind == 7:
        return (_blend(one, two, random), 4), NEITHER
    if kind == 8:
        return (_halved(_blend(one, two, random), two, at), at), NEITHER
    if kind == 9:
        return (_halved(strange, one, at), at), NEITHER
    if kind == 10:
        return (_halved(torch.full_like(one, _WHITE), one, at), at), NEITHER
    return ((_blend(one, two, random), at) if own else (strange, 4)), NEITHER


def _halved(mine: Tensor, beside: Tensor, at: int) -> Tensor:
    """A collage with ``mine`` in half ``at``."""
    first, second = (mine, beside) if at in (0, 2) else (beside, mine)
    return collage(first, second, (SIZE, SIZE), beside=at < 2, fit="whole")[0]


def _blend(one: Tensor, two: Tensor, random: torch.Generator) -> Tensor:
    """One creature of two: laid over each other, cut in the middle, or one's shape in the other's colours."""
    kind = int(torch.randint(3, (), generator=random))
    if kind == 0:
        return one.lerp(two, 0.35 + 0.3 * float(torch.rand((), generator=random)))
    if kind == 1:
        cut = int(torch.randint(13, 20, (), generator=random))
        if torch.rand((), generator=random) < 0.5:
            return torch.cat([one[:, :, :cut], two[:, :, cut:]], 2)
        return torch.cat([one[:, :cut], two[:, cut:]], 1)
    light = one.mean(0, keepdim=True)
    return light + (two - two.mean(0, keepdim=True)) * (one < 0.9).any(0)


def _any(pictures: Tensor, random: torch.Generator) -> Tensor:
    return pictures[int(torch.randint(len(pictures), (), generator=random))]
