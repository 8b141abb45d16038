"""cloneofsimo/lora, the first LoRAs for Stable Diffusion: modules by number, not by name.

Facts (lora_diffusion 0.1, diffusers of early 2023; the numbers agree with the shapes of its own example files):

- Keys ``unet:25:up`` (out, r) and ``unet:25:down`` (r, in); ``text_encoder:0:up`` …. No alpha: scale 1.
- The number counts the Linear layers inside of the target classes, in the order of ``model.modules()`` of then:
  down blocks, *up blocks, then the middle*; in a transformer block attn1 (to_q, to_k, to_v, to_out.0), the feed-
  forward's GEGLU projection, then attn2. Text encoder: k_proj, v_proj, q_proj, out_proj of each layer.
- Metadata: ``unet`` and ``text_encoder`` are JSON lists of the target classes; ``unet:25:rank`` a rank per module;
  an added token ``<tok>`` has its embedding under its own name, and the metadata value ``<embed>``.
- With other target classes (``ResnetBlock2D``) the numbers mean other modules: such components are not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache

from regraft.adapter import MODEL, Adapter, ModuleRef, TokenRef
from regraft.errors import InputError
from regraft.families import family_of_modules, without_text_model
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._common import Parts, check_float, component_for, contiguous, shapes_of, training_metadata
from regraft.formats._factors import cannot_hold, folded
from regraft.tensors import TensorRef
from regraft.updates import Full, LowRank, Update

TARGETS = {
    "unet": ("CrossAttention", "Attention", "GEGLU"),
    "text_encoder": ("CLIPAttention",),
}
EMBEDDED = "<embed>"
TEXT = "text_encoder"

_KEY = re.compile(r"(?P<component>unet|text_encoder):(?P<number>\d+):(?P<role>up|down)")
_RANK = re.compile(r"(unet|text_encoder):\d+:rank")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# The library makes as many numbers as the encoder has layers: 12 in SD 1.x, 23 in SD 2.x.
_MOST_LAYERS = 32


@cache
def module_order(component: str) -> tuple[str, ...]:
    """Module paths by their number."""
    if component == "text_encoder":
        return tuple(
            f"text_model.encoder.layers.{layer}.self_attn.{part}"
            for layer in range(_MOST_LAYERS)
            for part in ("k_proj", "v_proj", "q_proj", "out_proj")
        )
    attentions = [f"down_blocks.{stage}.attentions.{i}" for stage in (0, 1, 2) for i in (0, 1)]
    attentions += [f"up_blocks.{stage}.attentions.{i}" for stage in (1, 2, 3) for i in (0, 1, 2)]
    attentions += ["mid_block.attentions.0"]
    inside = [*(f"attn1.{p}" for p in _ATTENTION), "ff.net.0.proj", *(f"attn2.{p}" for p in _ATTENTION)]
    return tuple(f"{attention}.transformer_blocks.0.{part}" for attention in attentions for part in inside)


def _detect(file: AdapterFile) -> bool:
    return any(_KEY.fullmatch(key) for key in file.tensors)


def _targets_are_known(component: str, metadata: Mapping[str, str], file: AdapterFile) -> bool:
    if component not in metadata:
        return True
    try:
        classes = json.loads(metadata[component])
    except ValueError:
        raise InputError("is not a JSON list", file=file.path, key=f"metadata {component}") from None
    return isinstance(classes, list) and all(name in TARGETS[component] for name in classes)


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    parts: dict[ModuleRef, Parts] = {}
    tokens: dict[TokenRef, TensorRef] = {}
    unrecognised: list[str] = []
    known = {component: _targets_are_known(component, file.metadata, file) for component in TARGETS}
    for key, ref in file.tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            if file.metadata.get(key) == EMBEDDED:
                check_float(ref, file.path, key)
                tokens[TokenRef(TEXT, key)] = ref
            else:
                unrecognised.append(key)
            continue
        order, number = module_order(found["component"]), int(found["number"])
        if not known[found["component"]] or number >= len(order):
            unrecognised.append(key)
            continue
        module = ModuleRef(found["component"], order[number])
        parts.setdefault(module, Parts()).add(found["role"], key, ref, file.path)
    updates: dict[ModuleRef, Update] = {}
    for component in TARGETS:
        for path in module_order(component):
            if part := parts.get(ModuleRef(component, path)):
                up, down = part.check_pair(file.path)
                updates[ModuleRef(component, path)] = LowRank(up, down, 1.0)
    return Adapter(
        updates,
        "cloneofsimo",
        metadata=file.metadata,
        family=family_of_modules(shapes_of(updates)),
        tokens=tokens,
        unrecognised=tuple(unrecognised),
        path=file.path,
    )


def _write(adapter: Adapter) -> Written:
    numbers = {
        (component, without_text_model(path)): number
        for component in TARGETS
        for number, path in enumerate(module_order(component))
    }
    tensors: dict[str, TensorRef] = {}
    own = adapter.format == "cloneofsimo"
    kept = adapter.metadata if own else training_metadata(adapter.metadata)
    metadata = {key: value for key, value in kept.items() if not _RANK.fullmatch(key)}
    for module, update in adapter.updates.items():
        component = component_for(adapter, module.component, "cloneofsimo")
        number = numbers.get((component, without_text_model(module.path)))
        if number is None:
            remedy = "These files number the attention and GEGLU layers of SD 1.x alone."
            raise cannot_hold("cloneofsimo", "this module", module, remedy)
        update = _checked(module, update)
        name = f"{component}:{number}"
        tensors[f"{name}:up"], tensors[f"{name}:down"] = update.up, update.down
        metadata[f"{name}:rank"] = str(update.rank)
        metadata.setdefault(component, json.dumps(list(TARGETS[component])))
    for token, ref in adapter.tokens.items():
        if token.component not in (MODEL, TEXT) or token.output or len(ref.shape) != 1:
            what = "an embedding that is not one vector of the first text encoder"
            raise cannot_hold("cloneofsimo", what, token, "Write a1111-embedding.")
        tensors[token.token], metadata[token.token] = ref, EMBEDDED
    return Written(contiguous(tensors), metadata)


def _checked(module: ModuleRef, update: Update) -> LowRank:
    if isinstance(update, Full):
        raise cannot_hold("cloneofsimo", "a parameter stored whole", module)
    if not isinstance(update, LowRank):
        raise cannot_hold("cloneofsimo", f"{update.kind} updates", module)
    if update.magnitude is not None:
        raise cannot_hold("cloneofsimo", "DoRA's magnitude", module)
    if update.bias is not None:
        raise cannot_hold("cloneofsimo", "a bias of the factor B (lora_bias)", module)
    if len(update.shape) > 2 or update.orientation != "weight":
        raise cannot_hold("cloneofsimo", "an update that is not a linear layer's", module)
    return folded(update)


FORMAT = Format("cloneofsimo", "cloneofsimo/lora (numbered modules, SD 1.x)", 90, _detect, _read, _write)
