"""Cross-LoRA: projection onto the old base's singular subspaces, aligned with the new base's."""

from __future__ import annotations

from torch import Tensor

from regraft.methods import method
from regraft.methods._subspace import index_matched, subspaces
from regraft.transport import Transport, projection


@method(
    "cross-lora",
    reference="Cross-LoRA (Xia et al. 2025, arXiv 2508.05232, eq. 1 to 7)",
    summary="Projects the update onto truncated singular subspaces, aligned by least squares; any size.",
    needs=("old", "new"),
    resizes=True,
)
def cross_lora(old: Tensor, new: Tensor, *, subspace_rank: int | float = 320) -> Transport:
    """ΔW_new = Ũ Ũᵀ ΔW Ṽ Ṽᵀ (eq. 7), Ũ = P U_s with P = argmin ‖P U_s − U_t‖_F (eq. 3 to 6), and so for V.

    The columns of U_s are orthonormal: the least squares are solved exactly by P = U_t U_s⁺, and Ũ is U_t itself.
    Between weights of one size the published rule is therefore LoRA-X's projection at a fixed rank (`lora-x`): the
    alignment drops out. Between sizes eq. 7 multiplies Ũᵀ (r, out') with ΔW (out, in), which do not fit; read in the
    old subspace's coordinates instead, ΔW_new = Ũ U_sᵀ ΔW V_s Ṽᵀ, it is LoRA-X's rule for other sizes, whose signs
    `index_matched` settles. The paper's algorithm 1 projects the factors A and B one side each: the same product.

    Args:
        old: old weight (out, in).
        new: new weight (out', in').
        subspace_rank: r, at most the full rank; the paper's is 320.
    """
    u, v = subspaces(new, subspace_rank, None)
    if old.shape == new.shape:
        return Transport(((projection(u), projection(v)),))
    return index_matched(*subspaces(old, subspace_rank, None), u, v)
