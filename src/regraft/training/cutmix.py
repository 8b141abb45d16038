"""Cut-Mix-Unmix: collages of two subjects, so that an adapter that learns several of them keeps them apart.

Source: Han et al., ICCV 2023, arXiv 2303.11305, section 3.3. Each drawn sample is, with a probability of 0.6, a
CutMix-like collage of two subjects under a prompt that names both, and else one subject alone. The paper leaves open
how a picture comes into its half, and how often each prompt is used: see `Fit` and `CutMix`. What keeps attention apart
is in `regraft.training.unmix`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from regraft.errors import InputError, UsageError

PROBABILITY = 0.6
"""Of a collage, in the paper; not 1, since then the subjects themselves are hard to tell apart."""

#: How a picture comes into a region of another shape: ``crop`` covers the region and cuts off what is beyond it, as
#: CutMix does; ``whole`` fits all of it in, and carries the picture's border on to the region's.
Fit = Literal["crop", "whole"]

#: How the two of a collage lie: left and right, or top and bottom.
Cut = Literal["beside", "above"]


@dataclass(frozen=True)
class Subject:
    """Something that an adapter learns.

    Attributes:
        pictures: of it, (n, 3, h, w) in [−1, 1].
        identifier: its special token, as in "<v1>"; empty for pictures of a class, for prior preservation.
        noun: its class, as in "dog".

    Raises:
        InputError: the pictures don't have that shape, or there are none.
    """

    pictures: Tensor
    identifier: str
    noun: str

    def __post_init__(self) -> None:
        if self.pictures.dim() != 4 or self.pictures.shape[1] != 3 or not self.pictures.numel():
            what = f"has pictures of shape {list(self.pictures.shape)}, not (n, 3, h, w)"
            raise InputError(what, key=self.name, remedy="Give at least one RGB picture.")

    @property
    def name(self) -> str:
        """What it is called in a prompt: "<v1> dog"."""
        return f"{self.identifier} {self.noun}".strip()


@dataclass(frozen=True)
class Phrases:
    """Prompts, with ``{0}`` and ``{1}`` for the names of the subjects, left before right and top before bottom.

    Attributes:
        one: of one subject.
        both: of a collage, whichever way it is cut.
        beside: of a collage of left and right.
        above: of a collage of top and bottom.

    Raises:
        UsageError: one doesn't hold the names.
    """

    one: str = "photo of a {0}"
    both: str = "photo of a {0} and a {1}"
    beside: str = "photo of a {0} on the left and a {1} on the right"
    above: str = "photo of a {0} at the top and a {1} at the bottom"

    def __post_init__(self) -> None:
        for phrase, names in ((self.one, ["\0"]), *((phrase, ["\0", "\1"]) for phrase in self.of_two)):
            try:
                made = phrase.format(*names)
            except (LookupError, ValueError, AttributeError):
                made = ""
            if any(made.count(name) != 1 for name in names):
                wanted = " and ".join(f"{{{at}}}" for at in range(len(names)))
                raise UsageError(f"the phrase {phrase!r} must hold {wanted} once")

    @property
    def of_two(self) -> tuple[str, str, str]:
        """Those of collages."""
        return self.both, self.beside, self.above


@dataclass(frozen=True)
class Sample:
    """A picture to learn from.

    Attributes:
        picture: (3, h, w) in [−1, 1].
        prompt: its prompt.
        subjects: those in it, one or two; left before right, top before bottom.
        regions: where each of them is, (1 or 2, h, w), bool.
    """

    picture: Tensor
    prompt: str
    subjects: tuple[Subject, ...]
    regions: Tensor

    @property
    def is_collage(self) -> bool:
        """Whether two subjects are in it."""
        return len(self.subjects) > 1


@dataclass(frozen=True)
class CutMix:
    """Draws samples of several subjects (arXiv 2303.11305, section 3.3).

    The two of a collage are drawn without replacement. A prompt with the sides or without is as likely as the other.
    Samples for prior preservation are drawn in the same way from `of_classes`.

    Attributes:
        subjects: to choose from; at least two, or one with a probability of 0.
        size: of the pictures to make, (h, w) in pixels.
        probability: that a sample is a collage.
        fit: how a picture comes into its half.
        phrases: how a sample is described.
        cuts: ways to lay the two, each as likely as the others.

    Raises:
        UsageError: the probability is none, the subjects are too few or have one name, or a half would be empty.
    """

    subjects: Sequence[Subject]
    size: tuple[int, int]
    probability: float = PROBABILITY
    fit: Fit = "crop"
    phrases: Phrases = Phrases()
    cuts: tuple[Cut, ...] = ("beside", "above")

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UsageError(f"a probability lies between 0 and 1, not at {self.probability}", key="cut-mix")
        if len(self.subjects) < (least := 2 if self.probability else 1):
            raise UsageError(
                f"needs at least {least} subjects, and there are {len(self.subjects)}",
                key="cut-mix",
                remedy="Give more subjects, or a probability of 0.",
            )
        names = [subject.name for subject in self.subjects]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"two subjects are called {twice!r}", remedy="Give each its own identifier.")
        if min(self.size) < 2:
            raise UsageError(f"pictures of {self.size[0]} × {self.size[1]} can't be cut in two", key="cut-mix")

    def draw(self, generator: torch.Generator) -> Sample:
        """The next sample."""
        if _chance(generator) >= self.probability:
            return self._alone(generator)
        chosen = torch.randperm(len(self.subjects), generator=generator)[:2].tolist()
        first, second = (self.subjects[at] for at in chosen)
        beside = self.cuts[int(torch.randint(len(self.cuts), (), generator=generator))] == "beside"
        sides = _chance(generator) < 0.5
        picture, regions = collage(
            _any(first, generator), _any(second, generator), self.size, beside=beside, fit=self.fit
        )
        told = (self.phrases.beside if beside else self.phrases.above) if sides else self.phrases.both
        return Sample(picture, told.format(first.name, second.name), (first, second), regions)

    def _alone(self, generator: torch.Generator) -> Sample:
        subject = self.subjects[int(torch.randint(len(self.subjects), (), generator=generator))]
        picture = fitted(_any(subject, generator), self.size, "crop")
        everywhere = torch.ones(1, *self.size, dtype=torch.bool)
        return Sample(picture, self.phrases.one.format(subject.name), (subject,), everywhere)

    def of_classes(self, pictures: Sequence[Tensor]) -> CutMix:
        """The same for prior preservation: pictures of each subject's class, under its noun alone.

        Args:
            pictures: of the class of each subject, (n, 3, h, w) in [−1, 1]; the base itself makes them. Of subjects of
                one class, the first ones' are taken.
        """
        classes: dict[str, Subject] = {}
        for subject, shown in zip(self.subjects, pictures, strict=True):
            classes.setdefault(subject.noun, Subject(shown, "", subject.noun))
        # One class alone has nothing to be put beside.
        return replace(self, subjects=list(classes.values()), probability=self.probability * (len(classes) > 1))


def collage(
    first: Tensor, second: Tensor, size: tuple[int, int], *, beside: bool, fit: Fit = "crop"
) -> tuple[Tensor, Tensor]:
    """Two pictures in the halves of one.

    Args:
        first: goes to the left or the top, (3, h, w).
        second: goes to the other half, (3, h', w').
        size: (h, w) of the result, in pixels; of an odd side, the second half has one more.
        beside: left and right, else top and bottom.
        fit: how each comes into its half.

    Returns:
        The picture (3, h, w), and where each of the two is in it, (2, h, w), bool.
    """
    height, width = size
    regions = torch.zeros(2, height, width, dtype=torch.bool)
    if beside:
        cut = width // 2
        halves = fitted(first, (height, cut), fit), fitted(second, (height, width - cut), fit)
        regions[0, :, :cut], regions[1, :, cut:] = True, True
    else:
        cut = height // 2
        halves = fitted(first, (cut, width), fit), fitted(second, (height - cut, width), fit)
        regions[0, :cut], regions[1, cut:] = True, True
    return torch.cat(halves, dim=2 if beside else 1), regions


def fitted(picture: Tensor, size: tuple[int, int], fit: Fit) -> Tensor:
    """A picture (3, h, w) in the shape of a region, (3, *size), not distorted; see `Fit`."""
    height, width = picture.shape[-2:]
    scales = size[0] / height, size[1] / width
    scale = max(scales) if fit == "crop" else min(scales)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    if inner != (height, width):
        picture = functional.interpolate(picture[None], inner, mode="bilinear", antialias=True, align_corners=False)[0]
    before = [math.floor((inner[axis] - size[axis]) / 2) for axis in (0, 1)]
    # Negative where the picture is too small: the nearest of its own pixels are repeated.
    rows, columns = (
        (torch.arange(size[axis]) + before[axis]).clamp(0, inner[axis] - 1).to(picture.device) for axis in (0, 1)
    )
    return picture[:, rows][:, :, columns]


def _chance(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _any(subject: Subject, generator: torch.Generator) -> Tensor:
    return subject.pictures[int(torch.randint(len(subject.pictures), (), generator=generator))]
