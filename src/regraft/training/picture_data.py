"""Pictures with captions to train a pipeline's denoiser on: read from a folder, cropped to one size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.errors import InputError, first_line, reading
from regraft.runtime.latents import Latents
from regraft.runtime.libraries import library
from regraft.runtime.load import Loaded

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_METADATA = "metadata.jsonl"
# Pictures that are encoded together.
_TOGETHER = 8


@dataclass(frozen=True)
class Pictures:
    """Pictures in a pipeline's latents, each with its caption.

    Attributes:
        latents: (n, channels, height, width), float32.
        captions: n.
        size: height and width of the pictures.
    """

    latents: Tensor
    captions: tuple[str, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.captions)


def read_pictures(folder: Path, model: Loaded, size: int | None, caption: str | None) -> Pictures:
    """The pictures of a folder in a pipeline's latents.

    A caption stands in a ``.txt`` file of the picture's name (kohya's scripts), or as ``text`` beside ``file_name`` in
    ``metadata.jsonl`` (datasets). A picture is scaled until its shorter side fits, and cropped at its centre.

    Args:
        folder: with pictures in it.
        model: a pipeline with an autoencoder.
        size: height and width; None for what the pipeline draws.
        caption: of pictures that have none.

    Raises:
        InputError: there are no pictures, one can't be read or has no caption, or the pipeline has no such latents.
    """
    height, width = _size(model, size)
    files = _files(folder)
    captions = read_captions(folder, caption)
    with torch.no_grad():
        parts = [
            Latents(model).encode(_pixels(model, files[i : i + _TOGETHER], height, width)).cpu()
            for i in range(0, len(files), _TOGETHER)
        ]
    latents = torch.cat(parts)
    if latents.dim() != 4 or not bool(latents.isfinite().all()):
        raise InputError("its autoencoder makes no latents of pictures", file=model.path, remedy="Try --dtype float32.")
    return Pictures(latents, captions, (height, width))


def read_captions(folder: Path, caption: str | None) -> tuple[str, ...]:
    """The captions of a folder's pictures, in the order of `read_pixels`.

    Args:
        folder: with pictures in it.
        caption: of pictures that have none.

    Raises:
        InputError: there are no pictures, or one has no caption.
    """
    said = _captions(folder)
    return tuple(_caption(file, said, caption) for file in _files(folder))


def read_pixels(folder: Path, model: Loaded, size: int | None) -> Tensor:
    """The pictures of a folder as they are cropped for a pipeline, (n, 3, h, w) in [−1, 1]; captions are not read.

    Args:
        folder: with pictures in it.
        model: a pipeline with an autoencoder.
        size: height and width; None for what the pipeline draws.

    Raises:
        InputError: there are no pictures, one can't be read, or the pipeline has no latents to train on.
    """
    return torch.cat(list(pixel_groups(folder, model, size)))


def pixel_groups(folder: Path, model: Loaded, size: int | None) -> Iterator[Tensor]:
    """`read_pixels`, a few pictures at a time: all of them at full size can be more than the memory holds.

    Raises:
        InputError: as `read_pixels`; before the first are read for all but pictures that can't be.
    """
    height, width = _size(model, size)
    files = _files(folder)
    return (_pixels(model, files[i : i + _TOGETHER], height, width) for i in range(0, len(files), _TOGETHER))


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES) if folder.is_dir() else []
    if not files:
        raise InputError(f"has no pictures in it ({', '.join(_SUFFIXES)})", file=folder, remedy="Name their folder.")
    return files


def _size(model: Loaded, size: int | None) -> tuple[int, int]:
    pipeline = model.pipeline
    # Such pipelines reshape latents before the denoiser sees them, each in its own way.
    packs = hasattr(pipeline, "_pack_latents")
    # Those of videos, and others that compress pictures further, have scales and shapes of their own.
    plain = isinstance(getattr(pipeline, "vae", None), library("diffusers").AutoencoderKL)
    if not plain or not Latents(model).noise_is_known or packs:
        what = "packs its latents in a way of its own" if packs else "has no AutoencoderKL, or no known noise schedule"
        raise InputError(
            f"a {model.name} {what}: it can't be trained here",
            file=model.path,
            remedy="Train with kohya's scripts, Musubi Tuner or OneTrainer, and stamp the file: regraft lineage stamp.",
        )
    factor = getattr(pipeline, "vae_scale_factor", 8)
    if size is not None:
        if size % factor:
            raise InputError(f"--size {size} is no multiple of {factor}, which its autoencoder needs", file=model.path)
        return size, size
    sample = getattr(model.main.config, "sample_size", None)
    if sample is None:
        raise InputError("does not say how large its pictures are", file=model.path, remedy="Give --size.")
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * factor, width * factor


def _captions(folder: Path) -> Mapping[str, str]:
    file = folder / _METADATA
    if not file.is_file():
        return {}
    found = {}
    with reading(file):
        lines = file.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            found[str(row["file_name"])] = str(row["text"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError("is no object with file_name and text", file=file, key=f"line {number}") from None
    return found


def _caption(file: Path, said: Mapping[str, str], default: str | None) -> str:
    beside = file.with_suffix(".txt")
    if beside.is_file():
        with reading(beside):
            return beside.read_text(encoding="utf-8").strip()
    if file.name in said:
        return said[file.name].strip()
    if default is None:
        remedy = f"Write {beside.name} or {_METADATA}, or give one for all with --caption."
        raise InputError("has no caption", file=file, remedy=remedy)
    return default


def _pixels(model: Loaded, files: list[Path], height: int, width: int) -> Tensor:
    """(n, 3, height, width), from −1 to 1."""
    # Part of diffusers' own needs.
    image = library("PIL.Image")
    processor = library("diffusers.image_processor").VaeImageProcessor(
        vae_scale_factor=getattr(model.pipeline, "vae_scale_factor", 8)
    )
    opened = []
    for file in files:
        try:
            with reading(file), image.open(file) as picture:
                opened.append(_cropped(picture, height, width))
        except image.DecompressionBombError as error:
            remedy = "Scale it down."
            raise InputError(f"is too large to be opened ({first_line(error)})", file=file, remedy=remedy) from error
    pixels: Tensor = processor.preprocess(opened, height=height, width=width)
    return pixels


def _cropped(picture: Any, height: int, width: int) -> Any:
    ops = library("PIL.ImageOps")
    # Cameras store a turn beside the pixels.
    upright = ops.exif_transpose(picture).convert("RGB")
    return ops.fit(upright, (width, height), method=library("PIL.Image").Resampling.LANCZOS)
