"""Inputs for two models: who made them, that they come back from a seed, and which positions answer to each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.errors import InputError
from regraft.probes.batches import TextBatch, make_batches
from regraft.probes.batches_aligned import align
from regraft.probes.text import same_tokens
from regraft.runtime import applied, load_model
from regraft.runtime.both import BothModels, twin
from regraft.runtime.record import calls_of, record, statistics
from verify import tiny


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> BothModels:
    folder = tmp_path_factory.mktemp("bases")
    return BothModels(load_model(tiny.llama(folder / "old")), load_model(tiny.llama(folder / "new", drift=0.2)))


@pytest.fixture(scope="module")
def adapter(both: BothModels) -> Adapter:
    return tiny.lora(both.old.main, ("q_proj", "v_proj"), size=0.5)


def test_half_are_the_old_bases_and_half_its_adapters_and_others_are_held_out(
    both: BothModels, adapter: Adapter
) -> None:
    batches = make_batches(both, adapter, 12, held_out=4)
    assert {b.made_by: len(b) for b in batches.fit} == {"old": 6, "adapter": 6}
    assert {b.made_by: len(b) for b in batches.held_out} == {"old": 4, "adapter": 4, "new": 4}
    assert [len(b) for b in batches.held("new")] == [4]


def test_one_seed_gives_the_same_inputs_and_another_others(both: BothModels, adapter: Adapter) -> None:
    def ids(seed: int) -> list[torch.Tensor]:
        made = make_batches(both, adapter, 4, seed, held_out=2)
        return [batch.ids["old"] for batch in (*made.fit, *made.held_out) if isinstance(batch, TextBatch)]

    first, again, other = ids(1), ids(1), ids(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_other_vocabularies_without_tokenizers_are_an_error(both: BothModels, tmp_path: Path) -> None:
    other = load_model(tiny.llama(tmp_path / "other", vocab=40))
    with pytest.raises(InputError, match="vocabularies differ"):
        make_batches(BothModels(both.old, other), None, 4)


class Splitter:
    """A tokenizer that cuts text into runs of so many characters."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, text: str, **_: Any) -> dict[str, list[Any]]:
        spans = [(i, min(i + self.size, len(text))) for i in range(0, len(text), self.size)]
        return {"input_ids": [3 + start % 30 for start, _ in spans], "offset_mapping": spans}


def merged_pairs(merges: list[tuple[str, str]]) -> Any:
    """A tokenizer of the letters, and of these pairs after them."""
    letters = [chr(code) for code in range(32, 127)]
    vocab = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, merges)))


def test_tokens_are_other_ones_where_text_is_split_otherwise_though_old_ids_stay() -> None:
    letters, pairs = merged_pairs([]), merged_pairs([("t", "h"), ("th", "e")])
    assert not same_tokens(letters, pairs)
    assert not same_tokens(pairs, letters)
    assert same_tokens(pairs, merged_pairs([("t", "h"), ("th", "e")]))


def test_tokens_are_the_same_where_some_were_added() -> None:
    letters, more = merged_pairs([]), merged_pairs([])
    more.add_tokens(["<|tool|>"], special_tokens=True)
    assert same_tokens(letters, more)
    assert same_tokens(more, letters)


def test_positions_answer_to_each_other_where_both_have_read_the_same_characters(both: BothModels) -> None:
    both = BothModels(replace(both.old, tokenizer=Splitter(2)), replace(both.new, tokenizer=Splitter(3)))
    found = align(["abcdefgh", "abcdef"], both)
    assert found.ids["old"].shape == (2, 4)
    assert found.ids["new"].shape == (2, 3)
    # Ends of "abcdefgh": 2 4 6 8 and 3 6 8; of "abcdef": 2 4 6 and 3 6.
    assert found.rows["old"].tolist() == [2, 3, 4 + 2]
    assert found.rows["new"].tolist() == [1, 2, 3 + 1]


def test_a_twin_shares_the_tensors_and_an_adapter_on_it_leaves_the_first_alone(
    both: BothModels, adapter: Adapter
) -> None:
    batch = make_batches(both, adapter, 4, held_out=0).fit[0]
    second = twin(both.old)
    plain = batch.run(both.old, "old")
    with applied(second.components, adapter):
        assert not torch.equal(batch.run(second, "old"), plain)
        assert torch.equal(batch.run(both.old, "old"), plain)
    assert second.main.lm_head.weight is both.old.main.lm_head.weight


def test_what_is_recorded_is_what_the_weight_is_multiplied_with(both: BothModels, adapter: Adapter) -> None:
    ref = ModuleRef(MODEL, "model.layers.1.mlp.down_proj")
    batch = make_batches(both, adapter, 4, held_out=0).fit[0]
    seen = next(record(both.old, "old", [ref], [batch]))[ref]
    assert torch.allclose(seen.input @ both.old.main.get_submodule(ref.path).weight.T, seen.output, atol=1e-5)


def test_moments_of_a_model_with_itself_are_its_own(both: BothModels, adapter: Adapter) -> None:
    ref = ModuleRef(MODEL, "model.layers.0.self_attn.v_proj")
    batches = make_batches(both, adapter, 8, held_out=0).fit
    (name, found), *rest = statistics(BothModels(both.old, both.old), {ref: ref}, batches)
    assert (name, rest) == (ref, [])
    assert torch.equal(found.in_old, found.in_new)
    assert torch.equal(found.in_old, found.in_cross)
    assert found.rows == sum(batch.ids["old"].numel() for batch in batches if isinstance(batch, TextBatch))


def test_modules_come_in_the_order_in_which_they_run(both: BothModels) -> None:
    paths = ("lm_head", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj")
    batch = make_batches(both, None, 4, held_out=0).fit[0]
    counted = calls_of(both.new, "new", [ModuleRef(MODEL, path) for path in paths], batch)
    assert [ref.path for ref in counted] == list(reversed(paths))
    assert set(counted.values()) == {1}
