"""The student's base in 4 or 8 bits while its adapter is trained (Dettmers et al. 2023, "QLoRA"), by bitsandbytes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from regraft.errors import InputError, RegraftError
from regraft.runtime.libraries import library
from regraft.runtime.load import Loaded

#: How the new base's linear layers are held in the training: as they are, in bitsandbytes' nf4, or in its int8.
Quantize = Literal["none", "4bit", "8bit"]

# Of a row of 4-bit numbers, so many share a scale. bitsandbytes (0.50, on the CPU) reads rows of another length with
# each other's scales.
_BLOCK = 64
# As transformers has it by default: scales in float32, so that what nf4 has rounded once stays as it is.
_NF4: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
_TOLD = {"4bit": "4 bits (nf4)", "8bit": "8 bits (int8)"}


def check_quantiser(quantize: Quantize) -> None:
    """Whether bitsandbytes is there, before anything else is done.

    Raises:
        RegraftError: it is not installed.
    """
    if quantize == "none":
        return
    try:
        library("bitsandbytes")
    except RegraftError as error:
        raise RegraftError(
            "bitsandbytes is not installed, and --quantize needs it", remedy="Run: pip install bitsandbytes"
        ) from error


def quantise(model: Loaded, quantize: Quantize, precision: str = "no", whose: str = "the new base") -> str:
    """Put quantised layers in the place of the main model's linear ones; and what was done, in words.

    The output matrix and what its class keeps in full precision stay as they are, as with transformers; so do, with
    4 bits, layers whose inputs are no multiple of 64.

    Args:
        model: a twin (`regraft.runtime.both.twin`): its modules are exchanged, the tensors that it shares are left.
        quantize: ``none`` does nothing.
        precision: that the layers compute in, as accelerate names it.
        whose: the model, in words.

    Raises:
        InputError: there is no linear layer to quantise.
    """
    if quantize == "none":
        return ""
    main = model.main
    found = {name: module for name, module in main.named_modules() if _is_quantisable(main, name, module, quantize)}
    if not found:
        sizes = f" (of multiples of {_BLOCK} inputs)" if quantize == "4bit" else ""
        raise InputError(
            f"has no linear layers{sizes} that could be quantised", file=model.path, remedy="Leave --quantize out."
        )
    compute = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    for name, linear in found.items():
        parent, _, last = name.rpartition(".")
        setattr(main.get_submodule(parent), last, _layer(linear, quantize, compute))
    # PEFT chooses its layers by what transformers notes of a model that it has quantised.
    setattr(main, f"is_loaded_in_{quantize}", True)
    return f"{len(found)} linear layers of {whose} were held in {_TOLD[quantize]} while it was trained on"


def _is_quantisable(main: Any, name: str, module: nn.Module, quantize: Quantize) -> bool:
    # Subclasses are read by their owners' own code (nn.MultiheadAttention), past their forward.
    if type(module) is not nn.Linear or (quantize == "4bit" and module.in_features % _BLOCK):
        return False
    head = main.get_output_embeddings() if hasattr(main, "get_output_embeddings") else None
    # T5 reads the dtype of some weights, and would cast to that of the packed bytes.
    whole = getattr(main, "_keep_in_fp32_modules", None) or ()
    return module is not head and not any(part in whole for part in name.split("."))


def _layer(linear: nn.Linear, quantize: Quantize, compute: torch.dtype) -> nn.Module:
    layers = library("bitsandbytes").nn
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    # A copy: bitsandbytes packs a parameter where it lies, and these are the whole base's, too.
    weight = linear.weight.detach().clone()
    with torch.device("meta"):
        if quantize == "4bit":
            layer = layers.Linear4bit(*sizes, bias=bias, compute_dtype=compute, **_NF4)
        else:
            layer = layers.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
    if quantize == "4bit":
        layer.weight = layers.Params4bit(weight, requires_grad=False, **_NF4)
    else:
        layer.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    # The move is what packs them.
    packed: nn.Module = layer.to(weight.device)
    return packed
