"""One port as a lineage tells it, out of the port's own report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.lineage.name_sets import compact
from regraft.migrations.base_id import from_summary
from regraft.report.schema import PortedModule, PortReport

if TYPE_CHECKING:
    from regraft.carry import Settings
    from regraft.migration import Migration


def port_entry(report: PortReport, settings: Settings, migration: Migration, adapter: Adapter) -> dict[str, Any]:
    """The port, without a clock and without folders: the same inputs give the same bytes, and nobody's paths travel.

    Args:
        report: of the port.
        settings: how it came out.
        migration: by which it was carried.
        adapter: as it was before.
    """
    refs = {str(ref): ref for ref in adapter.updates}
    entry = {
        "from": from_summary(migration.source) if migration.source is not None else None,
        "to": from_summary(migration.target),
        "method": report.method,
        "options": report.options,
        "strength": settings.strength,
        "block_strength": [list(pair) for pair in settings.block_strength],
        "rank": settings.rank,
        "migrations": list(migration.hashes),
        "via": [from_summary(base) for base in migration.via],
        "kept": _kept(report.modules, refs),
        "lost": _lost(report.modules, refs),
        "verdict": report.verdict,
        "forced": report.forced,
        "tool": f"regraft {report.regraft_version}",
    }
    return {key: value for key, value in entry.items() if key == "from" or value not in (None, [], {})}


def _kept(rows: Iterable[PortedModule], refs: dict[str, ModuleRef]) -> list[dict[str, Any]]:
    """Carried modules by the share of ‖ΔW‖² that came through, to two digits: few groups, each a few patterns."""
    groups: dict[float | None, list[str]] = {}
    for row in rows:
        if row.status == "ported":
            energy = None if row.energy_kept is None else round(row.energy_kept, 2) + 0.0
            groups.setdefault(energy, []).append(row.name)
    ordered = sorted(groups.items(), key=lambda group: (group[0] is None, -(group[0] or 0.0)))
    return [
        {**({"energy": energy} if energy is not None else {}), "modules": _modules(names, refs)}
        for energy, names in ordered
    ]


def _lost(rows: Iterable[PortedModule], refs: dict[str, ModuleRef]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[PortedModule]] = {}
    for row in rows:
        if row.status != "ported":
            groups.setdefault((row.status, row.reason[:4096]), []).append(row)
    return [
        {
            "status": status,
            "reason": reason,
            "share": round(sum(row.share or 0.0 for row in group), 4),
            "modules": _modules((row.name for row in group), refs),
        }
        for (status, reason), group in sorted(groups.items())
    ]


def _modules(names: Iterable[str], refs: dict[str, ModuleRef]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name in names:
        # A key that the format's reader did not understand belongs to no component.
        ref = refs.get(name, ModuleRef(MODEL, name))
        grouped.setdefault(ref.component, []).append(ref.path)
    return {component: compact(paths) for component, paths in sorted(grouped.items())}
