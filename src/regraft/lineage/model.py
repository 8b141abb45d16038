"""The lineage as checked objects; `docs/standard.md` has the specification, `schemas/lineage.json` the JSON Schema.

Every object keeps the fields that it does not know: a later minor version's must survive a tool of this one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from regraft.lineage.name_sets import count

#: Written by this regraft. A reader takes every minor version of its own major one.
VERSION = "1.0"
#: Ports that one lineage may tell of.
MOST_PORTS = 256

Version = Annotated[str, Field(pattern=r"^1\.(0|[1-9][0-9]{0,5})$")]
Text = Annotated[str, Field(max_length=4096)]
Word = Annotated[str, Field(min_length=1, max_length=256)]
#: Compared as a string; `regraft.fingerprint` says how each is made.
Fingerprint = Annotated[str, Field(pattern=r"^[!-~]{8,4096}$")]
# It names kinds of stored values, and some names are of two words (``bnb nf4``).
Sketch = Annotated[str, Field(pattern=r"^[ -~]{8,4096}$")]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileHash = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _countable(sets: dict[str, list[str]]) -> dict[str, list[str]]:
    count(pattern for patterns in sets.values() for pattern in patterns)
    return sets


#: Component → patterns, see `regraft.lineage.name_sets`.
NameSets = Annotated[
    dict[Word, Annotated[list[Annotated[str, Field(max_length=65536)]], Field(min_length=1, max_length=65536)]],
    AfterValidator(_countable),
]


class Open(BaseModel):
    """Common ground: strict types, unknown fields kept."""

    model_config = ConfigDict(extra="allow", strict=True)


class BaseId(Open):
    """One version of a base model; `regraft.fingerprint` specifies the fingerprints.

    Attributes:
        fingerprint: the short form, which tells any two bases apart.
        structure: hash of its names and shapes alone.
        sketch: the brief sketch of its values, to be compared with a tolerance.
        components: the ``sample`` hash of each component.
        content: the ``content`` hash of each component, of every stored byte.
        family: as the tool that wrote it calls it.
        name: for people, and for `base_model_name_or_path`: a hub id or a file's name, never a folder of a disk.
    """

    fingerprint: Fingerprint
    structure: Fingerprint | None = None
    sketch: Sketch | None = None
    components: dict[Word, Hash] = Field(default_factory=dict)
    content: dict[Word, Hash] = Field(default_factory=dict)
    family: Word | None = None
    name: Text | None = None


class UpdateGroup(Open):
    """Modules whose updates are of one kind and stored by one convention.

    Attributes:
        kind: ``lora``, ``dora``, ``loha``, ….
        scale: how the factor on ΔW is stored; absent where the kind has none.
        axis: which axis of the weight a DoRA magnitude is per.
        modules: component → patterns of module names.
    """

    kind: Word
    scale: Word | None = None
    axis: Literal["output", "input"] | None = None
    modules: NameSets


class Kept(Open):
    """Modules that were carried, with the share of ‖ΔW‖² that came through."""

    modules: NameSets
    energy: Share | None = None


class Lost(Open):
    """Modules that were not carried, and why; ``share`` is theirs of the whole ‖ΔW‖²."""

    modules: NameSets
    status: Literal["skipped", "refused"]
    reason: Text
    share: Share | None = None


class Fidelity(Open):
    """One measured figure, and how it was measured."""

    measure: Word
    value: Finite | None
    low: Finite | None = None
    high: Finite | None = None
    inputs: Annotated[int, Field(ge=0)] | None = None
    how: Text


class RefinedBy(Open):
    """A distillation that followed a port.

    Attributes:
        objective: what was matched: ``effect``, ``output``, or something between.
        start: the method that it began from, or ``given``.
        steps: of the training, up to the numbers that were kept.
        inputs: how many.
        how: how they were made.
        recovered: share of what was wanted that was there in the end, on inputs that were held out.
    """

    objective: Word
    start: Word = "given"
    steps: int = 0
    inputs: int = 0
    how: Text = ""
    recovered: Finite = 0.0


class Port(Open):
    """One carrying from base to base.

    Attributes:
        source: None where the method did not need the old base.
        target: the new base.
        method: as the tool calls it.
        options: of the method.
        strength: factor on the whole update.
        migrations: SHA-256 of each migration file on the way, in order; empty where it was fitted on the spot.
        via: the bases between, where there was more than one migration.
        kept: what was carried.
        lost: what was not.
        verdict: what the check said beforehand.
        forced: whether a refusal was overridden.
        refined: the distillation that followed it.
        fidelity: what was measured afterwards.
        tool: name and version of the program.
    """

    source: BaseId | None = Field(alias="from")
    target: BaseId = Field(alias="to")
    method: Word
    options: dict[str, Any] = Field(default_factory=dict)
    strength: Finite = 1.0
    migrations: Annotated[list[FileHash], Field(max_length=256)] = Field(default_factory=list)
    via: Annotated[list[BaseId], Field(max_length=256)] = Field(default_factory=list)
    kept: list[Kept] = Field(default_factory=list)
    lost: list[Lost] = Field(default_factory=list)
    verdict: Word | None = None
    forced: bool = False
    refined: RefinedBy | None = None
    fidelity: list[Fidelity] = Field(default_factory=list)
    tool: Text | None = None


class Lineage(Open):
    """Where an adapter belongs and where it came from.

    Attributes:
        version: ``major.minor`` of the specification.
        base: that the adapter belongs to now.
        updates: the adapter's modules, by kind.
        ports: that it has been through, oldest first.
    """

    version: Version
    base: BaseId
    updates: list[UpdateGroup] = Field(default_factory=list)
    ports: Annotated[list[Port], Field(max_length=MOST_PORTS)] = Field(default_factory=list)
