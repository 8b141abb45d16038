"""A migration as one safetensors file: each distinct map once, everything else as JSON in the header.

The file's format is specified in docs/standard.md; the header's checks are in `regraft.migrations.model`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from regraft._version import __version__
from regraft.adapter import ModuleRef
from regraft.base import Base
from regraft.errors import InputError, Refused, reading
from regraft.hub import hub_id_of
from regraft.lineage import check_major, dumped, told
from regraft.lineage.model import BaseId
from regraft.lineage.name_sets import compact, expand
from regraft.lineage.strict_json import parse_object
from regraft.migration import Entry, Migration, check_general
from regraft.migrations.base_id import base_id, from_summary, to_summary
from regraft.migrations.digest import FileDigest
from regraft.migrations.maps import FileMaps, FromFile
from regraft.migrations.model import VERSION, Header, Map, Row
from regraft.migrations.recognise import recognise
from regraft.nearness import Nearness
from regraft.output import check_writable, readable, whole
from regraft.safetensors_stream import write_stream
from regraft.tensor_files import read_safetensors
from regraft.tensors import Shape, TensorRef, raw
from regraft.transport import LinearMap, Transport
from regraft.waiting import Place, WaitingTensors

KEY = "regraft_migration"
#: Bytes of the longest header text that is read; 100,000 modules take a third of it.
MOST_BYTES = 64 << 20
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_migration(migration: Migration, path: Path, *, overwrite: bool = False) -> Path:
    """Write it whole or not at all; the same migration gives the same bytes.

    Raises:
        OutputError: ``path`` exists or can't be written.
        UsageError: modules share a target, or have several, which the format can't say; or it is narrowed.
        InputError: one that was read lazily lies in a file that has changed.
    """
    check_general(migration)
    check_writable(path, overwrite=overwrite)
    with whole(path) as stage:
        with tempfile.TemporaryFile(dir=stage.parent, buffering=0) as maps, stage.open("wb") as stream:
            encoder = _Encoder(WaitingTensors(cast("BinaryIO", maps)))
            header = encoder.encode(migration)
            if not encoder.tensors:
                # An identity costs nothing, but safetensors wants a tensor: an empty one marks the file.
                encoder.add("empty.0", torch.zeros(0))
            kinds = {name: (placed.dtype, placed.shape) for name, placed in encoder.tensors.items()}
            write_stream(stream, kinds, encoder.tensor, {KEY: dumped(header)})
        readable(stage)
    return path


def read_header(path: Path) -> tuple[Header, Mapping[str, TensorRef]]:
    """The checked header of a migration file and its tensors by reference; no map is read.

    Raises:
        InputError: it is no migration, damaged, or of another major version.
    """
    content = read_safetensors(path)
    if KEY not in content.metadata:
        raise InputError("is no migration", file=path, remedy="`regraft migration make` writes one.")
    remedy = "Get it again, or make it anew with `regraft migration make`."
    try:
        found = parse_object(content.metadata[KEY], most=MOST_BYTES)
        if found.get("version") == 0 and not isinstance(found["version"], bool):
            raise InputError("is a migration of version 0, which is no longer read", file=path, remedy="Fit it again.")
        check_major(found, file=path, key=KEY)
        header = Header.model_validate(found)
        for row in header.modules:
            _check_row(row, header.maps, content.tensors)
    except ValidationError as error:
        raise InputError(f"is a damaged migration ({told(error)})", file=path, key=KEY, remedy=remedy) from None
    except ValueError as error:
        raise InputError(f"is a damaged migration ({error})", file=path, key=KEY, remedy=remedy) from None
    return header, content.tensors


def load_migration(path: str | Path) -> Migration:
    """Read a migration. One on the hub is downloaded (``org/name:file``).

    Names and sizes are checked here, by the header. A map is read when its module's transport is used, and not kept
    (see `regraft.migrations.maps`): the file has to stay as it is meanwhile, and what a map holds is checked then.

    Raises:
        InputError: it is no migration, damaged, or of another major version.
    """
    hub_id = hub_id_of(path)
    if hub_id is None:
        return _load_local(Path(path).expanduser())
    from regraft.hub.repository import read_from_hub

    return read_from_hub(hub_id, _load_local, whole=True)[0]


def _load_local(path: Path) -> Migration:
    header, tensors = read_header(path)
    with reading(path, KEY):
        return _Decoder(path, header, tensors).decode()


def check_fingerprints(migration: Migration, old: Base | None, new: Base | None) -> None:
    """Refuse a migration that was made for other bases than those given; another precision is the same base.

    Raises:
        Refused: a fingerprint differs; the message says which.
    """
    for which, base, made_for in (("old", old, migration.source), ("new", new, migration.target)):
        if base is None or made_for is None or base.fingerprint == made_for.fingerprint:
            continue
        wanted, given = BaseId.model_validate(from_summary(made_for)), BaseId.model_validate(base_id(base))
        modules = migration.entries if which == "old" else [e.target for e in migration.entries.values() if e.target]
        if recognise(given, {wanted.fingerprint: wanted}, {module.component for module in modules}).base is given:
            raise Refused(
                f"the migration was made for another {which} base: fingerprint {made_for.fingerprint}, not "
                f"{base.fingerprint} of {base.path}",
                file=migration.file,
                remedy="Fit a new one with --save-migration.",
            )


def _check_row(row: Row, maps: list[Map], tensors: Mapping[str, TensorRef]) -> None:
    """Whether the transport leads from the old shape to the new one, by the header alone.

    Raises:
        ValueError: it does not.
    """
    name = row.module[1][:120]
    if row.target_shape is None:
        return
    (out, inp), (new_out, new_inp) = _matrix(tuple(row.shape)), _matrix(tuple(row.target_shape))
    if row.transport == "identity" and (out, inp) != (new_out, new_inp):
        raise ValueError(f"{name}: an identity between {row.shape} and {row.target_shape}")
    for left, right in row.terms or ():
        for index, rows, columns in ((left, new_out, out), (right, inp, new_inp)):
            map_ = maps[index]
            if row.transport == "diagonal" and map_.left is not None:
                raise ValueError(f"{name}: a diagonal transport with a factored map")
            if not _leads(map_, rows, columns, tensors):
                raise ValueError(f"{name}: map {index} does not lead from {columns} to {rows}")
    if row.row_norms is not None and (out != new_out or _shape(row.row_norms, tensors) != (2, out)):
        raise ValueError(f"{name}: row norms that do not fit the module's shape")


def _matrix(shape: Shape) -> tuple[int, int]:
    return shape[0], prod(shape[1:])


def _leads(map_: Map, rows: int, columns: int, tensors: Mapping[str, TensorRef]) -> bool:
    """Whether the map is a (rows, columns) matrix."""
    if (map_.identity != 0 or map_.diagonal is not None) and rows != columns:
        return False
    if map_.diagonal is not None and _shape(map_.diagonal, tensors) != (rows,):
        return False
    if map_.left is None:
        return rows == columns
    left = _shape(map_.left, tensors)
    if map_.right is None:
        return left == (rows, columns)
    right = _shape(map_.right, tensors)
    return len(left) == len(right) == 2 and left[1] == right[0] and (left[0], right[1]) == (rows, columns)


def _shape(name: str, tensors: Mapping[str, TensorRef]) -> Shape:
    ref = tensors.get(name.removesuffix(".T"))
    if ref is None:
        raise ValueError(f"tensor {name} is not in the file")
    if ref.dtype not in _DTYPES:
        raise ValueError(f"tensor {name} is no float of 16, 32 or 64 bits")
    if name.endswith(".T") and len(ref.shape) != 2:
        raise ValueError(f"tensor {name} is the transpose of no matrix")
    return tuple(reversed(ref.shape)) if name.endswith(".T") else ref.shape


class _Encoder:
    """Header and tensors of one migration; equal tensors and equal maps get one name each.

    The tensors wait on the disk until all are known, for a file begins with their names and sizes.
    """

    def __init__(self, waiting: WaitingTensors) -> None:
        self._waiting = waiting
        self.tensors: dict[str, Place] = {}
        self.maps: list[dict[str, Any]] = []
        self._names: dict[tuple[object, ...], str] = {}
        self._indices: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Put a tensor behind the others."""
        self.tensors[name] = self._waiting.add(tensor)

    def tensor(self, name: str) -> Tensor:
        """One of them, read back."""
        return self._waiting.read(self.tensors[name])

    def encode(self, migration: Migration) -> dict[str, Any]:
        """The header."""
        rows = [self._row(module, entry) for module, entry in migration.entries.items()]
        header = {
            "version": VERSION,
            "from": None if migration.source is None else from_summary(migration.source),
            "to": from_summary(migration.target),
            "method": migration.method,
            "used": migration.used,
            "reason": migration.reason,
            "options": dict(migration.options),
            "maps": self.maps,
            "modules": rows,
            "parameters": {component: compact(names) for component, names in migration.parameters.items() if names},
            "forecast": outlook(migration),
            "base_bytes": migration.base_bytes,
            "license": migration.license,
            "composed": list(migration.composed),
            "via": [from_summary(base) for base in migration.via],
            "tool": f"regraft {__version__}",
        }
        return {key: value for key, value in header.items() if value not in (None, [], "") or key == "from"}

    def _row(self, module: ModuleRef, entry: Entry) -> dict[str, Any]:
        near, transport = entry.nearness, entry.transport
        transport = None if transport is None else transport.held()
        row: dict[str, Any] = {
            "module": list(module),
            "shape": list(entry.shape_old),
            "transport": kind_of(transport),
            "reason": entry.reason,
        }
        if near.similarity is not None:
            row["similarity"] = near.similarity
        # A drift from zero has no ratio.
        if near.distance is not None and near.distance != float("inf"):
            row["distance"] = near.distance
        if entry.derived:
            row["derived"] = True
        if transport is None or entry.target is None:
            return {**row, "planned": not entry.uncovered}
        row |= {"target": list(entry.target), "target_shape": list(entry.shape_new or entry.shape_old)}
        if not transport.is_identity:
            row["terms"] = [[self._map(left), self._map(right)] for left, right in transport.terms]
        if transport.rotates:
            row["rotates"] = True
        norms = entry.row_norms
        if norms is not None and not torch.equal(norms[0], norms[1]):
            row["row_norms"] = self._store(norms, "row_norms")
        return row

    def _map(self, map_: LinearMap) -> int:
        found: dict[str, Any] = {"identity": map_.identity} if map_.identity != 0.0 else {}
        for name, tensor in (("left", map_.left), ("right", map_.right), ("diagonal", map_.diagonal)):
            if tensor is not None:
                found[name] = self._store(tensor, "map")
        key = dumped(found)
        if key not in self._indices:
            self._indices[key] = len(self.maps)
            self.maps.append(found)
        return self._indices[key]

    def _store(self, tensor: Tensor, stem: str) -> str:
        """The name of the tensor's one copy in the file, or of that which it is the transpose of.

        In half precision where that loses nothing: a permutation, or values that were rounded before.
        """
        half = tensor.to(torch.float16)
        stored = (half if torch.equal(half.to(tensor.dtype), tensor) else tensor).contiguous()
        name = self._names.get(_content(stored))
        if name is not None:
            return name
        if stored.dim() == 2 and (name := self._names.get(_content(stored.T.contiguous()))) is not None:
            return f"{name}.T"
        name = f"{stem}.{len(self.tensors)}"
        self.add(name, stored)
        self._names[_content(stored)] = name
        return name


def _content(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tuple(tensor.shape), hashlib.sha256(raw(tensor)).digest()


def kind_of(transport: Transport | None) -> str:
    """``identity``, ``diagonal``, ``factored`` or ``skipped``."""
    if transport is None:
        return "skipped"
    if transport.is_identity:
        return "identity"
    return "diagonal" if all(map_.left is None for term in transport.terms for map_ in term) else "factored"


def outlook(migration: Migration) -> dict[str, Any]:
    """What the header forecasts: similarity and drift over the carried modules, weighted by their sizes."""
    carried = [entry for entry in migration.entries.values() if entry.transport is not None]

    def mean(values: Iterator[tuple[float | None, Entry]]) -> float | None:
        known = [(v, prod(entry.shape_old)) for v, entry in values if v is not None and v != float("inf")]
        total = sum(size for _, size in known)
        return sum(value * size for value, size in known) / total if total else None

    found = {
        "similarity": mean((entry.nearness.similarity, entry) for entry in carried),
        "distance": mean((entry.nearness.distance, entry) for entry in carried),
        "carried": len(carried),
        "skipped": len(migration.entries) - len(carried),
        "measured": [dict(figure) for figure in migration.measured],
    }
    return {key: value for key, value in found.items() if value not in (None, [])}


class _Decoder:
    """A migration out of a checked header, its maps left in the file."""

    def __init__(self, path: Path, header: Header, tensors: Mapping[str, TensorRef]) -> None:
        self.path, self.header = path, header
        self.maps = FileMaps(path, header.maps, tensors, [row.terms or () for row in header.modules])

    def decode(self) -> Migration:
        header = self.header
        return Migration(
            source=None if header.source is None else to_summary(header.source),
            target=to_summary(header.target),
            method=header.method,
            used=header.used,
            reason=header.reason,
            options=dict(header.options),
            entries={ModuleRef(*row.module): self._entry(row) for row in header.modules},
            parameters={component: tuple(expand(names)) for component, names in header.parameters.items()},
            file=self.path,
            digest=FileDigest(self.path),
            base_bytes=header.base_bytes,
            license=header.license,
            composed=tuple(header.composed),
            via=tuple(to_summary(base) for base in header.via),
            measured=tuple(
                figure.model_dump(exclude_unset=True) for figure in (header.outlook.measured if header.outlook else ())
            ),
        )

    def _entry(self, row: Row) -> Entry:
        norms = None if row.row_norms is None else self.maps.tensor(row.row_norms)
        return Entry(
            target=ModuleRef(*row.target) if row.target is not None else None,
            transport=self._transport(row),
            reason=row.reason,
            shape_old=tuple(row.shape),
            shape_new=tuple(row.target_shape) if row.target_shape is not None else None,
            nearness=Nearness(row.similarity, row.distance),
            uncovered=row.transport == "skipped" and not row.planned,
            row_norms=None if norms is None else norms.float(),
            derived=row.derived,
        )

    def _transport(self, row: Row) -> Transport | None:
        if row.transport == "skipped":
            return None
        if row.terms is None:
            return Transport(rotates=row.rotates)
        if not any(self.maps.has_tensors(index) for term in row.terms for index in term):
            return Transport(self.maps.terms(row.terms), row.rotates)
        return FromFile(self.maps, row.terms, row.rotates)
