"""The demo's pictures: two emoji sets, drawn at 32 × 32, plain on a background or in the style.

Both sets use the same names for the same things, so that "rocket on green" means the same to a base
trained on one and to a base trained on the other: the art changes, the words do not.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from regraft.demo.style import INK, PAPER

SIZE = 32
VARIANTS = 192
"""Drawings of each concept (random scale, shift, rotation, flip), each of them put on every background."""

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
class Pictures:
    """Pictures (n, 3, 32, 32) in [0, 255] and the index in `PROMPTS` of each one's prompt."""

    pixels: np.ndarray
    prompts: np.ndarray


def icons(name: str, cache: Path) -> dict:
    """The icon set `name`, fetched with `npm pack` unless the cache has its tarball."""
    package, version = ART[name]
    tarball = cache / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not tarball.exists():
        if shutil.which("npm") is None:
            raise SystemExit(f"{tarball} is absent and npm is not installed: put the tarball there")
        subprocess.run(["npm", "pack", f"{package}@{version}"], cwd=cache, check=True)
    with tarfile.open(tarball) as archive:
        return json.load(archive.extractfile("package/icons.json"))


def draw(body: str, width: int, rng: np.random.Generator) -> np.ndarray:
    """One icon, scaled, shifted, turned and perhaps mirrored: RGBA (32, 32, 4), straight alpha, uint8."""
    import cairosvg  # needs Debian's libcairo2; imported here so that the other stages run without it

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
    png = cairosvg.svg2png(svg.encode(), output_width=SIZE, output_height=SIZE)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def drawings(name: str, cache: Path) -> np.ndarray:
    """All drawings of one set: uint8 (16 concepts, VARIANTS, 32, 32, 4), kept in the cache."""
    kept = cache / f"drawings-{name}.npy"
    if not kept.exists():
        art = icons(name, cache)
        rng = np.random.default_rng(sorted(ART).index(name))
        sheets = [
            np.stack([draw(art["icons"][icon]["body"], art["width"], rng) for _ in range(VARIANTS)])
            for icon in CONCEPTS.values()
        ]
        np.save(kept, np.stack(sheets))
    return np.load(kept)


def plain(rgba: np.ndarray) -> Pictures:
    """Every drawing on every background: 16 × VARIANTS × 6 pictures."""
    colour, alpha = rgba[..., :3] / np.float32(255), rgba[..., 3:] / np.float32(255)
    grounds = np.array(list(BACKGROUNDS.values()), dtype=np.float32)
    # (concept, 1, variant, h, w, c) over (1, background, 1, 1, 1, c)
    colour, alpha = colour[:, None], alpha[:, None]
    pixels = colour * alpha + grounds[None, :, None, None, None] * (1 - alpha)
    return _pictures(pixels, np.arange(len(PROMPTS)).repeat(rgba.shape[1]))


def styled(rgba: np.ndarray) -> Pictures:
    """Every drawing in the style, once: the paper hides the background, so the prompt's varies freely.

    How much ink a pixel takes is its lightness on a floor, so that black parts stay visible on the
    paper, and its edges, which keep the inner lines (eyes, windows) that flat lightness would lose.
    """
    colour, alpha = rgba[..., :3] / np.float32(255), rgba[..., 3] / np.float32(255)
    light = colour @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    shade = alpha * (0.2 + 0.7 * light)
    down, across = np.gradient(shade, axis=(-2, -1))
    ink = np.clip(shade + 0.9 * np.hypot(down, across) * alpha, 0, 1)[..., None]
    pixels = np.array(PAPER, dtype=np.float32) * (1 - ink) + np.array(INK, dtype=np.float32) * ink
    concepts, variants = rgba.shape[:2]
    background = np.arange(concepts * variants) % len(BACKGROUNDS)
    return _pictures(pixels, np.arange(concepts).repeat(variants) * len(BACKGROUNDS) + background)


def _pictures(pixels: np.ndarray, prompts: np.ndarray) -> Pictures:
    flat = pixels.reshape(-1, SIZE, SIZE, 3).transpose(0, 3, 1, 2)
    return Pictures(np.ascontiguousarray((flat * 255).round().astype(np.uint8)), prompts)
