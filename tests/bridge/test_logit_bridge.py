from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from bridge import letters
from regraft.adapter import Adapter
from regraft.bridge.logits import LogitBridge, log_probabilities, scored
from regraft.bridge.passes import Passes
from regraft.errors import InputError
from regraft.probes.text import encode
from regraft.runtime import Loaded, applied, load_model
from regraft.runtime.both import twin
from verify import tiny

TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def pair(old: Path, folder: Path) -> tuple[Loaded, Loaded]:
    """Two models of other weights and widths; the ids are the same."""
    return load_model(old), load_model(tiny.llama(folder / "other", seed=5, width=32))


def lora(model: Loaded) -> Adapter:
    return tiny.lora(model.main, TARGETS, size=1.0)


def generate(model: Loaded, bridge: LogitBridge | None, ids: Tensor, **settings: Any) -> Tensor:
    given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings}
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    processors = LogitsProcessorList([] if bridge is None else [bridge])
    return model.main.generate(ids, logits_processor=processors, **{"attention_mask": mask, **given})


@contextmanager
def counted(model: Loaded) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the ids of each forward pass."""
    calls: list[tuple[int, ...]] = []
    hook = model.main.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


PROMPT = torch.tensor([[1, 7, 9, 23, 11]])
PADDED = torch.tensor([[1, 7, 9, 23, 11], [0, 0, 1, 30, 31]])


def test_strength_0_is_the_new_base_and_runs_no_other(pair) -> None:
    old, new = pair
    bridge = LogitBridge(old, new, lora(old), strength=0.0)
    with counted(old) as calls:
        assert generate(new, bridge, PROMPT).equal(generate(new, None, PROMPT))
    assert not calls


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_between_equal_bases_strength_1_is_the_old_base_with_the_adapter(make: Callable[..., Path], tmp_path) -> None:
    old, new = load_model(make(tmp_path)), load_model(make(tmp_path))
    adapter = tiny.lora(old.main, TARGETS if make is tiny.llama else ("c_attn", "c_proj"), size=1.0)
    plain, bridged = generate(new, None, PROMPT), generate(new, LogitBridge(old, new, adapter), PROMPT)
    with applied(old.components, adapter):
        expected = generate(old, None, PROMPT)
    assert bridged.equal(expected)
    assert not bridged.equal(plain)
    # The old base itself is left as it was.
    assert generate(old, None, PROMPT).equal(plain)


def test_scores_are_those_of_the_papers_equation(pair) -> None:
    old, new = pair
    with applied(old.components, lora(old)):
        expert = old.main(PROMPT).logits[0, -1]
    ours, theirs = (model.main(PROMPT).logits[0, -1] for model in pair)
    bridge = LogitBridge(old, new, lora(old), strength=0.7)
    expected = (theirs + 0.7 * (expert - ours)).log_softmax(-1)
    torch.testing.assert_close(bridge(PROMPT, theirs[None])[0], expected, atol=1e-5, rtol=0)


def test_a_step_costs_the_new_pass_and_two_old_ones_of_one_token(pair) -> None:
    old, new = pair
    bridge = LogitBridge(old, new, lora(old))
    with counted(old) as ours, counted(bridge.with_adapter) as adapted, counted(new) as theirs:
        generate(new, bridge, PADDED, attention_mask=PADDED != 0, min_new_tokens=6, max_new_tokens=6)
    assert ours == adapted == theirs == [(2, 5), *[(2, 1)] * 5]


def test_a_batch_padded_on_the_left_gives_what_its_rows_give_alone(pair) -> None:
    old, new = pair
    settings = {"min_new_tokens": 8, "max_new_tokens": 8}
    both = generate(
        new, LogitBridge(old, new, lora(old), pad_token_id=0), PADDED, attention_mask=PADDED != 0, **settings
    )
    for row, padding in zip(range(2), (0, 2), strict=True):
        alone = generate(new, LogitBridge(old, new, lora(old)), PADDED[row : row + 1, padding:], **settings)
        assert both[row, 5:].equal(alone[0, 5 - padding :])


def test_beams_that_change_places_keep_their_own_context(pair) -> None:
    old, new = pair
    bridge = LogitBridge(old, new, lora(old))
    settings = {"num_beams": 4, "num_return_sequences": 4, "output_scores": True, "return_dict_in_generate": True}
    kept = generate(new, bridge, PROMPT, **settings)

    class Forgetful(LogitBridge):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.reset()
            return super().__call__(input_ids, scores)

    anew = generate(new, Forgetful(old, new, lora(old)), PROMPT, **settings)
    assert kept.sequences.equal(anew.sequences)
    torch.testing.assert_close(kept.sequences_scores, anew.sequences_scores, atol=1e-4, rtol=0)
    # Beams did change places, or nothing was tested.
    assert any(not row.equal(torch.arange(4)) for row in kept.beam_indices.clamp(min=0)[:, 1:].T[:3])


def test_one_call_of_generate_leaves_nothing_behind_for_the_next(pair) -> None:
    old, new = pair
    bridge = LogitBridge(old, new, lora(old))
    generate(new, bridge, PADDED, attention_mask=PADDED != 0)
    for ids in (PROMPT, torch.tensor([[1, 40, 41, 42]]), PROMPT[:, :3]):
        assert generate(new, bridge, ids).equal(generate(new, LogitBridge(old, new, lora(old)), ids))


def test_sampling_cuts_the_bridged_scores(pair) -> None:
    old, new = pair
    bridge = LogitBridge(old, new, lora(old))
    one = generate(new, bridge, PROMPT, do_sample=True, top_k=1)
    assert one.equal(generate(new, bridge, PROMPT))


def test_permuted_vocabularies_give_the_same_text(numbered: tuple[Path, Path]) -> None:
    first, second = (load_model(path) for path in numbered)
    adapter = lora(first)
    ids = encode(first, " ".join(tiny.NUMBERED[3:9]))
    with applied(first.components, adapter):
        expected = first.tokenizer.decode(generate(first, None, ids)[0])
    bridge = LogitBridge(first, second, adapter)
    theirs = encode(second, " ".join(tiny.NUMBERED[3:9]))
    assert not theirs.equal(ids)
    assert second.tokenizer.decode(generate(second, bridge, theirs)[0]) == expected
    assert expected != second.tokenizer.decode(generate(second, None, theirs)[0])


def test_ids_are_exchanged_one_by_one_where_text_is_split_alike(tmp_path: Path) -> None:
    every = [chr(code) for code in range(32, 127)]
    old = letters.model(tmp_path / "old", [], seed=1, letters=every)
    new = letters.model(tmp_path / "new", [], seed=2, letters=every[::-1])
    bridge = LogitBridge(old, new, lora(old), 0.8)
    ids = torch.tensor(new.tokenizer("<s>a bridge</s>")["input_ids"])
    assert old.tokenizer.decode(bridge.vocabulary.context(ids.tolist())) == "<s>a bridge</s>"
    with counted(old) as calls:
        log_probabilities(bridge, ids)
    assert calls == [(1, len(ids))]


def test_where_text_is_split_otherwise_the_old_base_reads_its_own_tokens(tmp_path: Path) -> None:
    old = letters.model(tmp_path / "old", [("a", "b"), ("ab", "c")], seed=1)
    new = letters.model(tmp_path / "new", [("c", "d")], seed=2)
    bridge = LogitBridge(old, new, lora(old))
    words = new.tokenizer.get_vocab()
    # "cd" has no counterpart; the letters and the end of a text have.
    assert bridge.vocabulary.to_old[words["cd"]] == -1
    assert bridge.vocabulary.to_old[words["</s>"]] == old.tokenizer.eos_token_id
    for text, tokens in (("ab", ["ab"]), ("abc", ["abc"]), ("abcd", ["abc", "d"]), ("b", ["b"])):
        ids = torch.tensor(new.tokenizer(text)["input_ids"])[None]
        context = old.tokenizer(text, return_tensors="pt")["input_ids"]
        assert old.tokenizer.convert_ids_to_tokens(context[0]) == tokens
        before = old.main(context).logits[0, -1].log_softmax(-1)
        after = bridge.with_adapter.main(context).logits[0, -1].log_softmax(-1)
        shift = bridge.shift(ids)[0]
        torch.testing.assert_close(shift[words["d"]], (after - before)[old.tokenizer.get_vocab()["d"]])
        # What begins as another token does is as much likelier as that; "ab" and "abc" begin with "a".
        assert shift[words["cd"]] == shift[words["c"]] != 0
        together = [old.tokenizer.get_vocab()[token] for token in ("a", "ab", "abc")]
        torch.testing.assert_close(shift[words["a"]], (after[together].logsumexp(0) - before[together].logsumexp(0)))


def test_special_tokens_of_both_stay_where_they_are_between_texts_that_are_split_anew(tmp_path: Path) -> None:
    old = letters.model(tmp_path / "old", [("a", "b")], seed=1)
    new = letters.model(tmp_path / "new", [("c", "d")], seed=2)
    vocabulary = LogitBridge(old, new, lora(old)).vocabulary
    ids = new.tokenizer("<s>abcd</s>dab")["input_ids"]
    expected = ["<s>", "ab", "c", "d", "</s>", "d", "ab"]
    assert old.tokenizer.convert_ids_to_tokens(vocabulary.context(ids)) == expected


def test_a_split_that_changes_along_the_way_masks_what_it_leaves_behind(tmp_path: Path) -> None:
    old = letters.model(tmp_path / "old", [("a", "b"), ("ab", "c"), ("b", "d")], seed=1)
    new = letters.model(tmp_path / "new", [("c", "d")], seed=2)
    kept, anew = LogitBridge(old, new, lora(old)), LogitBridge(old, new, lora(old))
    rows = [new.tokenizer(text)["input_ids"] for text in ("dadabcabd", "abcaaabca", "bdaabdcab")]
    with counted(old) as calls:
        for n in range(1, 10):
            ids = torch.tensor([row[:n] for row in rows])
            found = kept.shift(ids)
    assert len(calls) == 9
    assert max(length for _, length in calls[3:]) <= 3
    torch.testing.assert_close(found, anew.shift(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_a_text_longer_than_the_old_base_reads_goes_on(make: Callable[..., Path], tmp_path: Path) -> None:
    old = load_model(make(tmp_path))
    bridge = LogitBridge(old, old, tiny.lora(old.main, ("v_proj", "c_attn")))
    ids = torch.arange(60)[None] % 40
    with counted(old) as calls:
        for n in range(30, 60):
            found = bridge.shift(ids[:, :n])
    assert bool(found.isfinite().all())
    # Of 22 steps past the 38 that it reads, those that move the beginning read anew, and the others one token.
    assert sum(length for _, length in calls[9:]) < 22 + 4 * 38


def test_texts_are_scored_as_they_would_be_sampled(pair, numbered: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = pair
    split = letters.model(tmp_path / "o", [("a", "b")], seed=1), letters.model(tmp_path / "n", [("c", "d")], seed=2)
    for bridge, ids in (
        (LogitBridge(old, new, lora(old), 0.8), PROMPT[0]),
        (LogitBridge(*split, lora(split[0]), 0.8), torch.tensor(split[1].tokenizer("abcdab")["input_ids"])),
    ):
        found = log_probabilities(bridge, ids)
        logits = bridge.new.main(ids[None]).logits[0]
        for i in range(len(ids)):
            step = bridge(ids[None, : i + 1], logits[i : i + 1])[0]
            torch.testing.assert_close(found[i], step, atol=1e-5, rtol=0)
    text = scored(bridge, "abcdab")
    assert text.tolist() == pytest.approx([float(found[i, ids[i + 1]]) for i in range(len(ids) - 1)], abs=1e-5)


def test_scores_of_strength_0_are_the_new_bases(pair) -> None:
    old, new = pair
    found = log_probabilities(LogitBridge(old, new, lora(old), 0.0), PROMPT[0])
    torch.testing.assert_close(found, new.main(PROMPT).logits[0].log_softmax(-1))


def test_what_no_bridge_can_be_made_of_is_told_in_one_line(pair, numbered, old: Path, tmp_path: Path) -> None:
    model, adapter = pair[0], lora(pair[0])
    encoder, tokens = load_model(tiny.bert(tmp_path / "bert")), load_model(numbered[0])
    strangers = [letters.model(tmp_path / "ab", [], seed=0, letters="ab")]
    strangers.append(letters.model(tmp_path / "cd", [], seed=0, letters="cd"))
    cases: list[tuple[Loaded, Loaded, Adapter, str]] = [
        (model, encoder, adapter, "is no language model"),
        (model, tokens, adapter, "there is no tokenizer"),
        (*strangers, lora(strangers[0]), "shares no token"),
        (model, pair[1], Adapter({}, format="peft"), "changes no weights"),
        (model, pair[1], tiny.lora(encoder.main, ("query",)), "has no place"),
    ]
    for ours, theirs, which, words in cases:
        with pytest.raises(InputError, match=words) as told:
            LogitBridge(ours, theirs, which)
        assert "\n" not in str(told.value)


def test_an_interrupted_pass_leaves_no_false_cache(
    numbered: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(numbered[0])
    passes = Passes((model, twin(model)))
    ids = [[3, 4, 5], [3, 4, 5, 6]]
    passes(ids[:1])
    run, calls = Passes._run, [0]

    def stopped(self: Passes, *given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return run(self, *given)

    monkeypatch.setattr(Passes, "_run", stopped)
    with pytest.raises(KeyboardInterrupt):
        passes(ids[1:])
    monkeypatch.setattr(Passes, "_run", run)
    again, fresh = passes(ids[1:]), Passes((model, twin(model)))(ids[1:])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again, fresh, strict=True))


def test_a_text_longer_than_the_old_base_reads_is_scored_too(pair) -> None:
    bridge = LogitBridge(pair[0], pair[1], lora(pair[0]))
    ids = torch.arange(20) % 7 + 3
    whole = log_probabilities(bridge, ids)
    pair[0].main.config.max_position_embeddings, before = 12, pair[0].main.config.max_position_embeddings
    try:
        cut = log_probabilities(bridge, ids)
    finally:
        pair[0].main.config.max_position_embeddings = before
    assert torch.allclose(cut[:8], whole[:8], atol=1e-4)
    assert cut.isfinite().all()
