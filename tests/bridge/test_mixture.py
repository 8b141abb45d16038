"""A mixture is Bayes' rule with a prior that comes back, and it says the same in `generate` as over a whole text."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_logit_bridge import PADDED, PROMPT, counted, generate, lora
from torch import Tensor

from bridge import letters
from regraft.bridge import logits
from regraft.bridge.logits import FORGETTING, LogitBridge, log_probabilities
from regraft.bridge.mixture import Mixture, mixed
from regraft.errors import UsageError
from regraft.runtime import Loaded, load_model
from verify import tiny

PRIOR = (0.2, 0.3, 0.5)


@pytest.fixture(scope="module")
def pair(old: Path, folder: Path) -> tuple[Loaded, Loaded]:
    return load_model(old), load_model(tiny.llama(folder / "mixed", seed=5, width=32))


@pytest.fixture
def told() -> Tensor:
    """log p of five tokens by three experts."""
    return torch.rand(5, 3, generator=torch.Generator().manual_seed(0)).log()


def test_without_forgetting_the_weights_are_the_posterior(told: Tensor) -> None:
    found = Mixture(PRIOR, 0.0).along(told)
    expected = torch.cat([torch.zeros(1, 3), told.cumsum(0)]) + torch.tensor(PRIOR).log()
    torch.testing.assert_close(found, expected.log_softmax(-1))


def test_what_a_text_loses_is_that_of_all_ways_to_change_hands(told: Tensor) -> None:
    share, prior = 0.1, torch.tensor(PRIOR)
    weights = Mixture(PRIOR, share).along(told)
    found = float(mixed(weights[:-1], told.T[:, :, None])[:, 0].sum().exp())
    move = (1 - share) * torch.eye(3) + share * prior
    ways = 0.0
    for path in product(range(3), repeat=5):
        likely = prior[path[0]] * torch.stack([told[i, k].exp() for i, k in enumerate(path)]).prod()
        for a, b in pairwise(path):
            likely = likely * move[a, b]
        ways += float(likely)
    assert found == pytest.approx(ways, rel=1e-5)


def test_a_token_that_nobody_expects_leaves_the_weights_alone() -> None:
    mixture = Mixture(PRIOR, 0.0)
    found = mixture.after(mixture.prior, torch.full((3,), -torch.inf))
    torch.testing.assert_close(found, mixture.prior)


def test_scores_are_the_three_experts_by_their_weights(pair) -> None:
    old, new = pair
    bridge = LogitBridge(old, new, lora(old), strength=0.7, mix=0.8)
    models = (new, old, bridge.with_adapter)
    theirs, ours, adapted = (model.main(PROMPT).logits[0].log_softmax(-1) for model in models)
    experts = torch.stack([theirs, (theirs + 0.7 * (adapted - ours)).log_softmax(-1), adapted])
    told = torch.stack([experts[:, i, token] for i, token in enumerate(PROMPT[0, 1:].tolist())])
    weights = Mixture((0.2, 0.4, 0.4), FORGETTING).along(told)[-1]
    expected = (weights.exp()[:, None] * experts[:, -1].exp()).sum(0).log()
    torch.testing.assert_close(bridge(PROMPT, theirs[-1:])[0], expected, atol=1e-5, rtol=0)


def test_the_base_that_wrote_a_text_is_the_one_to_go_on(pair) -> None:
    old, new = pair
    bridge = LogitBridge(old, new, lora(old), mix=0.9)
    writers = (new, bridge.with_adapter)
    drawn = {"do_sample": True, "min_new_tokens": 40, "max_new_tokens": 40, "top_k": 0}
    for expert, writer in zip((0, 2), writers, strict=True):
        torch.manual_seed(0)
        text = generate(writer, None, PROMPT, **drawn)
        after = bridge(text, new.main(text).logits[:, -1])[0]
        alone = writer.main(text).logits[0, -1].log_softmax(-1)
        other = writers[expert == 0].main(text).logits[0, -1].log_softmax(-1)
        assert (after - alone).abs().mean() < 0.2 * (after - other).abs().mean()


def test_with_strength_0_nothing_is_mixed(pair) -> None:
    old, new = pair
    bridge = LogitBridge(old, new, lora(old), strength=0.0, mix=0.9)
    with counted(old) as calls:
        assert generate(new, bridge, PROMPT).equal(generate(new, None, PROMPT))
    assert not calls
    torch.testing.assert_close(log_probabilities(bridge, PROMPT[0]), new.main(PROMPT).logits[0].log_softmax(-1))


def test_a_token_that_is_ruled_out_stays_so(pair) -> None:
    old, new = pair
    scores = new.main(PROMPT).logits[:, -1].clone()
    scores[:, [3, 17]] = -torch.inf
    found = LogitBridge(old, new, lora(old), mix=0.9)(PROMPT, scores)
    assert found[0].isneginf().nonzero()[:, 0].tolist() == [3, 17]
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-5)


def test_each_prompt_is_read_once_more_and_then_a_step_costs_what_it_did(pair) -> None:
    old, new = pair
    bridge = LogitBridge(old, new, lora(old), pad_token_id=0, mix=0.9)
    with counted(old) as ours, counted(bridge.with_adapter) as adapted, counted(new) as theirs:
        generate(new, bridge, PADDED, attention_mask=PADDED != 0, min_new_tokens=6, max_new_tokens=6)
    steps = [(2, 5), *[(2, 1)] * 5]
    assert ours == adapted == [(1, 5), (1, 3), *steps]
    assert theirs == [steps[0], (1, 5), (1, 3), *steps[1:]]


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        (PADDED, {"max_new_tokens": 8}),
        (PROMPT, {"num_beams": 4, "num_return_sequences": 4}),
    ],
)
def test_what_was_followed_is_what_a_new_reading_finds(pair, prompt: Tensor, settings: dict[str, Any]) -> None:
    old, new = pair

    class Forgetful(LogitBridge):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.reset()
            return super().__call__(input_ids, scores)

    asked = {**settings, "output_scores": True, "return_dict_in_generate": True, "attention_mask": prompt != 0}
    kept, anew = (
        generate(new, kind(old, new, lora(old), pad_token_id=0, mix=0.9), prompt, **asked)
        for kind in (LogitBridge, Forgetful)
    )
    assert kept.sequences.equal(anew.sequences)
    torch.testing.assert_close(torch.stack(kept.scores), torch.stack(anew.scores), atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [2, 64])
def test_texts_are_scored_as_they_would_be_sampled(pair, tmp_path: Path, monkeypatch, chunk: int) -> None:
    monkeypatch.setattr(logits, "_CHUNK", chunk)
    old, new = pair
    split = letters.model(tmp_path / "o", [("a", "b")], seed=1), letters.model(tmp_path / "n", [("c", "d")], seed=2)
    for bridge, ids in (
        (LogitBridge(old, new, lora(old), mix=0.8), PROMPT[0]),
        (LogitBridge(*split, lora(split[0]), mix=0.8), torch.tensor(split[1].tokenizer("abcdab")["input_ids"])),
    ):
        found = log_probabilities(bridge, ids)
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(ids)))
        theirs = bridge.new.main(ids[None]).logits[0]
        for i in range(len(ids)):
            step = bridge(ids[None, : i + 1], theirs[i : i + 1])[0]
            torch.testing.assert_close(found[i], step, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mix", [0.0, 1.0, -0.5, float("nan")])
def test_a_part_that_is_none_is_told_in_one_line(pair, mix: float) -> None:
    with pytest.raises(UsageError, match="no part of a mixture"):
        LogitBridge(*pair, lora(pair[0]), mix=mix)
