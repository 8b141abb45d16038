"""kohya's sd-scripts, and the tools that write its grammar (OneTrainer, LyCORIS' LoCon, diffusers' converter).

Facts (sd-scripts 48d368f):

- Key: prefix + ``_`` + module path with every ``.`` as ``_``; then ``.lora_down.weight`` (r, in), ``.lora_up.weight``
  (out, r), ``.alpha``. Only the first ``.`` splits. The way back is ambiguous (``to_q``, ``proj_in``), so it is looked
  up in the families' tables, or in the base's own names; never guessed.
- Prefixes: ``lora_unet``; ``lora_te`` (SD 1.x), ``lora_te1`` and ``lora_te2`` (SDXL), ``lora_te3`` (T5).
- SD 1.x U-Net: diffusers names. SDXL: sgm names (``input_blocks_4_1_…``); diffusers names from OneTrainer and others.
- Scale = alpha / r, r = rows of ``lora_down``. Alpha is a scalar tensor of any dtype, integers too; missing it counts
  as r, and so does 0.
- Convolution: down (r, in, kh, kw), up (out, r, 1, 1); a 1 × 1 convolution stays 4-D.
- DoRA (LyCORIS, OneTrainer): ``dora_scale``, (out, 1, …) per output or (1, in, …) per input.
- Text encoders always have the level ``text_model``; transformers 5 leaves it out of its names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.families import aliases, families, family_of_modules, get_family, without_text_model
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._common import (
    Choices,
    Parts,
    alphas_of,
    chosen,
    component_for,
    contiguous,
    new_alpha,
    scalars,
    shapes_of,
    stored,
    training_metadata,
)
from regraft.formats._factors import Reshaped, cannot_hold, flat
from regraft.formats._hashes import with_true_hashes
from regraft.tensors import TensorRef
from regraft.updates import Full, LowRank, Update

# Longest first: lora_te is the beginning of the others.
PREFIXES = {
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_te": "text_encoder",
    "lora_unet": "unet",
}
_ROLES = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha", "dora_scale": "magnitude"}
_DEFAULT_PREFIXES = {
    "unet": "lora_unet",
    "transformer": "lora_unet",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}
_PARAMETER = (".weight", ".bias")


def flattened(path: str) -> str:
    """A module path as these files write it."""
    return path.replace(".", "_")


def _detect(file: AdapterFile) -> bool:
    return any(_prefix(key) is not None for key in file.tensors)


def _prefix(key: str) -> str | None:
    return next((prefix for prefix in PREFIXES if key.startswith(f"{prefix}_")), None)


@cache
def _family_names(component: str) -> dict[str, tuple[str, str]]:
    """Flattened name → (module path, naming), of all families that list their modules."""
    table: dict[str, tuple[str, str]] = {}
    for family in families().values():
        for path in family.tables.get(component, {}):
            for spelling in (path, without_text_model(path)):
                table[flattened(spelling)] = (spelling, "diffusers")
        for path, original in family.sgm.get(component, {}).items():
            table[flattened(original)] = (path, "sgm")
    return table


class _Names:
    """Flattened name → module: the base's own names first, then the families' tables."""

    def __init__(self, names: BaseNames | None) -> None:
        self.names = dict(names or {})
        self.tables: dict[str, tuple[str, dict[str, str]]] = {}

    def find(self, prefix: str, name: str) -> tuple[ModuleRef, str] | None:
        if prefix not in self.tables:
            self.tables[prefix] = self._table(PREFIXES[prefix])
        component, table = self.tables[prefix]
        if name in table:
            return ModuleRef(component, table[name]), "diffusers"
        if name in (known := _family_names(component)):
            path, naming = known[name]
            return ModuleRef(component, path), naming
        return None

    def _table(self, component: str) -> tuple[str, dict[str, str]]:
        if component == "unet" and "unet" not in self.names and "transformer" in self.names:
            component = "transformer"
        paths = self.names.get(component)
        if paths is None and set(self.names) == {MODEL} and component in ("unet", "text_encoder"):
            paths = self.names[MODEL]
        return component, _flat_table(paths or ())


def _flat_table(paths: Iterable[str]) -> dict[str, str]:
    table: dict[str, str] = {}
    for path in paths:
        module = next((path.removesuffix(end) for end in _PARAMETER if path.endswith(end)), path)
        # The flattened name has text_model where the file's trainer saw it; the base may not, and the other way round.
        bare = without_text_model(module)
        for spelling in (module, bare, f"text_model.{bare}"):
            table.setdefault(flattened(spelling), spelling)
    return table


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    known = _Names(names)
    parts: dict[ModuleRef, Parts] = {}
    unrecognised: list[str] = []
    prefixes: dict[str, str] = {}
    naming, text_model = Choices(), Choices()
    for name, keys in _by_module(file.tensors).items():
        prefix = _prefix(name)
        found = known.find(prefix, name.removeprefix(f"{prefix}_")) if prefix else None
        roles = {key: _ROLES.get(key.partition(".")[2]) for key in keys}
        # A sibling that we don't know (lora_mid, hada_, …) changes what the rest of the module means.
        if prefix is None or found is None or None in roles.values():
            unrecognised += keys
            continue
        module, spelling = found
        prefixes.setdefault(module.component, prefix)
        if module.component.startswith("text_encoder"):
            text_model.note(*module, "with" if module.path.startswith("text_model.") else "without")
        else:
            naming.note(*module, spelling)
        part = parts.setdefault(module, Parts())
        for key, role in roles.items():
            part.add(str(role), key, file.tensors[key], file.path)
    alphas = scalars({m: part.tensors["alpha"] for m, part in parts.items() if "alpha" in part.tensors}, file.path)
    updates: dict[ModuleRef, Update] = {}
    for module, part in parts.items():
        up, down = part.check_pair(file.path)
        rank = down.shape[0]
        # sd-scripts takes a stored 0 for "as the rank".
        scale = (alphas.get(module) or rank) / rank
        magnitude = part.tensors.get("magnitude")
        if magnitude is not None and magnitude.shape[0] == up.shape[0] and set(magnitude.shape[1:]) == {1}:
            magnitude = flat(magnitude)
        updates[module] = LowRank(up, down, scale, part.tensors.get("alpha"), magnitude)
    layout = {"prefixes": prefixes, "naming": naming.to_layout(), "text_model": text_model.to_layout()}
    family = family_of_modules(shapes_of(updates))
    return Adapter(
        updates, "kohya", layout, file.metadata, family=family, unrecognised=tuple(unrecognised), path=file.path
    )


def _by_module(keys: Iterable[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for key in keys:
        grouped.setdefault(key.partition(".")[0], []).append(key)
    return grouped


def _write(adapter: Adapter) -> Written:
    if adapter.tokens:
        token = next(iter(adapter.tokens))
        raise cannot_hold("kohya", "embeddings of added tokens", token, "They would be lost: keep the old format.")
    own = adapter.format == "kohya"
    updates = {module: _checked(module, update) for module, update in adapter.updates.items()}
    alphas = alphas_of(updates)
    name_of = _Writer(adapter)
    tensors: dict[str, TensorRef] = {}
    for module, update in updates.items():
        name = name_of(module)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = update.down, update.up
        if module in alphas:
            tensors[f"{name}.alpha"] = alphas[module]
        elif not own or update.scale != 1.0:
            tensors[f"{name}.alpha"] = new_alpha(update)
        if update.magnitude is not None:
            tensors[f"{name}.dora_scale"] = _dora_scale(update, own=own)
    metadata = dict(adapter.metadata) if own else _metadata(adapter, updates.values())
    loaded = contiguous(tensors)
    return Written(loaded, with_true_hashes(metadata, loaded))


def _checked(module: ModuleRef, update: Update) -> LowRank:
    lost = "It would be lost: keep the old format."
    if isinstance(update, Full):
        raise cannot_hold("kohya", "a parameter stored whole", module, lost)
    if not isinstance(update, LowRank):
        raise cannot_hold("kohya", f"{update.kind} updates", module, lost)
    if update.orientation != "weight":
        raise cannot_hold("kohya", "an update of an embedding or a Conv1D layer", module, lost)
    if update.bias is not None:
        raise cannot_hold("kohya", "a bias of the factor B (lora_bias)", module, lost)
    return update


class _Writer:
    """Module → flattened name, as the adapter's file spelt it, or as sd-scripts does for its family."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.layout: Mapping[str, Any] = adapter.layout if adapter.format == "kohya" else {}
        self.family = get_family(adapter.family)
        data = self.family.data if self.family else {}
        self.naming: str = data.get("kohya", "diffusers")
        self.prefixes: dict[str, str] = {**_DEFAULT_PREFIXES, **data.get("prefixes", {})}
        if "text_encoder_2" in adapter.components():
            self.prefixes["text_encoder"] = "lora_te1"
        self.prefixes |= self.layout.get("prefixes", {})

    def __call__(self, module: ModuleRef) -> str:
        component = component_for(self.adapter, module.component, "kohya")
        if component not in self.prefixes:
            remedy = f"They have: {', '.join(_DEFAULT_PREFIXES)}."
            raise cannot_hold("kohya", f"the component {component}", module, remedy)
        path = module.path
        if component.startswith("text_encoder"):
            with_level = chosen(self.layout.get("text_model", {}), component, path, "with") == "with"
            if with_level and path.startswith(("encoder.", "embeddings.", "final_layer_norm")):
                path = f"text_model.{path}"
        elif chosen(self.layout.get("naming", {}), component, path, self.naming) == "sgm":
            # An own file of unknown family can't have sgm names: they were looked up in a family's table.
            path = self._original(component, path)
        return f"{self.prefixes[component]}_{flattened(path)}"

    def _original(self, component: str, path: str) -> str:
        for name in (self.adapter.family, *families()):
            if name and path in (table := _aliases(name, component)):
                return table[path]
        return path


_aliases = cache(aliases)


def _dora_scale(update: LowRank, *, own: bool) -> TensorRef:
    assert update.magnitude is not None
    if own and stored(update.magnitude) is not None:
        return update.magnitude.of if isinstance(update.magnitude, Reshaped) else update.magnitude
    if len(update.magnitude.shape) > 1 and update.magnitude.shape[0] == 1:
        return update.magnitude
    return Reshaped(update.magnitude, (update.shape[0], *[1] * (len(update.shape) - 1)))


def _metadata(adapter: Adapter, updates: Iterable[LowRank]) -> dict[str, str]:
    """What sd-scripts' own readers look for, beside what the old file told of its training."""
    updates = list(updates)
    ranks = {update.rank for update in updates}
    alphas = Counter(update.scale * update.rank for update in updates)
    family = get_family(adapter.family)
    stated = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.most_common(1)[0][0]:.6g}" if alphas else "1",
    }
    version = family.data.get("ss_base_model_version") if family else None
    if version:
        stated |= {"ss_v2": "False", "ss_base_model_version": version}
    return {"format": "pt"} | training_metadata(adapter.metadata) | stated


FORMAT = Format("kohya", "kohya sd-scripts (Automatic1111, ComfyUI)", 60, _detect, _read, _write)
