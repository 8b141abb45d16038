"""Which of several next-token distributions is to speak, by how well each of them foretold the text so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regraft.errors import UsageError


def check_mix(mix: float | None) -> None:
    """Fail where a part of a mixture is none.

    Raises:
        UsageError: it is not above 0 and below 1.
    """
    if mix is not None and not 0 < mix < 1:
        raise UsageError(f"mix={mix} is no part of a mixture", remedy="Give a number above 0 and below 1, such as 0.8.")


class Mixture:
    """A Bayesian mixture whose weights forget.

    The weights are the posterior of "this text is that expert's", which changes hands between two tokens with a small
    probability: fixed share (Herbster and Warmuth 1998, §5), with the prior in place of equal shares. So the mixture's
    loss on a text is at most log(1 / prior) above that of the best expert, and a little for each change.
    """

    def __init__(self, prior: Sequence[float], share: float) -> None:
        """Before the first token the prior is all that there is.

        Args:
            prior: of the experts; they sum to 1.
            share: of the weights, what goes back to the prior with each token.
        """
        self.prior = torch.tensor(prior).log()
        self._kept, self._given = math.log1p(-share), self.prior + (math.log(share) if share else -math.inf)

    def after(self, weights: Tensor, told: Tensor) -> Tensor:
        """Log-weights after one more token.

        Args:
            weights: before it, (…, experts).
            told: log p of the token by each expert, (…, experts).
        """
        # A token that no expert gave any probability tells nothing.
        told = told.clamp(min=-1e4)
        found = weights + (told - told.amax(-1, keepdim=True))
        return torch.logaddexp(found.log_softmax(-1) + self._kept, self._given.to(found.device))

    def along(self, told: Tensor, start: Tensor | None = None) -> Tensor:
        """Log-weights before each token of a text and after the last, (tokens + 1, experts).

        Args:
            told: log p of each token by each expert, (tokens, experts).
            start: log-weights to begin with, (experts,); by default the prior.
        """
        found = [(self.prior if start is None else start).to(told.device)]
        for one in told:
            found.append(self.after(found[-1], one))
        return torch.stack(found)


class Followed:
    """The weights of rows of tokens that grow step by step, as `generate` has them: beams may change places."""

    def __init__(self, mixture: Mixture, told: Callable[[Sequence[int]], Tensor]) -> None:
        """Nothing is read yet.

        Args:
            mixture: whose weights they are.
            told: log p of each token of a row but the first, by each expert, (tokens − 1, experts).
        """
        self._mixture, self._told = mixture, told
        # Row → its log-weights, (experts,), and what each expert says comes next, (experts, vocabulary).
        self._kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def reset(self) -> None:
        """Forget all rows."""
        self._kept = {}

    def weights(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Log-weights behind the last token of each row, (rows, experts).

        A row that is not one of the last step's and a token is read from its beginning.
        """
        found: dict[tuple[int, ...], Tensor] = {}
        for row in map(tuple, rows):
            if row in found:
                continue
            before = self._kept.get(row[:-1])
            if before is not None:
                found[row] = self._mixture.after(before[0], before[1][:, row[-1]])
            else:
                found[row] = self._kept[row][0] if row in self._kept else self._mixture.along(self._told(row))[-1]
        return torch.stack([found[tuple(row)] for row in rows])

    def keep(self, rows: Sequence[Sequence[int]], weights: Tensor, experts: Tensor) -> None:
        """What the next step goes on from.

        Args:
            rows: of tokens.
            weights: log-weights, (rows, experts).
            experts: log p of the next token, (experts, rows, vocabulary).
        """
        self._kept = {tuple(row): (weights[i], experts[:, i]) for i, row in enumerate(rows)}


def mixed(weights: Tensor, experts: Tensor) -> Tensor:
    """Log p of the mixture, (rows, vocabulary).

    Args:
        weights: log-weights, (rows, experts).
        experts: log p, (experts, rows, vocabulary).
    """
    return (weights.T[:, :, None] + experts).logsumexp(0)
