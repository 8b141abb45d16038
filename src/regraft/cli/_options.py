"""Options that several verbs share, and their parsing."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from regraft.adapter import MODEL, Adapter
from regraft.base import Base, open_base
from regraft.carry import matches
from regraft.errors import RegraftError, UsageError
from regraft.families import block_names
from regraft.hub import hub_id_of
from regraft.methods import get_method
from regraft.methods.task import Rank, Running
from regraft.pairing import Named
from regraft.plan import Selection

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

_UNITS = {"s": 1, "m": 60, "h": 3600}

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def dtype(name: str, option: str = "--dtype") -> torch.dtype:
    """A dtype by the name that people type."""
    if name not in DTYPES:
        raise UsageError(f"{option} {name!r} is not known", remedy=f"Known: {', '.join(DTYPES)}.")
    return DTYPES[name]


def number_or_share(text: str | None, option: str) -> int | float | None:
    """``32`` → 32; ``0.9`` → 0.9; ``keep`` or nothing → None."""
    if text is None or text == "keep":
        return None
    try:
        number: int | float = int(text) if text.isdigit() else float(text)
    except ValueError:
        number = -1
    if not number > 0 or (isinstance(number, float) and number > 1):
        raise UsageError(f"{option} {text!r} is neither a rank nor a share", remedy="Give 16, 0.9 or keep.")
    return number


def wanted_rank(text: str | None) -> Rank:
    """The rank of the output: as `number_or_share`, or ``full``."""
    return "full" if text == "full" else number_or_share(text, "--rank")


def pull(text: str | None) -> float | str | None:
    """``auto``, or how far to pull, 0 to 1."""
    if text is None or text == "auto":
        return text
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise UsageError(f"--pull {text!r} is out of range", remedy="Give 0 to 1, or auto.")
    return number


def running(
    n_inputs: int | None, seed: int, prompts: Path | None, config: Path | None, device: str, weights_only: bool
) -> Running:
    """How both models are to be run."""
    return Running(n_inputs, seed, texts(prompts), config, device, weights_only)


def texts(prompts: Path | None) -> tuple[str, ...] | None:
    """The lines of a file of prompts."""
    if prompts is None:
        return None
    from regraft.probes import read_prompts

    return tuple(read_prompts(prompts))


def number_or_word(text: str | None, option: str, word: str) -> float | str | None:
    """``0.8`` → 0.8; the word itself; nothing → None."""
    if text is None or text == word:
        return text
    try:
        return finite(float(text), option)
    except ValueError:
        raise UsageError(f"{option} {text!r} is neither a number nor {word!r}", remedy=f"Give 0.8 or {word}.") from None


def finite(number: float, option: str) -> float:
    """``number``, or a usage error where it is no factor that can be applied."""
    if not isfinite(number):
        raise UsageError(f"{option} {number} is no number", remedy="Give one such as 0.8.")
    return number


def above_zero(number: float, option: str) -> float:
    """``number``, or a usage error where it is not above 0."""
    if not finite(number, option) > 0:
        raise UsageError(f"{option} {number} is out of range", remedy="Give a number above 0.")
    return number


def at_least_zero(number: float, option: str) -> float:
    """``number``, or a usage error where it is below 0."""
    if not finite(number, option) >= 0:
        raise UsageError(f"{option} {number} is out of range", remedy="Give 0 or more.")
    return number


def share(number: float, option: str) -> float:
    """``number``, or a usage error where it is no share of 1."""
    if not 0 <= finite(number, option) <= 1:
        raise UsageError(f"{option} {number} is out of range", remedy="Give 0 to 1.")
    return number


def one_of(word: str, option: str, known: Sequence[str]) -> Any:
    """``word``, or a usage error where it is none of the known ones."""
    if word not in known:
        raise UsageError(f"{option} {word!r} is not known", remedy=f"Known: {', '.join(known)}.")
    return word


def method_options(method: str, **given: Any) -> dict[str, Any]:
    """The options that were given, checked against what the method has."""
    options = {name: value for name, value in given.items() if value is not None}
    # The removed blocks' policy is every method's.
    get_method(method).check_options({name: value for name, value in options.items() if name != "removed"})
    return options


def selection(include: list[str] | None, exclude: list[str] | None, components: list[str] | None) -> Selection:
    """A `Selection` from repeated or comma-separated options."""

    def split(values: list[str] | None) -> tuple[str, ...]:
        return tuple(part for value in values or () for part in value.split(",") if part)

    return Selection(split(include), split(exclude), split(components))


def block_strengths(text: str | None, adapter: Adapter) -> tuple[tuple[str, float], ...]:
    """``1,0.5,…`` (one number per block, as block-weight tools have it), or ``GLOB=FACTOR,…``.

    Raises:
        UsageError: neither, or the family has no such number of blocks.
    """
    if not text:
        return ()
    try:
        if "=" in text:
            pairs = [part.rsplit("=", 1) for part in text.split(",")]
            given = tuple((glob.strip(), finite(float(factor), "--block-strength")) for glob, factor in pairs)
            return _that_match(given, adapter)
        factors = [finite(float(part), "--block-strength") for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--block-strength {text!r} can't be read", remedy="Give 1,0.5,… or IN04=0.5,*attn2*=0."
        ) from None
    names = block_names(adapter.family, len(factors))
    if names is None:
        raise UsageError(
            f"--block-strength with {len(factors)} numbers does not fit family {adapter.family or 'unknown'}",
            remedy="SD 1.5 takes 17 or 26, SDXL 12 or 20; any family takes GLOB=FACTOR,….",
        )
    return tuple(zip(names, factors, strict=True))


def _that_match(given: tuple[tuple[str, float], ...], adapter: Adapter) -> tuple[tuple[str, float], ...]:
    """The same, or a usage error that names the first glob that matches no module or block."""
    for glob, _ in given:
        if not any(matches(glob, ref, adapter.family) for ref in adapter.updates):
            some = str(next(iter(adapter.updates), "none"))
            remedy = f"Modules are named like {some}."
            raise UsageError(f"--block-strength: {glob!r} matches no module or block of the adapter", remedy=remedy)
    return given


def open_bases(old: Path | None, new: Path | None, *, whole: bool = True) -> tuple[Base | None, Base]:
    """Both bases from ``--from`` and ``--to``; those on the hub downloaded (``whole``), or to be read in part.

    Raises:
        UsageError: ``--to`` is missing.
    """
    if new is None:
        raise UsageError("--to is missing", remedy="Give the base that the adapter is to run on.")
    return (open_base(old, whole=whole) if old is not None else None), open_base(new, whole=whole)


def runnable(path: Path) -> Path:
    """The path itself, or where a model on the hub was downloaded to with all that it needs to run."""
    hub_id = hub_id_of(path)
    if hub_id is None:
        return path
    from regraft.hub.repository import download_runnable

    return download_runnable(hub_id)


def names_of(named: Named) -> dict[str, tuple[str, ...]]:
    """Module names of a base or migration by component, to un-flatten underscored names by."""
    return {component: tuple(named.modules(component)) for component in named.components}


def config_of(base: object) -> Mapping[str, Any] | None:
    """``config.json`` of a base that is one model alone; a migration has none."""
    return base.configs.get(MODEL) if isinstance(base, Base) else None


def use_hardware(device: str, compute: str, threads: int | None) -> dict[str, Any]:
    """Check ``--device`` and ``--dtype``, set the thread count, and return what the methods are to compute with.

    Two programs with a thread for every core spin each other to a standstill: by default the threads are the
    processors that other programs leave free.

    Raises:
        UsageError: no such device here, or a dtype that can't be computed in.
    """
    if device not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {device!r} is not known", remedy="Known: cpu, cuda, mps.")
    if (device == "cuda" and not torch.cuda.is_available()) or (
        device == "mps" and not torch.backends.mps.is_available()
    ):
        raise RegraftError(f"this machine (or its torch) has no {device} device", remedy="Leave --device out.")
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = free_processors()
    if threads is not None:
        torch.set_num_threads(threads)
    known = {"float32": torch.float32, "float64": torch.float64}
    if compute not in known:
        raise UsageError(f"--dtype {compute!r} is not known", remedy=f"Known: {', '.join(known)}.")
    return {"device": device, "dtype": known[compute]}


def free_processors() -> int:
    """Processors of this process that others leave free, by the load of the last minute; at least 1."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, mine - round(load))


def seconds(text: str | None) -> float | None:
    """``90`` → 90; ``10m`` → 600; ``2h`` → 7200.

    Raises:
        UsageError: it is neither.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"--budget {text!r} is no time", remedy="Give seconds, 10m or 2h.")
    return float(found[1]) * _UNITS[found[2] or "s"]
