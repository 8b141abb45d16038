"""Few-step adapters (LCM, Lightning and the like), told by what they do, and judged by what they are for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regraft.adapter import Adapter, ModuleRef
from regraft.methods.task import AdapterTask
from regraft.probes.diffusion import prompts_for, reads_prompts, sample_latents
from regraft.probes.sentences import PICTURE_PROMPTS
from regraft.runtime.applied import applied
from regraft.runtime.load import Loaded
from regraft.updates import Update

#: Steps that such adapters are made for, and those of the guided run that they are to come near.
FEW, MANY = (2, 4, 8), 24
# Guidance that may have been distilled with them; None is the pipeline's own.
_GUIDANCE = (None, 4.0, 2.0)
_PICTURES = 12
# Of the plain base's distance to its own guided pictures, at most this is left where an adapter shortens the way.
_SHORTENED = 0.7


@dataclass(frozen=True)
class FewSteps:
    """A few-step adapter's purpose on the new base.

    Attributes:
        task: the adapter and both bases.
        steps: unguided ones that the adapter is best at.
        texts: prompts, one per picture.
        aims: the new base's own pictures of many guided steps, latents (n, …).
        plain: mean squared distance of its own few unguided steps to them.
    """

    task: AdapterTask
    steps: int
    texts: Sequence[str]
    aims: Tensor
    plain: float

    @classmethod
    def of(cls, task: AdapterTask) -> FewSteps | None:
        """None where the adapter does not bring the old base's few unguided steps near to its many guided ones."""
        old, new = task.models.old, task.models.new
        if not all(model.pipeline is not None and _guided(model) for model in (old, new)):
            return None
        given = list(task.prompts if task.prompts is not None else PICTURE_PROMPTS)
        texts = prompts_for(given, _PICTURES, task.seed)
        aims = {guidance: _drawn(old, texts, task.seed, MANY, guidance) for guidance in _GUIDANCE}
        found, least = None, _SHORTENED
        for steps in FEW:
            without = _drawn(old, texts, task.seed, steps, 1.0)
            with applied(old.components, task.adapter):
                ours = _drawn(old, texts, task.seed, steps, 1.0)
            for guidance, aim in aims.items():
                left = _distance(ours, aim) / max(_distance(without, aim), 1e-30)
                if left < least:
                    found, least = (steps, guidance), left
        if found is None:
            return None
        steps, guidance = found
        aim = _drawn(new, texts, task.seed, MANY, guidance)
        return cls(task, steps, texts, aim, _distance(_drawn(new, texts, task.seed, steps, 1.0), aim))

    @torch.no_grad()
    def error(self, updates: Mapping[ModuleRef, Update]) -> float:
        """Of a ported adapter's updates: what is left of the plain new base's distance, so that 0 is perfect."""
        new = self.task.models.new
        ported: Adapter = replace(self.task.adapter, updates=updates)
        with applied(new.components, ported):
            drawn = _drawn(new, self.texts, self.task.seed, self.steps, 1.0)
        return _distance(drawn, self.aims) / max(self.plain, 1e-30)


def _guided(model: Loaded) -> bool:
    return reads_prompts(model) and "guidance_scale" in inspect.signature(model.pipeline.__call__).parameters


@torch.no_grad()
def _drawn(model: Loaded, texts: Sequence[str], seed: int, steps: int, guidance: float | None) -> Tensor:
    drawn: Tensor = sample_latents(model, list(texts), seed, num_inference_steps=steps, guidance_scale=guidance)
    return drawn.float().cpu()


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean())
