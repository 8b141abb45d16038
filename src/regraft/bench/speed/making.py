"""Checkpoints with a real family's names and shapes, weights with a trained one's spectra, and LoRAs for them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from regraft.errors import OutputError
from regraft.families._tables import table
from regraft.output import whole
from regraft.safetensors_stream import header
from regraft.tensors import Shape, raw

Shapes = Mapping[str, Shape]

# Of a trained weight's ‖W‖², so much is in leading directions that fall off as a power; the rest looks like noise.
_SPIKES, _SPIKE_ENERGY, _FALL = 32, 0.4, 0.7
# Numbers that all tensors are cut from, each at a place of its own: to draw billions would take longer than to port.
_POOL = 1 << 25
_BLOCK = re.compile(r"(?<=transformer_blocks\.)\d+")
#: What a LoRA of the bench changes: attention and feed-forward.
_TOUCHED = re.compile(
    r"\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2"
    r"|add_q_proj|add_k_proj|add_v_proj|to_add_out|proj_mlp|proj_out|q_proj|k_proj|v_proj|o_proj|up_proj|down_proj"
    r"|gate_proj)$"
)


@dataclass(frozen=True)
class Geometry:
    """The parameters of a pair of bases.

    Attributes:
        name: what `bench speed --family` calls it.
        title: for people.
        component: of a pipeline that both are.
        old: parameter → shape.
        new: likewise.
        drift: ‖W_new − W_old‖ / ‖W_old‖ of what both have.
    """

    name: str
    title: str
    component: str
    old: Shapes
    new: Shapes
    drift: float

    def touched(self) -> dict[str, Shape]:
        """Module of the old base that the LoRA changes → its weight's shape."""
        found = {name.removesuffix(".weight"): shape for name, shape in self.old.items() if name.endswith(".weight")}
        return {module: shape for module, shape in found.items() if _TOUCHED.search(module) and len(shape) == 2}


def _named(name: str, title: str, component: str, old: str, new: str, drift: float) -> Geometry:
    return Geometry(name, title, component, table(old).parameters, table(new).parameters, drift)


def geometry(name: str) -> Geometry:
    """A pair by its name, one of `FAMILIES`."""
    return _named(name, *FAMILIES[name])


#: Name → title, component, table of the old base, of the new one, drift.
FAMILIES: dict[str, tuple[str, str, str, str, float]] = {
    "sd15": ("SD 1.5 → SD 1.5, trained on", "unet", "sd15-unet", "sd15-unet", 0.04),
    "sdxl": ("SDXL → SDXL, trained on", "unet", "sdxl-unet", "sdxl-unet", 0.04),
    "ssd1b": ("SDXL → SSD-1B", "unet", "sdxl-unet", "ssd1b-unet", 0.1),
    "flux": ("FLUX.1 dev → FLUX.1 dev, trained on", "transformer", "flux-dev", "flux-dev", 0.04),
}


def grid_geometry(width: int, modules: int) -> Geometry:
    """A language model's attention projections: ``modules`` square weights of one width, four a layer."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (256, width)}
    for index in range(modules):
        name = ("q_proj", "k_proj", "v_proj", "o_proj")[index % 4]
        shapes[f"model.layers.{index // 4}.self_attn.{name}.weight"] = (width, width)
    return Geometry(f"{modules}x{width}", f"{modules} weights of {width}²", "model", shapes, shapes, 0.04)


class _Numbers:
    """Normal numbers by the place that a name gives them."""

    def __init__(self) -> None:
        self._pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))

    def of(self, name: str, purpose: str, *shape: int) -> Tensor:
        """Numbers of one name and purpose, (shape)."""
        count = prod(shape)
        if count > _POOL // 2:
            half = shape[0] // 2
            sizes = {"a": half, "b": shape[0] - half}
            return torch.cat([self.of(name, f"{purpose}/{part}", size, *shape[1:]) for part, size in sizes.items()])
        # Not the built-in hash, which another run salts anew.
        dice = torch.Generator().manual_seed(int.from_bytes(f"{purpose}/{name}".encode(), "little") % (2**63 - 25))
        start = int(torch.randint(0, _POOL - count, (1,), generator=dice))
        return self._pool[start : start + count].reshape(shape)

    def weight(self, name: str, shape: Shape) -> Tensor:
        """A weight, ‖W‖² about out."""
        rows, columns = shape[0], prod(shape[1:])
        noise = self.of(name, "noise", rows, columns) * ((1 - _SPIKE_ENERGY) / columns) ** 0.5
        spikes = min(_SPIKES, rows, columns)
        sizes = torch.arange(1, spikes + 1, dtype=torch.float32) ** -_FALL
        sizes *= (_SPIKE_ENERGY * rows) ** 0.5 / float(sizes.norm()) / (rows * columns) ** 0.5
        left, right = self.of(name, "left", rows, spikes), self.of(name, "right", spikes, columns)
        return torch.addmm(noise, left * sizes, right).reshape(shape)

    def moved(self, weight: Tensor, name: str, drift: float) -> Tensor:
        """The weight after training, (shape)."""
        noise = self.of(name, "drift", *weight.shape)
        return weight + noise * (drift * float(weight.norm()) / float(noise.norm()))


def _tensors(numbers: _Numbers, shapes: Shapes) -> Iterator[Tensor]:
    for name, shape in shapes.items():
        if len(shape) < 2:
            yield torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
        else:
            yield numbers.weight(name, shape)


def _moved(numbers: _Numbers, pair: Geometry) -> Iterator[Tensor]:
    depths = _depths(pair.old), _depths(pair.new)
    for name, shape in pair.new.items():
        source = _came_from(name, *depths)
        if len(shape) < 2:
            yield torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
        elif pair.old.get(source) == shape:
            yield numbers.moved(numbers.weight(source, shape), name, pair.drift)
        else:
            yield numbers.weight(f"new/{name}", shape)


def _depths(shapes: Shapes) -> dict[str, int]:
    """Beginning of a stack of blocks → how many there are."""
    found: dict[str, int] = {}
    for name in shapes:
        for block in _BLOCK.finditer(name):
            found[name[: block.start()]] = max(found.get(name[: block.start()], 0), int(block[0]) + 1)
    return found


def _came_from(name: str, old: Mapping[str, int], new: Mapping[str, int]) -> str:
    """The old parameter that a new one was made of: where blocks are fewer, those that are left lie evenly."""
    block = _BLOCK.search(name)
    if block is None:
        return name
    stack = name[: block.start()]
    before, after = old.get(stack, new[stack]), new[stack]
    return f"{stack}{int(block[0]) * before // after}{name[block.end() :]}"


def write_pair(pair: Geometry, folder: Path, *, dtype: torch.dtype = torch.float16) -> tuple[Path, Path]:
    """Write both bases as weights files, one tensor at a time; those that are there already are kept.

    Args:
        pair: which.
        folder: to write to.
        dtype: of the tensors.

    Returns:
        The old base's file and the new one's.

    Raises:
        OutputError: there is no room for them, or the folder can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"can't be made ({error.strerror})", file=folder) from None
    old, new = folder / "old.safetensors", folder / "new.safetensors"
    if not (old.exists() and new.exists()):
        numbers = _Numbers()
        _write(old, pair.old, _tensors(numbers, pair.old), dtype)
        _write(new, pair.new, _moved(numbers, pair), dtype)
        # Else the system goes on writing them while the first command is timed.
        os.sync()
    return old, new


def _write(path: Path, shapes: Shapes, tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
    """A safetensors file of tensors that are never held all at once, as the library's own writer would have it."""
    kinds = {name: (dtype, tuple(shape)) for name, shape in shapes.items()}
    with whole(path) as stage, stage.open("wb") as stream:
        stream.write(header(kinds, {"format": "pt"}))
        for tensor in tensors:
            stream.write(raw(tensor.to(dtype).contiguous()))


def write_lora(
    path: Path,
    modules: Mapping[str, Shape],
    component: str,
    rank: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """A LoRA in diffusers' format (PEFT's, for a language model): small, of full rank, both factors of one size.

    Args:
        path: a file.
        modules: module → shape of its weight.
        component: of the pipeline; ``model`` for a language model.
        rank: of each update.
        seed: of its numbers.
        dtype: of its tensors.
    """
    dice = torch.Generator().manual_seed(seed)
    prefix = "base_model.model" if component == "model" else component
    state: dict[str, Tensor] = {}
    for module, (rows, columns) in modules.items():
        down = torch.randn(rank, columns, generator=dice) * columns**-0.5
        up = torch.randn(rows, rank, generator=dice) * 0.05
        state |= {f"{prefix}.{module}.lora_A.weight": down.to(dtype), f"{prefix}.{module}.lora_B.weight": up.to(dtype)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as stage:
        save_file(state, stage, metadata={"format": "pt"})
    return path


def by_shape(modules: Mapping[str, Shape]) -> dict[Shape, list[str]]:
    """Shape → the modules that have it."""
    groups: dict[Shape, list[str]] = {}
    for module, shape in modules.items():
        groups.setdefault(shape, []).append(module)
    return groups
