"""One weights file: safetensors, or a PyTorch state dict; a Stable Diffusion one by its components.

Web interfaces keep the whole pipeline in one file under the original code's names. Adapters and diffusers' folders
speak of components and diffusers' names, so such a file is presented that way: names only, no weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from regraft.adapter import MODEL
from regraft.checkpoints import Checkpoint, Reader
from regraft.checkpoints._files import read_plain
from regraft.families import aliases, families
from regraft.tensors import TORCH_SUFFIXES, TensorRef

_UNET = "model.diffusion_model."
# Where the first text encoder lies: in Stable Diffusion 1.x, in SDXL. The second one (open_clip, with one fused
# matrix for query, key and value) has no tensor of its own for each module that an adapter may change: left out.
_TEXT_ENCODERS = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")


def split_components(tensors: Mapping[str, TensorRef]) -> tuple[dict[str, Mapping[str, TensorRef]], tuple[str, ...]]:
    """Components by diffusers' names, of a file in the original names; one ``model`` where it is something else.

    Also the names of the tensors that belong to none of them.
    """
    for family in families():
        modules = aliases(family, "unet")
        if modules and all(f"{_UNET}{original}.weight" in tensors for original in modules.values()):
            names = {
                f"{path}.{kind}": f"{_UNET}{original}.{kind}"
                for path, original in modules.items()
                for kind in ("weight", "bias")
            }
            unet = {name: tensors[original] for name, original in names.items() if original in tensors}
            text = {
                name.removeprefix(prefix): ref
                for prefix in _TEXT_ENCODERS
                for name, ref in tensors.items()
                if name.startswith(prefix)
            }
            components: dict[str, Mapping[str, TensorRef]] = {"unet": unet, "text_encoder": text}
            held = {id(ref) for part in components.values() for ref in part.values()}
            left_out = tuple(name for name, ref in tensors.items() if id(ref) not in held)
            return {name: part for name, part in components.items() if part}, left_out
    return {MODEL: tensors}, ()


def _detect(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".safetensors", *TORCH_SUFFIXES)


def _read(path: Path) -> Checkpoint:
    plain, description = read_plain(path)
    components, left_out = split_components(plain.tensors)
    return Checkpoint(components, {}, description, plain.left_out + left_out)


READER = Reader("weights file", 20, _detect, _read)
