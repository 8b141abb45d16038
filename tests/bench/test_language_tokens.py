"""Both tokenizers give a text back, and agree with the models on what a character is."""

from __future__ import annotations

import pytest

from regraft.bench.language_text import CHARACTERS
from regraft.bench.language_tokens import character_tokenizer, encode, pair_tokenizer, spelling

TEXT = "def f(x):\n    return x  # it's  ~\n\nThe end"


@pytest.fixture(scope="module")
def pairs():
    return pair_tokenizer(["the cat sat on the mat\n    return the end\n"] * 20, 120)


def test_a_characters_id_is_its_place():
    ids = encode(character_tokenizer(), TEXT).tolist()
    assert ids == [CHARACTERS.index(c) for c in TEXT]


@pytest.mark.parametrize("which", ["characters", "pairs"])
def test_text_goes_there_and_back(which, pairs, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = character_tokenizer() if which == "characters" else pairs
    assert tokenizer.decode(encode(tokenizer, TEXT)) == TEXT
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert encode(again, TEXT).tolist() == encode(tokenizer, TEXT).tolist()
    assert again.decode(encode(again, TEXT)) == TEXT


def test_merged_pairs_shorten_text_and_stay_within_words(pairs):
    tokens = pairs.tokenize("the cat sat")
    assert tokens == ["the", " cat", " sat"]
    assert len(encode(pairs, "the cat sat")) < len("the cat sat")
    assert not any(" " in token.strip() for token in pairs.get_vocab())


def test_every_token_is_spelt_in_characters(pairs):
    for token, ids in zip(pairs.convert_ids_to_tokens(range(len(pairs))), spelling(pairs), strict=True):
        assert "".join(CHARACTERS[i] for i in ids) == token


def test_all_characters_are_tokens_of_the_merged_ones_too(pairs):
    assert set(CHARACTERS) <= set(pairs.get_vocab())
    assert len(pairs) <= 120


def test_an_unknown_character_keeps_its_place(pairs):
    for tokenizer in (character_tokenizer(), pairs):
        found = tokenizer("the é cat", return_offsets_mapping=True)
        assert tokenizer.decode(found["input_ids"]) == "the ? cat"
        assert found["offset_mapping"][-1][1] == len("the é cat")
