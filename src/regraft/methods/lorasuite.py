"""LoRASuite: maps of width, depth and heads from the weights, for Llama-type language models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regraft.adapter import ModuleRef
from regraft.methods import Fit, Outcome, Skip, WeightPairs, method
from regraft.methods._embeddings import common_embeddings, width_map
from regraft.methods._heads import HeadCounts, cka, head_counts, head_similarity, match_heads, split_heads
from regraft.pairing import monotone_alignment
from regraft.transport import IDENTITY, LinearMap, Transport

_PATH = re.compile(r"(?P<stem>.*layers)\.(?P<layer>\d+)\.(?P<role>self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
# Tokens whose features tell layers apart.
_TOKENS = 2048


@dataclass(frozen=True)
class _Model:
    """Which of a pair's models, and the names of its blocks."""

    pairs: WeightPairs
    which: Literal["old", "new"]
    component: str
    stem: str

    def weight(self, layer: int, role: str) -> Tensor:
        return self.pairs.weight(self.which, self.ref(layer, role))

    def ref(self, layer: int, role: str) -> ModuleRef:
        return ModuleRef(self.component, f"{self.stem}.{layer}.{role}")

    def layers(self) -> list[int]:
        base = self.pairs.bases[0 if self.which == "old" else 1]
        found = (_PATH.fullmatch(path) for path in base.modules(self.component))
        return sorted({int(hit["layer"]) for hit in found if hit and hit["stem"] == self.stem})


@method(
    "lorasuite",
    reference="LoRASuite (Li et al., NeurIPS 2025, arXiv 2505.13515; YananLi18/LoRASuite lora_adaption.py)",
    summary="Maps width by the tokens' embeddings, depth by CKA, heads by their products; language models. Not alone.",
    needs=("old", "new"),
    per="pair",
    resizes=True,
)
def lorasuite(pairs: WeightPairs, *, heads: Literal["product", "rotation"] = "product", mlp: bool = True) -> Fit:
    """The published steps, without the fine-tune on 100 samples that follows them there (alone they carry ≈ nothing).

    1. W_x (h, h') = E_old⁺ E_new over the common tokens; the identity where the widths are equal.
    2. Layers: linear CKA, matched in order for the highest sum. The paper takes CKA of activations; here of what each
       layer's q, k, v, gate and up make of the tokens' embeddings, since weights are all there is.
    3. Heads of a layer: cosine of [W_xᵀQᵀKW_x ; W_xᵀVᵀOᵀW_x], Hungarian; grouped keys and values repeated first, the
       mean over the repeats afterwards.
    4. ΔQ' = (Q W_x Q'ᵀ)ᵀ ΔQ W_x per head, and so K and V; ΔO' = W_xᵀ ΔO (Oᵀ W_x O').
    5. Gate and up: ΔU' = U' W_x⁺ U⁺ ΔU W_x. Down: ΔD' = W_x⁺ ΔD D⁺ W_x D'. The code leaves both out for Llama and Qwen.

    Args:
        pairs: all paired weights.
        heads: ``product`` as published, whose Q W_x Q'ᵀ has the weights' own scale, squared; ``rotation``: the nearest
            orthogonal map in its place, so that equal bases give a copy.
        mlp: carry the MLP's updates.
    """
    placed: dict[ModuleRef, dict[ModuleRef, Outcome]] = {}
    unknown = Skip("lorasuite knows the attention and MLP of Llama-type blocks", planned=False)
    stacks: dict[tuple[str, str], list[tuple[ModuleRef, int, str]]] = {}
    for module in pairs.wanted:
        found = _PATH.fullmatch(module.path)
        if found is None:
            placed[module] = {module: unknown}
        else:
            stacks.setdefault((module.component, found["stem"]), []).append(
                (module, int(found["layer"]), found["role"])
            )
    reasons = []
    for (component, stem), modules in stacks.items():
        there = pairs.pairing[modules[0][0]].module or modules[0][0]
        hit = _PATH.fullmatch(there.path)
        old = _Model(pairs, "old", component, stem)
        new = _Model(pairs, "new", there.component, hit["stem"] if hit else stem)
        suite = _Suite(old, new, heads)
        if suite.problem:
            placed |= {module: {module: Skip(suite.problem, planned=False)} for module, _, _ in modules}
            continue
        reasons.append(f"{len(suite.depth)} layers of {stem} mapped")
        for module, layer, role in modules:
            if layer not in suite.depth:
                placed[module] = {module: Skip("its layer has no counterpart")}
            elif role.startswith("mlp") and not mlp:
                placed[module] = {module: Skip("left out with --no-mlp")}
            else:
                target = suite.depth[layer]
                there = new.ref(target, role)
                placed[module] = {there: pairs.for_adapter(module, suite.transport(layer, target, role), there)}
    transports = {module: next(iter(placed[module].values())) for module in pairs.wanted}
    return Fit(transports, "lorasuite", "; ".join(reasons), placed=placed)


class _Suite:
    """The maps of one stack of blocks."""

    def __init__(self, old: _Model, new: _Model, heads: Literal["product", "rotation"]) -> None:
        self.old, self.new, self.kind, self.problem = old, new, heads, ""
        self.depth: dict[int, int] = {}
        self._matched: dict[tuple[int, int], list[int]] = {}
        tokens = common_embeddings(*old.pairs.bases, old.component)
        if tokens is None:
            self.problem = "no embeddings of common tokens are in both bases"
            return
        counts = [self._counts(model) for model in (old, new)]
        if counts[0] is None or counts[1] is None:
            self.problem = "lorasuite needs both bases' config.json for the number of heads"
            return
        self.counts: tuple[HeadCounts, HeadCounts] = (counts[0], counts[1])
        h, h_new = tokens[0].shape[1], tokens[1].shape[1]
        self.same = h == h_new
        self.width = torch.eye(h) if self.same else width_map(*tokens)
        self.back = torch.eye(h) if self.same else torch.linalg.pinv(self.width)
        self._align(*tokens)

    @staticmethod
    def _counts(model: _Model) -> HeadCounts | None:
        base = model.pairs.bases[0 if model.which == "old" else 1]
        layers = model.layers()
        return (
            head_counts(base, model.component, base.shape(model.ref(layers[0], _ATTENTION[0]))[0]) if layers else None
        )

    def _align(self, old_tokens: Tensor, new_tokens: Tensor) -> None:
        step = max(1, len(old_tokens) // _TOKENS)
        features = []
        for model, tokens in ((self.old, old_tokens[::step]), (self.new, new_tokens[::step])):
            roles = (*_ATTENTION[:3], "mlp.gate_proj", "mlp.up_proj")
            features.append(
                [torch.cat([tokens @ model.weight(layer, role).T for role in roles], 1) for layer in model.layers()]
            )
        scores = torch.tensor([[cka(x, y) for y in features[1]] for x in features[0]])
        olds, news = self.old.layers(), self.new.layers()
        self.depth = {olds[i]: news[j] for i, j in monotone_alignment(scores)}

    def transport(self, layer: int, target: int, role: str) -> Transport:
        """Of one module, from its layer to the one that it is mapped to."""
        right = IDENTITY if self.same else LinearMap(0.0, self.width)
        if role in ("mlp.gate_proj", "mlp.up_proj"):
            up, up_new = self.old.weight(layer, role), self.new.weight(target, role)
            inner = up_new if self.same else up_new @ self.back
            return Transport(((LinearMap(0.0, inner, torch.linalg.pinv(up)), right),), rotates=True)
        if role == "mlp.down_proj":
            down, down_new = self.old.weight(layer, role), self.new.weight(target, role)
            inner = down_new if self.same else self.width @ down_new
            columns = LinearMap(0.0, torch.linalg.pinv(down), inner)
            left = IDENTITY if self.same else LinearMap(0.0, self.back)
            return Transport(((left, columns),), rotates=True)
        matched = self._heads(layer, target)
        if role == "self_attn.o_proj":
            blocks = self._blocks(layer, target, role, matched)
            left = IDENTITY if self.same else LinearMap(0.0, self.width.T)
            return Transport(((left, LinearMap(0.0, blocks.T)),), rotates=True)
        return Transport(((LinearMap(0.0, self._blocks(layer, target, role, matched)), right),), rotates=True)

    def _heads(self, layer: int, target: int) -> list[int]:
        if (layer, target) not in self._matched:
            one = split_heads([self.old.weight(layer, role) for role in _ATTENTION], self.counts[0])
            other = split_heads([self.new.weight(target, role) for role in _ATTENTION], self.counts[1])
            self._matched[layer, target] = match_heads(head_similarity(one, other, self.width))
        return self._matched[layer, target]

    def _blocks(self, layer: int, target: int, role: str, matched: list[int]) -> Tensor:
        """The map of the heads' units, (out', out): of each new head's rows, its old head's map."""
        one, other = self.old.weight(layer, role), self.new.weight(target, role)
        if role == "self_attn.o_proj":
            one, other = one.T, other.T
        grouped = role in ("self_attn.k_proj", "self_attn.v_proj")
        old, new = self.counts
        share_old = old.queries // old.keys if grouped else 1
        share_new = new.queries // new.keys if grouped else 1
        total = torch.zeros(len(other), len(one), dtype=one.dtype, device=one.device)
        for j, i in enumerate(matched):
            if i < 0:
                continue
            there, here = j // share_new, i // share_old
            rows = slice(there * new.size, (there + 1) * new.size)
            columns = slice(here * old.size, (here + 1) * old.size)
            block = (one[columns] @ self.width @ other[rows].T).T
            if self.kind == "rotation":
                u, _, vh = torch.linalg.svd(block, full_matrices=False)
                block = u @ vh
            total[rows, columns] += block / share_new
        return total
