"""How an adapter is refined."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from regraft.bridge.delta import Course
from regraft.bridge.x_adapter.settings import Joining, Reading
from regraft.refine.quantised import Quantize

#: What is matched: the adapter's effect, the old base's own outputs with it, something between; or no outputs at all,
#: but what the old base writes or draws with it is learnt.
Objective = Literal["auto", "effect", "output", "mixed", "sample"]
#: Whose pictures are learnt: the old base's with its adapter, or those of a bridge between the two.
TeacherKind = Literal["adapter", "bridge"]
#: Objective → how far its aim is pulled from the new base's own outputs to the old base's.
PULLS = {"effect": 0.0, "mixed": 0.5, "output": 1.0}

#: Where there is no room for both bases.
REMEDY = "Free some, take --low-memory, or a device or a machine with more."
#: By default, at most; from afar much is yet to be learnt, and few texts are soon learnt by heart.
STEPS, FAR_STEPS, FAR_TEXTS = 240, 480, 768
#: Of the steps, by default.
RETENTION = 0.25


@dataclass(frozen=True)
class RefineSettings:
    """How an adapter is refined.

    Attributes:
        objective: see `regraft.refine.aims`, and for ``sample`` `regraft.refine.samples`; ``auto`` chooses by what the
            pair shares.
        steps: at most; None for `STEPS`, or `FAR_STEPS`.
        rate: AdamW's learning rate at its peak.
        teacher: see `TeacherKind`.
        mapper: of a bridge by X-Adapter; None for one by delta sampling.
        bridge_strength: λ of a bridge; it may go from one number to another over the sampling.
        guidance: that pictures to learn from are drawn with; None: each pipeline's own default.
        bridge_start: with a mapper, see `regraft.bridge.x_adapter.settings.Joining`, as the next four.
        lead: likewise.
        reading: likewise.
        new_prompt: likewise.
        new_guidance: likewise.
        hidden: weight of the change of hidden states beside the outputs; see `regraft.refine.hidden`.
        retention: share of the steps that are spent on inputs that the new base made; None for `RETENTION`, or 0 of
            pictures that are learnt as samples.
        stay: how far the new base is to stay itself there, 0 (with the adapter's effect) to 1 (as it is alone).
        patience: looks at held-out inputs without a gain, after which it stops.
        look: steps from one such look to the next.
        n_inputs: that the old base and the old base with its adapter make; None for the default of their kind.
        prompts: texts instead of made ones.
        filter: share of the samples made that is left out: those on which the adapter matters least (``sample``).
        seed: of inputs, order and padding.
        budget: seconds; None for no limit.
        rank: of the result; None for that of the start.
        targets: patterns of further modules of the new base to train, by name.
        config: of bare weights files.
        device: ``cpu``, ``cuda`` or ``mps``.
        precision: of the student's passes, as accelerate names it.
        quantize: how the student's base is held; see `regraft.refine.quantised`.
        low_memory: never hold both bases on the device at once: they take turns, and what the old one says is kept.
        checkpointing: save memory by computing activations twice.
        optimizer: ``adamw``, or ``adamw8bit`` (bitsandbytes).
    """

    objective: Objective = "auto"
    teacher: TeacherKind = "adapter"
    mapper: Path | None = None
    bridge_strength: Course = 1.0
    guidance: float | None = None
    bridge_start: float = Joining.start
    lead: float | None = Joining.lead
    reading: Reading = Joining.reading
    new_prompt: str = Joining.new_prompt
    new_guidance: float = Joining.new_guidance
    steps: int | None = None
    rate: float = 2e-3
    hidden: float = 0.0
    retention: float | None = None
    stay: float = 0.0
    patience: int = 4
    look: int = 20
    n_inputs: int | None = None
    prompts: tuple[str, ...] | None = None
    filter: float = 0.0
    seed: int = 0
    budget: float | None = None
    rank: int | None = None
    targets: tuple[str, ...] = ()
    config: Path | None = None
    device: str = "cpu"
    precision: Literal["no", "fp16", "bf16"] = "no"
    quantize: Quantize = "none"
    low_memory: bool = False
    checkpointing: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"

    @property
    def kept(self) -> float:
        """The share of the steps for retention."""
        return RETENTION if self.retention is None else self.retention

    @property
    def joining(self) -> Joining:
        """How the new base joins, in a bridge by X-Adapter."""
        return Joining(self.bridge_start, self.lead, self.reading, self.new_prompt, self.new_guidance)


def settled(settings: RefineSettings, *, far: bool, texts: bool, sampled: bool) -> RefineSettings:
    """The same with what was left to the pair decided.

    On tuning adapters, share of native: from scratch at another width and depth, at rank 32, 0.83 with 192 texts, where
    held-out ones stopped it at step 200, and 0.93 with 768 and 480 steps; pruned, 0.91 with 192 texts, stopped too.

    Args:
        settings: as asked for.
        far: the bases are built differently, or it begins without effect or from `stream`.
        texts: inputs are texts.
        sampled: they are samples to learn from.
    """
    steps = settings.steps or (FAR_STEPS if far else STEPS)
    n_inputs = settings.n_inputs or (FAR_TEXTS if far and texts else None)
    retention = 0.0 if settings.retention is None and sampled and not texts else settings.kept
    return replace(settings, steps=steps, n_inputs=n_inputs, retention=retention)
