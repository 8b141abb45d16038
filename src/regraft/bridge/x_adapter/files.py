"""A mapper as a file: its tensors, what it is built from, and the two bases that it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from regraft._version import __version__
from regraft.base import Base
from regraft.bridge.x_adapter.mapper import Level, Mapper, MapperConfig
from regraft.errors import InputError, Refused
from regraft.lineage.model import BaseId
from regraft.migrations.base_id import base_id
from regraft.migrations.recognise import recognise
from regraft.output import check_writable, readable, whole
from regraft.tensor_files import TORCH_SUFFIXES, read_safetensors, read_torch
from regraft.tensors import InMemory, TensorRef

#: Of the header.
KEY = "regraft_mapper"

#: The released X-Adapter's levels: three up blocks of SD 1.5, and where the released code adds them to SDXL's.
RELEASED = MapperConfig(
    (
        Level("up_blocks.1", "mid_block", 1280, 1280),
        Level("up_blocks.2", "up_blocks.0", 640, 1280),
        Level("up_blocks.3", "up_blocks.1", 320, 640, grows=True),
    )
)
# Names in X_Adapter_v1.bin (showlab/X-Adapter, model/adapter.py), where `body` counts the blocks of all levels on.
_RELEASED_NAMES = {"in_conv": "widen", "block1": "first", "block2": "second", "up_opt.op": "grow"}


def save_mapper(
    mapper: Mapper, file: Path, old: Base, new: Base, *, told: dict[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Write a mapper, whole or not at all.

    Args:
        mapper: to write.
        file: a ``.safetensors`` file.
        old: the base that plug-ins are for.
        new: the base that is bridged to.
        told: further facts, of its training.
        overwrite: replace what is there.

    Raises:
        OutputError: it can't be written.
    """
    check_writable(file, overwrite=overwrite)
    header = {
        "version": 1,
        "regraft_version": __version__,
        "config": mapper.config.to_json(),
        "source": base_id(old),
        "target": base_id(new),
        "told": told or {},
    }
    tensors = {name: tensor.contiguous() for name, tensor in mapper.state_dict().items()}
    with whole(file) as stage:
        save_file(tensors, stage, metadata={KEY: json.dumps(header, sort_keys=True)})
        readable(stage)
    return file


def load_mapper(file: Path, old: Base | None = None, new: Base | None = None) -> Mapper:
    """Read a mapper: a file of `save_mapper`, or the released X_Adapter_v1.bin, which names no bases.

    Args:
        file: to read.
        old: the base that plug-ins are for; None asks nothing.
        new: the base that is bridged to.

    Raises:
        InputError: it is no mapper, or damaged.
        Refused: it was made for other bases.
    """
    mapper, tensors = _described(file, old, new)
    mapper.load_state_dict(
        {name: tensors[name].load().to(value.dtype) for name, value in mapper.state_dict().items()}, assign=True
    )
    return mapper


def check_mapper(file: Path, old: Base, new: Base) -> None:
    """Fail as `load_mapper` does, by the header alone, before anything large is loaded.

    Raises:
        InputError: it is no mapper, or damaged.
        Refused: it was made for other bases.
    """
    _described(file, old, new)


def _described(file: Path, old: Base | None, new: Base | None) -> tuple[Mapper, Mapping[str, TensorRef]]:
    """A mapper without values, and the tensors that hold them, all there and of its shapes."""
    if file.suffix.lower() in TORCH_SUFFIXES:
        return _matching(_empty(RELEASED), _from_released(read_torch(file).tensors, file), file)
    read = read_safetensors(file)
    if KEY not in read.metadata:
        remedy = "Give a file of `regraft bridge train`, or the released X_Adapter_v1.bin."
        raise InputError("is no mapper of a bridge", file=file, remedy=remedy)
    try:
        header = json.loads(read.metadata[KEY])
        config = MapperConfig.from_json(header["config"])
        ids = BaseId.model_validate(header["source"]), BaseId.model_validate(header["target"])
        mapper = _empty(config)
    except (ValueError, KeyError, TypeError, RuntimeError, RecursionError, ValidationError, InputError) as error:
        raise InputError("has a damaged header", file=file, remedy="Train it again.") from error
    for which, base, made_for in (("old", old, ids[0]), ("new", new, ids[1])):
        if base is not None:
            _check_base(file, which, base, made_for)
    return _matching(mapper, read.tensors, file)


def _check_base(file: Path, which: str, base: Base, made_for: BaseId) -> None:
    given = BaseId.model_validate(base_id(base))
    if recognise(given, {made_for.fingerprint: made_for}).base is given and given.fingerprint != made_for.fingerprint:
        raise Refused(
            f"the mapper was made for another {which} base: fingerprint {made_for.fingerprint}, not "
            f"{given.fingerprint} of {base.path}",
            file=file,
            remedy="Train one for this pair: regraft bridge train.",
        )


def _empty(config: MapperConfig) -> Mapper:
    """Without memory, until the file is known to hold what its header promises."""
    with torch.device("meta"):
        return Mapper(config)


def _matching(mapper: Mapper, tensors: Mapping[str, TensorRef], file: Path) -> tuple[Mapper, Mapping[str, TensorRef]]:
    """Both, where each value of the mapper is among the tensors."""
    for name, tensor in mapper.state_dict().items():
        if name not in tensors:
            raise InputError("is missing", file=file, key=name, remedy="Is it a whole mapper? Get it again.")
        if tuple(tensors[name].shape) != tuple(tensor.shape):
            what = f"has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
            raise InputError(what, file=file, key=name, remedy="Is it a mapper of this kind? Get it again.")
    return mapper, tensors


def _from_released(tensors: Mapping[str, TensorRef], file: Path) -> dict[str, TensorRef]:
    """The released names → ours."""
    found: dict[str, TensorRef] = {}
    for i, level in enumerate(RELEASED.levels):
        # What a level reads is not normalised there.
        found[f"levels.{i}.mean"] = InMemory(torch.zeros(level.inner))
        found[f"levels.{i}.spread"] = InMemory(torch.ones(level.inner))
    for name, ref in tensors.items():
        first, _, rest = name.partition(".")
        number, _, rest = rest.partition(".")
        module, _, leaf = rest.rpartition(".")
        if first == "zero_out" and number.isdecimal():
            found[f"levels.{number}.out.{rest}"] = ref
        elif first == "body" and number.isdecimal() and module in _RELEASED_NAMES:
            place, block = divmod(int(number), RELEASED.blocks)
            found[f"levels.{place}.blocks.{block}.{_RELEASED_NAMES[module]}.{leaf}"] = ref
        else:
            raise InputError("is no part of the released X-Adapter", file=file, key=name)
    return found
