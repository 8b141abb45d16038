"""Tokens that begin alike are one event that both models can speak of."""

from __future__ import annotations

import pytest
import torch

from bridge import letters
from regraft.bridge.groups import _prefixes, _texts
from regraft.bridge.vocabulary import Vocabulary

MERGES = [("a", "b"), ("ab", "c")], [("c", "d"), ("cd", "a")]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("letters")
    old, new = (letters.model(folder / str(i), merges, seed=i) for i, merges in enumerate(MERGES))
    return Vocabulary.of(old, new)


def members(vocabulary: Vocabulary, token: str) -> tuple[set[str], set[str]]:
    """The tokens of either side in the group of one of the new base's."""
    groups = vocabulary.groups
    number = int(groups.new[vocabulary.new.get_vocab()[token]])
    assert number < groups.n
    sides = ((groups.old, vocabulary.old), (groups.new, vocabulary.new))
    found = [set(words.convert_ids_to_tokens((of == number).nonzero()[:, 0].tolist())) for of, words in sides]
    return found[0], found[1]


def test_what_the_other_side_lacks_is_where_its_longest_beginning_is(vocabulary: Vocabulary) -> None:
    assert members(vocabulary, "cda") == ({"c"}, {"c", "cd", "cda"})
    assert members(vocabulary, "a") == ({"a", "ab", "abc"}, {"a"})
    assert members(vocabulary, "b") == ({"b"}, {"b"})
    assert members(vocabulary, "</s>") == ({"</s>"}, {"</s>"})


def test_a_group_is_as_likely_as_its_tokens_together(vocabulary: Vocabulary) -> None:
    groups = vocabulary.groups
    logits = torch.randn(3, len(groups.old), generator=torch.Generator().manual_seed(0))
    said = vocabulary.said(logits)
    number = int(groups.new[vocabulary.new.get_vocab()["a"]])
    ids = [vocabulary.old.get_vocab()[token] for token in ("a", "ab", "abc")]
    torch.testing.assert_close(said[:, number].exp(), logits.softmax(-1)[:, ids].sum(-1))
    torch.testing.assert_close(said.exp().sum(-1), torch.ones(3))
    spread = groups.spread(said)
    assert spread.shape == (3, len(groups.new))
    assert spread[:, vocabulary.new.get_vocab()["cd"]].equal(spread[:, vocabulary.new.get_vocab()["c"]])


def test_what_can_not_come_next_has_no_group_that_is_not_a_number(vocabulary: Vocabulary) -> None:
    logits = torch.full((1, len(vocabulary.groups.old)), -torch.inf)
    logits[0, 3] = 0.0
    said = vocabulary.said(logits)
    assert bool(said.isfinite().all())
    assert float(said.exp().sum()) == 1


def test_bytes_of_a_byte_level_tokenizer_are_read_as_characters() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    words.train_from_iterator(["ét été 你 été ét the the"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    ids = tokenizer.get_vocab()
    assert "Ã©t" in ids
    texts = _texts(tokenizer, len(ids))
    assert texts[ids["Ã©t"]] == "ét"
    assert texts[ids["Ġthe"]] == " the"
    assert ids["Ã"] not in texts
    assert ids["<s>"] not in texts
    assert dict(_prefixes(texts, set(), {0: "é", 1: "Ã", 2: "th"}))[ids["Ã©t"]] == 0


def test_an_adapter_that_makes_the_impossible_possible_takes_nothing_else_away(vocabulary: Vocabulary) -> None:
    logits = torch.zeros(1, len(vocabulary.groups.old))
    before = logits.clone()
    before[0, 3] = -torch.inf
    assert bool((vocabulary.change(before, logits).abs() < 1).all())
