"""``regraft inspect``: what an adapter file is."""

from __future__ import annotations

from regraft.cli import _options as o
from regraft.cli._sink import emit
from regraft.inspection import inspect_adapter
from regraft.report.inspect_table import print_inspection


def inspect(adapter: o.AdapterArgument, json: o.Json = False, quiet: o.Quiet = False) -> None:
    """Say what an adapter file is: format, model family, components, ranks."""
    report = inspect_adapter(adapter)
    emit(report, json=json, quiet=quiet, table=lambda console: print_inspection(report, console))
