"""`refine` as a row of the grid: its settings written out, its start by any method, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from regraft.adapter import Adapter
from regraft.bench.cells import Cell
from regraft.bench.cost import Cost
from regraft.bench.variants import Variant
from regraft.errors import UsageError
from regraft.methods import get_method
from regraft.refine import RefineResult, RefineSettings, refine
from regraft.refine.bridged import check_teacher
from regraft.refine.starting import ZERO

if TYPE_CHECKING:
    from regraft.bench.group import Group

# Of the settings, what a variant may not ask for: the grid gives it, or it changes no figure.
_OWN = ("seed", "prompts", "config", "device", "low_memory", "checkpointing")


def check_refine(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked of a refine, as its settings hold it: a path of a text, a tuple of a list.

    Args:
        options: settings by name, and ``start``: ``zero`` or a method.

    Raises:
        UsageError: there is no such setting or method, it takes no such value, or one is of another teacher.
    """
    found = dict(options)
    hints = {name: hint for name, hint in get_type_hints(RefineSettings).items() if name not in _OWN}
    for name, value in options.items():
        if name == "start":
            if value != ZERO:
                get_method(value)
            continue
        if name not in hints:
            raise UsageError(f"refine has no option {name}", remedy=f"Known: start, {', '.join(hints)}.")
        try:
            found[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            choices = ", ".join(map(str, get_args(hints[name])))
            raise UsageError(
                f"refine takes no {name}={value}", remedy=f"It takes {choices}." * bool(choices)
            ) from error
    check_teacher(replace(RefineSettings(), **{name: value for name, value in found.items() if name != "start"}))
    return found


def refined(group: Group, variant: Variant) -> tuple[Cell, Adapter]:
    """A cell without scores yet, and the refined adapter.

    Args:
        group: the adapter and both bases.
        variant: settings of the refine, and how it is to start.
    """
    asked = check_refine(variant.options)
    how = asked.pop("start", None)
    rank = variant.rank if isinstance(variant.rank, int) else None
    known = {field.name for field in fields(RefineSettings)} & group.inputs.keys()
    given = {name: group.inputs[name] for name in known if name in ("prompts", "config")}
    if "prompts" in given:
        given["prompts"] = tuple(given["prompts"])
    settings = replace(RefineSettings(), rank=rank, n_inputs=variant.n_inputs, seed=group.seed, **given, **asked)
    with Cost() as cost:
        start = how if how is None or how == ZERO else group.ported(Variant(how, how)).adapter
        result = refine(group.adapter, group.old, group.new, start=start, settings=settings)
    cell = Cell(
        row=variant.name,
        seconds=round(cost.seconds, 2),
        peak_mb=cost.added_mb,
        used=f"{how or result.report.start}, {result.report.objective}",
        figures={name: float(f"{value:.5g}") for name, value in _figures(group, result, cost.seconds).items()},
    )
    return cell, result.adapter


def _figures(group: Group, result: RefineResult, seconds: float) -> dict[str, float]:
    report = result.report
    found = {
        "steps": float(report.steps),
        "steps_made": float(report.looks[-1].step),
        "inputs": float(report.n_inputs),
        "trained": float(report.trained),
        "of_what_is_wanted": report.recovered,
        "start_had": report.looks[0].recovered,
        "seconds_training": report.looks[-1].seconds,
    }
    spent = getattr(group.world, "trained_in", None)
    native: float | None = spent(group.spec.name, group.name, group.seed) if spent is not None else None
    return found | ({"of_native_seconds": seconds / native} if native else {})
