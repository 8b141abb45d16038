"""One weights file: safetensors, or a PyTorch state dict; a Stable Diffusion one by its components.

Web interfaces keep the whole pipeline in one file under the original code's names. Adapters and diffusers' folders
speak of components and diffusers' names, so such a file is presented that way: names only, no weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from regraft.adapter import MODEL
from regraft.checkpoints import Checkpoint, Reader
from regraft.families import aliases, families
from regraft.tensors import TORCH_SUFFIXES, TensorRef, read_tensor_file

_UNET = "model.diffusion_model."
# Where the first text encoder lies: in Stable Diffusion 1.x, in SDXL. The second one (open_clip, with one fused
# matrix for query, key and value) has no tensor of its own for each module that an adapter may change: left out.
_TEXT_ENCODERS = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")


def split_components(tensors: Mapping[str, TensorRef]) -> dict[str, dict[str, TensorRef]]:
    """Components by diffusers' names, of a file in the original names; one ``model`` where it is something else."""
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
            return {"unet": unet, "text_encoder": text} if text else {"unet": unet}
    return {MODEL: dict(tensors)}


def _detect(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".safetensors", *TORCH_SUFFIXES)


def _read(path: Path) -> Checkpoint:
    return Checkpoint(split_components(read_tensor_file(path).tensors))


READER = Reader("weights file", 20, _detect, _read)
