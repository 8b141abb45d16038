"""Options of a bridge that several verbs share, and their parsing."""

from __future__ import annotations

from typing import Annotated, get_args

import typer

from regraft.bridge.delta import Course
from regraft.bridge.x_adapter.settings import Joining, Reading
from regraft.cli import _options as o
from regraft.errors import UsageError

CourseText = Annotated[
    str,
    typer.Option(
        "--strength",
        metavar="λ|FROM:TO",
        help="Factor of what the adapter changes; of pictures it may go from one to another over the sampling.",
    ),
]
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


def course(text: str, named: str = "--strength") -> Course:
    """``0.85`` → 0.85; ``1.5:0.5`` → from 1.5 to 0.5.

    Raises:
        UsageError: it is neither.
    """
    try:
        numbers = [o.finite(float(part), named) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise UsageError(f"{named} {text!r} is neither a number nor FROM:TO", remedy="Give 0.85, or 1.5:0.5.")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


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
