"""Tables of one model's parameters: canonical names and shapes, the original code's names, other spellings.

A table is a JSON file in ``tables/``, made by ``python -m tools.make_families``; it is read when it is first asked for
and expanded when its names are. `docs/formats.md` explains the fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Any

from regraft.families._templates import expand, kind_of
from regraft.tensors import Shape

# transformers 5 leaves this level out of CLIPTextModel.
_OPTIONAL = "text_model."

CANONICAL = "canonical"
ORIGINAL = "original"


@dataclass(frozen=True)
class Piece:
    """Part of an original parameter that is a canonical one.

    Attributes:
        name: canonical parameter (or module, where modules are asked for).
        rows: ranges of the original's rows that, put together in this order, are the canonical parameter; None: all.
            They are those of the real size: a model of other widths has them in proportion.
        transposed: the canonical parameter is the transposed of the original.
    """

    name: str
    rows: tuple[tuple[int, int], ...] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Named:
    """What a name of some scheme stands for.

    Attributes:
        name: dotted name in that scheme.
        pieces: the canonical modules (or parameters) in it.
        shape: of the parameter under that name.
    """

    name: str
    pieces: tuple[Piece, ...]
    shape: Shape


def flattened(name: str) -> str:
    """A name as kohya's files write it."""
    return name.replace(".", "_")


def fill(value: Any, number: str) -> Any:
    """The name (or the names of a mapping) with a number in the place of the first ``{}``."""
    if isinstance(value, str):
        return value.replace("{}", number, 1)
    return {name.replace("{}", number, 1): rows for name, rows in value.items()}


def _pieces(value: str | Mapping[str, Any]) -> tuple[Piece, ...]:
    if isinstance(value, str):
        return (Piece(value),)
    return tuple(
        Piece(name, transposed=True) if rows == "transposed" else Piece(name, tuple((a, b) for a, b in rows))
        for name, rows in value.items()
    )


class Table:
    """One model's parameters, expanded on demand."""

    def __init__(self, name: str, data: Mapping[str, Any]) -> None:
        self.name = name
        self.data = data
        self._named: dict[tuple[str, bool], dict[str, Named]] = {}
        self._kinds: dict[str, frozenset[str]] = {}

    @cached_property
    def parameters(self) -> dict[str, Shape]:
        """Canonical parameter → shape, in the order of the state dict."""
        return {name: tuple(shape) for name, shape in expand(self.data["parameters"].items())}

    @cached_property
    def original(self) -> dict[str, tuple[Piece, ...]]:
        """Original parameter → its pieces; empty where there is no other code than the canonical."""
        if self.data.get("original") == "same":
            return {name: (Piece(name),) for name in self.parameters}
        return {name: _pieces(value) for name, value in expand(self.data.get("original", {}).items(), fill)}

    @cached_property
    def spellings(self) -> dict[str, dict[str, str]]:
        """Scheme → its parameter name → the original (or canonical) one."""
        schemes: Mapping[str, Any] = self.data.get("spellings", {})
        return {scheme: dict(expand(rows.items(), fill)) for scheme, rows in schemes.items()}

    @property
    def tied(self) -> Mapping[str, str]:
        """Parameter that is another one under a second name, which files may leave out → that one."""
        tied: Mapping[str, str] = self.data.get("tied", {})
        return tied

    @cached_property
    def modules(self) -> dict[str, Shape]:
        """Canonical module → its weight's shape."""
        return {n.removesuffix(".weight"): shape for n, shape in self.parameters.items() if n.endswith(".weight")}

    @cached_property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """Original module → the canonical modules that it holds, where they are several."""
        return {
            name.removesuffix(".weight"): tuple(piece.name.removesuffix(".weight") for piece in pieces)
            for name, pieces in self.original.items()
            if len(pieces) > 1 and all(piece.name.endswith(".weight") for piece in pieces)
        }

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration that makes this model: widths, heads, depths."""
        config: Mapping[str, Any] = self.data["config"]
        return config

    @property
    def schemes(self) -> tuple[str, ...]:
        """Names of the schemes that this table knows, canonical first."""
        own = (ORIGINAL,) if self.data.get("original", "same") != "same" else ()
        return (CANONICAL, *own, *self.data.get("spellings", {}))

    def kinds(self, scheme: str) -> frozenset[str]:
        """Kinds of its names in one scheme, dotted and flattened: what a quick look compares."""
        if scheme not in self._kinds:
            source = {CANONICAL: "parameters", ORIGINAL: "original"}.get(scheme)
            rows = self.data[source] if source else self.data["spellings"][scheme]
            names = {kind_of(template) for template in rows}
            if source is None:
                names |= {kind_of(template) for template in self.data.get("original", {})}
            names |= {name.removesuffix(".weight") for name in names}
            names |= {name.removeprefix(_OPTIONAL) for name in names}
            self._kinds[scheme] = frozenset(names | {flattened(name) for name in names})
        return self._kinds[scheme]

    def pieces(self, scheme: str) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        """Parameter of the scheme → canonical pieces."""
        if scheme == CANONICAL:
            for name in self.parameters:
                yield name, (Piece(name),)
        elif scheme == ORIGINAL:
            yield from self.original.items()
        else:
            renamed = self.spellings[scheme]
            for name, target in renamed.items():
                yield name, self.original.get(target) or (Piece(target),)
            # What a tool did not rename has its original name.
            yield from ((name, held) for name, held in self.original.items() if name not in set(renamed.values()))

    def named(self, scheme: str, *, flat: bool = False) -> Mapping[str, Named]:
        """Names of one scheme → what they stand for: modules and whole parameters, dotted; or modules, flattened."""
        if (scheme, flat) not in self._named:
            self._named[scheme, flat] = dict(self._flat(scheme) if flat else self._dotted(scheme))
        return self._named[scheme, flat]

    def _dotted(self, scheme: str) -> Iterator[tuple[str, Named]]:
        for name, pieces in self.pieces(scheme):
            entry = Named(name, pieces, self._shape(pieces))
            spelled = [entry]
            if name.startswith(_OPTIONAL):
                spelled.append(Named(name.removeprefix(_OPTIONAL), pieces, entry.shape))
            for one in spelled:
                yield one.name, one
                if one.name.endswith(".weight"):
                    parts = tuple(Piece(p.name.removesuffix(".weight"), p.rows, p.transposed) for p in pieces)
                    path = one.name.removesuffix(".weight")
                    yield path, Named(path, parts, one.shape)

    def _flat(self, scheme: str) -> Iterator[tuple[str, Named]]:
        parameters = {name for name, _ in self.pieces(scheme)}
        for name, entry in self.named(scheme).items():
            if name not in parameters and not name.endswith((".weight", ".bias")):
                yield flattened(name), entry

    def _shape(self, pieces: tuple[Piece, ...]) -> Shape:
        first = self.parameters[pieces[0].name]
        if len(pieces) == 1:
            return first[::-1] if pieces[0].transposed else first
        return (sum(self.parameters[piece.name][0] for piece in pieces), *first[1:])


@cache
def table(name: str) -> Table:
    """The table of that name."""
    file = resources.files("regraft.families").joinpath("tables", f"{name}.json")
    return Table(name, json.loads(file.read_text(encoding="utf-8")))
