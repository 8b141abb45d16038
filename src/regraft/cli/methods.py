from __future__ import annotations

import sys
from json import dumps as json_text

from rich.console import Console
from rich.table import Table

from regraft.cli import _options as o
from regraft.cli._sink import out
from regraft.methods import methods as registered
from regraft.report.schema import MethodInfo

NEEDS = {"old": "old base", "new": "new base", "models": "both models run", "adapters": "paired adapters"}


def method_infos() -> list[MethodInfo]:
    """Every registered method as a record."""
    return [
        MethodInfo(
            name=method.name,
            reference=method.reference,
            summary=method.summary,
            needs=list(method.needs),
            scope=method.scope,
            tier=method.tier,
            options=dict(method.options),
        )
        for method in registered().values()
    ]


def methods(json: o.Json = False) -> None:
    """What can carry an adapter, with references and needs."""
    infos = method_infos()
    if json:
        sys.stdout.write(json_text([info.model_dump() for info in infos], indent=2) + "\n")
        return
    _table(infos, out)


def _table(infos: list[MethodInfo], console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_edge=False)
    for title in ("method", "needs", "what it does", "reference"):
        table.add_column(title, overflow="fold")
    for info in infos:
        needs = " + ".join(NEEDS[need] for need in info.needs) or "shapes only"
        table.add_row(info.name, needs, info.summary, info.reference)
    console.print(table)
