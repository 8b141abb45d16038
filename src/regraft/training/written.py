"""A trained adapter on disk: PEFT's folder or one file, with the lineage of what it was trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from regraft.base import Base
from regraft.errors import UsageError
from regraft.formats import load_adapter, open_adapter_file
from regraft.lineage import KEY, dumped
from regraft.lineage.stamp import first_lineage, write_with_metadata
from regraft.ops.convert import convert_adapter
from regraft.output import names_file
from regraft.runtime.libraries import quiet_libraries
from regraft.training.kinds import kind_of


def file_format(kind: str, output: Path, format: str | None, *, pipeline: bool) -> str | None:
    """The format of the file that is to be written; None for PEFT's folder.

    Args:
        kind: of the adapter.
        output: a name that ends as those of weights files do is a file's.
        format: as asked for.
        pipeline: the adapter is a diffusers pipeline's.

    Raises:
        UsageError: that kind of adapter is no single file, or a name and a format that don't go together.
    """
    if format == "peft" or (format is None and not names_file(output)):
        if names_file(output):
            raise UsageError("PEFT's format is a folder", remedy=f"Name one: -o {output.with_suffix('')}.")
        return None
    found = format or (kind_of(kind).file if pipeline else None)
    if found is None:
        whose = f"A {kind}" if pipeline else "An adapter of a language model"
        raise UsageError(
            f"{whose} is written as PEFT's folder", remedy=f"Name one: -o {output.with_suffix('')}; or give --format."
        )
    return found


def picture_metadata(captions: Sequence[str], size: tuple[int, int]) -> dict[str, str]:
    """What kohya's scripts note of their data, which `refine` draws its prompts by.

    Args:
        captions: of the pictures that it was trained on.
        size: their height and width.
    """
    height, width = size
    counts = Counter(caption for caption in captions if caption)
    return {
        "ss_resolution": f"({width}, {height})",
        "ss_tag_frequency": json.dumps({"data": dict(counts.most_common())}, ensure_ascii=False),
    }


def write_trained(
    tuned: Any,
    base: Base,
    output: Path,
    *,
    format: str | None,
    metadata: Mapping[str, str],
    overwrite: bool,
    conversion: Path | None = None,
) -> tuple[Path, list[str]]:
    """Write an adapter, stamped with the base that it was trained on.

    Args:
        tuned: PEFT's model.
        base: its base.
        output: the folder or file.
        format: of a file; None for PEFT's folder.
        metadata: further entries of the header.
        overwrite: replace what is there.
        conversion: folder of the adapter before the training, where PEFT is to write the difference from it.

    Returns:
        What was written, and what became of modules that the file's format holds in another form.

    Raises:
        OutputError: it can't be written.
    """
    names = {component: tuple(base.modules(component)) for component in base.components}
    with TemporaryDirectory() as place:
        made, stamped = Path(place) / "made", Path(place) / "stamped"
        more = {} if conversion is None else {"path_initial_model_for_weight_conversion": str(conversion)}
        with quiet_libraries():
            tuned.save_pretrained(str(made), save_embedding_layers=False, **more)
        adapter = load_adapter(made, names=names)
        lineage = first_lineage(adapter, open_adapter_file(made), base)
        added = {**metadata, KEY: dumped(lineage)}
        if format is None:
            write_with_metadata(made, output, added, overwrite=overwrite)
            return output, []
        write_with_metadata(made, stamped, added, overwrite=False)
        report = convert_adapter(stamped, output, format, base=base.path, overwrite=overwrite)
    # Its further notes are of what was beside the weights in a folder that nobody has seen.
    changes = Counter((change.status, change.reason) for change in report.changes)
    return output, [f"{count} modules {status} in the file: {reason}" for (status, reason), count in changes.items()]
