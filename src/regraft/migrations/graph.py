"""A folder of migrations as a graph: bases are its nodes, migrations its edges; which way leads from one to another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from regraft.errors import InputError, UsageError
from regraft.hub import HubId, hub_id_of
from regraft.lineage.model import BaseId
from regraft.migration import Migration
from regraft.migration_file import KEY, load_migration, read_header
from regraft.migrations.base_id import called
from regraft.migrations.compose import compose_all
from regraft.migrations.model import Header
from regraft.tensor_files import read_safetensors
from regraft.tensors import raw

# A folder of more files, and more ways to look at than these, is no folder of migrations that anybody keeps.
_MOST_FILES, _MOST_WAYS = 10_000, 5_000
# So many are listed when there are several.
_LISTED = 4


@dataclass(frozen=True)
class Edge:
    """One migration file; ``place`` is that of one on the hub, whose ``file`` is but a name."""

    file: Path
    header: Header
    source: BaseId
    target: BaseId
    place: HubId | None = None

    def __str__(self) -> str:
        return f"{called(self.source)} → {called(self.target)} ({self.file.name})"


Way = tuple[Edge, ...]


@dataclass(frozen=True)
class Graph:
    """What a folder holds.

    Attributes:
        folder: that was read.
        edges: sorted by file name; of equal files, one.
        damaged: files that can't be read as migrations, with the error.
        loose: migrations without an old base: they are no part of any way.
        other: names of safetensors files that are no migrations.
    """

    folder: Path
    edges: tuple[Edge, ...]
    damaged: tuple[InputError, ...] = ()
    loose: tuple[Path, ...] = ()
    other: tuple[str, ...] = ()

    def bases(self) -> dict[str, BaseId]:
        """Fingerprint → base, for every node."""
        return {base.fingerprint: base for edge in self.edges for base in (edge.source, edge.target)}

    def leaving(self, fingerprint: str) -> list[Edge]:
        """Migrations that begin at a base and lead to another."""
        return [edge for edge in self.edges if edge.source.fingerprint == fingerprint != edge.target.fingerprint]


def read_graph(folder: str | Path) -> Graph:
    """Every migration of a folder, or of a repository on the hub (``org/name[@revision][:folder]``), by their headers.

    Raises:
        InputError: there is no such folder, or no migration in it.
    """
    hub_id = hub_id_of(folder)
    if hub_id is None:
        return _read_local(Path(folder).expanduser())
    from regraft.hub.repository import read_from_hub

    graph, place = read_from_hub(hub_id, _read_local, whole=False)
    # Without a network, what was downloaded before is read where it lies.
    if place is not None:
        return graph
    edges = tuple(
        replace(edge, place=HubId(hub_id.repo, hub_id.revision, _inside(hub_id, edge))) for edge in graph.edges
    )
    return replace(graph, folder=Path(str(hub_id)), edges=edges)


def _inside(hub_id: HubId, edge: Edge) -> str:
    return f"{hub_id.file}/{edge.file.name}" if hub_id.file else edge.file.name


def _read_local(folder: Path) -> Graph:
    if not folder.is_dir():
        raise InputError("is no folder", file=folder, remedy="--migrations takes a folder of migration files.")
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > _MOST_FILES:
        raise InputError(f"holds {len(files)} files; {_MOST_FILES} are read", file=folder)
    edges: list[Edge] = []
    damaged: list[InputError] = []
    loose: list[Path] = []
    other: list[str] = []
    for file in files:
        try:
            header, _ = read_header(file)
        except InputError as error:
            if error.what == "is no migration":
                other.append(file.name)
            else:
                damaged.append(error)
            continue
        if header.source is None:
            loose.append(file)
        else:
            edges.append(Edge(file, header, header.source, header.target))
    if not edges:
        why = f" ({len(damaged)} damaged files: {damaged[0]})" if damaged else ""
        raise InputError(f"holds no migration{why}", file=folder, remedy="`regraft migration make` writes one.")
    return Graph(folder, tuple(_distinct(edges)), tuple(damaged), tuple(loose), tuple(other))


def _distinct(edges: Sequence[Edge]) -> Iterator[Edge]:
    """The edges without copies of a file under another name."""
    groups: dict[tuple[str, str], list[Edge]] = {}
    for edge in edges:
        groups.setdefault((edge.source.fingerprint, edge.target.fingerprint), []).append(edge)
    for group in groups.values():
        seen: set[str] = set()
        for edge in group:
            digest = content_hash(edge.file) if len(group) > 1 else ""
            if digest not in seen:
                seen.add(digest)
                yield edge


def content_hash(file: Path) -> str:
    """Hash of a migration's header and tensors' bytes: equal for copies of a file, on the hub too."""
    content = read_safetensors(file)
    digest = hashlib.sha256(content.metadata[KEY].encode())
    for name, ref in sorted(content.tensors.items()):
        digest.update(f"{name}\t{ref.dtype}\t{ref.shape}\n".encode())
        digest.update(raw(ref.load()))
    return digest.hexdigest()


@dataclass
class _Search:
    """The shortest ways from one base to another."""

    graph: Graph
    goal: str
    via: Sequence[str]
    looked: int = 0
    reached: dict[str, BaseId] = field(default_factory=dict)

    def shortest(self, start: str) -> list[Way]:
        """All of the least length, without a base twice; empty where there is none."""
        ways: list[tuple[Way, frozenset[str]]] = [((), frozenset([start]))]
        while ways:
            longer = [
                ((*way, edge), been | {edge.target.fingerprint})
                for way, been in ways
                for edge in self.graph.leaving(way[-1].target.fingerprint if way else start)
                if edge.target.fingerprint not in been
            ]
            self.looked += len(longer)
            if self.looked > _MOST_WAYS:
                raise InputError(
                    f"holds more than {_MOST_WAYS} ways between bases",
                    file=self.graph.folder,
                    remedy="Name one: --via.",
                )
            found = [way for way, _ in longer if way[-1].target.fingerprint == self.goal and self._passes(way)]
            if found:
                return found
            if not self.via:
                # Without a wish, only the first arrival at a base can be part of a shortest way.
                longer = [(way, been) for way, been in longer if way[-1].target.fingerprint not in self.reached]
            self.reached.update({way[-1].target.fingerprint: way[-1].target for way, _ in longer})
            ways = longer
        return []

    def _passes(self, way: Way) -> bool:
        return all(any(names(wish, edge) for edge in way) for wish in self.via)


def names(wish: str, edge: Edge) -> bool:
    """Whether a ``--via`` names this migration, or a base at one of its ends."""
    if wish in (edge.file.name, edge.file.stem):
        return True
    return any(wish == base.name or base.fingerprint.startswith(wish) for base in (edge.source, edge.target))


def find_way(graph: Graph, start: BaseId, goal: BaseId, via: Sequence[str] = ()) -> Way:
    """The one shortest way between two bases.

    Args:
        graph: a folder's.
        start: the base that the adapter is for.
        goal: the base that it is to run on.
        via: migrations or bases that the way must pass: file names, names of bases, or beginnings of fingerprints.

    Raises:
        InputError: there is none; says how far it leads.
        UsageError: there are several of one length, or a ``via`` names nothing.
    """
    if start.fingerprint == goal.fingerprint:
        raise InputError(
            f"the adapter is for {called(goal)} already ({goal.fingerprint})", remedy="There is nothing to port."
        )
    for wish in via:
        if not any(names(wish, edge) for edge in graph.edges):
            raise UsageError(f"--via {wish!r} names no migration or base of {graph.folder}")
    search = _Search(graph, goal.fingerprint, via)
    ways = search.shortest(start.fingerprint)
    if len(ways) == 1:
        return ways[0]
    if not ways:
        raise _no_way(graph, start, goal, search, via)
    shown = "; or ".join(told(way) for way in ways[:_LISTED])
    more = f"; and {len(ways) - _LISTED} more" if len(ways) > _LISTED else ""
    raise UsageError(
        f"{len(ways)} ways of {len(ways[0])} steps lead from {called(start)} to {called(goal)}: {shown}{more}",
        file=graph.folder,
        remedy="Choose with --via FILE.",
    )


def told(way: Way) -> str:
    """``v1 → v2 → v3 (a.safetensors, b.safetensors)``."""
    bases = [called(way[0].source), *(called(edge.target) for edge in way)]
    return f"{' → '.join(bases)} ({', '.join(edge.file.name for edge in way)})"


def _no_way(graph: Graph, start: BaseId, goal: BaseId, search: _Search, via: Sequence[str]) -> InputError:
    bases = graph.bases()
    passing = f" by way of {', '.join(via)}" if via else ""
    what = f"no way leads from {called(start)} ({start.fingerprint}) to {called(goal)} ({goal.fingerprint}){passing}"
    if start.fingerprint not in bases or not graph.leaving(start.fingerprint):
        facts = [f"no migration begins at {called(start)}", *_likes(start, graph)]
    elif goal.fingerprint not in {edge.target.fingerprint for edge in graph.edges}:
        facts = [f"no migration ends at {called(goal)}", *_likes(goal, graph)]
    else:
        far = ", ".join(sorted(called(base) for base in search.reached.values()))
        before = ", ".join(sorted({called(e.source) for e in graph.edges if e.target.fingerprint == goal.fingerprint}))
        facts = [f"it breaks off: {called(start)} leads to {far or 'nothing else'}; {called(goal)} follows {before}"]
    if graph.damaged:
        facts.append(f"{len(graph.damaged)} damaged files were left out ({graph.damaged[0]})")
    return InputError(
        f"{what}: {'; '.join(facts)}", file=graph.folder, remedy="`regraft migration show FOLDER` lists what is there."
    )


def _likes(base: BaseId, graph: Graph) -> list[str]:
    """Bases of the folder that have the same architecture: another version, or the same one in another precision."""
    alike = {
        called(other)
        for other in graph.bases().values()
        if base.structure and other.structure == base.structure and other.fingerprint != base.fingerprint
    }
    return (
        [f"of the same architecture, but other weights or another precision: {', '.join(sorted(alike))}"]
        if alike
        else []
    )


def cycles(graph: Graph) -> list[list[BaseId]]:
    """The cycles of the folder, each once, by its bases; a way never follows one round."""
    found: dict[frozenset[str], list[BaseId]] = {}
    bases = graph.bases()
    state: dict[str, int] = {}
    for root in sorted(bases):
        stack: list[tuple[str, Iterator[Edge]]] = []
        if state.get(root) is None:
            state[root] = 1
            stack.append((root, iter(graph.leaving(root))))
        while stack:
            here, edges = stack[-1]
            edge = next(edges, None)
            if edge is None:
                state[here] = 2
                stack.pop()
                continue
            there = edge.target.fingerprint
            if state.get(there) == 1:
                on_the_way = [name for name, _ in stack]
                ring = on_the_way[on_the_way.index(there) :]
                first = min(range(len(ring)), key=lambda i: (called(bases[ring[i]]), ring[i]))
                found.setdefault(frozenset(ring), [bases[name] for name in ring[first:] + ring[:first]])
            elif state.get(there) is None:
                state[there] = 1
                stack.append((there, iter(graph.leaving(there))))
    return list(found.values())


def along(way: Way) -> Migration:
    """The migrations of a way as one; each file is read now.

    Raises:
        InputError: a file is damaged, or has changed since its header was read.
        Refused: two do not meet.
    """
    loaded = []
    for edge in way:
        migration = load_migration(edge.file if edge.place is None else str(edge.place))
        ends = (migration.source.fingerprint if migration.source else None, migration.target.fingerprint)
        if ends != (edge.source.fingerprint, edge.target.fingerprint):
            raise InputError("has changed since it was opened", file=edge.file, remedy="Run it again.")
        loaded.append(migration)
    return compose_all(loaded)
