"""Updates read from a module's own state dict, by the suffixes that the tools write."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from regraft.tensors import InMemory, Shape, TensorRef
from regraft.updates import Boft, Diff, GLora, Ia3, LoHa, LoKr, LowRank, Oft, Tucker, Update, scale_of

_LORA = {"lora_up.weight": "up", "lora_down.weight": "down", "lora_mid.weight": "mid", "dora_scale": "magnitude"}


def from_lycoris(state: Mapping[str, Tensor], weight_shape: Shape | None = None) -> Update:
    """The update that LyCORIS' state dict of one module holds."""
    refs: dict[str, TensorRef] = {key: InMemory(value.detach().clone()) for key, value in state.items()}
    alpha = float(refs["alpha"].load()) if "alpha" in refs else None
    if "lora_up.weight" in refs:
        fields = {_LORA.get(key, key): ref for key, ref in refs.items()}
        kind = Tucker if "mid" in fields else LowRank
        return kind(scale=scale_of(alpha, fields["down"].shape[0]), **fields)
    if "hada_w1_a" in refs:
        fields = {_LORA.get(key, key).removeprefix("hada_"): ref for key, ref in refs.items()}
        return LoHa(scale=scale_of(alpha, fields["w1_b"].shape[0]), weight_shape=weight_shape, **fields)
    if any(key.startswith("lokr_") for key in refs):
        fields = {_LORA.get(key, key).removeprefix("lokr_"): ref for key, ref in refs.items()}
        low = fields.get("w1_b") or fields.get("w2_b")
        rank = None if low is None else low.shape[0]
        return LoKr(scale=scale_of(alpha, rank), weight_shape=weight_shape, **fields)
    if "oft_blocks" in refs:
        kind = Oft if len(refs["oft_blocks"].shape) == 3 else Boft
        return kind(refs["oft_blocks"], refs.get("rescale"), refs.get("alpha"))
    if "a1.weight" in refs:
        fields = {key.removesuffix(".weight"): ref for key, ref in refs.items()}
        return GLora(scale=scale_of(alpha, fields["a2"].shape[0]), **fields)
    if "on_input" in refs:
        return Ia3(refs["weight"], refs["on_input"])
    key = next(key for key in ("diff", "w_norm", "diff_b", "b_norm") if key in refs)
    return Diff(refs[key], key)
