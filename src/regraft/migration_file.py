"""A migration as one safetensors file: each distinct map once, everything else as JSON in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from regraft.adapter import ModuleRef
from regraft.base import Base
from regraft.errors import InputError, Refused, reading
from regraft.migration import Entry, Migration
from regraft.nearness import Nearness
from regraft.output import check_writable, whole
from regraft.report.schema import BaseSummary
from regraft.tensors import Shape, TensorRef, read_safetensors
from regraft.transport import LinearMap, Transport

KEY = "regraft_migration"
VERSION = 0


def save_migration(migration: Migration, path: Path, *, overwrite: bool = False) -> Path:
    """Write it whole or not at all.

    Raises:
        OutputError: ``path`` exists or can't be written.
    """
    check_writable(path, overwrite=overwrite)
    tensors, header = _encode(migration)
    # An identity costs nothing, but safetensors wants a tensor: an empty one marks the file.
    tensors = tensors or {"empty": torch.zeros(0)}
    with whole(path) as stage:
        save_file(tensors, stage, metadata={KEY: json.dumps(header, ensure_ascii=False)})
    return path


def load_migration(path: str | Path) -> Migration:
    """Read a migration; the maps are read with it.

    Raises:
        InputError: it is no migration, damaged, or of a later version.
    """
    path = Path(path).expanduser()
    content = read_safetensors(path)
    if KEY not in content.metadata:
        raise InputError("is no migration", file=path, remedy="`regraft port --save-migration` writes one.")
    damaged = InputError("is a damaged migration", file=path, key=KEY, remedy="Fit it again.")
    with reading(path, KEY):
        header = json.loads(content.metadata[KEY])
        if not isinstance(header, dict):
            raise damaged
        if header.get("version") != VERSION:
            raise InputError("is a migration of a later version", file=path, remedy="Update regraft.")
        try:
            migration = _decode(header, content.tensors, path)
        except (ValidationError, TypeError, IndexError, AttributeError, AssertionError):
            raise damaged from None
    for module, entry in migration.entries.items():
        if not _fits(entry):
            raise InputError(
                "a map does not fit its module's shape", file=path, key=str(module), remedy="Fit it again."
            )
    return migration


def _fits(entry: Entry) -> bool:
    """Whether the transport leads from the old shape to the new one, by finite maps of matching sizes."""
    if entry.transport is None:
        return True
    if entry.shape_new is None or entry.target is None:
        return False
    (out, inp), (new_out, new_inp) = _matrix(entry.shape_old), _matrix(entry.shape_new)
    sides = [pair for left, right in entry.transport.terms for pair in ((left, new_out, out), (right, inp, new_inp))]
    norms = entry.row_norms
    return all(_leads(map_, rows, columns) for map_, rows, columns in sides) and (
        norms is None or (tuple(norms.shape) == (2, out) and bool(norms.isfinite().all()))
    )


def _matrix(shape: Shape) -> tuple[int, int]:
    return shape[0], prod(shape[1:])


def _leads(map_: LinearMap, rows: int, columns: int) -> bool:
    """Whether the map is a finite (rows, columns) matrix."""
    if map_.identity != 0 and rows != columns:
        return False
    if map_.left is None:
        return map_.right is None and isfinite(map_.identity)
    right = map_.right
    if map_.left.dim() != 2 or (right is not None and right.dim() != 2):
        return False
    shape = (map_.left.shape[0], map_.left.shape[1] if right is None else right.shape[1])
    inner = right is None or map_.left.shape[1] == right.shape[0]
    finite = bool(map_.left.isfinite().all()) and (right is None or bool(right.isfinite().all()))
    return shape == (rows, columns) and inner and finite and isfinite(map_.identity)


def check_fingerprints(migration: Migration, old: Base | None, new: Base | None) -> None:
    """Refuse a migration that was made for other bases than those given.

    Raises:
        Refused: a fingerprint differs; the message says which.
    """
    for which, base, made_for in (("old", old, migration.source), ("new", new, migration.target)):
        if base is not None and made_for is not None and base.fingerprint != made_for.fingerprint:
            raise Refused(
                f"the migration was made for another {which} base: fingerprint {made_for.fingerprint}, not "
                f"{base.fingerprint} of {base.path}",
                file=migration.file,
                remedy="Fit a new one with --save-migration.",
            )


def _encode(migration: Migration) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    # A map shared by many modules, or a transpose beside its map, lies in the same memory: it is stored once.
    stored_at: dict[int, list[str]] = {}

    def store(tensor: Tensor | None) -> str | None:
        if tensor is None:
            return None
        names = stored_at.setdefault(tensor.data_ptr(), [])
        for name in names:
            if torch.equal(tensors[name], tensor):
                return name
            if torch.equal(tensors[name].T, tensor):
                return f"{name}.T"
        name = f"map.{len(tensors)}"
        tensors[name] = tensor.contiguous()
        names.append(name)
        return name

    def encode_map(map_: LinearMap) -> list[Any]:
        return [map_.identity, store(map_.left), store(map_.right)]

    modules: list[dict[str, Any]] = []
    for (component, path), entry in migration.entries.items():
        row: dict[str, Any] = {
            "module": [component, path],
            "target": list(entry.target) if entry.target is not None else None,
            "reason": entry.reason,
            "shape_old": list(entry.shape_old),
            "shape_new": list(entry.shape_new) if entry.shape_new is not None else None,
            "similarity": entry.nearness.similarity,
            "distance": entry.nearness.distance,
            "uncovered": entry.uncovered,
        }
        if entry.transport is not None:
            row["rotates"] = entry.transport.rotates
            row["terms"] = [[encode_map(left), encode_map(right)] for left, right in entry.transport.terms]
        if entry.row_norms is not None and not torch.equal(entry.row_norms[0], entry.row_norms[1]):
            tensors[row.setdefault("row_norms", f"row_norms.{len(modules)}")] = entry.row_norms
        modules.append(row)
    header = {
        "version": VERSION,
        "from": _public(migration.source),
        "to": _public(migration.target),
        "method": migration.method,
        "used": migration.used,
        "reason": migration.reason,
        "options": dict(migration.options),
        "modules": modules,
        "parameters": {component: list(names) for component, names in migration.parameters.items()},
    }
    return tensors, header


def _public(base: BaseSummary | None) -> dict[str, Any] | None:
    # The file may be published: the folder in which a base lay on its maker's disk stays at home.
    return None if base is None else {**base.model_dump(), "path": Path(base.path).name}


def _decode(header: Mapping[str, Any], tensors: Mapping[str, TensorRef], path: Path) -> Migration:
    loaded: dict[str, Tensor] = {}

    def fetch(name: str | None) -> Tensor | None:
        if name is None:
            return None
        if name.endswith(".T"):
            whole_map = fetch(name.removesuffix(".T"))
            assert whole_map is not None
            return whole_map.T
        if name not in loaded:
            loaded[name] = tensors[name].load()
        return loaded[name]

    def decode_map(row: list[Any]) -> LinearMap:
        identity, left, right = row
        return LinearMap(float(identity), fetch(left), fetch(right))

    def decode_transport(row: Mapping[str, Any]) -> Transport:
        terms = tuple((decode_map(left), decode_map(right)) for left, right in row["terms"])
        return Transport(terms, bool(row["rotates"]))

    entries = {}
    for row in header["modules"]:
        shape_new = row["shape_new"]
        entries[ModuleRef(*row["module"])] = Entry(
            target=ModuleRef(*row["target"]) if row["target"] is not None else None,
            transport=decode_transport(row) if row.get("terms") else None,
            reason=str(row["reason"]),
            shape_old=tuple(row["shape_old"]),
            shape_new=tuple(shape_new) if shape_new is not None else None,
            nearness=Nearness(row["similarity"], row["distance"]),
            uncovered=bool(row["uncovered"]),
            row_norms=fetch(row.get("row_norms")),
        )
    source = BaseSummary(**header["from"]) if header["from"] is not None else None
    return Migration(
        source=source,
        target=BaseSummary(**header["to"]),
        method=str(header["method"]),
        used=str(header["used"]),
        reason=str(header["reason"]),
        options=dict(header["options"]),
        entries=entries,
        parameters={str(component): tuple(names) for component, names in header["parameters"].items()},
        file=path,
    )
