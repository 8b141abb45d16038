"""Training is the same every time, and losses count characters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regraft.bench.language_models import CONTEXT, Size, new_model
from regraft.bench.language_tokens import character_tokenizer, encode, pair_tokenizer
from regraft.bench.language_train import (
    AdapterRecipe,
    Course,
    batches,
    drift,
    losses,
    pace,
    train,
    train_adapter,
)

SIZE = Size(width=16, layers=2, mlp=24, heads=2)
COURSE = Course(steps=3, rate=5e-2, batch=2)
WORDS = "the cat sat on the mat, and the dog sat on the cat.\n"


@pytest.fixture(scope="module")
def ids():
    return encode(character_tokenizer(), WORDS * 20)


def silent(line: str) -> None:
    pass


def test_windows_come_from_every_text_and_the_same_ones_for_a_seed():
    texts = [torch.arange(300), torch.arange(1000, 1500)]
    course = Course(steps=20, rate=1.0, batch=4)
    drawn = torch.cat(list(batches(texts, course, 0)))
    assert drawn.shape == (80, CONTEXT + 1)
    assert torch.equal(drawn, torch.cat(list(batches(texts, course, 0))))
    assert not torch.equal(drawn, torch.cat(list(batches(texts, course, 1))))
    assert (drawn.diff(dim=1) == 1).all()
    assert 20 < (drawn[:, 0] < 1000).sum() < 60


def test_the_rate_rises_and_falls_to_a_tenth():
    rates = [pace(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(1.0) == rates[5]
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_the_same_seed_trains_the_same_bytes_and_the_loss_falls(ids):
    first, second = new_model(SIZE, 0), new_model(SIZE, 0)
    before = losses(first.eval(), character_tokenizer(), [WORDS]).item()
    for model in (first, second):
        train(model, [ids], Course(steps=8, rate=2e-2, batch=4), 0, silent)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert losses(first, character_tokenizer(), [WORDS]).item() < before - 0.2


def test_a_teacher_alone_pulls_its_pupil_to_itself(ids):
    teacher, course = new_model(SIZE, 1).eval(), Course(steps=8, rate=1e-2, batch=4)

    def away(**learning: Any) -> float:
        pupil = new_model(SIZE, 0)
        if learning:
            train(pupil, [ids], course, 0, silent, teacher=teacher, **learning)
        with torch.no_grad():
            a, b = (m.eval()(input_ids=ids[None, :64]).logits.log_softmax(-1) for m in (teacher, pupil))
        return float((a - b).square().mean())

    # The text alone leads elsewhere.
    assert away(pull=1.0) < 0.8 * away() < 0.8 * away(pull=0.0)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_on_the_named_modules_alone_and_the_base_stays(ids, dora):
    model = new_model(SIZE, 0).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = AdapterRecipe("words", 2, ("q_proj", "v_proj"), dora, COURSE)
    wrapped = train_adapter(model, ids, recipe, 0, silent)
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * (3 if dora else 2)
    assert all("q_proj" in name or "v_proj" in name for name in trained)
    with wrapped.disable_adapter():
        state = {k.replace(".base_layer", ""): v for k, v in wrapped.get_base_model().state_dict().items()}
        assert all(torch.equal(state[name], value) for name, value in before.items())


def test_the_head_is_no_target_of_all_linear(ids):
    wrapped = train_adapter(new_model(SIZE, 0), ids, AdapterRecipe("words", 2, course=COURSE), 0, silent)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert not any("lm_head" in name for name in trained)


def test_drift_is_the_change_over_the_weight():
    old = new_model(SIZE, 0).state_dict()
    assert drift(old, old) == 0
    assert drift(old, {name: 1.25 * value for name, value in old.items()}) == pytest.approx(0.25)
    assert drift(old, new_model(Size(width=8, layers=2, mlp=24, heads=2), 0).state_dict()) is None


def test_a_loss_is_the_mean_over_all_characters_but_the_first():
    model = new_model(SIZE, 0).eval()
    ids = encode(character_tokenizer(), WORDS)
    with torch.no_grad():
        chances = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    by_hand = -torch.stack([chances[i, ids[i + 1]] for i in range(len(ids) - 1)]).mean()
    found = losses(model, character_tokenizer(), [WORDS])
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert not found.requires_grad


def test_a_text_has_the_same_loss_beside_longer_ones():
    model, tokenizer = new_model(SIZE, 0).eval(), pair_tokenizer([WORDS], 110)
    model.resize_token_embeddings(len(tokenizer))
    alone = [losses(model, tokenizer, [text]).item() for text in (WORDS, "zzzz", "the cat")]
    assert losses(model, tokenizer, [WORDS, "zzzz", "the cat"]).tolist() == pytest.approx(alone, rel=1e-5)


def test_losses_of_other_tokens_are_of_the_same_characters():
    # Every token equally likely: ln(vocabulary) a token, whatever a token spells.
    tokenizer = pair_tokenizer([WORDS], 110)
    model = new_model(Size(width=16, layers=1, mlp=24, heads=2, vocabulary=len(tokenizer)), 0)
    torch.nn.init.zeros_(model.lm_head.weight)
    n = len(encode(tokenizer, WORDS[1:]))
    expected = n * torch.tensor(float(len(tokenizer))).log().item() / (len(WORDS) - 1)
    assert losses(model.eval(), tokenizer, [WORDS]).item() == pytest.approx(expected, rel=1e-5)
