"""``regraft doctor``: what is installed, what device there is, what is missing for which verb."""

from __future__ import annotations

from regraft.cli import _options as o
from regraft.cli._sink import emit
from regraft.doctor import doctor as look
from regraft.report.doctor_table import doctor_table


def doctor(json: o.Json = False, quiet: o.Quiet = False) -> None:
    """Tell what is installed, which devices there are, and what a verb lacks. Nothing is changed."""
    record = look()
    emit(record, json=json, quiet=quiet, table=lambda console: doctor_table(record, console))
