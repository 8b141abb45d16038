"""Bridge sampling: the old base runs beside the new one, and what the LoRA changes in it is added at every step.

x̂_new + λ (x̂_old+LoRA − x̂_old), between guided predictions of the picture at one noise level; docs/bridge.md. What the
host offers is imported where it is used: `comfy.sampler_helpers.convert_cond`, `comfy.samplers.process_conds` and
``sampling_function``, `comfy.model_management.load_models_gpu`, and the methods of its ``ModelPatcher``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from regraft.bridge.latent_spaces import shared_change

# A state of pure noise has r = σ / α without end; what lies beyond is the same to float32.
_MOST = 1e4


@dataclass(frozen=True)
class HostLevels:
    """Noise levels of a host's model, by the σ that its samplers count in; predictions are of the picture itself.

    Attributes:
        flow: states are (1 − σ) x + σ ε; else x + σ ε.
        most: highest σ of its schedule.
    """

    flow: bool
    most: float

    @classmethod
    def of(cls, model: Any, what: str) -> HostLevels:
        """Those of a model, by how it mixes noise into a picture: no name of a class tells it for all.

        Raises:
            RuntimeError: it mixes them in another way.
        """
        sampling = model.model.model_sampling
        half, zero, one = torch.tensor([0.5]), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        noise = float(sampling.noise_scaling(half, one, zero).mean())
        picture = float(sampling.noise_scaling(half, zero, one).mean())
        if not math.isclose(noise, 0.5, rel_tol=1e-4) or picture not in (0.5, 1.0):
            raise RuntimeError(
                f"{what} mixes noise and picture in a way that is not known here ({type(sampling).__name__})"
            )
        return cls(picture == 0.5, float(sampling.sigma_max))

    def ratio(self, time: float) -> float:
        """r = σ / α of a state."""
        return min(time / max(1 - time, 1 / _MOST), _MOST) if self.flow else time

    def time(self, ratio: float) -> float:
        """σ of the state with this r, or the nearest that the schedule has."""
        return min(ratio / (1 + ratio) if self.flow else ratio, self.most)

    def mix(self, ratio: float) -> tuple[float, float]:
        """α and σ at r."""
        return (1 / (1 + ratio), ratio / (1 + ratio)) if self.flow else (1.0, ratio)

    def slope(self, ratio: float) -> float:
        """The host's samplers speak of pictures, whatever the model predicts."""
        return 1.0


@dataclass
class Side:
    """The old base, with or without the LoRA, and its prompts.

    Attributes:
        model: the host's patcher.
        positive: prompts as the host's samplers take them.
        negative: likewise.
    """

    model: Any
    positive: Sequence[Any]
    negative: Sequence[Any]
    _ready: dict[Any, Mapping[str, Any]] = field(default_factory=dict)

    def denoised(self, state: Tensor, sigma: Tensor, guidance: float, seed: int | None) -> Tensor:
        """The guided prediction of the picture, (n, channels, …), as the host's own samplers make it."""
        # The host moves weights as it needs room, and two patchers of one model take turns on its weights.
        import_module("comfy.model_management").load_models_gpu([self.model])
        samplers = import_module("comfy.samplers")
        conds = self._conds(samplers, state)
        found: Tensor = samplers.sampling_function(
            self.model.model,
            state,
            sigma,
            conds["negative"],
            conds["positive"],
            guidance,
            model_options=self.model.model_options,
            seed=seed,
        )
        return found

    def _conds(self, samplers: Any, state: Tensor) -> Mapping[str, Any]:
        key = (tuple(state.shape), state.device, state.dtype)
        if key not in self._ready:
            convert = import_module("comfy.sampler_helpers").convert_cond
            conds = {"positive": convert(self.positive), "negative": convert(self.negative)}
            self._ready = {key: samplers.process_conds(self.model.model, state, conds, state.device)}
        return self._ready[key]


@dataclass
class Delta:
    """What is added to the new base's predictions: the host calls it after guidance, at every step.

    Attributes:
        old: the old base.
        adapted: the same with the LoRA.
        levels: of the old base, and of the new one.
        strength: λ.
        guidance: of the old base; None: the sampler's own.
    """

    old: Side
    adapted: Side
    levels: tuple[HostLevels, HostLevels]
    strength: float
    guidance: float | None
    _swapped: bool = False

    def __call__(self, args: Mapping[str, Any]) -> Tensor:
        """The new base's guided prediction with the change, in its dtype.

        Raises:
            RuntimeError: the host does not tell its guidance; the old base gives no numbers.
        """
        denoised: Tensor = args["denoised"]
        if self.strength == 0:
            return denoised
        guidance = args.get("cond_scale") if self.guidance is None else self.guidance
        if guidance is None:
            raise RuntimeError("this ComfyUI does not tell the sampler's cfg; set the node's cfg instead of 0")
        old, new = self.levels
        u: Tensor = args["input"]

        def pair(z: Tensor, time: float) -> tuple[Tensor, Tensor]:
            sigma = torch.full((len(z),), time, device=args["sigma"].device, dtype=args["sigma"].dtype)
            sides = [self.old, self.adapted]
            order = sides[::-1] if self._swapped else sides
            # Begun with the side that came last: weights that both share are changed once a step, not twice.
            self._swapped = not self._swapped
            made = [side.denoised(z.to(u), sigma, guidance, args.get("seed")) for side in order]
            without, adapted = made[::-1] if order is not sides else made
            return without.float(), adapted.float()

        ratio = new.ratio(float(args["sigma"].flatten()[0]))
        change = shared_change(pair, u.float(), ratio, self.strength, old, new)
        if not bool(change.isfinite().all()):
            raise RuntimeError("the old base's predictions are no numbers (NaN)")
        return denoised + change.to(denoised)


def check_sides(new: Any, old: Any, adapted: Any, conds: Sequence[Sequence[Any]]) -> None:
    """Refuse what would draw something else than the formula says.

    Raises:
        RuntimeError: the models' latents differ, two that must have weights of their own share them, or a prompt
            carries what only its own sampler can run.
    """
    if old.model is new.model or adapted.model is new.model:
        raise RuntimeError("the old and the new model come from one loader: there is nothing to bridge")
    if type(old.model) is not type(adapted.model):
        raise RuntimeError(
            "old_model and old_model_with_lora are of different architectures: the LoRA goes on old_model"
        )
    ours, theirs = (model.model.latent_format for model in (old, new))
    for other, name in ((theirs, "the new model"), (adapted.model.latent_format, "old_model_with_lora")):
        if not same_format(ours, other):
            raise RuntimeError(
                f"the latents of old_model ({_told(ours)}) and of {name} ({_told(other)}) differ: "
                "what changes in one is no change of the other; `regraft bridge run` goes through pixels"
            )
    for _, options in (entry for cond in conds for entry in cond):
        lost = [name for name in ("control", "hooks", "gligen") if options.get(name) is not None]
        if lost:
            raise RuntimeError(f"the old model's prompts carry {lost[0]}, which the bridge does not run; leave it out")


def same_format(first: Any, second: Any) -> bool:
    """Whether two of the host's latent formats have the same channels, scale and shift: both are tried on numbers."""
    if (first.latent_channels, _dimensions(first)) != (second.latent_channels, _dimensions(second)):
        return False
    shape = (1, first.latent_channels, *[2] * _dimensions(first))
    tried = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    return torch.allclose(first.process_in(tried.clone()), second.process_in(tried.clone()), rtol=1e-4, atol=1e-6)


def _dimensions(format: Any) -> int:
    return int(getattr(format, "latent_dimensions", 2))


def _told(format: Any) -> str:
    return f"{type(format).__name__}, {format.latent_channels} channels, scale {getattr(format, 'scale_factor', 1.0):g}"


class BridgeDelta:
    """A model that draws with the new base and, at every step, hears what the LoRA changes in the old one."""

    CATEGORY, FUNCTION = "loaders/regraft", "run"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    DESCRIPTION = "Adds what a LoRA changes in the old model's picture to the new model's, at every step of sampling."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The new base, to sample with."}),
                "old_model": ("MODEL", {"tooltip": "The base that the LoRA was trained on, without it."}),
                "old_model_with_lora": ("MODEL", {"tooltip": "The same after Load LoRA."}),
                "old_positive": ("CONDITIONING", {"tooltip": "The prompt by the old base's CLIP, without the LoRA."}),
                "old_negative": ("CONDITIONING",),
                "strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01, "tooltip": "λ"}),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.1,
                        "tooltip": "Of the old base; 0: the sampler's.",
                    },
                ),
            },
            "optional": {
                "lora_positive": ("CONDITIONING", {"tooltip": "The prompt by the CLIP after Load LoRA."}),
                "lora_negative": ("CONDITIONING",),
            },
        }

    def run(
        self,
        model: Any,
        old_model: Any,
        old_model_with_lora: Any,
        old_positive: Any,
        old_negative: Any,
        strength: float,
        cfg: float,
        lora_positive: Any = None,
        lora_negative: Any = None,
    ) -> tuple[Any]:
        """Nothing is sampled yet.

        Raises:
            RuntimeError: the two can't be bridged so; the host shows the line.
        """
        plain = old_positive, old_negative
        # A LoRA of the text encoder acts through the prompts.
        changed = lora_positive or old_positive, lora_negative or old_negative
        check_sides(model, old_model, old_model_with_lora, (*plain, *changed))
        if old_model is old_model_with_lora and changed == plain:
            raise RuntimeError("old_model and old_model_with_lora are the same: put the LoRA on the second one")
        levels = HostLevels.of(old_model, "old_model"), HostLevels.of(model, "the new model")
        old, adapted = Side(old_model, *plain), Side(old_model_with_lora, *changed)
        bridged = model.clone()
        bridged.set_model_sampler_post_cfg_function(Delta(old, adapted, levels, strength, cfg or None))
        if strength != 0 and hasattr(bridged, "set_additional_models"):
            # Room for them is made before sampling begins, so that it does not push out the model that samples.
            own = [old_model] if old_model.model is old_model_with_lora.model else [old_model, old_model_with_lora]
            bridged.set_additional_models("regraft_bridge", own)
        return (bridged,)


NODE_CLASS_MAPPINGS = {"RegraftBridgeDelta": BridgeDelta}
NODE_DISPLAY_NAME_MAPPINGS = {"RegraftBridgeDelta": "Bridge sampling (delta) (regraft)"}
