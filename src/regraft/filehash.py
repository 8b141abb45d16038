"""The hashes by which tools of the field know a checkpoint file.

Facts (sd-scripts ``train_util.model_hash`` and ``calculate_sha256``; the web interface's ``sd_models.model_hash`` and
``hashes.addnet_hash_safetensors``): the *legacy* hash (Civitai's AutoV1) is the first 8 hexadecimal digits of the
SHA-256 of 0x10000 bytes from offset 0x100000; the new one is the SHA-256 of the file, whose first 10 digits are
AutoV2; AutoV3 is the first 12 digits of the SHA-256 of a safetensors file's data, all that follows its header.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from regraft.cache import cache_folder
from regraft.errors import reading

_LEGACY_FROM, _LEGACY_SIZE, _LEGACY_DIGITS = 0x100000, 0x10000, 8
#: The legacy hash of every file below 1 MiB: it says nothing.
EMPTY_LEGACY = hashlib.sha256(b"").hexdigest()[:_LEGACY_DIGITS]
_BLOCK = 1 << 22
_STORE = "hashes.json"


@dataclass(frozen=True)
class FileHashes:
    """Whole-file hashes, hexadecimal.

    Attributes:
        sha256: of the file.
        data: of a safetensors file's data section; None for other files.
    """

    sha256: str
    data: str | None


#: (start, size) of what the legacy hash is of.
LEGACY_SPAN = (_LEGACY_FROM, _LEGACY_SIZE)


def legacy_hash(file: Path) -> str:
    """The 8 digits of the legacy hash; reads 64 KiB.

    Raises:
        InputError: the file can't be read.
    """
    with reading(file), file.open("rb") as stream:
        stream.seek(_LEGACY_FROM)
        return legacy_digits(stream.read(_LEGACY_SIZE))


def legacy_digits(part: bytes) -> str:
    """The legacy hash, of the bytes that it is of."""
    return hashlib.sha256(part).hexdigest()[:_LEGACY_DIGITS]


def file_hashes(file: Path) -> FileHashes:
    """Both whole-file hashes in one read; remembered while path, size and time of change stay the same.

    Raises:
        InputError: the file can't be read.
    """
    with reading(file):
        status = file.stat()
    key, stamp = str(file.resolve()), [status.st_size, status.st_mtime_ns]
    known = _remembered()
    entry = known.get(key)
    if isinstance(entry, list) and len(entry) == 4 and entry[:2] == stamp:
        return FileHashes(entry[2], entry[3])
    found = computed_hashes(file)
    _remember({**known, key: [*stamp, found.sha256, found.data]})
    return found


def computed_hashes(file: Path) -> FileHashes:
    """Both whole-file hashes in one read, with nothing remembered."""
    whole, data = hashlib.sha256(), hashlib.sha256()
    safetensors = file.suffix.lower() == ".safetensors"
    with reading(file), file.open("rb", buffering=0) as stream:
        head = stream.read(8)
        whole.update(head)
        left = int.from_bytes(head, "little") if safetensors else 0
        while block := stream.read(_BLOCK):
            whole.update(block)
            data.update(memoryview(block)[min(left, len(block)) :])
            left -= min(left, len(block))
    return FileHashes(whole.hexdigest(), data.hexdigest() if safetensors else None)


def _remembered() -> dict[str, object]:
    with suppress(OSError, ValueError):
        known = json.loads((cache_folder() / _STORE).read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    return {}


def _remember(known: dict[str, object]) -> None:
    # A cache that can't be written is no reason to fail; two writers at once cost one of them its entry.
    with suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{_STORE}.{os.getpid()}"
        part.write_text(json.dumps(known), encoding="utf-8")
        part.replace(folder / _STORE)
