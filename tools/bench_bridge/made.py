"""Adapters of the new base made of the old one's: by `stream`, by a refine, and of what the bridge shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.bench_bridge.styles import GUIDANCE, NEW, OLD, STEPS, Case

from regraft.adapter import Adapter
from regraft.base import Base, open_base
from regraft.bench.diffusion_recipes import AdapterRecipe
from regraft.carry import Settings
from regraft.formats import load_adapter
from regraft.methods.task import Running
from regraft.port import port
from regraft.refine import RefineSettings, drawn, refine
from regraft.refine.starting import STREAM, ZERO
from regraft.refine.state import forget

#: What is run by the new base alone; the last two are trained, from no effect.
REFINE, DISTILLED = "refine", "distilled"
MADE = (STREAM, REFINE, DISTILLED)

# A refine learns from pictures of as many steps as those that are measured.
assert drawn.STEPS == STEPS


def made(case: Case, way: str, mapper: Path | None = None, *, steps: int | None = None) -> Adapter:
    """An adapter of the new base, which is made if it is missing.

    Args:
        case: the old base's adapter, and the seed of what it is taught with.
        way: one of `MADE`.
        mapper: of the bridge that is distilled.
        steps: of a refine's training, at most; None for its own. Those of another number lie beside it.
    """
    counted = f"-{steps}-steps" if steps is not None and way != STREAM else ""
    file = case.bench.shop.cache / "bridge" / "adapters" / f"{way}-{case.name}-{case.seed}{counted}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        adapter = case.bench.adapter(OLD, case.name, case.seed)
        bases = [open_base(case.bench.shop.base(which)) for which in (OLD, NEW)]
        if way == STREAM:
            # Between these bases it is refused: here it is a control.
            running = Running(seed=case.seed, prompts=case.prompts)
            result: Any = port(
                adapter, *bases, STREAM, settings=Settings(force=True, allow_partial=True, running=running)
            )
        else:
            result = _refined(case, adapter, bases, settings_of(case, way, mapper, steps), file)
        result.save(file)
        file.with_suffix(".json").write_text(result.report.model_dump_json(indent=1), encoding="utf-8")
    return load_adapter(file)


def settings_of(case: Case, way: str, mapper: Path | None, steps: int | None) -> RefineSettings:
    """Of a refine by the old base with its adapter, or by the bridge: as `Case` draws with either."""
    # At the rate that native ones are trained with.
    rate = AdapterRecipe.rate
    plain = RefineSettings(steps=steps, rate=rate, prompts=case.prompts, seed=case.seed, guidance=GUIDANCE)
    if way == REFINE:
        return plain
    assert mapper is not None
    return replace(plain, teacher="bridge", mapper=mapper)


def _refined(case: Case, adapter: Adapter, bases: list[Base], settings: RefineSettings, file: Path) -> Any:
    state = file.with_suffix(".state.pt")
    result = refine(
        adapter,
        *bases,
        start=ZERO,
        settings=settings,
        state=state,
        heard=lambda look: print(file.stem, look, flush=True),
    )
    forget(state)
    return result
