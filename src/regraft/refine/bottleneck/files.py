"""AdapterHub's folders of bottlenecks: ``adapter_config.json`` beside ``pytorch_adapter.bin`` or safetensors.

Keys are a block's place in the model (`regraft.refine.bottleneck.places`), ``adapters``, the adapter's name, and a
parameter of `Bottleneck`, as in ``bert.encoder.layer.0.output.adapters.NAME.adapter_up.weight``. The folder may hold a
prediction head as well, in files of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.errors import InputError, reading, understanding
from regraft.formats import Written
from regraft.lineage import KEY, dumped, parse_lineage
from regraft.output import ADAPTER_CONFIG
from regraft.refine.bottleneck.layers import Bottleneck, Form, activation, built
from regraft.refine.bottleneck.places import LAYOUTS, Position, Spot, blocks_of, layout_of, width_of
from regraft.runtime.load import Loaded
from regraft.tensor_files import read_tensor_file
from regraft.tensors import check_finite

#: Names of the weights file; the library takes the first, or the second with ``use_safetensors``.
WEIGHTS = ("pytorch_adapter.bin", "adapter.safetensors")
#: Files beside them that belong to a prediction head, or to a model that the library knows by its interface alone.
HEAD = ("head_config.json", "pytorch_model_head.bin", "model_head.safetensors")
INTERFACE = "adapter_interface.json"

# Before version 2 of adapter-transformers.
_LEGACY = re.compile(r"\b(?:attention|layer)_text_(?:task|lang)_adapters\.")
# And what it called activations.
_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}
# Options that make something else of a bottleneck → what.
_OTHERS = {
    "phm_layer": "Compacter",
    "is_parallel": "parallel",
    "use_gating": "gated",
    "cross_adapter": "cross-attention",
}
# Heads of language models, by the library's type of head or by transformers' class.
_LANGUAGE = ("causal_lm", "masked_lm", "seq2seq_lm", "ForCausalLM", "ForMaskedLM", "LMHeadModel", "ForPreTraining")
_READ = "Bottlenecks one behind the other are: seq_bn, double_seq_bn, adapter_plus."


@dataclass(frozen=True)
class Bottlenecks:
    """An adapter of bottlenecks.

    Attributes:
        path: the folder that it was read from.
        config: ``adapter_config.json``.
        form: of every bottleneck, from the configuration.
        tables: spot → parameter of `Bottleneck` → tensor, in the stored dtype.
        prefix: of the keys: what the model without its head is called in the one that was saved, and a dot.
        weights_name: of the weights file.
        files: others of the folder that belong to it, by name.
        dtype: that tensors are written in.
    """

    path: Path
    config: Mapping[str, Any]
    form: Form
    tables: Mapping[Spot, Mapping[str, Tensor]]
    prefix: str
    weights_name: str
    files: Mapping[str, Path] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def digest(self) -> str:
        """What tells it from others."""
        found = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for spot, table in self.tables.items():
            for name, tensor in table.items():
                found.update(f"{spot} {name}".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def modules(self) -> dict[Spot, Bottleneck]:
        """A module for each spot, with the file's numbers in float32."""
        return {spot: built(table, self.form) for spot, table in self.tables.items()}

    def says_words(self) -> bool:
        """Whether the prediction head beside them is that of a language model.

        Raises:
            InputError: its configuration is damaged.
        """
        file = self.files.get(HEAD[0])
        if file is None:
            return False
        with reading(file), understanding(HEAD[0], file):
            found = json.loads(file.read_text(encoding="utf-8"))
            kind = (found.get("config") or {}).get("head_type") or found.get("model_class") or ""
            return bool(kind.endswith(_LANGUAGE))

    @property
    def metadata(self) -> dict[str, str]:
        """Its lineage, as a safetensors header would have it."""
        return {KEY: dumped(self.config[KEY])} if KEY in self.config else {}


def is_bottleneck(path: Path) -> bool:
    """Whether a folder is the library's, of whichever kind."""
    file = path / ADAPTER_CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError):
        return False
    named = any((path / name).is_file() for name in WEIGHTS)
    return isinstance(found, dict) and "peft_type" not in found and (named or {"config", "name"} <= set(found))


def load_bottlenecks(path: Path) -> Bottlenecks:
    """Read the library's folder.

    Raises:
        InputError: it is damaged, or holds an adapter of another kind.
    """
    file = path / ADAPTER_CONFIG
    with reading(file), understanding(ADAPTER_CONFIG, path):
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    form = _form_of(config, file)
    if KEY in config:
        # A damaged lineage is told before the training, not after it.
        with understanding(ADAPTER_CONFIG, path):
            parse_lineage(dumped(config[KEY]), file=file)
    weights_name = next((name for name in WEIGHTS if (path / name).is_file()), None)
    if weights_name is None:
        raise InputError(f"holds neither {' nor '.join(WEIGHTS)}", file=path, remedy="Save it with save_adapter.")
    weights = path / weights_name
    with reading(weights):
        tensors = {key: ref.load() for key, ref in read_tensor_file(weights).tensors.items()}
    layout = LAYOUTS[config["model_type"]]
    positions: dict[str, Position] = {place.key: position for position, place in layout.places.items()}
    keys = "|".join(re.escape(key) for key in positions)
    pattern = re.compile(
        rf"((?:\w+\.)?){re.escape(layout.blocks)}\.(\d{{1,4}})\.({keys})\.adapters\.{re.escape(config['name'])}\.(.+)"
    )
    tables: dict[Spot, dict[str, Tensor]] = {}
    prefixes = set()
    for key, tensor in tensors.items():
        found = pattern.fullmatch(_LEGACY.sub("adapters.", key))
        if found is None:
            what = "an invertible adapter's" if "invertible" in key else "no bottleneck's"
            raise InputError(f"is {what} key: it is not read", file=weights, key=key, remedy=_READ)
        prefixes.add(found[1])
        spot = Spot(int(found[2]), positions[found[3]])
        tables.setdefault(spot, {})[found[4]] = check_finite(tensor, weights, key)
    if len(prefixes) != 1:
        raise InputError("holds no bottlenecks, or those of two models", file=weights)
    widths = {_width(table, spot, form, weights) for spot, table in tables.items()}
    if len(widths) > 1:
        raise InputError(f"holds bottlenecks of {len(widths)} widths", file=weights)
    files = {name: path / name for name in (*HEAD, INTERFACE) if (path / name).is_file()}
    dtype = next(iter(tensors.values())).dtype
    return Bottlenecks(path, config, form, dict(sorted(tables.items())), prefixes.pop(), weights_name, files, dtype)


def _form_of(config: Mapping[str, Any], file: Path) -> Form:
    """What the options say.

    Raises:
        InputError: they are of another kind of adapter, or of a model that bottlenecks aren't placed in.
    """

    def unread(what: str) -> InputError:
        return InputError(f"is {what}, which is not read", file=file, remedy=_READ)

    options = config.get("config")
    if not isinstance(options, Mapping) or not isinstance(config.get("name"), str):
        raise unread("no adapter with a name and its options in full")
    if options.get("architecture") is not None:
        raise unread(f"an AdapterHub adapter of the kind {options['architecture']}")
    other = next((what for option, what in _OTHERS.items() if options.get(option)), None)
    if other is not None:
        raise unread(f"an adapter of the {other} kind")
    kind = str(config.get("model_type"))
    if kind not in LAYOUTS:
        raise InputError(
            f"is for a model of type {kind}, whose bottlenecks aren't read",
            file=file,
            remedy=f"Those of {', '.join(LAYOUTS)} are.",
        )
    with understanding(ADAPTER_CONFIG, file):
        activity = str(options["non_linearity"]).lower()
        given = {name: options[name] for name in Form.__dataclass_fields__ if options.get(name) is not None}
        scaling = given.pop("scaling", 1.0)
        if scaling not in ("learned", "channel"):
            scaling = float(scaling)
        skip = given.pop("residual_before_ln", True)
        activity = activity if "version" in config else _RENAMED.get(activity, activity)
        form = Form(**{**given, "residual_before_ln": skip, "scaling": scaling, "non_linearity": activity})
        odd = [name for name in given if name != "non_linearity" and not isinstance(given[name], bool)]
        odd += ["residual_before_ln"] * (not isinstance(skip, bool) and skip != "post_add")
        odd += ["scaling"] * (isinstance(scaling, float) and not math.isfinite(scaling))
        if odd:
            raise ValueError(f"{odd[0]} is {options[odd[0]]!r}")
    activation(form.non_linearity)
    return form


def _width(table: Mapping[str, Tensor], spot: Spot, form: Form, file: Path) -> int:
    """The width of the states that a bottleneck reads.

    Raises:
        InputError: parameters are missing or more, or of other shapes or types than they should be.
    """
    where = f"{spot.position} of block {spot.block}"
    down = f"adapter_down.{int(form.ln_before)}.weight"
    if down not in table or table[down].dim() != 2 or not table[down].numel():
        raise InputError(f"has no {down}", file=file, key=where)
    if not all(tensor.is_floating_point() for tensor in table.values()):
        raise InputError("holds numbers that are no floats", file=file, key=where)
    try:
        return built(table, form).down.in_features
    except RuntimeError as error:
        what = " ".join(str(error).split()[:40])
        raise InputError(f"does not fit its configuration ({what})", file=file, key=where) from None


def check_base(bottlenecks: Bottlenecks, base: Loaded) -> None:
    """Whether they can be those of a base.

    Raises:
        InputError: they are for models of another type, width or depth.
    """
    kind, width = bottlenecks.config["model_type"], next(iter(bottlenecks.modules().values())).down.in_features
    remedy = "Is it the base that it was trained on?"
    if layout_of(base) is not LAYOUTS[kind]:
        what = f"is for models of type {kind}, and {base.path.name} is of type {base.main.config.model_type}"
        raise InputError(what, file=bottlenecks.path, remedy=remedy)
    if width_of(base) != width:
        what = f"reads states of {width} numbers, and those of {base.path.name} have {width_of(base)}"
        raise InputError(what, file=bottlenecks.path, remedy=remedy)
    last, depth = max(spot.block for spot in bottlenecks.tables), len(blocks_of(base))
    if last >= depth:
        what = f"has a bottleneck for block {last}, and {base.path.name} has {depth} blocks"
        raise InputError(what, file=bottlenecks.path, remedy=remedy)


def written(bottlenecks: Bottlenecks) -> Written:
    """The library's folder, with the same kind of weights file as it was read from."""
    layout, name = LAYOUTS[bottlenecks.config["model_type"]], bottlenecks.config["name"]
    tensors = {
        f"{bottlenecks.prefix}{layout.blocks}.{spot.block}.{layout.places[spot.position].key}.adapters.{name}.{parameter}":
            tensor.detach().cpu().to(bottlenecks.dtype).clone().contiguous()
        for spot, table in bottlenecks.tables.items()
        for parameter, tensor in table.items()
    }  # fmt: skip
    config = json.dumps(bottlenecks.config, indent=2, sort_keys=True) + "\n"
    pickled = bottlenecks.weights_name == WEIGHTS[0]
    return Written(
        tensors,
        {**bottlenecks.metadata, "format": "pt"},
        {ADAPTER_CONFIG: config, **bottlenecks.files},
        folder=True,
        weights_name=bottlenecks.weights_name,
        save=partial(torch.save, tensors) if pickled else None,
    )
