"""How much noise there is at a timestep: the measure that two schedules are aligned by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.runtime.latents import Latents, predicted
from regraft.runtime.load import Loaded

# Their pipelines turn the prediction's sign, or the clock, before the scheduler sees it.
_TURNED = ("Lumina", "HiDream")
_PREDICTIONS = ("flow", "epsilon", "v_prediction", "sample")
# Below this share of picture or noise a division by it would be one by rounding's errors.
_LEAST = 1e-4


@dataclass(frozen=True)
class Levels:
    """A pipeline's noise levels, as r = σ / α of its states α x + σ ε, whatever its schedule calls them.

    States are as the denoiser reads them: α² + σ² = 1 with ``alphas_cumprod``, α + σ = 1 in flow matching.
    """

    model: Loaded

    def __post_init__(self) -> None:
        """Fail early.

        Raises:
            InputError: the scheduler does not say how much noise there is, or its prediction is another one.
        """
        if type(self.model.pipeline).__name__.startswith(_TURNED):
            what = f"a {type(self.model.pipeline).__name__} turns its predictions about, which is not known here"
            raise InputError(what, file=self.model.path)
        config = getattr(self.model.pipeline.scheduler, "config", None)
        continuous = getattr(config, "timestep_type", "discrete") == "continuous"
        if not Latents(self.model).noise_is_known or self.predicts not in _PREDICTIONS or continuous:
            name = type(self.model.pipeline.scheduler).__name__
            what = f"its scheduler ({name}) does not tell how much noise there is, and what is predicted"
            raise InputError(what, file=self.model.path)

    @cached_property
    def predicts(self) -> str:
        """As `regraft.runtime.latents.predicted`."""
        return predicted(self.model.pipeline)

    @cached_property
    def _table(self) -> Tensor:
        alpha, sigma = Latents(self.model).levels(torch.arange(Latents(self.model).steps))
        return (sigma.double() / alpha.double().clamp_min(_LEAST)).flatten()

    def ratio(self, time: float) -> float:
        """r at a timestep, which may lie between two of the schedule's."""
        if self.predicts == "flow":
            sigma = min(max(time / Latents(self.model).steps, 0.0), 1.0)
            return sigma / max(1 - sigma, _LEAST)
        time = min(max(time, 0.0), len(self._table) - 1.0)
        low = min(int(time), len(self._table) - 2)
        return float(torch.lerp(self._table[low], self._table[low + 1], time - low))

    def time(self, ratio: float) -> float:
        """The timestep of r; the nearest one where the schedule has no such level."""
        if self.predicts == "flow":
            return Latents(self.model).steps * ratio / (1 + ratio)
        table = self._table
        high = int(torch.searchsorted(table, ratio).clamp(1, len(table) - 1))
        low, step = float(table[high - 1]), float(table[high] - table[high - 1])
        time = high - 1 + min(max((ratio - low) / max(step, 1e-12), 0.0), 1.0)
        return float(round(time)) if abs(time - round(time)) < 1e-6 else time

    def mix(self, ratio: float) -> tuple[float, float]:
        """α and σ at r."""
        total = 1 + ratio if self.predicts == "flow" else (1 + ratio**2) ** 0.5
        return 1 / total, ratio / total

    def slope(self, ratio: float) -> float:
        """d x̂ / d prediction: how a change of the prediction at r changes the picture's latents in it."""
        alpha, sigma = self.mix(ratio)
        if self.predicts == "sample":
            return 1.0
        sigma = max(sigma, _LEAST)
        return -sigma / alpha if self.predicts == "epsilon" else -sigma

    def clean(self, prediction: Tensor, z: Tensor, ratio: float) -> Tensor:
        """x̂, the picture's latents in a prediction of the state z at r."""
        if self.predicts == "sample":
            return prediction
        alpha, _ = self.mix(ratio)
        # x̂ = z + slope · prediction, of which noise prediction has z / α and v-prediction α z.
        factor = {"epsilon": 1 / alpha, "v_prediction": alpha}.get(self.predicts, 1.0)
        return factor * z + self.slope(ratio) * prediction
