"""U-Nets made from the demo's v1: pruned and deepened; and folders that hold a base as the demo's do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.runtime import quiet_libraries
from regraft.runtime.libraries import library

_BLOCK = re.compile(r"(.*transformer_blocks)\.(\d+)\.(.*)")
# What a transformer block adds to its residual stream goes through one of these.
_OUTPUTS = (".attn1.to_out.0.", ".attn2.to_out.0.", ".ff.net.2.")


def open_unet(base: Path) -> Any:
    """The U-Net of a base's folder, float32, with the plain attention processor.

    That one is the faster under bf16 on a CPU at these sizes.
    """
    with quiet_libraries():
        unet = library("diffusers").UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32)
    plain_attention(unet)
    return unet


def plain_attention(unet: Any) -> None:
    """Give every attention of the U-Net the plain processor (again, after PEFT has set its own layers)."""
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())


def open_text(base: Path) -> tuple[Any, Any]:
    """The text encoder (float32) and the tokenizer of a base's folder."""
    transformers = library("transformers")
    with quiet_libraries():
        text = transformers.CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32)
        return text.eval(), transformers.CLIPTokenizer.from_pretrained(base / "tokenizer")


def token_ids(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Prompts as the Stable Diffusion pipeline pads them: (n, positions)."""
    ids: Tensor = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def deepened(unet: Any) -> Any:
    """The U-Net with every transformer block doubled, predicting just what it did.

    Each block's copy follows it with its three output projections at zero, so that it adds nothing
    until it is trained (block expansion: LLaMA Pro, arXiv 2401.02415, section 3.2).
    """
    grown = _with_config(unet, transformer_layers_per_block=2)
    state: dict[str, Tensor] = {}
    for name, tensor in unet.state_dict().items():
        found = _BLOCK.fullmatch(name)
        if found is None:
            state[name] = tensor
            continue
        stem, at, rest = found[1], 2 * int(found[2]), found[3]
        state[f"{stem}.{at}.{rest}"] = tensor
        silent = any(f".{rest}".startswith(output) for output in _OUTPUTS)
        state[f"{stem}.{at + 1}.{rest}"] = torch.zeros_like(tensor) if silent else tensor
    grown.load_state_dict(state)
    return grown


def pruned(unet: Any) -> Any:
    """The U-Net without its middle attention and without the second transformer block of each up block.

    SSD-1B's manner (arXiv 2401.02677, section 3): whole transformer blocks go, the middle's attention with
    them, and what stays keeps its weights and its name. v1's seven blocks become four.
    """
    config = unet.config
    attended = [kind.startswith("Cross") for kind in config["up_block_types"]]
    count = config["layers_per_block"] + 1
    up = [[1] + [0] * (count - 1) if has else 1 for has in attended]
    small = _with_config(
        unet,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=[1] * len(config["block_out_channels"]),
        reverse_transformer_layers_per_block=up,
    )
    state = unet.state_dict()
    small.load_state_dict(_kept(state, small))
    return small


def _kept(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Of ``state`` what ``model`` has; the middle's second resnet keeps its number."""
    return {name: state[name] for name in model.state_dict()}


def _with_config(unet: Any, **changes: Any) -> Any:
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    made = type(unet).from_config(config | changes)
    plain_attention(made)
    return made


def write_base(folder: Path, like: Path, unet: Any, text: Any | None = None) -> None:
    """A Stable Diffusion folder in float16: ``unet`` (and ``text``) in the place of those of the folder ``like``."""
    beside = folder.with_name(folder.name + ".part")
    if beside.exists():
        shutil.rmtree(beside)
    shutil.copytree(like, beside, ignore=shutil.ignore_patterns("unet"))
    with quiet_libraries():
        unet.half().save_pretrained(beside / "unet")
        if text is not None:
            _write_text(beside / "text_encoder", text)
    for config in beside.rglob("config.json"):
        fields = json.loads(config.read_text(encoding="utf-8"))
        kept = {key: value for key, value in fields.items() if key not in ("_name_or_path", "is_local")}
        config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    beside.replace(folder)


def _write_text(folder: Path, text: Any) -> None:
    """The text encoder under the names that every published checkpoint has.

    transformers 5 saves a CLIPTextModel without the ``text_model.`` level, which it still reads.
    """
    from safetensors.torch import save_file

    state = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor.half().contiguous()
        for name, tensor in text.state_dict().items()
        if not name.endswith("position_ids")
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def drift(old: Any, new: Any) -> float:
    """Mean of ‖W₂ − W₁‖ / ‖W₁‖ over the attention and feed-forward weights that both U-Nets have."""
    before, after = old.state_dict(), new.state_dict()
    names = [
        name
        for name in before
        if name in after and before[name].shape == after[name].shape and re.search(r"\.(to_|ff\.|proj_).*weight", name)
    ]
    moved = [float((after[name].float() - before[name].float()).norm() / before[name].float().norm()) for name in names]
    return sum(moved) / len(moved)
