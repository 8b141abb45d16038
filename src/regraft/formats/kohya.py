"""kohya's sd-scripts, and the tools that write its grammar (A1111, ComfyUI and diffusers read it).

Facts (sd-scripts 48d368f):

- Key: prefix + ``_`` + module path with every ``.`` as ``_``; then ``.lora_down.weight`` (r, in), ``.lora_up.weight``
  (out, r), ``.alpha``. Only the first ``.`` splits. The way back is ambiguous (``to_q``, ``proj_in``), so it is looked
  up in the families' tables, or in the base's own names; never guessed.
- Prefixes: ``lora_unet``, for transformers too; ``lora_te`` (SD 1.x, 2.x), ``lora_te1`` and ``lora_te2`` (SDXL, SD 3),
  ``lora_te3`` (T5 of SD 3 and Flux; OneTrainer writes Flux' T5 as ``lora_te2``). Wan-Fun's trainer has ``lora_unet__``.
- SD 1.x and 2.x: diffusers names. SDXL: sgm names (``input_blocks_4_1_…``); diffusers names from OneTrainer and
  others. SD 3, Flux and later: the names of the model's own code, with its fused projections.
- Scale = alpha / r, r = rows of ``lora_down``. Alpha is a scalar tensor of any dtype, integers too; missing it counts
  as r, and so does 0.
- Convolution: down (r, in, kh, kw), up (out, r, 1, 1); a 1 × 1 convolution stays 4-D.
- DoRA (LyCORIS, OneTrainer): ``dora_scale``, (out, 1, …) per output or (1, in, …) per input.
- Text encoders always have the level ``text_model``; transformers 5 leaves it out of its names.
- Flux' ``split_qkv`` stores rank 3 r (4 r for ``linear1``) with alpha unchanged; every reader takes alpha / rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from regraft.adapter import Adapter
from regraft.families import get_family
from regraft.formats import AdapterFile, BaseNames, Format, Written
from regraft.formats._emit import Spelling, write
from regraft.formats._grammar import MAIN, Prefix, read, split_prefix
from regraft.updates import Update

PREFIXES = (
    Prefix("lora_unet_", MAIN, flat=True),
    Prefix("lora_unet__", MAIN, flat=True),
    Prefix("lora_transformer_", MAIN, flat=True),
    Prefix("lycoris_", MAIN, flat=True),
    Prefix("lora_te_", "text_encoder", flat=True),
    Prefix("lora_te1_", "text_encoder", flat=True),
    Prefix("lora_te2_", "text_encoder_2", flat=True),
    Prefix("lora_te3_", "text_encoder_3", flat=True),
)
_SPELLING = Spelling("kohya", PREFIXES)


def is_flat(file: AdapterFile) -> bool:
    """Whether a file has this grammar."""
    return any(split_prefix(key, PREFIXES) is not None for key in file.tensors)


def read_flat(file: AdapterFile, names: BaseNames | None, format: str) -> Adapter:
    """A file of this grammar, as the format of that name."""
    return read(file, names, format, PREFIXES)


def stated(adapter: Adapter, network: str) -> dict[str, str]:
    """The metadata that sd-scripts' own readers look for.

    Args:
        adapter: to be written.
        network: of the module that trains such a file (``networks.lora``).
    """
    updates = list(adapter.updates.values())
    ranks = {update.rank for update in updates if update.rank is not None}
    family = get_family(adapter.family)
    version = family.data.get("ss_base_model_version") if family else None
    return {
        "ss_network_module": network,
        "ss_network_dim": str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": _usual_alpha(updates),
        **({"ss_v2": str(adapter.family == "sd2"), "ss_base_model_version": version} if version else {}),
    }


def _usual_alpha(updates: Iterable[Update]) -> str:
    alphas = Counter(getattr(update, "scale", 1.0) * update.rank for update in updates if update.rank is not None)
    return f"{alphas.most_common(1)[0][0]:.6g}" if alphas else "1"


def _read(file: AdapterFile, names: BaseNames | None) -> Adapter:
    return read_flat(file, names, "kohya")


def _write(adapter: Adapter) -> Written:
    return write(adapter, _SPELLING, stated(adapter, "networks.lora"))


FORMAT = Format("kohya", "kohya sd-scripts (Automatic1111, ComfyUI)", 60, is_flat, _read, _write)
