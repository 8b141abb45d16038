"""Tuners whose adapters are made to be carried over: LoRA-X, FouRA and SVDiff, as PEFT tuners.

Importing this registers them with PEFT, which must have happened before it loads one of their files.

>>> import peft
>>> from regraft.tuners import LoraXConfig
>>> model = peft.get_peft_model(model, LoraXConfig(r=64, target_modules=["q_proj", "v_proj"]))
"""

from regraft.tuners._register import check_version

check_version()

from regraft.tuners.foura import FouraConfig, FouraModel  # noqa: E402
from regraft.tuners.lorax import LoraXConfig, LoraXModel, transfer_lorax  # noqa: E402
from regraft.tuners.svdiff import (  # noqa: E402
    SvdiffConfig,
    SvdiffModel,
    load_spectral_shifts,
    save_spectral_shifts,
)

__all__ = [
    "FouraConfig",
    "FouraModel",
    "LoraXConfig",
    "LoraXModel",
    "SvdiffConfig",
    "SvdiffModel",
    "load_spectral_shifts",
    "save_spectral_shifts",
    "transfer_lorax",
]
