"""The fitted transports of one (old, new) pair of bases: made once, used by every adapter, kept as one file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.errors import UsageError
from regraft.families import family_of_base
from regraft.migrations.digest import FileDigest
from regraft.nearness import Nearness
from regraft.report.schema import BaseSummary
from regraft.tensors import Shape, n_bytes
from regraft.transport import Transport

if TYPE_CHECKING:
    from regraft.carry import Settings
    from regraft.port import PortResult


@dataclass(frozen=True, eq=False)
class Entry:
    """What a migration knows about one module of the old base.

    Attributes:
        target: the module of the new base; None where it is skipped.
        transport: None where it is skipped.
        reason: why, in plain words.
        shape_old: of the weight in the old base.
        shape_new: of the weight in the new base; None where it is skipped.
        nearness: of the two weights; its adapter fields only where it was fitted for one adapter.
        uncovered: the module changed its shape in a way that the method can't carry: not a planned skip.
        row_norms: (2, out): norms of the old and new weight's rows, which DoRA's magnitude is carried by; only
            between weights of one shape.
        derived: whether similarity and distance are derived from several steps (`regraft.migrations.compose`), not
            measured.
        copies: further modules of the new base that take the update, each with its own transport. A migration file
            holds none.
    """

    target: ModuleRef | None
    transport: Transport | None
    reason: str
    shape_old: Shape
    shape_new: Shape | None = None
    nearness: Nearness = field(default_factory=Nearness)
    uncovered: bool = False
    row_norms: Tensor | None = None
    derived: bool = False
    copies: tuple[Entry, ...] = ()


@dataclass(frozen=True, eq=False)
class Migration:
    """Transports for a pair of bases.

    Attributes:
        source: the old base; None where the method did not need it.
        target: the new base.
        method: as it was asked for.
        used: the method that made the transports (`auto` chooses one).
        reason: why `auto` chose it.
        options: the method's options.
        entries: module of the old base → what becomes of it.
        parameters: component of the old base → names of all its parameters, by which a trained head is known.
        file: where it was read from or written to.
        digest: of that file.
        base_bytes: size of the new base as it is stored, which the file's own size is held against.
        license: under which the file is published, an SPDX identifier.
        composed: hashes of the files that it was composed of, in order.
        via: the bases between them.
        measured: figures of ports through it, as a lineage's ``fidelity`` has them.
        narrowed: its maps are folded onto the adapter that it was fitted for (see `regraft.narrowing`): any other
            comes out wrong, and it can be neither saved nor composed.
    """

    source: BaseSummary | None
    target: BaseSummary
    method: str
    used: str
    reason: str
    options: Mapping[str, Any]
    entries: Mapping[ModuleRef, Entry]
    parameters: Mapping[str, Collection[str]] = field(default_factory=dict)
    file: Path | None = field(default=None)
    digest: FileDigest | None = None
    base_bytes: int | None = None
    license: str | None = None
    composed: tuple[str, ...] = ()
    via: tuple[BaseSummary, ...] = ()
    measured: tuple[Mapping[str, Any], ...] = ()
    narrowed: bool = False

    @property
    def file_hash(self) -> str | None:
        """Of its file, ``sha256:…``.

        Raises:
            InputError: the file can't be read.
        """
        return None if self.digest is None else self.digest.result()

    @property
    def hashes(self) -> tuple[str, ...]:
        """Of the files that it comes from: its own, or those that it was composed of."""
        return self.composed if self.digest is None else (self.digest.result(),)

    @property
    def components(self) -> Mapping[str, Collection[str]]:
        """Component of the old base → its modules that have an entry."""
        grouped: dict[str, list[str]] = {component: [] for component in self.parameters}
        for component, path in self.entries:
            grouped.setdefault(component, []).append(path)
        return grouped

    def modules(self, component: str) -> Iterator[str]:
        """The old base's modules of one component."""
        return iter(self.components.get(component, ()))

    def vectors(self, component: str) -> Iterator[str]:
        """The old base's modules of one component that may be norms: those with a weight that has no entry."""
        known = set(self.modules(component))
        for name in self.parameters.get(component, ()):
            if name.endswith(".weight") and name.removesuffix(".weight") not in known:
                yield name.removesuffix(".weight")

    def port(
        self,
        adapter: Adapter,
        settings: Settings | None = None,
        *,
        old: Base | None = None,
        new: Base | None = None,
    ) -> PortResult:
        """Carry an adapter over; see `regraft.port.apply_migration`."""
        from regraft.carry import Settings
        from regraft.port import apply_migration

        return apply_migration(adapter, self, settings or Settings(), old=old, new=new)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write it as one safetensors file; see `regraft.migration_file`."""
        from regraft.migration_file import save_migration

        return save_migration(self, Path(path), overwrite=overwrite)


def check_general(migration: Migration) -> None:
    """Whether it can be saved and composed: it is of every adapter, and puts each module's update in one place.

    Raises:
        UsageError: it is narrowed, or modules share a target or have several.
    """
    if migration.narrowed:
        what = "this migration is narrowed to the adapter that it was fitted for"
        raise UsageError(what, remedy="Fit it without narrow=True: it is then for every adapter of these modules.")
    # A reader of the format overwrites what lies there.
    taken: set[ModuleRef] = set()
    for module, entry in migration.entries.items():
        if entry.copies or entry.target in taken:
            why = "goes to several modules" if entry.copies else f"shares {entry.target} with another module"
            raise UsageError(
                f"{module} {why} of the new base: a migration can't say that yet",
                remedy="Port each adapter with --from and --to; for removed blocks, --removed drop makes a migration.",
            )
        if entry.target is not None:
            taken.add(entry.target)


def summarise(base: Base, *, exact: bool = False) -> BaseSummary:
    """Path, family and fingerprints of a base; ``exact`` reads all of it, for the hash of every stored byte."""
    prints = base.exact_prints() if exact else base.prints
    return BaseSummary(
        path=str(base.path),
        family=family_of_base(base),
        fingerprint=str(prints),
        structure=base.structure,
        sketch=prints.brief(),
        components={name: part.sample for name, part in prints.components.items()},
        content={name: part.content for name, part in prints.components.items() if part.content is not None},
    )


def size_of(base: Base) -> int:
    """Bytes of a base's tensors as they are stored."""
    return sum(n_bytes(ref) for tensors in base.components.values() for ref in tensors.values())


def parameters_of(base: Base) -> dict[str, tuple[str, ...]]:
    """Component → names of its parameters."""
    return {component: tuple(tensors) for component, tensors in base.components.items()}
