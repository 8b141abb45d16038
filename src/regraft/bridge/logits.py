"""Logit arithmetic: what an adapter does to the old base's next-token scores, added to the new base's.

Proxy tuning (Liu et al. 2024, arXiv 2401.08565, eq. 1): p = softmax(s_new + λ (s_old+adapter − s_old)), where the paper
has λ = 1 and one vocabulary. Here scores are log-probabilities and the two models may split text differently.

With ``mix`` that is one of three experts, beside the new base alone and the old one with the adapter: how much each of
them says is told by how well it foretold the text so far (`regraft.bridge.mixture`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.adapter import Adapter
from regraft.bridge.adapted import Adapted, check_kinds
from regraft.bridge.mixture import Followed, Mixture, check_mix, mixed
from regraft.bridge.passes import Passes
from regraft.bridge.vocabulary import Vocabulary
from regraft.errors import InputError
from regraft.probes.text import longest
from regraft.runtime.libraries import library
from regraft.runtime.load import Loaded

_Processor: Any = library("transformers").LogitsProcessor

#: Share of a mixture's weights that goes back to the prior with each token: what a text is about may change.
FORGETTING = 0.01
# Positions of a text that are worked on at once: of a large vocabulary, all of them take much memory.
_CHUNK = 64


class LogitBridge(_Processor):
    """A logits processor for ``new.main.generate(…, logits_processor=LogitsProcessorList([bridge]))``.

    A step costs the new base's pass and two of the old one, over the tokens that are new; with strength 0 the scores
    are returned as they are and the old base is not run. Batches padded on the left, beams and sampling work as without
    it: temperature, top-k and top-p come after it. What was read for one call of generate serves the next where the
    texts begin alike, and is dropped where they don't. A mixture reads each prompt once more, with all three.

    Attributes:
        old: the base that the adapter was trained on.
        with_adapter: the same with the adapter.
        new: the base that is bridged to.
        strength: λ.
        mix: the adapter's part of a mixture before anything is read; None: no mixture.
        vocabulary: which tokens the two share.
        pad_token_id: what rows begin with that are shorter than others.
    """

    def __init__(
        self,
        old: Loaded,
        new: Loaded,
        adapter: Adapter,
        strength: float = 1.0,
        pad_token_id: int | None = None,
        mix: float | None = None,
    ) -> None:
        """Nothing is run yet.

        Args:
            old: a causal language model.
            new: another; the tokenizers may differ.
            adapter: for ``old``, of any kind that changes weights.
            strength: λ.
            pad_token_id: by default that of the new tokenizer or config.
            mix: how likely it is, before anything is read, that a text is of the adapter's kind: above 0, below 1. Half
                of it is proxy tuning's, half the old base's with the adapter, and the rest the new base's.

        Raises:
            InputError: a model is no causal language model, has no place for a part of the adapter, or the two share
                no tokens.
            UsageError: ``mix`` is no such number.
        """
        check_mix(mix)
        check_kinds(old, new, "language", "language model")
        for model in (old, new):
            if getattr(model.main.config, "is_encoder_decoder", False):
                raise InputError("reads with an encoder; logits are added for causal models only", file=model.path)
        self.old, self.new, self.strength, self.mix = old, new, strength, mix
        self._adapted = Adapted(old, adapter)
        self.with_adapter = self._adapted.model
        self.vocabulary = Vocabulary.of(old, new)
        self.pad_token_id = _pad_of(new) if pad_token_id is None else pad_token_id
        empty = [] if new.tokenizer is None else new.tokenizer("")["input_ids"]
        self._begins_with_pad = empty[:1] == [self.pad_token_id]
        self._passes = Passes((old, self.with_adapter))
        self.mixture = None if mix is None else Mixture((1 - mix, mix / 2, mix / 2), FORGETTING)
        self._followed = None if self.mixture is None else Followed(self.mixture, self._told)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities of the next token.

        Args:
            input_ids: tokens so far, (rows, positions).
            scores: the new base's logits or log-probabilities, (rows, vocabulary).
        """
        if self.strength == 0:
            return scores
        rows = [self._unpadded(row) for row in input_ids.tolist()]
        weights = None if self._followed is None else self._followed.weights(rows).to(scores.device)
        experts = self.experts(scores, *self._passes([self.vocabulary.context(row) for row in rows]))
        if self._followed is None or weights is None:
            return experts[0]
        self._followed.keep(rows, weights, experts)
        return mixed(weights, experts)

    def shift(self, input_ids: Tensor) -> Tensor:
        """log p_old+adapter − log p_old of the next token, in the new base's tokens, (rows, vocabulary).

        Args:
            input_ids: of the new base, (rows, positions); padding on the left is left out.
        """
        contexts = [self.vocabulary.context(self._unpadded(row)) for row in input_ids.tolist()]
        return self.vocabulary.groups.spread(self.vocabulary.change(*self._passes(contexts)))

    def experts(self, scores: Tensor, old: Tensor, with_adapter: Tensor) -> Tensor:
        """Log-probabilities of the next token by each expert, (experts, rows, vocabulary): of proxy tuning alone, one.

        Args:
            scores: the new base's logits, (rows, vocabulary).
            old: the old base's, (rows, old vocabulary).
            with_adapter: the same with the adapter.
        """
        groups, new = self.vocabulary.groups, scores.float().log_softmax(-1)
        change = self.vocabulary.change(old, with_adapter).to(new.device)
        proxy = _added(new, groups.spread(self.strength * change))
        if self.mix is None:
            return proxy[None]
        # How likely each group is says the old base with the adapter; who in it comes next, the new base.
        theirs = self.vocabulary.said(with_adapter).to(new.device)
        return torch.stack([new, proxy, _added(new, groups.spread(theirs - groups.masses(new, groups.new)))])

    def reset(self) -> None:
        """Let go of the caches of keys and values, and of what was read."""
        self._passes.reset()
        if self._followed is not None:
            self._followed.reset()

    def read(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """What the experts say behind each token of a text, (experts, positions, vocabulary), some positions at a time.

        Where ids are exchanged one by one, each model runs once; else the old ones run at every position, as in
        sampling.

        Args:
            ids: of the new base, without padding.
        """
        given = torch.tensor([ids], device=self.new.device)
        scores = self.new.main(input_ids=given).logits[0]
        exchanged = self.vocabulary.exchanged(ids)
        if exchanged is None or len(exchanged) > longest(self.old, len(exchanged)):
            # Step by step, where the beginning of a text that is too long can be left out.
            passes = Passes((self.old, self.with_adapter))
            steps = (passes([self.vocabulary.context(ids[: i + 1])]) for i in range(len(ids)))
            for score, found in zip(scores, steps, strict=True):
                yield self.experts(score[None], *found)
            return
        models = (self.old, self.with_adapter)
        found = [m.main(input_ids=torch.tensor([exchanged], device=m.device)).logits[0] for m in models]
        for some in zip(*(each.split(_CHUNK) for each in (scores, *found)), strict=True):
            yield self.experts(*(each.float() for each in some))

    @torch.no_grad()
    def _told(self, ids: Sequence[int]) -> Tensor:
        """log p of each token of a text but the first by each expert, (tokens − 1, experts)."""
        told, rest = [], torch.tensor(ids[1:], dtype=torch.long)
        for experts in self.read(ids):
            told.append(_of_tokens(experts, rest))
            rest = rest[experts.shape[1] :]
        return torch.cat(told)

    def _unpadded(self, row: list[int]) -> list[int]:
        start = next((i for i, token in enumerate(row) if token != self.pad_token_id), len(row))
        # Some pad with the token that every text begins with: there one is the text's own.
        begins = start > 0 and self._begins_with_pad
        return row[min(start - begins, len(row) - 1) :]


@torch.no_grad()
def log_probabilities(bridge: LogitBridge, ids: Tensor) -> Tensor:
    """The bridged log-probabilities at every position of a text, (positions, vocabulary), float32.

    Row t is that of token t + 1 after the tokens up to t. See `LogitBridge.read`.

    Args:
        bridge: both bases, the adapter and the strength.
        ids: of the new base, (positions,).
    """
    ids = ids.long().reshape(-1)
    if bridge.strength == 0:
        alone: Tensor = bridge.new.main(input_ids=ids[None].to(bridge.new.device)).logits[0].float().cpu()
        return alone.log_softmax(-1)
    found, rest, weights = list[Tensor](), ids[1:], None
    for experts in bridge.read(ids.tolist()):
        if bridge.mixture is None:
            found.append(experts[0].cpu())
            continue
        before = bridge.mixture.along(_of_tokens(experts, rest), weights)
        weights, rest = before[-1], rest[experts.shape[1] :]
        found.append(mixed(before[: experts.shape[1]], experts).cpu())
    return torch.cat(found)


def scored(bridge: LogitBridge, text: str) -> Tensor:
    """log p of each token of a text after the ones before it, (tokens − 1,): the sum is the text's.

    Raises:
        InputError: the new base has no tokenizer, or the text fewer than two tokens.
    """
    if bridge.new.tokenizer is None:
        raise InputError("there is no tokenizer to read a text with", file=bridge.new.path)
    ids = torch.tensor(bridge.new.tokenizer(text)["input_ids"], dtype=torch.long)
    if len(ids) < 2:
        raise InputError(f"a text of fewer than two tokens has nothing to score: {text!r}", file=bridge.new.path)
    return log_probabilities(bridge, ids)[:-1].gather(1, ids[1:, None])[:, 0]


def _of_tokens(experts: Tensor, ids: Tensor) -> Tensor:
    """log p of the token that follows, (tokens, experts), at as many positions as there are tokens for."""
    some = ids[: experts.shape[1]].to(experts.device)
    return experts[:, torch.arange(len(some), device=some.device), some].T


def _added(log_p: Tensor, shift: Tensor) -> Tensor:
    # The columns of logits may be more than the table's rows, or fewer.
    n = min(log_p.shape[1], shift.shape[1])
    found = log_p.clone()
    found[:, :n] += shift[:, :n]
    return found.log_softmax(-1)


def _pad_of(model: Loaded) -> int | None:
    configs = (model.tokenizer, getattr(model.main, "generation_config", None), model.main.config)
    found = (getattr(config, "pad_token_id", None) for config in configs)
    return next((token for token in found if token is not None), None)
