"""What is measured: methods with their options, by the names that the tables show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from regraft.errors import UsageError
from regraft.methods import get_method, methods


@dataclass(frozen=True)
class Variant:
    """A method and how it is asked for.

    Attributes:
        name: in tables, and for ``--methods``.
        method: as ``port --method`` takes it.
        options: the method's own.
        rank: of the output: a number, a share of ‖ΔW‖², ``full``, or None for the adapter's own.
        n_inputs: self-made inputs, for methods that run both models; None for the method's own number.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | float | str | None = None
    n_inputs: int | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """All that was asked for, for the record."""
        extra = {"rank": self.rank, "n_inputs": self.n_inputs}
        return {**self.options, **{name: value for name, value in extra.items() if value is not None}}


#: Beside every method as it is by default.
FURTHER = (
    Variant("lora-x half rank", "lora-x", {"subspace_rank": 0.5}),
    Variant("prolora half rank", "prolora", {"subspace_rank": 0.5}),
    *(
        Variant(f"{method} rank={rank}", method, rank=rank)
        for method in ("effect", "stream")
        for rank in (16, 64, "full")
    ),
)

#: Measured always, as a control.
CONTROLS = ("copy",)
#: No method of a port, and a row of the grid all the same; see `regraft.bench.refined`.
REFINE = "refine"
#: Likewise; see `regraft.bench.by_index`.
BY_INDEX = "by-index"
#: Likewise; see `regraft.bench.bridged`.
LOGITS = "logits"


def default_variants() -> list[Variant]:
    """Every method of the port tier as it is, each followed by its further variants."""
    found = []
    for name, method in methods().items():
        if name in CONTROLS or method.tier != "port" or "adapters" in method.needs:
            continue
        found += [Variant(name, name), *(v for v in FURTHER if v.method == name)]
    return found


def parse_variants(given: Iterable[str]) -> list[Variant]:
    """Variants by name, by method alone, or written out: ``effect rank=16 pull=0.5``, ``refine steps=80 start=zero``.

    Raises:
        UsageError: no such method or option, or what stands behind the method is no ``name=value``.
    """
    return list({variant.name: variant for text in given for variant in [_parse(text)]}.values())


def _parse(text: str) -> Variant:
    named = next((variant for variant in FURTHER if variant.name == text), None)
    if named is not None:
        get_method(named.method).check_options(named.options)
        return named
    name, *rest = text.split()
    own = {REFINE: _check_refine, BY_INDEX: _check_nothing, LOGITS: _check_logits}
    check = own.get(name) or get_method(name).check_options
    options: dict[str, Any] = {}
    for part in rest:
        option, equals, value = part.partition("=")
        if not equals:
            known = ", ".join(repr(variant.name) for variant in FURTHER if variant.method == name) or "none"
            raise UsageError(
                f"{part!r} in {text!r} is no name=value", remedy=f"Further variants of {name} by name: {known}."
            )
        options[option.replace("-", "_")] = _value(value)
    if name not in (BY_INDEX, LOGITS):
        rank, n_inputs = options.pop("rank", None), options.pop("n_inputs", None)
    else:
        # Nothing is made that had a rank.
        rank = n_inputs = None
    check(options)
    if isinstance(rank, str) and rank != "full":
        raise UsageError(f"rank={rank} in {text!r} is no rank", remedy="Give a number, a share such as 0.9, or full.")
    return Variant(" ".join([name, *rest]), name, options, rank, n_inputs)


def _check_refine(options: Mapping[str, Any]) -> None:
    from regraft.bench.refined import check_refine

    check_refine(options)


def _check_logits(options: Mapping[str, Any]) -> None:
    from regraft.bench.bridged import check_logits

    check_logits(options)


def _check_nothing(options: Mapping[str, Any]) -> None:
    if options:
        raise UsageError(f"{BY_INDEX} has no option {next(iter(options))}")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
