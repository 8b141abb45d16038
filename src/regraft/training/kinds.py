"""The kinds of adapter that can be trained: PEFT's own tuners and `regraft.tuners`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from regraft.errors import InputError, UsageError, first_line
from regraft.runtime.libraries import library


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Attributes:
        config: name of its config class.
        module: that the class is in.
        rank: default r; None where it has none, or its config has one of its own.
        rate: default peak of AdamW's learning rate.
        fields: our names → those of its config.
        fixed: further fields of its config.
        file: format that a pipeline's adapter is written in where a file is asked for; None where only PEFT's folder
            holds it.
        by_weight: it is computed from the base's weights, which must be whole.
        linear: it changes linear layers alone, no convolutions.
    """

    config: str
    module: str = "peft"
    rank: int | None = 16
    rate: float = 2e-4
    fields: Mapping[str, str] = field(default_factory=lambda: {"rank": "r", "alpha": "lora_alpha"})
    fixed: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None
    by_weight: bool = False
    linear: bool = False


_OURS = "regraft.tuners"
_LYCORIS = {"rank": "r", "alpha": "alpha"}
_LORA = "diffusers"

#: Name → kind. Learning rates: of LoRA and its kin that of QLoRA's paper (arXiv 2305.14314, table 9); of VeRA,
#: FourierFT and IA3, which train few numbers, of the order of their papers'. LoRA-X's paper names none, and SVDiff's,
#: 1e-3, is for few pictures: the rates that were best on the development adapters of `regraft.bench`, brought to layers
#: of 1280. There as here, a first step moves the largest singular value of the change two to four times as far as
#: LoRA's rate does.
KINDS: dict[str, Kind] = {
    "lora": Kind("LoraConfig", file=_LORA),
    "rslora": Kind("LoraConfig", fixed={"use_rslora": True}, file=_LORA),
    "dora": Kind("LoraConfig", fixed={"use_dora": True}, file=_LORA),
    "pissa": Kind("LoraConfig", fixed={"init_lora_weights": "pissa"}, file=_LORA, linear=True),
    "loha": Kind("LoHaConfig", rank=8, fields=_LYCORIS, file="lycoris"),
    "lokr": Kind("LoKrConfig", rank=8, fields=_LYCORIS, file="lycoris"),
    "oft": Kind("OFTConfig", rank=8, rate=1e-3, fields={"rank": "r"}, fixed={"oft_block_size": 0}),
    "boft": Kind("BOFTConfig", rank=None, rate=1e-3, fields={}),
    # Which modules are scaled at their inputs PEFT knows of few models: at their outputs, unless --set says otherwise.
    "ia3": Kind("IA3Config", rank=None, rate=3e-3, fields={}, fixed={"feedforward_modules": []}),
    "vera": Kind("VeraConfig", rank=256, rate=4e-3, fields={"rank": "r"}, linear=True),
    "fourierft": Kind("FourierFTConfig", rank=None, rate=2e-2, fields={}, linear=True),
    "lorax": Kind("LoraXConfig", _OURS, rank=None, rate=2e-2, fields={"rank": "r"}, by_weight=True),
    "svdiff": Kind("SvdiffConfig", _OURS, rank=None, rate=2e-2, fields={}, by_weight=True),
    "foura": Kind("FouraConfig", _OURS, fields={"rank": "r", "alpha": "foura_alpha"}),
}

# The linear layers and projections of a denoiser's transformer blocks, as kohya's scripts change them; those of the
# text's stream (SD 3) behind those of the picture's.
_DENOISER: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
_DENOISER += ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
_BLOCK = re.compile(r"blocks?\.")


def rates() -> str:
    """The kinds' default learning rates, in words."""
    by_rate: dict[float, list[str]] = {}
    for name, kind in KINDS.items():
        by_rate.setdefault(kind.rate, []).append(name)
    return "; ".join(f"{rate:.0e} ({', '.join(names)})".replace("e-0", "e-") for rate, names in sorted(by_rate.items()))


def kind_of(name: str) -> Kind:
    """The kind of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in KINDS:
        raise UsageError(f"no kind of adapter is named {name!r}", remedy=f"Known: {', '.join(KINDS)}.")
    return KINDS[name]


def config_of(
    name: str,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    targets: tuple[str, ...] = (),
    options: Mapping[str, Any] | None = None,
) -> Any:
    """PEFT's config of a kind.

    Args:
        name: of the kind.
        rank: None for its default.
        alpha: None for the rank.
        targets: as PEFT takes them.
        options: further fields, which go before all others.

    Raises:
        UsageError: the kind has no rank or no alpha, or its config has no such field or refuses its value.
    """
    kind = kind_of(name)
    rank = rank or kind.rank
    # Given as a field, r is the rank that alpha goes by, too.
    final = (options or {}).get(kind.fields.get("rank", ""), rank)
    asked = {"rank": rank, "alpha": final if alpha is None and "alpha" in kind.fields else alpha}
    for ours, value in asked.items():
        if value is not None and ours not in kind.fields:
            raise UsageError(f"a {name} has no {ours}", remedy=f"Leave --{ours} out.")
    fields = {kind.fields[ours]: value for ours, value in asked.items() if value is not None}
    whole = targets[0] if targets == ("all-linear",) else list(targets)
    made = {"target_modules": whole, **fields, **kind.fixed, **(options or {})}
    if kind.config == "LoraConfig" and isinstance(made["lora_alpha"], float) and made["lora_alpha"].is_integer():
        made["lora_alpha"] = int(made["lora_alpha"])
    try:
        return getattr(library(kind.module), kind.config)(**made)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"PEFT makes no {name} of this ({first_line(error)})", remedy="Check --set.") from error


def default_targets(model: nn.Module, kind: str, *, denoiser: bool) -> tuple[str, ...]:
    """What is changed by default: every linear layer of a language model, the transformer blocks of a denoiser.

    Args:
        model: that is to be trained.
        kind: of the adapter.
        denoiser: whether the model is one.

    Raises:
        InputError: it has none of them.
    """
    if not denoiser:
        return ("all-linear",)
    unfit: dict[str, bool] = {}
    for name, module in model.named_modules():
        for end in _DENOISER:
            if name == end or name.endswith(f".{end}"):
                # An end that is a layer outside of the blocks, too, would take that with it.
                other = not _BLOCK.search(name) or (kind_of(kind).linear and not isinstance(module, nn.Linear))
                unfit[end] = unfit.get(end, False) or other
    found = tuple(end for end in _DENOISER if not unfit.get(end, True))
    if not found:
        what = f"a {type(model).__name__} has no attention layers of the usual names"
        raise InputError(what, remedy="Use --targets.")
    return found


def settle(tuned: Any, kind: str) -> str:
    """Fix what depends on the input, so that a trained adapter is a change of weights; told in words.

    Args:
        tuned: PEFT's model.
        kind: of its adapter.
    """
    if kind != "foura" or tuned.peft_config["default"].gate != "adaptive":
        return ""
    tuned.base_model.freeze_gate()
    return "its gate was frozen to the directions that were open for at least half of the training's inputs"
