"""Write a lineage into an adapter file that is there already; no byte of its tensors changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from regraft.adapter import Adapter
from regraft.base import Base
from regraft.errors import InputError, UsageError, reading
from regraft.formats import AdapterFile, load_adapter, open_adapter_file
from regraft.lineage import KEY, dumped, lineage_of
from regraft.lineage.model import VERSION
from regraft.lineage.updates import scale_convention, update_groups
from regraft.migrations.base_id import base_id
from regraft.output import ADAPTER_CONFIG, check_writable, names_file, readable, whole
from regraft.plan import check_families
from regraft.report.json_schema import parse
from regraft.report.schema import VerifyReport
from regraft.tensor_files import TORCH_SUFFIXES, read_safetensors

_CHUNK = 1 << 22


def first_lineage(adapter: Adapter, file: AdapterFile, base: Base, *, exact: bool = False) -> dict[str, Any]:
    """The lineage of an adapter that was trained on ``base``; ``exact`` reads all of the base, for its content hash.

    Raises:
        InputError: it has one already.
        Refused: it does not fit the base.
    """
    if KEY in adapter.metadata:
        lineage_of(adapter)
        raise InputError(
            "has a lineage already", file=adapter.path, key=KEY, remedy="`regraft lineage show` prints it."
        )
    check_families(adapter, None, base)
    scale = scale_convention(file.tensors.keys(), file.metadata, file.config)
    return {
        "version": VERSION,
        "base": base_id(base, exact=exact),
        "updates": update_groups(adapter, scale),
        "ports": [],
    }


def stamp(source: Path, base: Base, output: Path, *, exact: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Copy an adapter with the lineage of one that was trained on ``base``; returns the lineage.

    Args:
        source: a ``.safetensors`` file, or a PEFT folder.
        base: that it was trained on.
        output: a file for a file, a folder for a folder; ``source`` itself with ``overwrite``.
        exact: read all of the base, for the hash of every stored byte.
        overwrite: replace what is there.

    Raises:
        InputError: the adapter can't be read or has a lineage.
        OutputError: ``output`` can't be written.
        Refused: the adapter does not fit the base.
    """
    names = {component: tuple(base.modules(component)) for component in base.components}
    adapter, file = load_adapter(source, names=names), open_adapter_file(source)
    lineage = first_lineage(adapter, file, base, exact=exact)
    write_with_metadata(source, output, {KEY: dumped(lineage)}, overwrite=overwrite)
    return lineage


def with_measured(lineage: dict[str, Any], record: Path) -> dict[str, Any]:
    """The lineage with the figures of a ``verify --json`` record in its last port.

    Raises:
        InputError: the record is none, or the adapter is no port.
    """
    figures = figures_of(record)
    ports = list(lineage.get("ports", []))
    if not ports:
        raise InputError("the adapter is no port: there is nothing that was measured", remedy="Port it first.")
    known = [figure for figure in ports[-1].get("fidelity", []) if figure not in figures]
    ports[-1] = {**ports[-1], "fidelity": [*known, *figures]}
    return {**lineage, "ports": ports}


def figures_of(record: Path) -> list[dict[str, Any]]:
    """What a ``verify --json`` record measured, as ``fidelity`` tells it.

    Raises:
        InputError: the record is none.
    """
    with reading(record):
        report = parse(VerifyReport, record.read_text(encoding="utf-8"), file=record)
    how = f"{report.inputs}; {report.model_class}"[:4096]
    return [
        {
            "measure": name,
            "value": found.mean,
            "low": found.low,
            "high": found.high,
            "inputs": report.n_inputs,
            "how": how,
        }
        for name in ("effect_cosine", "effect_norm_ratio", "kl")
        if (found := getattr(report, name)) is not None
    ]


def metadata_of(path: Path) -> Mapping[str, str]:
    """The safetensors metadata of an adapter file or folder, or of one on the hub; no other kind of file has any.

    Raises:
        InputError: it can't be read.
    """
    return open_adapter_file(path, whole=False).metadata


def weights_file(path: Path) -> Path:
    """The safetensors file of an adapter that is a file or a folder.

    Raises:
        InputError: its weights are no safetensors file.
    """
    file = path
    if path.is_dir():
        named = path / "adapter_model.safetensors"
        found = [named] if named.is_file() else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise InputError("holds no single safetensors file", file=path, remedy="Name the file itself.")
        file = found[0]
    if file.suffix.lower() in TORCH_SUFFIXES:
        raise InputError(
            "a lineage lies in a safetensors header, which this file lacks",
            file=file,
            remedy="Convert it with `regraft convert` first.",
        )
    return file


def write_with_metadata(source: Path, output: Path, added: Mapping[str, str], *, overwrite: bool) -> None:
    """Copy an adapter file or folder, with entries of its header's metadata added or replaced.

    Raises:
        InputError: the source can't be read.
        OutputError: the output can't be written.
        UsageError: one of them is a file and the other a folder.
    """
    weights = weights_file(source)
    if source.is_dir() and output.resolve() == source.resolve():
        # Only the weights change: the folder's other files stay as they lie.
        source, output = weights, weights
    elif source.is_dir() != (output.is_dir() or (not output.exists() and not names_file(output))):
        raise UsageError("a file is stamped into a file, a folder into a folder", remedy="Name the output like it.")
    check_writable(output, overwrite=overwrite, source=source)
    with whole(output) as stage:
        if not source.is_dir():
            copy_with_metadata(weights, stage, added)
            readable(stage)
            return
        stage.mkdir()
        for entry in sorted(source.iterdir()):
            if entry == weights:
                copy_with_metadata(weights, stage / entry.name, added)
            elif entry.is_file():
                shutil.copyfile(entry, stage / entry.name)
        if not (stage / ADAPTER_CONFIG).is_file():
            raise InputError(f"has no {ADAPTER_CONFIG}", file=source, remedy="Name the weights file itself.")
        readable(stage)


def copy_with_metadata(source: Path, target: Path, added: Mapping[str, str]) -> None:
    """Copy a safetensors file with entries of its metadata added; the data section is copied as it lies."""
    # The library's own checks come first: a header that it refuses is not to be copied.
    read_safetensors(source)
    with reading(source), source.open("rb") as stream:
        header = _header(stream)
        metadata = {**header.pop("__metadata__", {}), **added}
        # In the order of the keys: the same content gives the same bytes.
        whole_header = {"__metadata__": dict(sorted(metadata.items())), **header}
        text = json.dumps(whole_header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with target.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(stream, out, _CHUNK)


def _header(stream: IO[bytes]) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return header
