"""Module names of every scheme, looked up in the families' tables: canonical, original, and a family's further ones.

Nothing is un-flattened by guess: a base's own names are flattened, and the file's name is looked up among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod

from regraft.families import Family, Piece, families, get_family, without_text_model
from regraft.tensors import Shape

#: The names of diffusers and transformers, which adapters are kept by.
CANONICAL = "canonical"
#: The names of the model's own code.
ORIGINAL = "original"

_TEXT_ROOTS = ("encoder.layers.", "embeddings.", "final_layer_norm")


def needs_text_model(path: str) -> bool:
    """Whether a text encoder's path lacks the level ``text_model``, which trainers' files always have."""
    return path.startswith(_TEXT_ROOTS)


# How many names decide which families are looked at closely.
_SAMPLE = 16


def flattened(path: str) -> str:
    """A module's path as kohya's grammar writes it."""
    return path.replace(".", "_")


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
def tables(family: str, component: str) -> dict[str, Table]:
    """Scheme → names of one family's component, the canonical ones first; empty where the family lists none."""
    known = get_family(family)
    parameters = known.parameters.get(component, {}) if known else {}
    if known is None or not parameters:
        return {}
    canonical = {name: (Piece(name),) for name in parameters}
    if component.startswith("text_encoder"):
        # Both spellings of a text encoder's names occur in files, and each stays as the file has it.
        canonical |= {bare: (Piece(bare),) for name in parameters if (bare := without_text_model(name)) != name}
    found = {CANONICAL: Table(canonical)}
    original = known.original.get(component, {})
    if original:
        found[ORIGINAL] = Table(original)
    for scheme, names in known.spellings.get(component, {}).items():
        found[scheme] = Table({name: original.get(to) or (Piece(to),) for name, to in names.items()})
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


def _alike(one: Shape, two: Shape) -> bool:
    # Files flatten kernels, and keep 1 × 1 convolutions as linear layers.
    return one[:1] == two[:1] and prod(one) == prod(two)


@dataclass(frozen=True)
class Match:
    """How well a family's component explains a file's names.

    Attributes:
        family: its name.
        component: the family's name of the component.
        named: how many of the names it has, in whichever scheme.
        shaped: how many of those have the right shape too.
    """

    family: str
    component: str
    named: int
    shaped: int


def recognise(names: Mapping[str, Shape | None], *, flat: bool, text: bool = False) -> Match | None:
    """The family's component that has most of a file's names, by shapes first.

    Args:
        names: module's name as the file has it → shape of its weight, or None where the update doesn't tell it.
        flat: whether the names are flattened.
        text: whether a text encoder is looked for, or a family's main model.
    """
    best: Match | None = None
    sample = list(names)[:: max(1, len(names) // _SAMPLE)]
    for family in families().values():
        for component in _components(family, text=text):
            if not _count(family, component, dict.fromkeys(sample), flat=flat)[0]:
                continue
            named, shaped = _count(family, component, names, flat=flat)
            match = Match(family.name, component, named, shaped)
            if named and (best is None or (shaped, named) > (best.shaped, best.named)):
                best = match
    return best


def _components(family: Family, *, text: bool) -> list[str]:
    if text:
        return [name for name in family.parameters if name.startswith("text_encoder") or family.main == name == "model"]
    return [family.main] if family.main in family.parameters and not family.main.startswith("text_encoder") else []


def _count(family: Family, component: str, names: Mapping[str, Shape | None], *, flat: bool) -> tuple[int, int]:
    named = shaped = 0
    shapes = family.parameters[component]
    schemes = tables(family.name, component).values()
    for name, shape in names.items():
        for table in schemes:
            module = table.modules.get(name) if flat else name
            if module is None or table.of(module) is None:
                continue
            named += 1
            expected = whole_shape(table, shapes, module)
            varying = any(f"{path}.weight" == piece.name for path in family.varying for piece in table.of(module) or ())
            shaped += varying or shape is None or (expected is not None and _alike(shape, expected))
            break
    return named, shaped


def recognise_scheme(names: Sequence[str]) -> str | None:
    """The scheme of dotted names, by the family that has most of a sample of them; canonical where both would do."""
    sample = list(names)[:: max(1, len(names) // _SAMPLE)]
    best, most = None, 0
    for family in families().values():
        for component in _components(family, text=False):
            for scheme, table in tables(family.name, component).items():
                found = sum(table.of(name) is not None for name in sample)
                if found > most:
                    best, most = scheme, found
    return best if 2 * most > len(sample) else None
