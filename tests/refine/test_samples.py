"""Where two models split text into other tokens, what the old one writes with its adapter is learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import Run

from regraft import Adapter, InputError, UsageError, load_adapter, open_base
from regraft.lineage import with_port
from regraft.methods._choosing import between, likelihoods
from regraft.methods.task import Running
from regraft.probes.batches import TextBatch
from regraft.refine import RefineSettings, refine, sampled
from regraft.refine.firsts import FirstCharacters
from regraft.refine.sampled import text_aims, text_samples
from regraft.refine.samples import objective_of, samples_of
from regraft.refine.starting import _of_kind, refine_entry, start_of
from regraft.refine.teacher import Teacher
from regraft.runtime import applied, load_model
from regraft.runtime.both import BothModels
from regraft.updates import LowRank
from verify import tiny

QUICK = RefineSettings(steps=30, look=10, n_inputs=64, rate=1e-2, retention=0.2)
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def adapter(numbered: Pair, folder: Path) -> Adapter:
    made = tiny.lora(load_model(numbered[0]).main, ("q_proj", "v_proj", "down_proj"), size=0.4)
    made.save(folder / "numbered_adapter")
    return load_adapter(folder / "numbered_adapter")


@pytest.fixture
def both(numbered: Pair) -> BothModels:
    return BothModels.load(*map(open_base, numbered))


def from_zero(adapter: Adapter, pair: Pair) -> Adapter:
    old, new = map(open_base, pair)
    return replace(adapter, updates=_of_kind(adapter, old, new), metadata=with_port(adapter, refine_entry(old, new)))


def test_other_tokens_are_the_reason_to_learn_from_samples(both: BothModels, old: Path, drifted: Path) -> None:
    assert objective_of("auto", both) == ("sample", "the two bases split text into different tokens")
    assert objective_of("auto", BothModels.load(open_base(old), open_base(drifted)))[0] == "output"
    with pytest.raises(UsageError, match="different tokens"):
        objective_of("output", both)


def test_a_model_whose_words_are_numbered_otherwise_has_all_of_it_with_the_adapter_itself(
    adapter: Adapter, numbered: Pair
) -> None:
    old, new = map(open_base, numbered)
    start = replace(adapter, metadata=with_port(adapter, refine_entry(old, new)))
    result = refine(adapter, old, new, start=start, settings=QUICK)
    assert result.report.objective == "sample"
    assert result.report.recovered == pytest.approx(1.0, abs=1e-3)
    for ref, update in adapter.updates.items():
        assert torch.equal(result.adapter.updates[ref].delta(), update.delta())


def test_from_nothing_the_old_bases_texts_become_likelier_on_texts_that_it_never_saw(
    adapter: Adapter, numbered: Pair, both: BothModels
) -> None:
    old, new = map(open_base, numbered)
    result = refine(adapter, old, new, start=from_zero(adapter, numbered), settings=QUICK)
    assert result.report.beside[-2].recovered == pytest.approx(0.0, abs=1e-6)
    assert result.report.recovered > 0.1
    fresh = text_samples(both, Teacher.of(both, adapter), 64, 77, None, kept=False).fit

    def said(with_: Adapter | None) -> float:
        with torch.no_grad(), applied(both.new.components, with_):
            return sum(float(likelihoods(b.run(both.new, "new"), b, "new").sum()) for b in fresh)  # type: ignore[arg-type]

    assert said(result.adapter) > said(None)


def test_a_start_is_found_across_tokenizers(adapter: Adapter, numbered: Pair) -> None:
    start = start_of(adapter, *map(open_base, numbered), Running(16, 0, None, None, "cpu"))
    assert start.how
    assert start.adapter.updates
    assert start.adapter.metadata


def test_prompts_are_gone_on_from_and_not_learnt(adapter: Adapter, both: BothModels) -> None:
    beginning = "w3 w4 w5 w6"
    batch = text_samples(both, Teacher.of(both, adapter), 8, 0, [beginning], kept=False).fit[0]
    assert isinstance(batch, TextBatch)
    told = both.new.tokenizer.batch_decode(batch.ids["new"])
    assert all(beginning in text for text in told)
    whole = text_samples(both, Teacher.of(both, adapter), 8, 0, None, kept=False).fit[0]
    assert isinstance(whole, TextBatch)
    given = len(both.new.tokenizer(beginning)["input_ids"])
    assert not between(batch, "new")[:, : given - 1].any()
    assert between(whole, "new")[:, : given - 1].any()


def test_a_filter_keeps_the_texts_on_which_the_adapter_matters_most(adapter: Adapter, both: BothModels) -> None:
    generator = torch.Generator().manual_seed(0)
    with applied(both.old.components, adapter):
        written = sampled._written(both.old, 40, generator, None)

    def gap(texts: list[sampled._Written]) -> float:
        with torch.no_grad():
            before = [sampled._own_likelihood(both.old, text) for text in texts]
            with applied(both.old.components, adapter):
                after = [sampled._own_likelihood(both.old, text) for text in texts]
        return min(a - b for a, b in zip(after, before, strict=True))

    chosen = sampled._mattering(written, 20, both.old, Teacher.of(both, adapter))
    assert len(chosen) == 20
    assert gap(chosen) > gap(written)
    batches = text_samples(both, Teacher.of(both, adapter), 16, 0, None, kept=False, dropped=0.5)
    assert sum(len(batch) for batch in batches.fit) == 16
    assert "out of 40" in batches.made


@pytest.mark.parametrize(
    ("token", "said"), [(2, "nothing but empty texts"), (7, "the same text every time")], ids=["empty", "constant"]
)
def test_an_old_base_that_writes_nothing_useful_is_told(
    adapter: Adapter, both: BothModels, monkeypatch: pytest.MonkeyPatch, token: int, said: str
) -> None:
    monkeypatch.setattr(
        sampled, "sample_texts", lambda model, n, *rest: [torch.tensor([[1, *[token] * 9]]) for _ in range(n)]
    )
    with pytest.raises(InputError, match=said):
        text_samples(both, Teacher.of(both, adapter), 8, 0, None, kept=False)


def test_an_adapter_that_makes_nan_is_told(adapter: Adapter, both: BothModels) -> None:
    broken = {
        ref: update.with_factors(torch.full_like(update.factors()[0], float("nan")), update.factors()[1])
        for ref, update in adapter.updates.items()
        if isinstance(update, LowRank)
    }
    with pytest.raises(InputError, match="no numbers"):
        text_samples(both, Teacher.of(both, replace(adapter, updates=broken)), 8, 0, None, kept=False)


def test_an_adapter_without_effect_is_told(adapter: Adapter, numbered: Pair) -> None:
    silent = replace(adapter, updates={ref: u.scaled(0.0) for ref, u in adapter.updates.items()})
    with pytest.raises(InputError, match=r"no effect|nothing"):
        refine(silent, *map(open_base, numbered), start=from_zero(adapter, numbered), settings=QUICK)


def test_the_command_says_that_it_learns_from_samples_and_why(
    run: Run, adapter: Adapter, numbered: Pair, folder: Path, tmp_path: Path
) -> None:
    old, new = numbered
    asked = ("refine", folder / "numbered_adapter", "--from", old, "--to", new, "-o", tmp_path / "out")
    ran = run(*asked, "--steps", 4, "--n-inputs", 16, "--json")
    assert ran.code == 0, ran.err
    assert ran.record["objective"] == "sample"
    assert "different tokens" in ran.record["objective_reason"]
    ran = run(*asked, "--overwrite", "--objective", "effect")
    assert ran.code == 2
    assert "--objective sample" in ran.err


def test_the_next_characters_distribution_is_the_tokens_that_begin_with_it(folder: Path) -> None:
    letters, words = folder / "letters", folder / "words"
    tiny.llama(letters, vocab=6)
    tiny.llama(words, vocab=7)
    tiny.write_tokenizer(letters, ["a", "b", "c"])
    tiny.write_tokenizer(words, ["cab", "ab", "b", "abc"])
    firsts = FirstCharacters.of(BothModels.load(open_base(letters), open_base(words)))
    shares = torch.tensor([[0.05, 0.0, 0.05, 0.2, 0.3, 0.3, 0.1]])
    told = firsts.logs(shares.log(), "new").exp()[0]
    # a, b, c are numbered as the first tokenizer has them; special tokens and whatever is unknown are 0.
    torch.testing.assert_close(told, torch.tensor([0.1, 0.4, 0.3, 0.2]), atol=1e-6, rtol=1e-5)


def test_more_logits_than_tokens_are_nobodys(folder: Path) -> None:
    firsts = FirstCharacters({"old": torch.tensor([0, 1]), "new": torch.tensor([0, 1, 1, 2])}, 3)
    assert firsts.logs(torch.zeros(1, 4), "old").exp()[0].tolist() == pytest.approx([0.75, 0.25, 0.0], abs=1e-5)
    assert firsts.logs(torch.zeros(1, 2), "new").exp()[0].tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-5)


def test_of_a_model_that_says_what_is_wanted_of_it_the_next_character_is_right_too(
    adapter: Adapter, both: BothModels
) -> None:
    batches = text_samples(both, Teacher.of(both, adapter), 16, 0, None, kept=False).fit
    aims = text_aims(both, Teacher.of(both, adapter), batches)
    for aim in aims:
        with torch.no_grad(), applied(both.new.components, adapter):
            outputs = aim.told(aim.batch.run(both.new, "new"))
        # The same model with other numbers: the adapter is all that is wanted.
        assert float(aim.loss(outputs)) == pytest.approx(0.0, abs=1e-4)


def test_held_out_texts_go_on_from_every_prompt(adapter: Adapter, both: BothModels) -> None:
    beginnings = ["w3 w4", "w30 w31"]
    held = text_samples(both, Teacher.of(both, adapter), 16, 0, beginnings, kept=False).held_out
    own = [batch for batch in held if isinstance(batch, TextBatch) and batch.made_by == "adapter"]
    told = " / ".join(text for batch in own for text in both.old.tokenizer.batch_decode(batch.ids["old"]))
    assert all(beginning in told for beginning in beginnings)


def test_models_without_tokenizers_learn_from_ids(old: Path, drifted: Path, folder: Path) -> None:
    tiny.lora(load_model(old).main, ("q_proj", "down_proj"), size=0.4).save(folder / "bare_adapter")
    asked = replace(QUICK, objective="sample", steps=10, n_inputs=32)
    result = refine(load_adapter(folder / "bare_adapter"), open_base(old), open_base(drifted), settings=asked)
    assert result.report.objective_reason == "as asked"
    assert result.report.recovered >= result.report.beside[1].recovered


def test_a_model_that_writes_nothing_is_told(adapter: Adapter, folder: Path) -> None:
    encoder = load_model(tiny.bert(folder / "encoder"))
    with pytest.raises(InputError, match="hidden states alone"):
        samples_of(BothModels(encoder, encoder), adapter, QUICK)
