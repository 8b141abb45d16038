"""What the user may say for one adapter: the options of ``port``, in the words of the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from regraft import asked as o
from regraft.adapter import Adapter
from regraft.carry import Settings
from regraft.errors import UsageError
from regraft.formats import get_format
from regraft.methods.task import Running

#: Options that take a whole number or a share.
RANKS = ("rank", "subspace_rank")
#: What a migration is fitted by; of one that was made before, it is decided.
FITTED_BY = ("method", "subspace_rank", "energy", "threshold", "edge", "pull", "ridge", "removed")


class RowOptions(BaseModel):
    """Options of one row; a manifest has a column for each that it sets. ``regraft port --help`` explains them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    migration: str | None = None
    method: str = "auto"
    subspace_rank: str | None = None
    energy: float | None = None
    threshold: str | None = None
    edge: float | None = None
    pull: str | None = None
    ridge: float | None = None
    removed: str | None = None
    n_inputs: int | None = Field(default=None, ge=2)
    seed: int = 0
    weights_only: bool = True
    strength: float = 1.0
    block_strength: str | None = None
    rank: str | None = None
    format: str | None = None
    save_dtype: str | None = None
    include: str | None = None
    exclude: str | None = None
    components: str | None = None
    strip_private: bool = False
    allow_partial: bool = False
    force: bool = False

    def given(self) -> dict[str, Any]:
        """Those that are not the defaults."""
        return self.model_dump(exclude_defaults=True)

    def method_options(self) -> dict[str, Any]:
        """Options of the method, as `fit_migration` takes them.

        Raises:
            UsageError: the method is unknown, or has no such option.
        """
        return o.method_options(
            self.method,
            subspace_rank=o.number_or_share(self.subspace_rank, "--subspace-rank"),
            energy=self.energy,
            threshold=o.number_or_word(self.threshold, "--threshold", "paper"),
            edge=self.edge,
            pull=o.pull(self.pull),
            ridge=self.ridge,
            removed=self.removed,
        )

    def running(self) -> Running:
        """How models are run, by a method that does that."""
        return o.running(self.n_inputs, self.seed, None, None, "cpu", self.weights_only)

    def settings(self, adapter: Adapter | None = None) -> Settings:
        """How an adapter is to come out; ``block_strength`` is read only where the adapter is given.

        Raises:
            UsageError: a value can't be read.
        """
        return Settings(
            selection=o.selection(
                *([text] if text else None for text in (self.include, self.exclude, self.components))
            ),
            strength=o.finite(self.strength, "--strength"),
            block_strength=o.block_strengths(self.block_strength, adapter) if adapter is not None else (),
            rank=o.wanted_rank(self.rank),
            save_dtype=o.dtype(self.save_dtype, "--save-dtype") if self.save_dtype is not None else None,
            allow_partial=self.allow_partial,
            force=self.force,
            private=not self.strip_private,
            running=self.running(),
        )


def parse_options(given: Mapping[str, Any], base: RowOptions = RowOptions()) -> RowOptions:
    """Options with ``given`` laid over ``base``, all of them checked.

    Args:
        given: name → value, of any type that a table may hold; empty cells are passed over.
        base: those that hold where nothing is given. A way of fitting takes the place of a migration, and the other
            way around.

    Raises:
        UsageError: an unknown name, a value that can't be read, or a migration beside a way of fitting one.
    """
    told = {name: text for name, value in given.items() if (text := _text(name, value)) is not None}
    plain = RowOptions().model_dump()
    fitting = [name for name in FITTED_BY if told.get(name, plain[name]) != plain[name]]
    if "migration" in told and fitting:
        what = f"a migration has its method: {', '.join(fitting)} can't change it"
        raise UsageError(what, remedy="Give the migration, or how one is to be fitted.")
    earlier = base.model_dump()
    # A row that says `auto` asks for a fit, too.
    for name in FITTED_BY if "migration" in told else ["migration"] if not told.keys().isdisjoint(FITTED_BY) else []:
        earlier[name] = plain[name]
    try:
        options = RowOptions.model_validate({**earlier, **told})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            known = ", ".join(RowOptions.model_fields)
            raise UsageError(f"column {name!r} is no option", remedy=f"Known: {known}; _… is passed over.") from None
        raise UsageError(f"{name} {told.get(name)!r} can't be read ({first['msg']})") from None
    options.method_options()
    options.settings()
    if options.format is not None:
        get_format(options.format)
    return options


def _text(name: str, value: Any) -> str | None:
    """A table's value as the command line has it; None for an empty cell."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    whole = whole_number(value)
    # A rank of 1.0 is a share: all of it.
    return str(value) if whole is None or (name in RANKS and whole == 1) else str(whole)


def whole_number(value: Any) -> int | None:
    """What a table holds as 8.0: most tools make floats of a column of whole numbers with gaps."""
    found = re.fullmatch(r"(\d+)\.0+", str(value))
    return int(found[1]) if found else None
