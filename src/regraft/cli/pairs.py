from __future__ import annotations

import sys
from json import dumps as json_text

from rich.console import Console
from rich.table import Table

from regraft.cli import _options as o
from regraft.cli._sink import out
from regraft.pairs import pairs as known_pairs
from regraft.report.pairs_schema import PairInfo


def pair_infos() -> list[PairInfo]:
    """Every known pair as a record."""
    return [
        PairInfo.model_validate(
            {
                "name": pair.name,
                "title": pair.title,
                "from": pair.old,
                "to": pair.new,
                "tier": pair.tier,
                "changes": list(pair.changes),
                "widened": dict(pair.widened),
                "components": {old: list(new) for old, new in pair.components.items()},
                "examples": list(pair.examples),
            }
        )
        for pair in known_pairs()
    ]


def pairs(json: o.Json = False) -> None:
    """Known upgrades of bases: what changes, and which tier usually applies."""
    infos = pair_infos()
    if json:
        sys.stdout.write(json_text([info.model_dump(by_alias=True) for info in infos], indent=2) + "\n")
        return
    _table(infos, out)


def _table(infos: list[PairInfo], console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_edge=False)
    for title in ("pair", "tier", "what changes"):
        table.add_column(title, overflow="fold")
    for info in infos:
        table.add_row(info.title, info.tier, " ".join(info.changes))
    console.print(table)
