"""Options of a bridge that several verbs share, and their parsing."""

from __future__ import annotations

from typing import Annotated, get_args

import typer

from regraft.bridge.x_adapter.settings import Joining, Reading
from regraft.cli import _options as o

HeldDtype = Annotated[
    str, typer.Option("--dtype", metavar="|".join(o.BASE_DTYPES), help="That both bases are held and run in.")
]
Lead = Annotated[
    float | None,
    typer.Option("--lead", help="--mapper: share of the new base's noise that the old one's states have."),
]
ReadingName = Annotated[
    str,
    typer.Option(
        "--reading",
        metavar="|".join(get_args(Reading)),
        help="--mapper: the old base's picture is read by it without its plug-ins, with them, or while it draws.",
    ),
]
NewPrompt = Annotated[
    str, typer.Option("--new-prompt", metavar="TEXT", help="--mapper: for the new base; by default empty.")
]
NewGuidance = Annotated[
    float, typer.Option("--new-guidance", help="--mapper: of the new base; --guidance is the old one's then.")
]


def joining(
    start: float, lead: float | None, reading: str, new_prompt: str, new_guidance: float, *, named: str = "--start"
) -> Joining:
    """How the new base joins, from what the options say.

    Args:
        start: of ``named``.
        lead: of ``--lead``.
        reading: of ``--reading``.
        new_prompt: of ``--new-prompt``.
        new_guidance: of ``--new-guidance``.
        named: an option.

    Raises:
        UsageError: one is out of range.
    """
    return Joining(
        start=o.above_zero(o.share(start, named), named),
        lead=None if lead is None else o.share(lead, "--lead"),
        reading=o.one_of(reading, "--reading", get_args(Reading)),
        new_prompt=new_prompt,
        new_guidance=o.at_least_zero(new_guidance, "--new-guidance"),
    )
