"""Adapters whose training began by moving a part of the base's weights into them (PiSSA, OLoRA, …).

What PEFT saves of them is an update of what was left of the base: W' = (W − s B₀ A₀) + s B A. Where B₀ A₀ follows from
W alone, the update of the base as it was is had again, ΔW = s (B A − B₀ A₀), at twice the rank:

- PiSSA (Meng et al. 2024, arXiv 2404.02948, eqs. 2 to 4; peft 0.21 ``LoraLayer.pissa_init``): s B₀ A₀ is the sum of W's
  first r singular directions.
- OLoRA (Büyükakyüz 2024, arXiv 2406.01775; ``LoraLayer.olora_init``): B₀ and A₀ are the first r columns of Q and the
  first r rows of R in W = Q R.

Neither product depends on the signs that a decomposition gives its vectors. PiSSA by a randomised decomposition
(``pissa_niter_4``), LoftQ, CorDA and LoRA-GA depend on more than W, and KaSA drops a part of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regraft.adapter import Adapter
from regraft.errors import InputError
from regraft.updates import LowRank

_CHANGED = ("pissa", "olora", "loftq", "corda", "lora_ga")
_KASA = "KaSA"


def changed_by(adapter: Adapter) -> str | None:
    """The initialisation that changed the base before the adapter was trained; None where it was left as it was."""
    config = adapter.config or {}
    if config.get("kasa_config"):
        return _KASA
    initial = str(config.get("init_lora_weights")).lower()
    return initial if initial.startswith(_CHANGED) else None


def check_whole(adapter: Adapter) -> None:
    """Refuse an adapter that is no update of the base as it was.

    Raises:
        InputError: it is none; the remedy says how it becomes one.
    """
    how = changed_by(adapter)
    if how is None:
        return
    remedy = "Save it once more with PEFT's path_initial_model_for_weight_conversion, which makes a LoRA of it."
    if how in (_KASA, "loftq"):
        remedy = "Merge it into its base with PEFT, and take the difference from the plain base: `regraft extract`."
    if how in _TAKEN:
        remedy = "`regraft convert ADAPTER --base OLD --format peft -o PLAIN` makes a LoRA of it."
    raise InputError(
        f"was trained on a base that {how} had changed first, and is no update of the base as it was",
        file=adapter.path,
        key="kasa_config" if how == _KASA else "init_lora_weights",
        remedy=remedy,
    )


def taken_of(adapter: Adapter) -> Callable[[Tensor, LowRank], tuple[Tensor, Tensor]] | None:
    """What the initialisation took out of a weight; None where the base was left as it was.

    Returns:
        A function of the weight (out, in), float32, and its update that gives factors (out, r) and (r, in).

    Raises:
        InputError: it does not follow from the weight.
    """
    how = changed_by(adapter)
    if how is None:
        return None
    if how not in _TAKEN:
        check_whole(adapter)
    return _TAKEN[how]


def _first_directions(weight: Tensor, update: LowRank) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[: update.rank].sqrt()
    return u[:, : update.rank] * root, root[:, None] * vh[: update.rank]


def _first_columns(weight: Tensor, update: LowRank) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(weight)
    return update.scale * q[:, : update.rank], r[: update.rank]


_TAKEN: dict[str, Callable[[Tensor, LowRank], tuple[Tensor, Tensor]]] = {
    "pissa": _first_directions,
    "olora": _first_columns,
}
