"""How PEFT cuts a LoKr: on loading it works out every size from its config, so that a foreign file must agree with it.

Facts (peft 0.21.2, ``tuners/lokr/layer.py``): out = l · k and in = m · n are cut by one ``decompose_factor``; w2 is a
product where r < max(k, n) / 2, and w1 where ``decompose_both`` is set and r < max(l, m) / 2; kernels are Tucker cores
with ``use_effective_conv2d``.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import ceil, isqrt
from typing import Any

from regraft.updates import LoKr


def factorised(size: int, factor: int) -> tuple[int, int]:
    """The two divisors that a size is cut into; with -1 they are as near to each other as can be, smaller one first.

    >>> factorised(320, -1), factorised(320, 8), factorised(10, 4)
    ((16, 20), (8, 40), (2, 5))
    """
    if factor > 0 and size % factor == 0:
        # LyCORIS puts the smaller one first here too.
        small = factor
    else:
        limit = isqrt(size) if factor < 0 else min(factor, isqrt(size))
        small = next(divisor for divisor in range(limit, 0, -1) if size % divisor == 0)
    return small, size // small


def lokr_config(updates: Mapping[str, LoKr]) -> tuple[dict[str, Any], dict[str, int]] | None:
    """The config fields and every module's rank by which PEFT cuts just as these are cut; None if there are none.

    Args:
        updates: module path → update.
    """
    kernels = {update.t2 is not None for update in updates.values() if update.t2 is not None or _has_kernel(update)}
    if len(kernels) > 1:
        return None
    factors = sorted({half[0] for update in updates.values() for half in _halves(update)} - {1})
    for factor, both in product((-1, *factors), (False, True)):
        ranks = {path: _rank(update, factor, both=both) for path, update in updates.items()}
        if all(ranks.values()):
            fields = {
                "decompose_factor": factor,
                "decompose_both": both,
                "use_effective_conv2d": kernels == {True},
            }
            return fields, {path: rank for path, rank in ranks.items() if rank is not None}
    return None


def _has_kernel(update: LoKr) -> bool:
    return update.w2 is None and update.weight_shape is not None and max(update.weight_shape[2:], default=1) > 1


def _halves(update: LoKr) -> tuple[tuple[int, int], tuple[int, int]]:
    """((l, k), (m, n))."""
    one, two = update.half_shapes()
    kernel = 1
    if len(two) == 2 and update.weight_shape is not None:
        for size in update.weight_shape[2:]:
            kernel *= size
    return (one[0], two[0]), (one[1], two[1] // kernel)


def _rank(update: LoKr, factor: int, *, both: bool) -> int | None:
    """The r with which PEFT makes the same tensors of this module, or None."""
    (out_1, k), (in_1, n) = _halves(update)
    if (out_1, k) != factorised(out_1 * k, factor) or (in_1, n) != factorised(in_1 * n, factor):
        return None
    # Full halves know no rank: the smallest that keeps PEFT from cutting them.
    rank = update.rank or ceil(max(k, n) / 2)
    low_w2, low_w1 = rank < max(k, n) / 2, both and rank < max(out_1, in_1) / 2
    if low_w1 != (update.w1 is None) or low_w2 != (update.w2 is None):
        return None
    if update.w1_b is not None and update.w2_b is not None and update.w1_b.shape[0] != update.w2_b.shape[0]:
        return None
    return rank
