"""Modules along depth: their order, their blocks, and what was left out, for the page and the terminal alike."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from regraft.report.schema import CheckedModule, CheckReport, Effect, Forecast, PortedModule, VerifyReport

Module = CheckedModule | PortedModule

#: The tiers that a forecast may have, as people read them, from cheap to strong.
FORECASTS = {
    "port": "port",
    "effect": "port, --method effect",
    "stream": "port, --method stream",
    "refine": "refine",
    "bridge": "bridge",
}

#: Over this many modules, one mark stands for a block: finer bars could not be told apart.
MARK_LIMIT = 120

_COMPONENTS = re.compile(r"(text_encoder|transformer|unet|vae|controlnet|prior|image_encoder|decoder)(_\d+)?\.")
_LATE = ("conv_out", "norm_out", "proj_out", "lm_head", "score", "classifier", "final_layer")
_EARLY = ("conv_in", "time_embedding", "x_embedder", "embed_tokens", "patch_embed")


def forecasts_of(report: CheckReport) -> list[tuple[str, Forecast]]:
    """The tiers that something is known of; that of the method at hand is not told twice."""
    found = [(shown, getattr(report.forecast, name)) for name, shown in FORECASTS.items() if name != report.method]
    return [(shown, value) for shown, value in found if value is not None]


def component_of(name: str) -> str:
    """``unet`` of ``unet.down_blocks.0…``; ``model`` where the adapter has one model alone."""
    match = _COMPONENTS.match(name)
    return match.group(0)[:-1] if match else "model"


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which block 10 follows block 9."""
    parts = re.split(r"(\d+)", text)
    return tuple((1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts)


def depth_key(name: str) -> tuple[object, ...]:
    """Component, then place: entry layers first, exit layers last, blocks by number between."""
    component = component_of(name)
    path = name[len(component) + 1 :] if name.startswith(component + ".") else name
    place = 2 if path.startswith(_LATE) else 0 if path.startswith(_EARLY) else 1
    return (natural_key(component), place, natural_key(path))


def _numbered(name: str) -> list[str]:
    """The name's prefixes that end in a block number, from coarse to fine."""
    segments = name.split(".")
    # Numbers inside one layer (`to_out.0`, `ff.net.2`) count no blocks.
    at = [i for i, segment in enumerate(segments[:-1]) if segment.isdecimal() and i and segments[i - 1] != "net"]
    return [".".join(segments[: i + 1]) for i in at]


def block_of(name: str) -> str:
    """The name up to its first number: ``unet.down_blocks.0`` of ``unet.down_blocks.0.attentions.1…``."""
    if "mid_block." in name:
        return name[: name.index("mid_block.") + len("mid_block")]
    return next(iter(_numbered(name)), name.rpartition(".")[0] or name)


@dataclass(frozen=True)
class Group:
    """One module, or the modules of one block."""

    name: str
    component: str
    modules: tuple[Module, ...] = field(repr=False)

    def fraction(self, of: Callable[[Module], float]) -> float:
        """Mean of ``of`` over the modules, weighted by their share of the update where all shares are known."""
        shares = [m.share for m in self.modules]
        known = [s for s in shares if s is not None]
        weights = known if len(known) == len(shares) and sum(known) > 0 else [1.0] * len(shares)
        return sum(w * of(m) for w, m in zip(weights, self.modules, strict=True)) / sum(weights)

    def count(self, status: str) -> int:
        return sum(m.status == status for m in self.modules)

    @property
    def share(self) -> float | None:
        return total(m.share for m in self.modules)

    @property
    def similarities(self) -> list[float]:
        return [m.similarity for m in self.modules if m.similarity is not None]

    @property
    def distances(self) -> list[float]:
        return [m.distance for m in self.modules if m.distance is not None]

    @property
    def kept(self) -> float | None:
        """Mean energy kept over the ported modules where it is defined."""
        ported = [m for m in self.modules if isinstance(m, PortedModule) and m.energy_kept is not None]
        return Group("", "", tuple(ported)).fraction(energy) if ported else None


def energy(module: Module) -> float:
    """The module's energy kept; 0 where it is not defined."""
    return (module.energy_kept or 0.0) if isinstance(module, PortedModule) else 0.0


def total(values: Iterable[float | None]) -> float | None:
    """Sum of the known values; ``None`` where none is known."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def in_depth_order(modules: Iterable[Module]) -> list[Module]:
    """The modules from entry to exit; a figure that is no number (a broken file's) counts as unknown."""
    return sorted((_finite(m) for m in modules), key=lambda m: depth_key(m.name))


def _finite(module: Module) -> Module:
    broken = {k: None for k, v in module if isinstance(v, float) and not math.isfinite(v)}
    return module.model_copy(update=broken) if broken else module


def groups(modules: Iterable[Module], limit: int = MARK_LIMIT) -> list[Group]:
    """The modules in depth order: each alone while there are few, else the finest blocks that stay under ``limit``."""
    ordered = in_depth_order(modules)
    if len(ordered) <= limit:
        return [Group(m.name, component_of(m.name), (m,)) for m in ordered]
    numbers: dict[str, set[str]] = {}
    for module in ordered:
        for prefix in _numbered(module.name):
            numbers.setdefault(prefix.rpartition(".")[0], set()).add(prefix)
    found: dict[str, list[Module]] = {}
    for level in (4, 3, 2, 1):
        found = {}
        for module in ordered:
            # A list of one (`transformer_blocks.0` of SD 1.5) divides nothing.
            dividing = [p for p in _numbered(module.name) if len(numbers[p.rpartition(".")[0]]) > 1][:level]
            found.setdefault(dividing[-1] if dividing else block_of(module.name), []).append(module)
        if len(found) <= limit:
            break
    return [Group(name, component_of(members[0].name), tuple(members)) for name, members in found.items()]


@dataclass(frozen=True)
class LeftOut:
    """Modules that were skipped or refused for one reason."""

    status: str
    reason: str
    share: float | None
    names: tuple[str, ...]

    @property
    def where(self) -> str:
        """The blocks they stand in, shortened to three."""
        blocks = list(dict.fromkeys(block_of(name) for name in self.names))
        if len(self.names) <= 3 and len(blocks) > 1:
            blocks = list(self.names)
        return ", ".join(blocks[:3]) + (f" and {len(blocks) - 3} more" if len(blocks) > 3 else "")


def left_out(modules: Iterable[Module]) -> list[LeftOut]:
    """What will not be or was not ported, by reason, the heaviest share first."""
    found: dict[tuple[str, str], list[Module]] = {}
    for module in in_depth_order(modules):
        if module.status != "ported":
            found.setdefault((module.status, module.reason), []).append(module)
    rows = [
        LeftOut(status, reason, total(m.share for m in members), tuple(m.name for m in members))
        for (status, reason), members in found.items()
    ]
    return sorted(rows, key=lambda row: -(row.share or 0.0))


def percent(value: float | None) -> str:
    """``0.0713`` → ``7.1 %``; small shares are not rounded to nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    if 0 < value < 0.001:
        return "<0.1 %"
    return f"{100 * value:.0f} %" if value >= 0.9995 or value == 0 else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """Two decimals, or a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}".replace("-0.00", "0.00")


def significant(value: float | None) -> str:
    """Three significant digits: for a KL, which may be small or large."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"


def whole_percent(value: float) -> str:
    """``0.88`` → ``88 %``: for forecasts, which carry no more digits."""
    return f"{100 * value:.0f} %"


#: What the controls of a measurement are.
CONTROLS = {
    "none": "new base alone",
    "copy": "plain copy",
    "random": "random update of equal norm",
    "native": "trained natively",
}


def effects(verify: VerifyReport) -> dict[str, Effect]:
    """The port's effect and the controls', in one list."""
    port = Effect(effect_cosine=verify.effect_cosine, effect_norm_ratio=verify.effect_norm_ratio, kl=verify.kl)
    return {"this port": port, **verify.controls}


#: What each tier asks of the user, in the fewest words.
TIERS = {
    "port": "carry the weights over",
    "refine": "distil, without data, beginning from what can be carried over",
    "bridge": "the weights can't be carried over; keep the old base beside the new one",
}


def after_word(summary: str, word: str) -> str:
    """The summary without the verdict's word in front, which stands before it already."""
    head, colon, rest = summary.partition(": ")
    if not colon or head.lower() != word.lower():
        return summary
    return rest[:1].upper() + rest[1:]


def further(reasons: Iterable[str], summary: str) -> list[str]:
    """The reasons that the summary has not given in the same words."""
    return [reason for reason in reasons if reason.rstrip(".").lower() not in summary.lower()]
