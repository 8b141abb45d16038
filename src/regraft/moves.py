"""How a change of a whole parameter is carried where a method does more than copy: by its module's maps.

A weight's change goes through its module's transport. A vector (a norm, a bias) belongs to a space of hidden units: it
moves where a rotation brings those units, and stays as it is under a projection, which leaves units where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regraft.adapter import ModuleRef
from regraft.migration import Entry, Migration
from regraft.spaces import named_sides
from regraft.tensors import Shape
from regraft.transport import LinearMap, Transport


@dataclass(frozen=True, eq=False)
class Units:
    """The space on one side of a module, whose map from old units to new ones its transport has.

    Attributes:
        transport: of the module.
        inputs: the space of its inputs; else of its outputs.
    """

    transport: Transport
    inputs: bool = False

    def map(self) -> LinearMap:
        """Old units → new units. It may have to be read, so that who plans many moves keeps none."""
        left, right = self.transport.terms[0]
        return right.T if self.inputs else left


@dataclass(frozen=True, eq=False)
class Move:
    """What takes a change from the old base's coordinates to the new one's.

    Attributes:
        reason: in plain words.
        target: the new base's parameter; None where names and blocks alone tell it.
        transport: of a weight.
        units: of a vector, the space that it lives in.
        gain: the vector multiplies its units (a norm's weight) and is not added to them.
    """

    reason: str
    target: ModuleRef | None = None
    transport: Transport | None = None
    units: Units | None = None
    gain: bool = False

    def shape(self, old: Shape) -> Shape:
        """Shape of the moved change of a parameter of shape ``old``."""
        if self.units is not None:
            return (self.units.map().out_features or old[0],)
        if self.transport is None:
            return old
        left, right = self.transport.terms[0]
        inputs = right.T.out_features
        sizes = {right.out_features, None}
        # A map of all of in · kh · kw tells the product alone: only the kernel's own size can follow.
        same_side = inputs is None or old[1] not in sizes
        return (left.out_features or old[0], old[1] if same_side else inputs or old[1], *old[2:])

    def __call__(self, change: Tensor) -> Tensor:
        """The change on the new base, float32, of `shape`."""
        change = change.float()
        if self.units is not None and self.gain:
            # diag(Q diag(γ) Qᵀ): what the gain is along the new units; a sign that turns leaves it.
            return self.units.map().squared(len(change)) @ change
        if self.units is not None:
            return (self.units.map() @ change[:, None])[:, 0]
        if self.transport is None:
            return change
        return self.transport.dense(change.flatten(1)).reshape(self.shape(tuple(change.shape)))


def move_of(home: ModuleRef, shape: Shape, migration: Migration) -> Move | None:
    """How a change of a parameter is carried; None where it is copied.

    Args:
        home: the parameter's name on the old base.
        shape: its shape there.
        migration: the fitted transports.
    """
    stem, _, last = home.path.rpartition(".")
    entry = migration.entries.get(ModuleRef(home.component, stem))
    if len(shape) > 1:
        known = entry is not None and last == "weight" and entry.transport is not None and entry.target is not None
        if not known or entry is None or entry.transport is None or entry.transport.is_identity:
            return None
        assert entry.target is not None
        target = ModuleRef(entry.target.component, f"{entry.target.path}.weight")
        return Move("its change, by its module's maps", target, entry.transport)
    here = {ref: e for ref, e in migration.entries.items() if ref.component == home.component and e.transport}
    if not any(e.transport is not None and not e.transport.is_identity for e in here.values()):
        return None
    if not any(e.transport is not None and e.transport.rotates for e in here.values()):
        return Move(f"its change, as it is: {migration.used} maps no vectors")
    units = _units(home, shape[0], entry, here) if shape else None
    if units is None:
        return Move("its change, as it is: none of the rotated spaces is known to be its own")
    if units.map().is_identity:
        return None
    return Move("its change, moved along with its hidden units", units=units, gain=last == "weight")


def _units(home: ModuleRef, size: int, own: Entry | None, entries: dict[ModuleRef, Entry]) -> Units | None:
    """The space that a vector lives in: its module's outputs, or the stream that its block reads."""
    if own is not None and own.transport is not None:
        return Units(own.transport) if own.shape_old[0] == size else None
    parts = home.path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    block = ".".join(parts[: numbers[-1] + 1]) + "." if numbers else ""
    near: dict[str, Units] = {}
    far: dict[str, Units] = {}
    for ref, entry in entries.items():
        assert entry.transport is not None
        out, inp = Units(entry.transport), Units(entry.transport, inputs=True)
        sides = named_sides(ref.path)
        for name, length, space in ((sides.out, entry.shape_old[0], out), (sides.inp, entry.shape_old[1], inp)):
            if name is None or length != size or (name == sides.out and sides.out_copies > 1):
                continue
            if block and ref.path.startswith(block) and not name.startswith(block):
                near.setdefault(name, space)
            # A space without a block's number in its name runs through the whole model.
            if not any(part.isdigit() for part in name.split(".")):
                far.setdefault(name, space)
    found = near or far
    return next(iter(found.values())) if len(found) == 1 else None
