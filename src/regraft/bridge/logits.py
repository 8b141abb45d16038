"""Logit arithmetic: what an adapter does to the old base's next-token scores, added to the new base's.

Proxy tuning (Liu et al. 2024, arXiv 2401.08565, eq. 1): p = softmax(s_new + λ (s_old+adapter − s_old)), where the paper
has λ = 1 and one vocabulary. Here scores are log-probabilities and the two models may split text differently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.adapter import Adapter
from regraft.bridge.adapted import Adapted, check_kinds
from regraft.bridge.passes import Passes
from regraft.bridge.vocabulary import Vocabulary
from regraft.errors import InputError
from regraft.probes.text import longest
from regraft.runtime.libraries import library
from regraft.runtime.load import Loaded

_Processor: Any = library("transformers").LogitsProcessor


class LogitBridge(_Processor):
    """A logits processor for ``new.main.generate(…, logits_processor=LogitsProcessorList([bridge]))``.

    A step costs the new base's pass and two of the old one, over the tokens that are new; with strength 0 the scores
    are returned as they are and the old base is not run. Batches padded on the left, beams and sampling work as without
    it: temperature, top-k and top-p come after it. What was read for one call of generate serves the next where the
    texts begin alike, and is dropped where they don't.

    Attributes:
        old: the base that the adapter was trained on.
        with_adapter: the same with the adapter.
        new: the base that is bridged to.
        strength: λ.
        vocabulary: which tokens the two share.
        pad_token_id: what rows begin with that are shorter than others.
    """

    def __init__(
        self, old: Loaded, new: Loaded, adapter: Adapter, strength: float = 1.0, pad_token_id: int | None = None
    ) -> None:
        """Nothing is run yet.

        Args:
            old: a causal language model.
            new: another; the tokenizers may differ.
            adapter: for ``old``, of any kind that changes weights.
            strength: λ.
            pad_token_id: by default that of the new tokenizer or config.

        Raises:
            InputError: a model is no causal language model, has no place for a part of the adapter, or the two share
                no tokens.
        """
        check_kinds(old, new, "language", "language model")
        for model in (old, new):
            if getattr(model.main.config, "is_encoder_decoder", False):
                raise InputError("reads with an encoder; logits are added for causal models only", file=model.path)
        self.old, self.new, self.strength = old, new, strength
        self._adapted = Adapted(old, adapter)
        self.with_adapter = self._adapted.model
        self.vocabulary = Vocabulary.of(old, new)
        self.pad_token_id = _pad_of(new) if pad_token_id is None else pad_token_id
        empty = [] if new.tokenizer is None else new.tokenizer("")["input_ids"]
        self._begins_with_pad = empty[:1] == [self.pad_token_id]
        self._passes = Passes((old, self.with_adapter))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities of the next token.

        Args:
            input_ids: tokens so far, (rows, positions).
            scores: the new base's logits or log-probabilities, (rows, vocabulary).
        """
        if self.strength == 0:
            return scores
        shift = self.shift(input_ids).to(scores.device)
        return _added(scores, self.strength * shift)

    def shift(self, input_ids: Tensor) -> Tensor:
        """log p_old+adapter − log p_old of the next token, in the new base's tokens, (rows, vocabulary).

        Args:
            input_ids: of the new base, (rows, positions); padding on the left is left out.
        """
        contexts = [self.vocabulary.context(self._unpadded(row)) for row in input_ids.tolist()]
        return self.vocabulary.carried(_difference(*self._passes(contexts)))

    def reset(self) -> None:
        """Let go of the caches of keys and values."""
        self._passes.reset()

    def _unpadded(self, row: list[int]) -> list[int]:
        start = next((i for i, token in enumerate(row) if token != self.pad_token_id), len(row))
        # Some pad with the token that every text begins with: there one is the text's own.
        begins = start > 0 and self._begins_with_pad
        return row[min(start - begins, len(row) - 1) :]


@torch.no_grad()
def log_probabilities(bridge: LogitBridge, ids: Tensor) -> Tensor:
    """The bridged log-probabilities at every position of a text, (positions, vocabulary), float32.

    Row t is that of token t + 1 after the tokens up to t. Where ids are exchanged one by one, each model runs once;
    else the old ones run at every position, as in sampling.

    Args:
        bridge: both bases, the adapter and the strength.
        ids: of the new base, (positions,).
    """
    ids = ids.long().reshape(-1)
    scores: Tensor = bridge.new.main(input_ids=ids[None].to(bridge.new.device)).logits[0].float().cpu()
    if bridge.strength == 0:
        return scores.log_softmax(-1)
    exchanged = bridge.vocabulary.exchanged(ids.tolist())
    if exchanged is None or len(exchanged) > longest(bridge.old, len(exchanged)):
        # Step by step, where the beginning of a text that is too long can be left out.
        shift = torch.cat([bridge.shift(ids[None, : i + 1]).cpu() for i in range(len(ids))])
    else:
        models = (bridge.old, bridge.with_adapter)
        found = [m.main(input_ids=torch.tensor([exchanged], device=m.device)).logits[0].float().cpu() for m in models]
        shift = bridge.vocabulary.carried(_difference(*found))
    return _added(scores, bridge.strength * shift)


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


def _difference(old: Tensor, with_adapter: Tensor) -> Tensor:
    # An adapter with added tokens has more columns than its base.
    n = min(old.shape[1], with_adapter.shape[1])
    return with_adapter[:, :n].log_softmax(-1) - old[:, :n].log_softmax(-1)


def _added(scores: Tensor, shift: Tensor) -> Tensor:
    # The columns of logits may be more than the table's rows, or fewer.
    n = min(scores.shape[1], shift.shape[1])
    found = scores.float().log_softmax(-1)
    found[:, :n] += shift[:, :n]
    return found.log_softmax(-1)


def _pad_of(model: Loaded) -> int | None:
    configs = (model.tokenizer, getattr(model.main, "generation_config", None), model.main.config)
    found = (getattr(config, "pad_token_id", None) for config in configs)
    return next((token for token in found if token is not None), None)
