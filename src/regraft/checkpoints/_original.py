"""The diffusion model of a file in its makers' names, shown by diffusers' names: views only, no weight is read.

The names are the families' tables (``Table.pieces``). Prefixes: ``model.diffusion_model.`` in whole checkpoints of the
web interfaces, none in the makers' own files, ``module.`` and ``model.model.`` in some exports.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from regraft.checkpoints._views import RowRanges
from regraft.errors import InputError
from regraft.families import CANONICAL, ORIGINAL, Family, Piece, Table, families
from regraft.families._templates import kind_of
from regraft.tensors import TensorRef, Transposed

PREFIXES = ("model.diffusion_model.", "", "diffusion_model.", "model.model.", "module.", "transformer.")
# Share of the names under a prefix that a table may lack, and of its unnumbered ones that the file may lack.
_FOREIGN, _LACKING = 0.05, 0.5


@dataclass(frozen=True)
class Found:
    """A diffusion model within a file.

    Attributes:
        family: the one whose table fits; of families with the same names, the first.
        tensors: canonical name → view.
        used: stored names that these are made from.
    """

    family: Family
    tensors: Mapping[str, TensorRef]
    used: frozenset[str]


def find_model(tensors: Mapping[str, TensorRef]) -> Found | None:
    """The diffusion model in the original names, or None where no family's table fits.

    Raises:
        InputError: a fused weight can't be cut as the family's are.
    """
    roots = (root for family in families().values() for root in family.roots.get(family.main, ()))
    for prefix in dict.fromkeys((*PREFIXES, *roots)):
        part = {name[len(prefix) :]: ref for name, ref in tensors.items() if name.startswith(prefix)}
        found = _best(part, prefix) if part else None
        if found is not None:
            family, table, scheme = found
            shown, used = _shown(table, scheme, part)
            return Found(family, shown, frozenset(f"{prefix}{name}" for name in used))
    return None


def _best(part: Mapping[str, TensorRef], prefix: str) -> tuple[Family, Table, str] | None:
    """The family and naming scheme that leave the fewest of the file's names over, then the fewest of their own."""
    best: tuple[tuple[int, int], Family, Table, str] | None = None
    for family, table, scheme in _layouts(part, prefix):
        names = _names(table, scheme)
        foreign, missing = part.keys() - names.keys(), names.keys() - part.keys()
        fits = len(foreign) <= _FOREIGN * len(part) and _only_blocks_lack(names, missing)
        over = len(foreign), len(missing)
        if fits and (best is None or over < best[0]):
            best = over, family, table, scheme
    return best[1:] if best else None


def _names(table: Table, scheme: str) -> dict[str, tuple[Piece, ...]]:
    """The scheme's names and their pieces; what a tool did not rename has its original name."""
    names = dict(table.pieces(scheme))
    if scheme not in (CANONICAL, ORIGINAL):
        renamed = set(table.spellings[scheme].values())
        names |= {name: pieces for name, pieces in table.original.items() if name not in renamed}
    return names


def _layouts(part: Mapping[str, TensorRef], prefix: str) -> Iterator[tuple[Family, Table, str]]:
    kinds, seen = {kind_of(name) for name in part}, set()
    for family in families().values():
        if family.main not in family.components or family.main.startswith("text_encoder"):
            continue
        table = family.table(family.main)
        if table.name in seen:
            continue
        seen.add(table.name)
        for scheme in table.schemes:
            known = table.kinds(scheme) | (table.kinds(ORIGINAL) if ORIGINAL in table.schemes else frozenset())
            # Canonical names without a prefix are no original checkpoint: the file is a model by itself.
            if (scheme != CANONICAL or prefix) and 2 * len(kinds & known) > len(kinds):
                yield family, table, scheme


def _only_blocks_lack(names: Mapping[str, tuple[Piece, ...]], missing: set[str]) -> bool:
    """Whether a file without ``missing`` is still this model: a shallower one, or one without an optional part.

    A block lacks as a whole or not at all: the last one of a deeper model may be of another make. And where a block's
    number in the original is not its canonical one, a shallower model has other names altogether.
    """
    present = {_block(name) for name in names if name not in missing}
    for name in missing:
        block = _block(name)
        if block is None:
            continue
        theirs = [_block(piece.name) for piece in names[name]]
        if block in present or any(own is None or own[1] != block[1] for own in theirs):
            return False
    plain = [name for name in names if _block(name) is None]
    lacking = sum(name in missing for name in plain)
    return not missing or (bool(plain) and lacking <= _LACKING * len(plain))


def _block(name: str) -> tuple[str, str] | None:
    """The numbered block that a parameter is in: the path before the number, and the number."""
    found = re.match(r"(.*?)\.(\d+)\.", name)
    return (found[1], found[2]) if found else None


def _shown(table: Table, scheme: str, part: Mapping[str, TensorRef]) -> tuple[dict[str, TensorRef], set[str]]:
    views: dict[str, TensorRef] = {}
    used = set()
    for name, pieces in _names(table, scheme).items():
        if name in part:
            used.add(name)
            for piece in pieces:
                views[piece.name] = view_of(part[name], piece, pieces, name)
    return {name: views[name] for name in table.parameters if name in views}, used


def view_of(ref: TensorRef, piece: Piece, pieces: tuple[Piece, ...], name: str) -> TensorRef:
    """The canonical parameter that ``piece`` of ``ref`` is.

    Raises:
        InputError: the rows don't divide as those of the real model do.
    """
    if piece.transposed:
        return Transposed(ref)
    if piece.rows is None:
        return ref
    total = max(end for other in pieces for _, end in other.rows or ())
    count = ref.shape[0] if ref.shape else 0
    if any(edge * count % total for pair in piece.rows for edge in pair) or not count:
        file = getattr(ref, "file", None)
        raise InputError(
            f"has {count} rows, which can't be cut in {len(pieces)} parts as {piece.name} asks",
            file=file if isinstance(file, Path) else None,
            key=name,
        )
    return RowRanges(ref, tuple((start * count // total, end * count // total) for start, end in piece.rows))
