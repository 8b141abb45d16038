"""Products of maps and transports, exact in form: no factor is multiplied out unless that is smaller.

(c₂ I + D₂ + L₂R₂)(c₁ I + D₁ + L₁R₁) is again of that form, and Σ L₂ (Σ L₁ ΔW R₁) R₂ = ΣΣ (L₂L₁) ΔW (R₁R₂).
Products are taken in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.transport import LinearMap, Transport

_Key = tuple[object, ...]


class Products:
    """Products of maps, each taken once: maps that modules share stay shared, and so do transposes."""

    def __init__(self) -> None:
        # The factors are kept beside the product: their addresses must not be given to another tensor meanwhile.
        self._known: dict[_Key, tuple[LinearMap, LinearMap, LinearMap]] = {}

    def __call__(self, second: LinearMap, first: LinearMap) -> LinearMap:
        """x ↦ second(first(x))."""
        if first.is_identity:
            return second
        if second.is_identity:
            return first
        known = self._known.get((_key(second), _key(first)))
        if known is not None:
            return known[0]
        turned = self._known.get((_key(first.T), _key(second.T)))
        found = product(second, first) if turned is None else turned[0].T
        self._known[_key(second), _key(first)] = (found, second, first)
        return found

    def transport(self, second: Transport, first: Transport) -> Transport:
        """ΔW ↦ second(first(ΔW))."""
        before, after = first.terms, second.terms
        terms = tuple((self(left2, left1), self(right1, right2)) for left1, right1 in before for left2, right2 in after)
        return Transport(terms, first.rotates or second.rotates)


def product(second: LinearMap, first: LinearMap) -> LinearMap:
    """x ↦ second(first(x)), in float32 where anything had to be computed."""
    identity, diagonal = _diagonal_part(second, first)
    if second.left is None and first.left is None:
        return LinearMap(identity, None, None, _single(diagonal))
    left, right = _low_part(second, first)
    if right is not None and left.shape[0] * right.shape[1] <= left.shape[1] * (left.shape[0] + right.shape[1]):
        left, right = left @ right, None
    return LinearMap(identity, _single(left), _single(right), _single(diagonal))


def _low_part(second: LinearMap, first: LinearMap) -> tuple[Tensor, Tensor | None]:
    """Everything of the product but its diagonal, as (left, right)."""
    left2, right2, left1, right1 = (_double(tensor) for tensor in (second.left, second.right, first.left, first.right))
    if left2 is None:
        assert left1 is not None
        return second @ left1, right1
    if left1 is None:
        return (first.on_the_right(left2), None) if right2 is None else (left2, first.on_the_right(right2))
    if first.is_low and not (second.is_low and right2 is not None and left2.shape[1] < left1.shape[1]):
        return second @ left1, right1
    if second.is_low:
        return (first.on_the_right(left2), None) if right2 is None else (left2, first.on_the_right(right2))
    # Both have a diagonal part: (D₂ + L₂R₂) L₁R₁ + L₂R₂ D₁.
    plain = LinearMap(first.identity, None, None, first.diagonal)
    if right1 is None or right2 is None:
        whole = second @ (left1 if right1 is None else left1 @ right1)
        return whole + plain.on_the_right(left2 if right2 is None else left2 @ right2), None
    return torch.cat([second @ left1, left2], dim=1), torch.cat([right1, plain.on_the_right(right2)], dim=0)


def _diagonal_part(second: LinearMap, first: LinearMap) -> tuple[float, Tensor | None]:
    c2, c1, d2, d1 = second.identity, first.identity, _double(second.diagonal), _double(first.diagonal)
    parts = [c2 * d1 if d1 is not None and c2 != 0.0 else None, c1 * d2 if d2 is not None and c1 != 0.0 else None]
    parts.append(d1 * d2 if d1 is not None and d2 is not None else None)
    total: Tensor | None = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return c2 * c1, total


def _key(map_: LinearMap) -> _Key:
    tensors = (map_.left, map_.right, map_.diagonal)
    return (map_.identity, *((t.data_ptr(), tuple(t.shape), t.stride()) if t is not None else None for t in tensors))


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def _single(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
