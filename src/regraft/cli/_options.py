"""Options that several verbs share, and their parsing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from regraft.adapter import MODEL
from regraft.asked import (
    DTYPES,
    above_zero,
    at_least_zero,
    block_strengths,
    dtype,
    finite,
    method_options,
    number_or_share,
    number_or_word,
    one_of,
    pull,
    running,
    seconds,
    selection,
    share,
    texts,
    wanted_rank,
)
from regraft.base import Base, open_base
from regraft.errors import UsageError
from regraft.hardware import free_processors, use_hardware
from regraft.hub import runnable
from regraft.pairing import names_of

# Those of the modules above that every verb takes from here, beside what is defined below.
__all__ = [
    "DTYPES",
    "above_zero",
    "at_least_zero",
    "block_strengths",
    "dtype",
    "finite",
    "free_processors",
    "method_options",
    "names_of",
    "number_or_share",
    "number_or_word",
    "one_of",
    "pull",
    "runnable",
    "running",
    "seconds",
    "selection",
    "share",
    "texts",
    "use_hardware",
    "wanted_rank",
]

#: What a training may hold its base in, and make its passes in (as accelerate names it).
BASE_DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = ("no", "fp16", "bf16")

AdapterArgument = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="The LoRA: a file, a PEFT folder, or its hub id.")
]
From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="OLD",
        help="The base that it was trained on: file, index, folder, or hub id (org/name[@revision][:file]).",
    ),
]
To = Annotated[Path | None, typer.Option("--to", metavar="NEW", help="The base that it is to run on.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", help="File or folder to write.")]
MethodOption = Annotated[str, typer.Option("--method", "-m", help="See `regraft methods`.")]
SubspaceRank = Annotated[
    str | None, typer.Option("--subspace-rank", metavar="N|SHARE", help="lora-x, prolora: rank of the subspaces.")
]
Energy = Annotated[float | None, typer.Option("--energy", help="lora-x, prolora: share of ‖W‖² in the subspaces.")]
Edge = Annotated[
    float | None,
    typer.Option("--edge", metavar="τ", help="lora-x: a soft edge at τ root mean squares of the singular values."),
]
Threshold = Annotated[
    str | None,
    typer.Option(
        "--threshold",
        metavar="N|paper",
        help="lora-x, prolora: least subspace similarity to carry a module; prolora: paper, for its Φ of 0.8.",
    ),
]
NInputs = Annotated[
    int | None, typer.Option("--n-inputs", min=2, help="Methods that run both bases: inputs that these make.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of those inputs.")]
Prompts = Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help="Texts to run instead, one a line.")]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE|FOLDER", help="config.json of bare weights files.")
]
WeightsOnly = Annotated[bool, typer.Option("--weights-only", help="auto: run no model; choose by the weights alone.")]
Pull = Annotated[
    str | None, typer.Option("--pull", metavar="0…1|auto", help="effect: pull towards the old base's own outputs.")
]
Ridge = Annotated[
    float | None, typer.Option("--ridge", help="effect, ridge: weight of the prior, in mean squares of the inputs.")
]
Anchors = Annotated[
    str | None,
    typer.Option("--anchors", metavar="OLD=NEW,…|FOLDER", help="anchor-ridge: adapters that exist on both bases."),
]
BlockStrength = Annotated[
    str | None, typer.Option("--block-strength", metavar="1,0.5,…|GLOB=F,…", help="Factors per block.")
]
Removed = Annotated[
    str | None,
    typer.Option(
        "--removed", metavar="POLICY", help="Updates of blocks that NEW lacks: drop (default), nearest, fold."
    ),
]
Include = Annotated[list[str] | None, typer.Option("--include", metavar="GLOB", help="Only these modules; repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Not these modules; repeatable.")]
Components = Annotated[
    list[str] | None,
    typer.Option("--components", metavar="NAME", help="Only these, such as unet; repeatable."),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="What to compute in: float32 or float64.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; by default, the free processors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Report = Annotated[Path | None, typer.Option("--report", metavar="FILE.html", help="Also write one HTML page.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Budget = Annotated[
    str | None, typer.Option("--budget", metavar="10m", help="Time for the training: seconds, 10m or 2h.")
]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Save memory by computing activations twice.")
]
Optimizer = Annotated[str, typer.Option("--optimizer", metavar="adamw|adamw8bit")]
BaseDtype = Annotated[str, typer.Option("--dtype", metavar="|".join(BASE_DTYPES), help="Of what is trained on.")]
Precision = Annotated[str, typer.Option("--precision", metavar="|".join(PRECISIONS), help="Of the training's passes.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an earlier run was stopped.")]

SavedMigration = Annotated[
    Path | None, typer.Option("--migration", metavar="M", help="A saved one, in place of both bases: a file or hub id.")
]

Migrations = Annotated[
    Path | None,
    typer.Option("--migrations", metavar="FOLDER", help="Find the way from its base to NEW in this folder."),
]
ToFingerprint = Annotated[
    str | None, typer.Option("--to-fingerprint", metavar="V1:…", help="--migrations: NEW, where it isn't at hand.")
]


def open_bases(old: Path | None, new: Path | None, *, whole: bool = True) -> tuple[Base | None, Base]:
    """Both bases from ``--from`` and ``--to``; those on the hub downloaded (``whole``), or to be read in part.

    Raises:
        UsageError: ``--to`` is missing.
    """
    if new is None:
        raise UsageError("--to is missing", remedy="Give the base that the adapter is to run on.")
    return (open_base(old, whole=whole) if old is not None else None), open_base(new, whole=whole)


def config_of(base: object) -> Mapping[str, Any] | None:
    """``config.json`` of a base that is one model alone; a migration has none."""
    return base.configs.get(MODEL) if isinstance(base, Base) else None
