"""What most formats share: a prefix that says the component, the module's name in some scheme, and a suffix.

A format file states its prefixes and how it spells what it writes; reading and writing are done here. Names go through
the families' tables (`_naming`), tensors through the suffix table (`_suffixes`); fused weights are cut and joined by
`regraft.updates.rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.errors import InputError
from regraft.families import Piece, family_of_modules, get_family, refine_by_hint
from regraft.formats import AdapterFile, BaseNames
from regraft.formats._common import Choices, scalars, shapes_of
from regraft.formats._naming import CANONICAL, Match, Table, own_table, recognise, tables, whole_shape
from regraft.formats._suffixes import PARAMETERS, SUFFIXES, build, parameter, split_key
from regraft.tensors import Shape, Transposed
from regraft.updates import Boft, Diff, Full, Ia3, LoHa, LoKr, LowRank, Oft, Update
from regraft.updates.rows import take_rows

#: The component of a prefix that stands for the family's main model, whatever its name.
MAIN = "main"
#: A family's schemes → a format's own ones, by name.
Extra = Callable[[Mapping[str, Table]], dict[str, Table]]
# Kinds that know only one axis of their weight.
_PARTIAL = (Oft, Boft, Ia3)
_SHAPED = (LoHa, LoKr, Oft, Boft, Ia3)


@dataclass(frozen=True)
class Prefix:
    """What keys of one component begin with.

    Attributes:
        text: the prefix, with its separator.
        component: `MAIN`, or a text encoder.
        flat: whether dots of the module's name are underscores.
    """

    text: str
    component: str
    flat: bool


@dataclass
class _Stem:
    """What a file says of one name."""

    prefix: Prefix
    name: str
    keys: dict[str, str] = field(default_factory=dict)
    update: Update | None = None
    parameters: list[tuple[str, Update]] = field(default_factory=list)

    @property
    def shape(self) -> Shape | None:
        if self.update is not None:
            return None if isinstance(self.update, _PARTIAL) else self.update.shape
        return next((update.shape for name, update in self.parameters if name == "weight"), None)


def split_prefix(key: str, prefixes: Sequence[Prefix]) -> Prefix | None:
    """The longest prefix that a key begins with."""
    found = [prefix for prefix in prefixes if key.startswith(prefix.text)]
    return max(found, key=lambda prefix: len(prefix.text), default=None)


def read(
    file: AdapterFile,
    names: BaseNames | None,
    format: str,
    prefixes: Sequence[Prefix],
    *,
    extra: Extra | None = None,
) -> Adapter:
    """Keys → adapter.

    Args:
        file: to read.
        names: the base's own names, where the caller knows them.
        format: name of the format.
        prefixes: of its components.
        extra: the format's own naming schemes, made of the main model's others.

    Raises:
        InputError: an update is incomplete, or its tensors don't fit each other.
    """
    stems, unrecognised = _stems(file, prefixes)
    reader = _Reader(file, names or {}, stems, extra)
    for stem in stems:
        unrecognised += reader.place(stem)
    family = _family(reader.updates, reader.main, file.metadata)
    return Adapter(
        reader.updates,
        format,
        reader.layout(),
        file.metadata,
        family=family,
        unrecognised=tuple(key for key in file.tensors if key in set(unrecognised)),
        path=file.path,
    )


def _stems(file: AdapterFile, prefixes: Sequence[Prefix]) -> tuple[list[_Stem], list[str]]:
    stems: dict[tuple[str, str], _Stem] = {}
    unrecognised: list[str] = []
    for key in file.tensors:
        prefix, split = split_prefix(key, prefixes), split_key(key)
        if prefix is None:
            unrecognised.append(key)
            continue
        # A key without a suffix may be a parameter's own name, and then stands for its new value.
        name, suffix = split or (key, "")
        stem = stems.setdefault((prefix.text, name), _Stem(prefix, name.removeprefix(prefix.text)))
        stem.keys[suffix] = key
    alphas = scalars(
        {(s.prefix.text, s.name): file.tensors[s.keys[".alpha"]] for s in stems.values() if _scales(s)}, file.path
    )
    for stem in stems.values():
        own = {suffix: key for suffix, key in stem.keys.items() if suffix and suffix not in PARAMETERS}
        if own and not set(own) <= {".alpha", ".weight"}:
            stem.update = build(own, file, alphas.get((stem.prefix.text, stem.name)))
        stem.parameters = [
            parameter(suffix, key, file.tensors[key]) for suffix, key in stem.keys.items() if suffix in PARAMETERS
        ]
    return list(stems.values()), unrecognised


def _scales(stem: _Stem) -> bool:
    # The alpha of OFT is a constraint, and may be anything.
    return ".alpha" in stem.keys and ".oft_blocks" not in stem.keys


def _family(updates: Mapping[ModuleRef, Update], match: Match | None, metadata: Mapping[str, str]) -> str | None:
    family = family_of_modules(shapes_of(updates))
    if family is None and match is not None and match.shaped == match.named:
        family = match.family
    hint = " ".join(metadata.get(key, "") for key in ("modelspec.architecture", "ss_base_model_version"))
    return refine_by_hint(family, hint)


class _Reader:
    """Places each name of a file on the canonical modules."""

    def __init__(
        self, file: AdapterFile, names: BaseNames, stems: Sequence[_Stem], extra: Extra | None
    ) -> None:
        self.file, self.names, self.extra = file, names, extra
        self.main = _match(stems, MAIN)
        self.updates: dict[ModuleRef, Update] = {}
        self.known: dict[str, tuple[str, dict[str, Table], Mapping[str, Shape]]] = {}
        self.prefixes = {stem.prefix.component for stem in stems}
        self.texts = {component: _match(stems, component) for component in self.prefixes - {MAIN}}
        self.choices = {name: Choices() for name in ("prefix", "scheme", "style", "magnitude")}

    def place(self, stem: _Stem) -> list[str]:
        """Note the stem's updates; returns the keys that are not understood."""
        component, schemes, shapes = self._names(stem.prefix)
        for scheme, table in schemes.items():
            module = table.modules.get(stem.name) if stem.prefix.flat else stem.name
            whole = table.pieces.get(stem.name) if not stem.prefix.flat else None
            if module is not None and (table.of(module) or table.of(module, "bias")):
                return self._put(stem, component, scheme, table, module, shapes)
            if whole and "" in stem.keys:
                return self._put_whole(stem, component, scheme, whole)
        if stem.prefix.flat or stem.update is None or "" in stem.keys:
            return list(stem.keys.values())
        # Dotted names of a family that is in no table are the model's own.
        table = Table({name: (Piece(name),) for name in (f"{stem.name}.weight", f"{stem.name}.bias")})
        return self._put(stem, component, CANONICAL, table, stem.name, shapes)

    def _names(self, prefix: Prefix) -> tuple[str, dict[str, Table], Mapping[str, Shape]]:
        if prefix.component not in self.known:
            self.known[prefix.component] = self._look_up(prefix.component)
        return self.known[prefix.component]

    def _look_up(self, component: str) -> tuple[str, dict[str, Table], Mapping[str, Shape]]:
        match = self.main if component == MAIN else self.texts[component]
        family = get_family(match.family) if match else None
        if component == MAIN:
            component = match.component if match else ""
            if not component or component == MODEL:
                component = "transformer" if "transformer" in self.names and "unet" not in self.names else "unet"
        else:
            component = self._text_component(component)
        schemes = dict(tables(match.family, match.component)) if match else {}
        shapes = family.parameters[match.component] if family and match else {}
        own = self.names.get(component)
        if own is None and set(self.names) == {MODEL}:
            own = self.names[MODEL]
        if own is not None:
            base = own_table(own)
            schemes[CANONICAL] = base if CANONICAL not in schemes else Table({**schemes[CANONICAL].pieces, **base.pieces})
        if self.extra is not None and not component.startswith("text_encoder"):
            schemes |= self.extra(schemes)
        return component, schemes, shapes

    def _text_component(self, component: str) -> str:
        # T5 is Flux's second text encoder and SD 3's third, and sd-scripts calls it te3 in both.
        third = component == "text_encoder_3" and "text_encoder_2" not in self.prefixes
        main = get_family(self.main.family) if self.main else None
        return "text_encoder_2" if third and (main is None or "text_encoder_3" not in main.parameters) else component

    def _put(
        self, stem: _Stem, component: str, scheme: str, table: Table, module: str, shapes: Mapping[str, Shape]
    ) -> list[str]:
        left: list[str] = []
        update = stem.update
        if update is not None:
            pieces = table.of(module)
            cut = _cut(_with_shape(update, whole_shape(table, shapes, module)), pieces) if pieces else None
            if cut is None:
                left += [key for suffix, key in stem.keys.items() if suffix and suffix not in PARAMETERS]
            else:
                self._note(component, stem, scheme, {name.removesuffix(".weight"): u for name, u in cut.items()})
        elif any(suffix and suffix not in PARAMETERS for suffix in stem.keys):
            left += self._values(stem, component, scheme, table, module)
        for suffix, key in stem.keys.items():
            if suffix in PARAMETERS:
                name, change = parameter(suffix, key, self.file.tensors[key])
                pieces = table.of(module, name)
                cut = _cut(change, pieces) if pieces else None
                if cut is None:
                    left.append(key)
                else:
                    self._note(component, stem, scheme, cut)
        return left

    def _values(self, stem: _Stem, component: str, scheme: str, table: Table, module: str) -> list[str]:
        """A ``.weight`` that is no part of an update is the parameter's new value."""
        keys = [key for suffix, key in stem.keys.items() if suffix not in PARAMETERS]
        pieces = table.of(module)
        if stem.prefix.flat or set(stem.keys) - set(PARAMETERS) != {".weight"} or not pieces:
            return keys
        cut = _cut(Full(self.file.tensors[keys[0]], keys[0]), pieces)
        if cut is None:
            return keys
        self._note(component, stem, scheme, cut)
        return []

    def _put_whole(self, stem: _Stem, component: str, scheme: str, pieces: tuple[Piece, ...]) -> list[str]:
        key = stem.keys[""]
        cut = _cut(Full(self.file.tensors[key], key), pieces)
        if cut is None:
            return [key]
        self._note(component, stem, scheme, cut)
        return [other for suffix, other in stem.keys.items() if suffix]

    def _note(self, component: str, stem: _Stem, scheme: str, cut: Mapping[str, Update]) -> None:
        for path, update in cut.items():
            ref = ModuleRef(component, path)
            if ref in self.updates:
                _double(self.file, ref, stem)
            self.updates[ref] = update
            self.choices["prefix"].note(component, path, stem.prefix.text)
            self.choices["scheme"].note(component, path, scheme)
            for suffix in stem.keys:
                if suffix in SUFFIXES and SUFFIXES[suffix].role in ("down", "magnitude"):
                    kind = "style" if SUFFIXES[suffix].role == "down" else "magnitude"
                    self.choices[kind].note(component, path, SUFFIXES[suffix].style)

    def layout(self) -> dict[str, Any]:
        """What the writer needs to give the same keys back."""
        naming = self.main or next((match for match in self.texts.values() if match), None)
        texts = {self._text_component(component): match for component, match in self.texts.items()}
        return {
            **{name: choices.to_layout() for name, choices in self.choices.items()},
            "family": naming.family if naming else None,
            "texts": {name: (match.family, match.component) for name, match in texts.items() if match},
        }


def _double(file: AdapterFile, ref: ModuleRef, stem: _Stem) -> None:
    raise InputError(
        f"is a second update of {ref}",
        file=file.path,
        key=next(iter(stem.keys.values())),
        remedy="Two spellings of one module in a file contradict each other: keep one.",
    )


def _match(stems: Iterable[_Stem], component: str) -> Match | None:
    mine = [stem for stem in stems if stem.prefix.component == component]
    names = {stem.name: stem.shape for stem in mine}
    return recognise(names, flat=mine[0].prefix.flat, text=component != MAIN) if mine else None


def _with_shape(update: Update, shape: Shape | None) -> Update:
    """The update with the shape of its weight, where the file leaves that open and the family's table fits."""
    if not isinstance(update, _SHAPED) or shape is None:
        return update
    if not isinstance(update, _PARTIAL) and math.prod(update.shape) != math.prod(shape):
        return update
    return replace(update, weight_shape=shape)


def _cut(update: Update, pieces: Sequence[Piece]) -> dict[str, Update] | None:
    """Canonical parameter → its share of an update of the fused weight; None where the sizes don't fit."""
    total = sum(end - start for piece in pieces for start, end in piece.rows or ())
    cut: dict[str, Update] = {}
    for piece in pieces:
        if piece.transposed:
            part = turned(update)
        elif piece.rows is None:
            part = update
        else:
            ranges = scaled_rows(piece.rows, total, update.shape[0])
            part = take_rows(update, ranges) if ranges is not None else None
        if part is None:
            return None
        cut[piece.name] = part
    return cut


def scaled_rows(rows: Sequence[tuple[int, int]], total: int, actual: int) -> list[tuple[int, int]] | None:
    """Row ranges of a table of ``total`` rows, on a weight that has ``actual`` ones; None where they don't divide."""
    if any(edge * actual % total for part in rows for edge in part):
        return None
    return [(start * actual // total, end * actual // total) for start, end in rows]


def turned(update: Update) -> Update | None:
    """The update of the transposed weight."""
    if isinstance(update, LowRank) and update.magnitude is None and update.bias is None and len(update.shape) == 2:
        return replace(update, up=Transposed(update.down), down=Transposed(update.up))
    if isinstance(update, Diff | Full) and len(update.shape) == 2:
        return replace(update, value=Transposed(update.value))
    return None
