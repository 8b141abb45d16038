"""llama.cpp's LoRA for language models: a GGUF file, as ``convert_lora_to_gguf.py`` writes it.

Facts (llama.cpp 0b03ada, gguf 0.19):

- ``general.type`` is ``adapter``, ``adapter.type`` is ``lora``, and ``general.architecture`` must be the base's.
- Tensors: llama.cpp's name of the weight + ``.lora_a`` (r, in) and ``.lora_b`` (out, r). Those of ``token_embd`` are
  ``lora_a`` (vocabulary, r) and ``lora_b`` (width, r).
- One alpha for the file, ``adapter.lora.alpha``; a module's scale is alpha / r with its own r, and 1 where alpha is 0.
  So per-module scales (alpha_pattern, rsLoRA of several ranks) are multiplied into B where they differ from that rule;
  llama.cpp's own converter takes ``lora_alpha`` alone, and scales such adapters wrongly.
- What the converter does to a weight it does to the LoRA: rows of query and key are reordered (Llama; by heads), the
  fused query-key-value of GPT-NeoX and BLOOM likewise. The weights of GPT-2's Conv1D are stored as (out, in).
- Norms stored whole are passed over by llama.cpp's loader: they are read, and written only back into such a file.
- Experts of a block share one pair, (experts, r, in) and (experts, out, r): all of them or none.
- aLoRA: ``adapter.alora.invocation_tokens``, as PEFT's config has them.
- No place for DoRA's magnitude, a bias of B, or trained embeddings beside the vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.checkpoints._gguf_file import GgufTensor, read_gguf
from regraft.checkpoints._gguf_names import ARCHITECTURES, Architecture
from regraft.checkpoints._views import Shifted
from regraft.errors import InputError, OutputError
from regraft.families import family_of_modules, refine_by_hint
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._common import Parts, contiguous, shapes_of, training_metadata
from regraft.formats._factors import cannot_hold, transposed
from regraft.formats._gguf_experts import expert_of, experts_name, join_experts, split_experts
from regraft.formats._gguf_heads import NEEDS_BASE, HeadOrder, head_fields, order_of, reorders, to_llama_cpp
from regraft.formats._gguf_write import KINDS, write_gguf
from regraft.lineage import KEY
from regraft.tensors import InMemory, TensorRef, Transposed
from regraft.updates import Full, LowRank, Update

ALPHA = "adapter.lora.alpha"
ALORA = "adapter.alora.invocation_tokens"
_PAIR = re.compile(r"(?P<module>.+)\.weight\.lora_(?P<half>[ab])")
_PARAMETER = re.compile(r"(?P<module>.+)\.(?P<kind>weight|bias)")
_BLOCK = re.compile(r"\b(?P<stem>blk|layers|h|layer|block)\.(?P<number>\d+)\.")
_EMBEDDING = "token_embd"
# Pairs that are worked out anew, and those of the tensors' own container.
_OWN = ("general.architecture", "general.type", "general.alignment", "adapter.type", ALPHA)
_PRIVATE = ("general.file_type", "general.quantization_version")
# transformers' model types that llama.cpp counts to another's architecture.
_SAME = {"mistral": "llama", "mixtral": "llama", "gemma3": "gemma3", "llama": "llama", "t5": "t5"}


def _detect(file: AdapterFile) -> bool:
    return file.metadata.get("general.type") == "adapter" or any(map(_PAIR.fullmatch, file.tensors))


@dataclass(frozen=True)
class _Names:
    """llama.cpp's module names and transformers', of one architecture."""

    arch: str

    @property
    def known(self) -> Architecture:
        return ARCHITECTURES[self.arch]

    def theirs(self, module: str) -> tuple[str, str, int] | None:
        """Transformers' path, the pattern and the block's number of a llama.cpp name (``blk.3.attn_q``)."""
        pattern, number = _pattern(module)
        name = self.known.names.get(pattern)
        if name is None or name.count("{}") > 1:
            return None
        return name.format(number), pattern, number

    def ours(self, path: str) -> tuple[str, str, int] | None:
        """llama.cpp's name, its pattern and the block's number of a transformers path."""
        wanted, number = _pattern(path)
        for pattern, name in self.known.names.items():
            # An adapter of the bare model (LlamaModel) lacks the first level.
            if name.count("{}") < 2 and wanted in (name, name.partition(".")[2]):
                return pattern.format(number), pattern, number
        return None


def _pattern(name: str) -> tuple[str, int]:
    found = _BLOCK.search(name)
    if found is None:
        return name, 0
    return f"{name[: found.start('number')]}{{}}{name[found.end('number') :]}", int(found["number"])


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    content = _fields(file)
    kind, arch = content.get("adapter.type", "lora"), str(content.get("general.architecture", ""))
    if kind != "lora":
        raise InputError(f"is an adapter of type {kind!r}, not a LoRA", file=file.path, key="adapter.type")
    alpha = content.get(ALPHA, 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"must be a number, not {alpha!r}", file=file.path, key=ALPHA)
    fields = {**head_fields(arch, file.base_config), **content}
    parts: dict[str, Parts] = {}
    unrecognised = [] if arch in ARCHITECTURES else list(file.tensors)
    updates: dict[ModuleRef, Update] = {}
    for key, ref in file.tensors.items() if arch in ARCHITECTURES else ():
        if found := _PAIR.fullmatch(key):
            dims = (
                2
                if _Names(arch).theirs(found["module"])
                else 3
                if experts_name(arch, *_pattern(found["module"]))
                else 0
            )
            if len(ref.shape) != dims:
                unrecognised.append(key)
                continue
            parts.setdefault(found["module"], Parts()).add(
                "up" if found["half"] == "b" else "down", key, ref, file.path
            )
        elif (whole := _whole(arch, key, ref)) is not None:
            updates[whole[0]] = whole[1]
        else:
            unrecognised.append(key)
    for module, part in parts.items():
        if stacked := experts_name(arch, *_pattern(module)):
            updates |= split_experts(stacked, part, float(alpha), file.path)
            continue
        named, update = _low_rank(arch, module, part, float(alpha), fields, file.path)
        updates[named] = update
    private = (*_OWN, *_PRIVATE)
    told = {k: str(v) for k, v in content.items() if not k.startswith(("adapter.", f"{arch}.")) and k not in private}
    kept = {k: v for k, v in content.items() if k not in _OWN and v is not None}
    family = family_of_modules(shapes_of(updates))
    if arch in ARCHITECTURES:
        family = refine_by_hint(
            family, f"{ARCHITECTURES[arch].model_type} {content.get('general.base_model.0.name', '')}"
        )
    stacks = {ref.shape[0] for key, ref in file.tensors.items() if len(ref.shape) == 3 and key not in unrecognised}
    layout = {"arch": arch, "alpha": float(alpha), "fields": kept, "experts": max(stacks, default=None)}
    return Adapter(updates, "gguf-lora", layout, told, family=family, unrecognised=tuple(unrecognised), path=file.path)


def _fields(file: AdapterFile) -> dict[str, Any]:
    """The key-value pairs: out of the file, or out of the metadata of one that is yet to be written."""
    stored = next((ref.raw.file for ref in file.tensors.values() if isinstance(ref, GgufTensor)), None)
    if stored is not None:
        return dict(read_gguf(stored).fields)
    fields: dict[str, Any] = dict(file.metadata)
    for key, text in file.metadata.items():
        if not key.startswith(("general.", KEY)):
            with suppress(ValueError):
                fields[key] = json.loads(text)
    return fields


def _whole(arch: str, key: str, ref: TensorRef) -> tuple[ModuleRef, Full] | None:
    """A norm stored whole."""
    found = _PARAMETER.fullmatch(key)
    named = _Names(arch).theirs(found["module"]) if found else None
    if found is None or named is None or len(ref.shape) != 1 or "norm" not in named[1]:
        return None
    value = Shifted(ref, -1.0) if ARCHITECTURES[arch].norm_plus_one and found["kind"] == "weight" else ref
    return ModuleRef(MODEL, f"{named[0]}.{found['kind']}"), Full(value, key)


def _low_rank(
    arch: str, module: str, part: Parts, alpha: float, fields: Mapping[str, Any], file: Path
) -> tuple[ModuleRef, LowRank]:
    named = _Names(arch).theirs(module)
    assert named is not None
    path, pattern, block = named
    if pattern == _EMBEDDING and set(part.tensors) == {"up", "down"}:
        # The lookup multiplies from the left: a is (vocabulary, r), b is (width, r).
        part.tensors = {"up": part.tensors["down"], "down": Transposed(part.tensors["up"])}
        part.keys = {"up": part.keys["down"], "down": part.keys["up"]}
    up, down = part.check_pair(file)
    rank = down.shape[0]
    scale = alpha / rank if alpha else 1.0
    stored_alpha = InMemory(torch.tensor(alpha)) if alpha else None
    ref = ModuleRef(MODEL, path)
    if pattern == _EMBEDDING:
        return ref, LowRank(up, down, scale, stored_alpha, orientation="embedding")
    if pattern in ARCHITECTURES[arch].transposed:
        return ref, LowRank(Transposed(down), Transposed(up), scale, stored_alpha, orientation="conv1d")
    if reorders(arch, pattern):
        up = HeadOrder(up, order_of(arch, pattern, block, up.shape[0], fields), file, part.keys["up"])
    return ref, LowRank(up, down, scale, stored_alpha)


def _write(adapter: Adapter) -> Written:
    own = adapter.format == "gguf-lora"
    arch = str(adapter.layout["arch"]) if own else _architecture(adapter)
    if arch not in ARCHITECTURES:
        raise cannot_hold(
            "GGUF LoRA", f"the architecture {arch!r}", None, f"Known: {', '.join(sorted(ARCHITECTURES))}."
        )
    if adapter.tokens:
        raise cannot_hold("GGUF LoRA", "embeddings of added tokens", next(iter(adapter.tokens)))
    fields = dict(adapter.layout["fields"]) if own else {}
    fields |= head_fields(arch, adapter.base_config)
    checked = {module: _checked(module, update, own=own) for module, update in adapter.updates.items()}
    low_rank = {module: update for module, update in checked.items() if isinstance(update, LowRank)}
    alpha = _alpha(adapter, low_rank, own=own)
    tensors: dict[str, TensorRef] = {}
    experts: dict[str, dict[int, LowRank]] = {}
    folded = 0
    for module, update in checked.items():
        if isinstance(update, Full):
            name, value = _norm(arch, module, update)
            tensors[name] = value
            continue
        update, changed = _by_rule(update, alpha)
        folded += changed
        if expert := expert_of(arch, module.path):
            experts.setdefault(expert.module, {})[expert.number] = update
        else:
            tensors |= _pair(arch, module, update, fields)
    for stacked, members in experts.items():
        tensors |= join_experts(stacked, members, fields.get(f"{arch}.expert_count") or adapter.layout.get("experts"))
    loaded = contiguous(tensors)
    for key, tensor in loaded.items():
        if tensor.dtype not in KINDS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise cannot_hold("GGUF LoRA", f"dtype {dtype}", key, "Save it as float32, float16 or bfloat16.")
    pairs: dict[str, Any] = {"general.type": "adapter", "adapter.type": "lora", ALPHA: alpha} | fields
    invoked = (adapter.config or {}).get("alora_invocation_tokens")
    if invoked:
        pairs[ALORA] = list(invoked)
    told = training_metadata(adapter.metadata)
    pairs |= {key: value for key, value in told.items() if key not in fields or str(fields[key]) != value}
    pairs.setdefault("general.file_type", _file_type(loaded))
    notes = (f"{folded} modules' own scales are multiplied into B: a GGUF LoRA has one alpha",) if folded else ()
    save = partial(write_gguf, arch=arch, fields=pairs, tensors=loaded)
    stated = {"general.architecture": arch} | pairs
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in stated.items()}
    return Written(loaded, metadata, save=save, suffix=".gguf", notes=notes)


def _architecture(adapter: Adapter) -> str:
    kind = str((adapter.base_config or {}).get("model_type") or "")
    by_type = {known.model_type: arch for arch, known in reversed(ARCHITECTURES.items())} | _SAME
    if kind:
        if kind not in by_type:
            known = ", ".join(sorted(by_type))
            raise cannot_hold("GGUF LoRA", f"the model type {kind!r}", None, f"Known: {known}.")
        return by_type[kind]
    arch = by_type.get(adapter.family or "")
    # One name is enough only where nothing depends on the config, and no other family is named alike.
    if arch is not None and arch != "llama" and not ARCHITECTURES[arch].grouped:
        return arch
    raise OutputError("a GGUF LoRA states its base's architecture, which is not known", remedy=NEEDS_BASE)


def _checked(module: ModuleRef, update: Update, *, own: bool) -> LowRank | Full:
    if module.component != MODEL:
        raise cannot_hold("GGUF LoRA", f"the component {module.component}", module, "It is for one language model.")
    if isinstance(update, Full):
        if own:
            return update
        raise cannot_hold("GGUF LoRA", "a parameter stored whole: llama.cpp passes it over", module)
    if not isinstance(update, LowRank):
        raise cannot_hold("GGUF LoRA", f"an update of kind {update.kind}", module)
    if update.magnitude is not None:
        raise cannot_hold("GGUF LoRA", "DoRA's magnitude", module, "Merge it into a LoRA first, with --base.")
    if update.bias is not None:
        raise cannot_hold("GGUF LoRA", "a bias of the factor B (lora_bias)", module)
    if len(update.shape) != 2:
        raise cannot_hold("GGUF LoRA", "an update of a convolution", module)
    return update


def _alpha(adapter: Adapter, updates: Mapping[ModuleRef, LowRank], *, own: bool) -> float:
    """The file's alpha: the old one where it holds for a module, else what most modules have."""
    alphas = Counter(round(update.scale * update.rank, 9) for update in updates.values())
    if all(update.scale == 1.0 for update in updates.values()) and (len(alphas) > 1 or own):
        before = float(adapter.layout["alpha"]) if own else 0.0
        # Zero is read as scale 1, whatever the rank.
        return before if len(alphas) == 1 and before in alphas else 0.0
    return alphas.most_common(1)[0][0] if alphas else 0.0


def _by_rule(update: LowRank, alpha: float) -> tuple[LowRank, bool]:
    """The update with the scale that the file's alpha gives it, and whether B had to change."""
    scale = alpha / update.rank if alpha else 1.0
    if math.isclose(scale, update.scale, rel_tol=1e-6):
        return update, False
    return replace(update.scaled(update.scale / scale), scale=scale), True


def _pair(arch: str, module: ModuleRef, update: LowRank, fields: Mapping[str, Any]) -> dict[str, TensorRef]:
    named = _Names(arch).ours(module.path)
    if named is None:
        raise cannot_hold("GGUF LoRA", f"this module of {arch}", module, "llama.cpp has no tensor for it.")
    name, pattern, block = named
    up, down = update.up, update.down
    if pattern == _EMBEDDING:
        up, down = transposed(down), up
    elif pattern in ARCHITECTURES[arch].transposed:
        up, down = transposed(down), transposed(up)
    elif update.orientation != "weight":
        raise cannot_hold("GGUF LoRA", "a transposed update of a plain linear layer", module)
    elif reorders(arch, pattern):
        up = _reordered(up, arch, pattern, block, module, fields)
    return {f"{name}.weight.lora_a": down, f"{name}.weight.lora_b": up}


def _reordered(
    up: TensorRef, arch: str, pattern: str, block: int, module: ModuleRef, fields: Mapping[str, Any]
) -> TensorRef:
    if isinstance(up, HeadOrder):
        return up.of
    order = order_of(arch, pattern, block, up.shape[0], fields)
    if order is None:
        what = f"llama.cpp reorders these rows by heads, whose number is not known or does not divide {up.shape[0]}"
        raise OutputError(what, key=str(module), remedy=NEEDS_BASE)
    return InMemory(to_llama_cpp(up.load(), order))


def _norm(arch: str, module: ModuleRef, update: Full) -> tuple[str, TensorRef]:
    path, _, kind = module.path.rpartition(".")
    named = _Names(arch).ours(path)
    if named is None:
        raise cannot_hold("GGUF LoRA", f"this parameter of {arch}", module, "llama.cpp has no tensor for it.")
    value = update.value
    if ARCHITECTURES[arch].norm_plus_one and kind == "weight":
        value = value.of if isinstance(value, Shifted) else Shifted(value, 1.0)
    return f"{named[0]}.{kind}", value


def _file_type(tensors: Mapping[str, torch.Tensor]) -> int:
    """llama.cpp's ``LlamaFileType``: all float32, mostly float16, mostly bfloat16."""
    most = Counter(tensor.dtype for tensor in tensors.values()).most_common(1)
    return {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[most[0][0]] if most else 0


FORMAT = Format("gguf-lora", "llama.cpp's LoRA (GGUF adapter)", 110, _detect, _read, _write)
