"""The header of a migration file as checked objects; `docs/standard.md` has the specification.

Every object keeps the fields that it does not know, as a lineage does.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from regraft.lineage.model import BaseId, FileHash, Finite, Modules, Open, Share, Text, Version, Word

#: Of the specification that this regraft writes.
VERSION = "1.0"

_Name = Annotated[str, Field(min_length=1, max_length=1024)]
Module = Annotated[list[_Name], Field(min_length=2, max_length=2)]
Size = Annotated[int, Field(ge=1, le=1 << 40)]
Shape = Annotated[list[Size], Field(min_length=2, max_length=8)]
#: The most terms of one transport: each adds the adapter's rank to what is carried.
MOST_TERMS = 64
#: A tensor of the file, or its transpose with ``.T`` behind.
TensorName = Annotated[str, Field(pattern=r"^[a-z][a-z_]{0,31}\.[0-9]{1,9}(\.T)?$")]
MapIndex = Annotated[int, Field(ge=0, lt=1 << 24)]
Kind = Literal["identity", "diagonal", "factored", "skipped"]


class Map(Open):
    """x ↦ identity · x + diagonal ⊙ x + left (right x)."""

    identity: Finite = 0.0
    diagonal: TensorName | None = None
    left: TensorName | None = None
    right: TensorName | None = None

    @model_validator(mode="after")
    def _has_left(self) -> Map:
        if self.right is not None and self.left is None:
            raise ValueError("a map with a right factor has a left one")
        return self


class Row(Open):
    """One module of the old base.

    Attributes:
        module: component and path in the old base.
        target: in the new base; absent where it is skipped.
        transport: kind.
        shape: of the old weight.
        target_shape: of the new weight; absent where it is skipped.
        terms: pairs of indices into ``maps``, for ``diagonal`` and ``factored``.
        rotates: whether what belongs to an output unit (a bias, a DoRA magnitude) moves along.
        row_norms: tensor (2, out) with the norms of the old and the new weight's rows.
        reason: why, in plain words.
        planned: for ``skipped``: whether a port succeeds without this module.
        similarity: of the two weights, corrected for chance.
        distance: relative drift.
        derived: whether both come from those of several steps, not from weights.
    """

    module: Module
    target: Module | None = None
    transport: Kind
    shape: Shape
    target_shape: Shape | None = None
    terms: (
        Annotated[
            list[Annotated[list[MapIndex], Field(min_length=2, max_length=2)]],
            Field(min_length=1, max_length=MOST_TERMS),
        ]
        | None
    ) = None
    rotates: bool = False
    row_norms: TensorName | None = None
    reason: Text = ""
    planned: bool = True
    similarity: Finite | None = None
    distance: Share | None = None
    derived: bool = False

    @model_validator(mode="after")
    def _whole(self) -> Row:
        if (self.transport == "skipped") != (self.target is None) or (self.target is None) != (
            self.target_shape is None
        ):
            raise ValueError("a module has a target and its shape, or is skipped")
        if (self.terms is not None) != (self.transport in ("diagonal", "factored")):
            raise ValueError("terms belong to the transports diagonal and factored, and to those alone")
        return self


class Outlook(Open):
    """What is known of the pair before any adapter is seen.

    Attributes:
        similarity: mean over the carried modules, weighted by their weights' sizes.
        distance: likewise.
        carried: modules with a transport.
        skipped: modules without one.
        measured: recoveries that were measured with adapters.
    """

    similarity: Finite | None = None
    distance: Share | None = None
    carried: Annotated[int, Field(ge=0)] = 0
    skipped: Annotated[int, Field(ge=0)] = 0
    measured: list[dict[str, Any]] = Field(default_factory=list)


class Header(Open):
    """The JSON in the file's header.

    Attributes:
        version: ``major.minor`` of the specification.
        source: the old base; None for transports that were made from the new base alone.
        target: the new base.
        method: as it was asked for.
        used: the method that made the transports.
        reason: why it was chosen.
        options: of the method.
        maps: that the terms refer to.
        modules: one row per module of the old base.
        parameters: component → patterns of the names of all its parameters.
        base_bytes: size of the new base as it was stored.
        outlook: the forecast.
        composed: SHA-256 of the files that this one was composed of, in order.
        via: the bases between them.
        license: an SPDX identifier.
        tool: name and version of the program.
    """

    version: Version
    source: BaseId | None = Field(alias="from")
    target: BaseId = Field(alias="to")
    method: Word
    used: Word
    reason: Text = ""
    options: dict[str, Any] = Field(default_factory=dict)
    maps: Annotated[list[Map], Field(max_length=1 << 20)] = Field(default_factory=list)
    modules: Annotated[list[Row], Field(max_length=1 << 20)]
    parameters: Modules = Field(default_factory=dict)
    base_bytes: Annotated[int, Field(ge=0)] | None = None
    outlook: Outlook | None = Field(default=None, alias="forecast")
    composed: Annotated[list[FileHash], Field(max_length=256)] = Field(default_factory=list)
    via: Annotated[list[BaseId], Field(max_length=256)] = Field(default_factory=list)
    license: Annotated[str, Field(max_length=256)] | None = None
    tool: Text | None = None

    @model_validator(mode="after")
    def _once(self) -> Header:
        seen: set[tuple[str, ...]] = set()
        for row in self.modules:
            if tuple(row.module) in seen:
                raise ValueError(f"module {row.module[1][:120]} comes twice")
            seen.add(tuple(row.module))
            for term in row.terms or ():
                if max(term) >= len(self.maps):
                    raise ValueError(f"module {row.module[1][:120]} names a map that is not there")
        return self
