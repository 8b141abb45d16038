"""Written, once it is known that it reads back as what was meant: no writer can forget a part in silence."""

from __future__ import annotations

import json
from collections import Counter
from math import isclose, prod
from pathlib import Path

import torch

from regraft.adapter import Adapter
from regraft.errors import OutputError
from regraft.formats import AdapterFile, Format, Written, formats, get_format, rendered
from regraft.ops._common import aligned_names, for_target
from regraft.output import ADAPTER_CONFIG, write_whole
from regraft.tensors import InMemory, TensorRef
from regraft.updates import ByShape, Update, with_shapes


def write_checked(
    adapter: Adapter, target: Path, format: str, *, overwrite: bool
) -> tuple[list[Path], tuple[str, ...]]:
    """Write an adapter: the files, and the writer's notes. It was read back and compared before it lies on disk.

    Raises:
        OutputError: the format can't hold it, a part would be missing or another, or the target can't be written.
        UsageError: the format is only read.
    """
    ready = for_target(adapter, target, format)
    written = rendered(ready, format)
    check_back(ready, written, get_format(format), target)
    return write_whole(written, target, overwrite=overwrite, source=adapter.path), written.notes


def check_back(adapter: Adapter, written: Written, format: Format, target: Path) -> None:
    """Read what is about to be written, and compare it with what was meant.

    Raises:
        OutputError: a part of it is missing or another.
    """
    config = written.files.get(ADAPTER_CONFIG)
    file = AdapterFile(
        target,
        {
            key: InMemory(tensor)
            for tensors in (written.tensors, *written.beside.values())
            for key, tensor in tensors.items()
        },
        written.metadata,
        json.loads(config) if isinstance(config, str) else None,
    )
    names = {component: tuple(updates) for component, updates in adapter.components().items()}
    reader = next((known for known in formats().values() if known.detect(file)), None)
    if reader is None:
        raise OutputError(
            f"nothing in a {format.name} file of this adapter would tell what it is",
            file=adapter.path,
            key=next(iter(written.tensors)),
            remedy="Choose another format.",
        )
    back = reader.read(file, names)
    # Some layouts name a token by the file and its encoder by the width alone: the vectors are what must be there.
    found = Counter(_shape(vectors) for vectors in back.tokens.values())
    for token, vectors in adapter.tokens.items():
        if not found[_shape(vectors)]:
            raise _fault("is missing", format, target, str(token))
        found[_shape(vectors)] -= 1
    ours, theirs = ({name: ref for ref, name in named.items()} for named in aligned_names((adapter, back)))
    # What a file of the kind does not tell, the adapter knew from its base.
    told = {
        theirs[n]: u.weight_shape
        for n, r in ours.items()
        if n in theirs and isinstance(u := adapter.updates[r], ByShape)
    }
    got = with_shapes(back.updates, {ref: shape for ref, shape in told.items() if shape is not None})
    for name, ref in ours.items():
        if name not in theirs or not _alike(adapter.updates[ref], got[theirs[name]]):
            what = "is missing" if name not in theirs else "is another change"
            raise _fault(what, format, target, str(ref))


def _shape(vectors: TensorRef) -> tuple[int, int]:
    return prod(vectors.shape[:-1]), vectors.shape[-1]


def _fault(what: str, format: Format, target: Path, key: str) -> OutputError:
    return OutputError(
        f"{what} when the {format.name} file is read back: nothing was written",
        file=target,
        key=key,
        remedy="This is a fault of regraft's: please report it, with `regraft inspect --json` of the input.",
    )


def _alike(meant: Update, got: Update) -> bool:
    """Whether two updates are one change, by what can be told without a base."""
    if (meant.magnitude is None) != (got.magnitude is None):
        return False
    coarse = max(torch.finfo(ref.dtype).eps for ref in meant.parts().values() if ref.dtype.is_floating_point)
    tolerance = max(1e-5, 16 * coarse)
    if meant.magnitude is not None and got.magnitude is not None:
        sizes = [float(ref.load().float().norm()) for ref in (meant.magnitude, got.magnitude)]
        if not isclose(*sizes, rel_tol=tolerance):
            return False
    try:
        return isclose(meant.norm(), got.norm(), rel_tol=tolerance, abs_tol=1e-30)
    except ValueError:
        # It depends on the base's weight: the same tensors are the same change.
        ours, theirs = _sizes(meant), _sizes(got)
        if meant.kind != got.kind or ours.keys() != theirs.keys():
            return False
        return all(isclose(size, theirs[role], rel_tol=tolerance) for role, size in ours.items())


def _sizes(update: Update) -> dict[str, float]:
    """Role → norm of the tensor, without what a format may state or leave out: alpha, and the print of the base."""
    parts = {role: ref for role, ref in update.parts().items() if role not in ("alpha", "stamp")}
    return {role: float(ref.load().float().norm()) for role, ref in parts.items()}
