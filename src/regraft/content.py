"""Whether two adapters change a base alike, by their content: names and formats aside."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from regraft.adapter import Adapter


def content_of(adapter: Adapter) -> str:
    """Digest of an adapter's updates, their scales and tensors; of nothing else about it."""
    found = hashlib.sha256()
    for ref, update in sorted(adapter.updates.items()):
        found.update(f"{ref.component}.{ref.path}".encode())
        for part in _parts(update):
            found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    yield type(value).__name__.encode()
    if hasattr(value, "load"):
        tensor = value.load()
        yield f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        yield tensor.detach().cpu().float().contiguous().numpy().tobytes()
    elif is_dataclass(value):
        for field in fields(value):
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _parts(one)
    else:
        yield repr(value).encode()
