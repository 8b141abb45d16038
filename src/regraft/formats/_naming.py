"""Module names of every scheme, looked up in the families' tables: canonical, original, and a family's further ones.

Nothing is un-flattened by guess: a base's own names are flattened, and the file's name is looked up among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from regraft.families import CANONICAL, ORIGINAL, Piece, flattened, recognise, without_text_model
from regraft.families import table as families_table
from regraft.tensors import Shape

_TEXT_ROOTS = ("encoder.layers.", "embeddings.", "final_layer_norm")


def needs_text_model(path: str) -> bool:
    """Whether a text encoder's path lacks the level ``text_model``, which trainers' files always have."""
    return path.startswith(_TEXT_ROOTS)


@dataclass(frozen=True)
class Table:
    """One component's parameters in one scheme → the canonical ones that they hold."""

    pieces: Mapping[str, tuple[Piece, ...]]

    def of(self, module: str, parameter: str = "weight") -> tuple[Piece, ...] | None:
        """The canonical parameters in ``module.parameter``; of a bare parameter (a norm's ``scale``) by its name."""
        return self.pieces.get(f"{module}.{parameter}") or (self.pieces.get(module) if parameter == "weight" else None)

    @cached_property
    def modules(self) -> Mapping[str, str]:
        """Flattened name → module's name."""
        names: dict[str, str] = {}
        for parameter in self.pieces:
            stem, _, last = parameter.rpartition(".")
            names.setdefault(flattened(stem if last in ("weight", "bias") else parameter), stem)
        return names

    @cached_property
    def inverse(self) -> Mapping[str, tuple[str, int]]:
        """Canonical parameter → (this scheme's parameter, which of its pieces)."""
        return {piece.name: (name, i) for name, pieces in self.pieces.items() for i, piece in enumerate(pieces)}


@cache
def tables(name: str) -> dict[str, Table]:
    """Scheme → names, by one of the families' tables; the canonical ones first."""
    known = families_table(name)
    canonical = {parameter: (Piece(parameter),) for parameter in known.parameters}
    # Both spellings of a CLIP text encoder's names occur in files, and each stays as the file has it.
    canonical |= {bare: (Piece(bare),) for full in known.parameters if (bare := without_text_model(full)) != full}
    found = {CANONICAL: Table(canonical)}
    if known.original:
        found[ORIGINAL] = Table(known.original)
    for scheme in known.spellings:
        found[scheme] = Table(dict(known.pieces(scheme)))
    return found


def own_table(parameters: Iterable[str]) -> Table:
    """The canonical table of a base whose parameters (or modules) are given."""
    pieces: dict[str, tuple[Piece, ...]] = {}
    for name in parameters:
        parameter = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        bare = without_text_model(parameter)
        # A trainer may have seen text_model. where the base has none, and the other way round.
        for spelling in (parameter, bare, f"text_model.{bare}"):
            pieces.setdefault(spelling, (Piece(spelling),))
    return Table(pieces)


def whole_shape(table: Table, shapes: Mapping[str, Shape], module: str) -> Shape | None:
    """Shape of a module's weight in a scheme, from those of its canonical pieces; None where it is not known."""
    pieces = table.of(module)
    if not pieces:
        return None
    found = [shapes.get(piece.name) or shapes.get(f"text_model.{piece.name}") for piece in pieces]
    if any(shape is None for shape in found):
        return None
    known = [shape for shape in found if shape is not None]
    if pieces[0].transposed:
        return tuple(reversed(known[0]))
    return (sum(shape[0] for shape in known), *known[0][1:])


def recognise_scheme(names: Sequence[str]) -> str | None:
    """The scheme of dotted module names without a component, or None where no family has most of them."""
    found = recognise({"": dict.fromkeys(names)})
    match = found.matches.get("") if found else None
    return match.scheme if match else None
