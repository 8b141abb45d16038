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
from regraft.families import (
    CANONICAL,
    Family,
    Piece,
    Recognition,
    family_of_modules,
    get_family,
    recognise,
    refine_by_hint,
    table,
)
from regraft.formats import AdapterFile, BaseNames
from regraft.formats._bundled_embeddings import read_bundled
from regraft.formats._common import Choices, doubled, scalars, shapes_of
from regraft.formats._naming import Table, own_table, tables, whole_shape
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
    """What a file says of one name.

    Attributes:
        prefix: before the name.
        name: of the module, or of a parameter.
        keys: suffix → key.
        update: of the module.
        parameters: key → (``weight`` or ``bias``, its change or new value).
    """

    prefix: Prefix
    name: str
    keys: dict[str, str] = field(default_factory=dict)
    update: Update | None = None
    parameters: dict[str, tuple[str, Update]] = field(default_factory=dict)

    @property
    def shape(self) -> Shape | None:
        if self.update is not None:
            return None if isinstance(self.update, _PARTIAL) else self.update.shape
        return next((update.shape for name, update in self.parameters.values() if name == "weight"), None)


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
    home: str | None = None,
    whole: Callable[[str], str] = lambda name: name,
) -> Adapter:
    """Keys → adapter.

    Args:
        file: to read.
        names: the base's own names, where the caller knows them.
        format: name of the format.
        prefixes: of its components.
        extra: the format's own naming schemes, made of the main model's others.
        home: the family of all such files, where the format has one.
        whole: a name as the families' tables have it, where the format names parts of a fused weight.

    Raises:
        InputError: an update is incomplete, or its tensors don't fit each other.
    """
    tokens, token_keys = read_bundled(file.tensors, file.path)
    bundled = set(token_keys.values())
    stems, unrecognised = _stems(file, [key for key in file.tensors if key not in bundled], prefixes)
    known = _recognised(stems, file.metadata, whole)
    reader = _Reader(file, names or {}, known, extra, get_family(home))
    for stem in stems:
        unrecognised += reader.place(stem)
    family = _family(reader, file.metadata)
    return Adapter(
        reader.updates,
        format,
        {**reader.layout(), "tokens": token_keys},
        file.metadata,
        family=family,
        tokens=tokens,
        unrecognised=tuple(key for key in file.tensors if key in set(unrecognised)),
        path=file.path,
    )


def _stems(file: AdapterFile, keys: Sequence[str], prefixes: Sequence[Prefix]) -> tuple[list[_Stem], list[str]]:
    stems: dict[tuple[str, str], _Stem] = {}
    unrecognised: list[str] = []
    for key in keys:
        prefix, split = split_prefix(key, prefixes), split_key(key)
        # A key without a suffix may be a parameter's own name, and then stands for its new value.
        name, suffix = split or (key, "")
        if prefix is None or not name.startswith(prefix.text):
            unrecognised.append(key)
            continue
        stem = stems.setdefault((prefix.text, name), _Stem(prefix, name.removeprefix(prefix.text)))
        stem.keys[suffix] = key
    alphas = scalars(
        {(s.prefix.text, s.name): file.tensors[s.keys[".alpha"]] for s in stems.values() if _scales(s)}, file.path
    )
    for stem in stems.values():
        own = {suffix: key for suffix, key in stem.keys.items() if suffix and suffix not in PARAMETERS}
        if own and not set(own) <= {".alpha", ".weight"}:
            stem.update = build(own, file, alphas.get((stem.prefix.text, stem.name)))
        stem.parameters = {
            key: parameter(suffix, key, file.tensors[key]) for suffix, key in stem.keys.items() if suffix in PARAMETERS
        }
    return list(stems.values()), unrecognised


def _scales(stem: _Stem) -> bool:
    # The alpha of OFT is a constraint, and may be anything.
    return ".alpha" in stem.keys and ".oft_blocks" not in stem.keys


def _family(reader: _Reader, metadata: Mapping[str, str]) -> str | None:
    known = reader.known
    family = known.family if known is not None and known.exact else family_of_modules(shapes_of(reader.updates))
    hint = " ".join(metadata.get(key, "") for key in ("modelspec.architecture", "ss_base_model_version"))
    return refine_by_hint(family, hint)


class _Reader:
    """Places each name of a file on the canonical modules."""

    def __init__(
        self,
        file: AdapterFile,
        names: BaseNames,
        known: Recognition | None,
        extra: Extra | None,
        home: Family | None,
    ) -> None:
        self.file, self.names, self.extra, self.home = file, names, extra, home
        self.known = known
        self.updates: dict[ModuleRef, Update] = {}
        self.tables: dict[str, str] = {}
        self.looked_up: dict[str, tuple[str, dict[str, Table], Mapping[str, Shape]]] = {}
        self.choices = {name: Choices() for name in ("prefix", "scheme", "style", "magnitude")}

    def place(self, stem: _Stem) -> list[str]:
        """Note the stem's updates; returns the keys that are not understood."""
        component, schemes, shapes = self._names(stem.prefix)
        for scheme, names in schemes.items():
            module = names.modules.get(stem.name) if stem.prefix.flat else stem.name
            whole = names.pieces.get(stem.name) if not stem.prefix.flat else None
            if whole and "" in stem.keys:
                return self._put_whole(stem, component, scheme, whole)
            if module is not None and (names.of(module) or names.of(module, "bias")):
                return self._put(stem, component, scheme, names, module, shapes)
        if stem.prefix.flat or stem.update is None or "" in stem.keys:
            return list(stem.keys.values())
        # Dotted names of a family that is in no table are the model's own.
        own = Table({name: (Piece(name),) for name in (f"{stem.name}.weight", f"{stem.name}.bias")})
        return self._put(stem, component, CANONICAL, own, stem.name, shapes)

    def _names(self, prefix: Prefix) -> tuple[str, dict[str, Table], Mapping[str, Shape]]:
        if prefix.component not in self.looked_up:
            self.looked_up[prefix.component] = self._look_up(prefix.component)
        return self.looked_up[prefix.component]

    def _look_up(self, component: str) -> tuple[str, dict[str, Table], Mapping[str, Shape]]:
        """The component by its family's name, its schemes, and the shapes of its parameters."""
        match = self.known.matches.get(component) if self.known else None
        schemes: dict[str, Table] = {}
        shapes: Mapping[str, Shape] = {}
        if match is not None and match.table is not None:
            schemes, shapes = dict(tables(match.table)), table(match.table).parameters
            component = match.component
            self.tables[component] = match.table
        elif component == MAIN and self.home is not None:
            component = self.home.main
            self.tables[component] = self.home.components[component]
            schemes, shapes = dict(tables(self.tables[component])), self.home.parameters[component]
        elif component == MAIN:
            component = "transformer" if "transformer" in self.names and "unet" not in self.names else "unet"
        own = self.names.get(component)
        if own is None and set(self.names) == {MODEL}:
            own = self.names[MODEL]
        if own is not None:
            pieces = schemes[CANONICAL].pieces if CANONICAL in schemes else {}
            schemes[CANONICAL] = Table({**pieces, **own_table(own).pieces})
        if self.extra is not None and not component.startswith("text_encoder"):
            schemes |= self.extra(schemes)
        return component, schemes, shapes

    def _put(
        self, stem: _Stem, component: str, scheme: str, table: Table, module: str, shapes: Mapping[str, Shape]
    ) -> list[str]:
        # The module's bare name, where that is no parameter, says nothing.
        left = [stem.keys[""]] if "" in stem.keys else []
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
        for key, (name, change) in stem.parameters.items():
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
        pieces = table.pieces.get(f"{module}.weight")
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
                raise doubled(f"update of {ref}", self.file.path, next(iter(stem.keys.values())))
            self.updates[ref] = update
            self.choices["prefix"].note(component, path, stem.prefix.text)
            self.choices["scheme"].note(component, path, scheme)
            for suffix in stem.keys:
                if suffix in SUFFIXES and SUFFIXES[suffix].role in ("down", "magnitude"):
                    kind = "style" if SUFFIXES[suffix].role == "down" else "magnitude"
                    self.choices[kind].note(component, path, SUFFIXES[suffix].style)

    def layout(self) -> dict[str, Any]:
        """What the writer needs to give the same keys back."""
        return {
            **{name: choices.to_layout() for name, choices in self.choices.items()},
            "tables": self.tables,
        }


def _recognised(stems: Iterable[_Stem], metadata: Mapping[str, str], whole: Callable[[str], str]) -> Recognition | None:
    names: dict[str, dict[str, Shape | None]] = {}
    for stem in stems:
        if stem.prefix.flat and "" in stem.keys:
            # No module's: one key with a suffix that nobody knows must not make dotted names of all the others.
            continue
        name = whole(stem.name)
        names.setdefault(stem.prefix.component, {})[name] = stem.shape if name == stem.name else None
    if MAIN in names:
        # To the families, this stands for the main model whatever it is called.
        names["transformer"] = names.pop(MAIN)
    found = recognise(names, metadata)
    if found is None or "transformer" not in found.matches:
        return found
    return replace(found, matches={**found.matches, MAIN: found.matches["transformer"]})


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
