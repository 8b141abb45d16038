"""The pictures of the diffusion world and of the demo: two emoji sets at 32 × 32, plain or in a look of two tones.

Both sets use the same names for the same things, so that "rocket on green" means the same to a base
trained on one and to a base trained on the other: the art changes, the words do not.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regraft.demo.style import INK, PAPER
from regraft.errors import RegraftError

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
Colour = tuple[float, float, float]

SIZE = 32
VARIANTS = 192
"""Drawings of each concept (random scale, shift, rotation, flip), each of them put on every background."""
TEST_VARIANTS = 8
"""Further drawings of each concept, from other random numbers, that nothing is trained on."""

ART = {
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "noto": ("@iconify-json/noto", "1.2.9"),
}
"""npm packages with the art as SVG, MIT and Apache-2.0: both let weights trained on them be passed on."""

CONCEPTS = {
    "rocket": "rocket",
    "cat": "cat-face",
    "dog": "dog-face",
    "apple": "red-apple",
    "house": "house",
    "tulip": "tulip",
    "mushroom": "mushroom",
    "car": "automobile",
    "umbrella": "umbrella",
    "penguin": "penguin",
    "owl": "owl",
    "cactus": "cactus",
    "octopus": "octopus",
    "sailboat": "sailboat",
    "guitar": "guitar",
    "butterfly": "butterfly",
}
"""Word in the prompt → icon name in both sets."""

BACKGROUNDS = {
    "white": (0.98, 0.98, 0.98),
    "grey": (0.80, 0.80, 0.80),
    "pink": (1.00, 0.78, 0.85),
    "green": (0.76, 0.93, 0.72),
    "blue": (0.66, 0.78, 1.00),
    "purple": (0.84, 0.74, 0.98),
}

PROMPTS = [f"{concept} on {background}" for concept in CONCEPTS for background in BACKGROUNDS]
"""Concept-major, so that prompt `i` is concept `i // 6` on background `i % 6`."""


@dataclass(frozen=True)
class Look:
    """A style of two tones: every pixel lies between ``paper`` and ``ink`` (RGB in [0, 1]).

    ``amount`` says how much ink a pixel takes from three maps (n, h, w): the drawing's opacity, its
    lightness, and the edges of both.
    """

    paper: Colour
    ink: Colour
    amount: Callable[[Floats, Floats, Floats], Floats]


def _lit(alpha: Floats, light: Floats, edge: Floats) -> Floats:
    """Lightness on a floor, so that black parts stay visible, and edges, which keep the inner lines."""
    ink: Floats = alpha * (0.2 + 0.7 * light) + 0.9 * edge
    return ink


def _shaded(alpha: Floats, light: Floats, edge: Floats) -> Floats:
    ink: Floats = alpha * (0.15 + 0.75 * (1 - light)) + 0.9 * edge
    return ink


def _outlined(alpha: Floats, light: Floats, edge: Floats) -> Floats:
    ink: Floats = 0.15 * alpha * light + 2.2 * edge
    return ink


LOOKS = {
    "cyano": Look(PAPER, INK, _lit),
    "woodcut": Look((0.98, 0.98, 0.98), (0.30, 0.16, 0.10), _shaded),
    "riso": Look((1.00, 0.78, 0.85), (0.72, 0.10, 0.24), _shaded),
    "blueprint": Look(PAPER, INK, _outlined),
    "amber": Look(PAPER, (1.00, 0.82, 0.30), _lit),
}
"""*cyano* is the demo's; *amber* belongs to the development adapter, on whose figures methods may be tuned.

The demo's autoencoders saw no other dark paper than cyano's and turn any into it, so the others' papers
are that one or the pictures' own backgrounds.
"""


@dataclass(frozen=True)
class Pictures:
    """Pictures (n, 3, 32, 32) in [0, 255] and the index in `PROMPTS` of each one's prompt."""

    pixels: Pixels
    prompts: NDArray[np.int64]


def icons(name: str, cache: Path) -> dict[str, Any]:
    """The icon set `name`, fetched with `npm pack` unless the cache has its tarball."""
    package, version = ART[name]
    tarball = cache / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not tarball.exists():
        if shutil.which("npm") is None:
            raise RegraftError(
                "the pictures come from an npm package, and npm is not installed",
                remedy=f"Install npm, or put {tarball.name} into {cache}.",
            )
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", f"{package}@{version}"], cwd=cache, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(tarball) as archive:
        found: dict[str, Any] = json.load(archive.extractfile("package/icons.json") or io.BytesIO())
    return found


def draw(body: str, width: int, rng: np.random.Generator) -> Pixels:
    """One icon, scaled, shifted, turned and perhaps mirrored: RGBA (32, 32, 4), straight alpha, uint8."""
    scale, angle = rng.uniform(0.78, 1.0), rng.uniform(-12, 12)
    across, down = rng.uniform(-0.08, 0.08, size=2) * width
    mirror = -1 if rng.random() < 0.5 else 1
    half = width / 2
    place = f"translate({half + across} {half + down}) rotate({angle}) scale({mirror * scale} {scale}) "
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {width}" width="{SIZE}" height="{SIZE}">'
        f'<g transform="{place} translate({-half} {-half})">{body}</g></svg>'
    )
    png = _cairosvg().svg2png(svg.encode(), output_width=SIZE, output_height=SIZE)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def _cairosvg() -> Any:
    """Imported where it is needed: with the drawings in the cache, all else runs without it."""
    try:
        return import_module("cairosvg")
    except (ImportError, OSError):  # the latter where the library libcairo2 is missing
        raise RegraftError(
            "the pictures are drawn by cairosvg, which is not there or finds no libcairo2",
            remedy="Run: pip install 'regraft[bench]', and install libcairo2.",
        ) from None


def drawings(name: str, cache: Path, *, test: bool = False) -> Pixels:
    """All drawings of one set: uint8 (16 concepts, variants, 32, 32, 4), kept in the cache."""
    kept = cache / f"drawings-{name}{'-test' if test else ''}.npy"
    if not kept.exists():
        art = icons(name, cache)
        rng = np.random.default_rng(sorted(ART).index(name) + (100 if test else 0))
        sheets = [
            np.stack(
                [
                    draw(art["icons"][icon]["body"], art["width"], rng)
                    for _ in range(TEST_VARIANTS if test else VARIANTS)
                ]
            )
            for icon in CONCEPTS.values()
        ]
        # Written beside and renamed: another process finds the whole of it or nothing.
        beside = kept.with_name(f".{os.getpid()}-{kept.name}")
        np.save(beside, np.stack(sheets))
        beside.replace(kept)
    loaded: Pixels = np.load(kept)
    return loaded


def plain(rgba: Pixels) -> Pictures:
    """Every drawing on every background: 16 × variants × 6 pictures."""
    colour, alpha = rgba[..., :3] / np.float32(255), rgba[..., 3:] / np.float32(255)
    grounds = np.array(list(BACKGROUNDS.values()), dtype=np.float32)
    # (concept, 1, variant, h, w, c) over (1, background, 1, 1, 1, c)
    colour, alpha = colour[:, None], alpha[:, None]
    pixels = colour * alpha + grounds[None, :, None, None, None] * (1 - alpha)
    return _pictures(pixels, np.arange(len(PROMPTS)).repeat(rgba.shape[1]))


def styled(rgba: Pixels, look: str = "cyano") -> Pictures:
    """Every drawing in the look, once: the paper hides the background, so the prompt's varies freely."""
    style = LOOKS[look]
    colour, alpha = rgba[..., :3] / np.float32(255), rgba[..., 3] / np.float32(255)
    light = colour @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    down, across = np.gradient(alpha * (0.2 + 0.7 * light), axis=(-2, -1))
    ink = np.clip(style.amount(alpha, light, np.hypot(down, across) * alpha), 0, 1)[..., None]
    pixels = np.array(style.paper, dtype=np.float32) * (1 - ink) + np.array(style.ink, dtype=np.float32) * ink
    concepts, variants = rgba.shape[:2]
    background = np.arange(concepts * variants) % len(BACKGROUNDS)
    return _pictures(pixels, np.arange(concepts).repeat(variants) * len(BACKGROUNDS) + background)


def _pictures(pixels: Floats, prompts: NDArray[np.int64]) -> Pictures:
    flat = pixels.reshape(-1, SIZE, SIZE, 3).transpose(0, 3, 1, 2)
    return Pictures(np.ascontiguousarray((flat * 255).round().astype(np.uint8)), prompts)
