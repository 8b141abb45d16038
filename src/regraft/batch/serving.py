"""Adapters as servers take them: one PEFT folder each, under a name that is safe in URLs and shells.

Facts (from their sources and documentation, 2025 and 2026):

- All four take PEFT folders of LoRA. They read ``r`` and ``lora_alpha`` of the config and no patterns: vLLM, LoRAX and
  TGI scale every module by that one factor. LoRAX and TGI stack the layers of a module type, which takes one rank.
  SGLang passes over ``use_rslora`` (its issue 40835).
- vLLM's ``--max-lora-rank`` is 1, 8, 16, 32, 64, 128, 256, 320 or 512. It refuses DoRA, ``modules_to_save`` and biases.
- LoRAX and TGI pass over what they don't know: magnitudes, embeddings, and a module type that one layer lacks.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.batch.rows import Row, stem_of
from regraft.errors import UsageError
from regraft.formats import Written
from regraft.hub import hub_id_of
from regraft.output import ADAPTER_CONFIG, names_file
from regraft.report.serving_schema import Blocker, Server, ServingFacts
from regraft.tensors import InMemory
from regraft.updates import Full, LowRank, Update

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_ALL: tuple[Server, ...] = ("vllm", "sglang", "lorax", "tgi")
_STACKING: tuple[Server, ...] = ("lorax", "tgi")
#: The index, beside the adapters.
INDEX = "serving.json"
# A disk allows 255 bytes; eight digits and what a writer puts before a name while it writes come on top.
_LONGEST = 100
_SAFE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class ServedModel:
    """A base as servers are told of it.

    Attributes:
        name: a repository on the hub, or a path.
        revision: of the repository; None for the main branch.
        whole: whether a server can load it: one file of weights, or a part of a repository, is no model.
    """

    name: str
    revision: str | None = None
    whole: bool = True

    @classmethod
    def of(cls, target: str) -> ServedModel:
        """From a base as it was given: ``org/name@main`` is ``org/name``, revision ``main``."""
        hub_id = hub_id_of(target)
        if hub_id is not None:
            return cls(hub_id.repo, hub_id.revision, hub_id.file is None)
        return cls(target, None, not names_file(Path(target)))


def serving_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows with outputs called by names that servers, URLs and shells take as they are.

    ``people/anna`` is ``people--anna``. A name that had to be changed otherwise gets eight digits of the true one, so
    that it stays what it is when the library grows; so do those that differ by capitals alone, or by the pair.

    Raises:
        UsageError: a row asks for another format than PEFT's.
    """
    for row in rows:
        if row.options.format not in (None, "peft"):
            what = f"servers take PEFT folders, not the format {row.options.format!r}"
            raise UsageError(what, file=row.name, remedy="Leave --format out, or --serve.")
    names = [safe_name(_named(row)) for row in rows]
    for whole in (False, True):
        counts = Counter(name.casefold() for name in names)
        pairs = zip(names, rows, strict=True)
        names = [name if counts[name.casefold()] == 1 else f"{name}.{_digits(row, whole=whole)}" for name, row in pairs]
    return [replace(row, output=name, serve=True) for name, row in zip(names, rows, strict=True)]


def _named(row: Row) -> str:
    """What a manifest calls the output, else the adapter's name, without the digits that told outputs apart."""
    stem = stem_of(row.name)
    ours = re.fullmatch(re.escape(stem) + r"(\.[0-9a-f]{8})?", row.output)
    return row.name if ours else row.output


def safe_name(text: str) -> str:
    """The name that stands for a name in a library.

    >>> safe_name("people/anna"), safe_name("ink.safetensors")
    ('people--anna', 'ink')
    """
    stem = stem_of(text)
    parts = stem.split("/")
    if all(_SAFE.fullmatch(part) and "--" not in part for part in parts) and len(stem) <= _LONGEST and not _taken(stem):
        return "--".join(parts)
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", plain)[:_LONGEST].strip("-._")
    return f"{plain or 'adapter'}.{hashlib.sha256(stem.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _taken(name: str) -> bool:
    """Whether a file of the batch itself is called so."""
    return name.casefold().partition(".")[0] in ("results", "forecast", "serving") and "." in name


def _digits(row: Row, *, whole: bool) -> str:
    told = [row.name, row.source, row.target, row.options.given(), *([row.adapter] if whole else [])]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def uniform(adapter: Adapter) -> Adapter:
    """The same adapter, up to rounding, with one rank and one scale, which is all that servers read of a config.

    Factors of a lower rank get rows and columns of zeros, and another scale than the most frequent one goes into B.
    Keys get the names that PEFT itself writes.
    """
    low = {ref: update for ref, update in adapter.updates.items() if isinstance(update, LowRank)}
    kept = {name: adapter.layout[name] for name in ("tokens", "projections", "base_model") if name in adapter.layout}
    layout = kept if adapter.format == "peft" else adapter.layout
    if not low:
        return replace(adapter, layout=layout)
    rank = max(update.rank for update in low.values())
    # A scale of 0 goes into B like any other: nothing could be divided by it.
    usual = next((scale for scale, _ in Counter(u.scale for u in low.values()).most_common() if scale), 1.0)
    updates: dict[ModuleRef, Update] = dict(adapter.updates)
    for ref, update in low.items():
        updates[ref] = _padded(_rescaled(update, usual), rank)
    config = adapter.config
    if config is not None:
        config = {**config, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return replace(adapter, updates=updates, layout=layout, config=config)


def _rescaled(update: LowRank, scale: float) -> LowRank:
    if update.scale == scale:
        return replace(update, alpha=None)
    # At once: in half precision, two factors round twice, and the first alone may leave nothing.
    return replace(update.scaled(update.scale / scale), scale=scale, alpha=None)


def _padded(update: LowRank, rank: int) -> LowRank:
    if update.rank == rank:
        return update
    up, down = update.up.load(), update.down.load()
    more = rank - update.rank
    up = torch.cat([up, up.new_zeros(up.shape[0], more, *up.shape[2:])], 1)
    down = torch.cat([down, down.new_zeros(more, *down.shape[1:])])
    return replace(update, up=InMemory(up), down=InMemory(down))


def for_servers(written: Written, adapter: Adapter, new: Base, base: ServedModel) -> tuple[Written, ServingFacts]:
    """A PEFT folder as servers read it, and what they need to know of it.

    Args:
        written: of the `uniform` adapter.
        adapter: that one.
        new: the base that it is for.
        base: what servers call that base.
    """
    config = json.loads(str(written.files[ADAPTER_CONFIG]))
    roles = sorted({ref.path.rpartition(".")[2] for ref, update in adapter.updates.items() if not update.by_parameter})
    changed = {ref.path for ref in adapter.updates}
    matched = {path for name in new.components for path in new.modules(name) if path.rpartition(".")[2] in roles}
    if matched and matched <= changed:
        # Short names where they mean the same: SGLang compares them with those of its own layers.
        config["target_modules"] = roles
    config["base_model_name_or_path"] = base.name
    config["revision"] = base.revision
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    kinds = sorted({update.kind for update in adapter.updates.values()})
    ranks = [update.rank for update in adapter.updates.values() if isinstance(update, LowRank)]
    facts = ServingFacts(
        kind="+".join(kinds),
        rank=max(ranks, default=None),
        target_modules=roles,
        blockers=_blockers(adapter, config, new),
    )
    return replace(written, files={**written.files, ADAPTER_CONFIG: text}), facts


def _blockers(adapter: Adapter, config: Mapping[str, object], new: Base) -> list[Blocker]:
    """Why a server would refuse the folder, or load it and leave a part of it out."""
    updates = adapter.updates.values()
    low = [update for update in updates if isinstance(update, LowRank)]
    others = sorted({update.kind for update in updates if not isinstance(update, LowRank | Full)})
    rank = max((update.rank for update in low), default=0)
    found: list[tuple[bool, tuple[Server, ...], str]] = [
        (bool(others), _ALL, f"servers take LoRA alone, and this is {', '.join(others)}"),
        (any(update.magnitude is not None for update in low), _ALL, "DoRA: servers leave its magnitudes out"),
        (any(isinstance(update, Full) for update in updates), _ALL, "it stores whole weights (a head, norms, biases)"),
        (any(update.bias is not None for update in low), _ALL, "its B has biases"),
        (bool(adapter.tokens), _ALL, "it adds tokens"),
        (bool(config.get("alora_invocation_tokens")), _ALL, "an activated LoRA: servers apply it from the first token"),
        (any(len(update.shape) > 2 for update in low), _ALL, "it changes convolutions"),
        (rank > RANKS[-1], ("vllm",), f"its rank {rank} is over vLLM's limit of {RANKS[-1]}"),
        (any(u.orientation == "embedding" for u in low), _STACKING, "it changes an embedding, which they leave out"),
    ]
    partial = _partial(adapter, new)
    if partial:
        what = f"some layers have no update of {', '.join(partial)}: they leave that module out in every layer"
        found.append((True, _STACKING, what))
    return [Blocker(servers=list(servers), reason=reason) for true, servers, reason in found if true]


def _partial(adapter: Adapter, new: Base) -> list[str]:
    """Types of module that are changed in some layers and not in others, by the last parts of their names."""
    changed = Counter(_type(ref.path) for ref, update in adapter.updates.items() if isinstance(update, LowRank))
    there = Counter(_type(path) for name in new.components for path in new.modules(name))
    return sorted({kind.rpartition(".")[2] for kind, number in changed.items() if number < there.get(kind, 0)})


def _type(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def least_rank(ranks: Sequence[int]) -> int | None:
    """The least ``--max-lora-rank`` of vLLM that takes these ranks; None for none."""
    return next((limit for limit in RANKS if limit >= max(ranks)), None) if ranks else None
