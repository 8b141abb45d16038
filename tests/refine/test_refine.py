"""A short distillation: more of the adapter than the start has, and the same from the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Run
from torch import Tensor

from regraft import Adapter, InputError, load_adapter, open_base, port
from regraft.adapter import ModuleRef
from regraft.lineage import lineage_of, with_port
from regraft.refine import RefineResult, RefineSettings, refine
from regraft.refine import loop as loop_module
from regraft.refine.aims import Aim
from regraft.refine.starting import Start, from_zero, refine_entry
from regraft.runtime import applied, load_model
from regraft.singular import print_of
from regraft.tensors import InMemory
from regraft.updates import Diff, LowRank, SpectralShift, Update
from verify import tiny

QUICK = RefineSettings(steps=24, look=8, n_inputs=16, rate=5e-3)
ROLES = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def new(folder: Path) -> Path:
    return tiny.llama(folder / "new", drift=0.4)


@pytest.fixture(scope="module")
def adapter(old: Path, folder: Path) -> Adapter:
    made = tiny.lora(load_model(old).main, ROLES, size=0.3)
    made.save(folder / "adapter")
    return load_adapter(folder / "adapter")


def refined(adapter: Adapter, old: Path, new: Path, settings: RefineSettings = QUICK, **more: Any) -> RefineResult:
    return refine(adapter, open_base(old), open_base(new), settings=settings, **more)


def numbers(adapter: Adapter) -> dict[str, Tensor]:
    return {
        f"{ref}.{name}": part.load() for ref, update in adapter.updates.items() for name, part in update.parts().items()
    }


def assert_same(one: Adapter, other: Adapter) -> None:
    mine, theirs = numbers(one), numbers(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def test_it_ends_nearer_to_the_old_base_with_its_adapter_than_it_began(adapter: Adapter, old: Path, new: Path) -> None:
    result = refined(adapter, old, new)
    report = result.report
    assert report.recovered > report.looks[0].recovered + 0.02
    # On texts that it never saw: the outputs of the old base with its adapter.
    ids = torch.randint(3, 48, (8, 24), generator=torch.Generator().manual_seed(5))

    def said(base: Path, with_: Adapter) -> Tensor:
        model = load_model(base)
        with torch.no_grad(), applied(model.components, with_):
            return model.main(input_ids=ids).logits.log_softmax(-1)

    wanted = said(old, adapter)
    start = refined(adapter, old, new, replace(QUICK, steps=1, rate=1e-9)).adapter
    before, after = (float((wanted.exp() * (wanted - said(new, a))).sum(-1).mean()) for a in (start, result.adapter))
    assert after < before


def test_from_a_base_to_itself_the_bytes_stay(adapter: Adapter, old: Path) -> None:
    result = refined(adapter, old, old)
    assert_same(result.adapter, adapter)
    assert result.report.recovered == pytest.approx(1.0, abs=1e-4)
    assert result.report.steps == 0


def test_the_same_seed_gives_the_same_bytes(adapter: Adapter, old: Path, new: Path) -> None:
    assert_same(refined(adapter, old, new).adapter, refined(adapter, old, new).adapter)


def test_a_run_that_was_stopped_goes_on_to_the_same_end(
    adapter: Adapter, old: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, state = refined(adapter, old, new), tmp_path / "state.pt"
    step = loop_module._Run.one_step

    def stopped(run: loop_module._Run, aim: Aim) -> float:
        if run.step == 13:
            raise KeyboardInterrupt
        return step(run, aim)

    monkeypatch.setattr(loop_module._Run, "one_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        refined(adapter, old, new, state=state)
    monkeypatch.setattr(loop_module._Run, "one_step", step)
    heard: list[int] = []
    again = refined(adapter, old, new, state=state, heard=lambda look: heard.append(look.step))
    assert heard == [16, 24]
    assert_same(again.adapter, whole.adapter)


def test_a_state_that_is_damaged_is_told(adapter: Adapter, old: Path, new: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    state.write_bytes(b"no state")
    with pytest.raises(InputError, match="state of the earlier run"):
        refined(adapter, old, new, state=state)


def test_a_loss_that_is_no_number_keeps_the_last_good_state(
    adapter: Adapter, old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distance = Aim.distance
    calls = 0

    def broken(aim: Aim, outputs: Tensor) -> Tensor:
        nonlocal calls
        calls += outputs.requires_grad
        return distance(aim, outputs) * (float("nan") if calls > 10 and outputs.requires_grad else 1.0)

    monkeypatch.setattr(Aim, "distance", broken)
    result = refined(adapter, old, new)
    assert "no number at step 11" in result.report.stopped
    assert result.report.recovered > result.report.looks[0].recovered
    assert all(torch.isfinite(value).all() for value in numbers(result.adapter).values())


def test_it_stops_when_nothing_is_gained(adapter: Adapter, old: Path, new: Path) -> None:
    result = refined(adapter, old, new, replace(QUICK, steps=400, look=2, patience=3, rate=1e-7))
    assert "no gain" in result.report.stopped
    assert result.report.looks[-1].step < 400


def test_an_adapter_without_effect_is_told_before_anything_is_trained(adapter: Adapter, old: Path, new: Path) -> None:
    silent = {
        ref: update.with_factors(torch.zeros_like(update.factors()[0]), update.factors()[1])
        for ref, update in adapter.updates.items()
        if isinstance(update, LowRank)
    }
    with pytest.raises(InputError, match=r"no effect|nothing"):
        refined(replace(adapter, updates=silent), old, new)


def test_the_lineage_tells_of_it(adapter: Adapter, old: Path, new: Path, tmp_path: Path) -> None:
    result = refined(adapter, old, new)
    result.save(tmp_path / "out")
    lineage = lineage_of(load_adapter(tmp_path / "out"))
    assert lineage is not None
    told = lineage["ports"][-1]["refined"]
    assert told["objective"] == result.report.objective
    assert told["steps"] == result.report.steps
    assert told["recovered"] == pytest.approx(result.report.recovered, abs=1e-3)


def test_peft_loads_what_was_refined(adapter: Adapter, old: Path, new: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    result = refined(adapter, old, new)
    result.save(tmp_path / "out")
    model, ids = load_model(new), torch.arange(3, 19)[None]
    with torch.no_grad(), applied(model.components, result.adapter):
        wanted = model.main(input_ids=ids).logits
    with torch.no_grad():
        got = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(new), tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_command_refines_and_leaves_no_state(
    run: Run, adapter: Adapter, old: Path, new: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = run(
        "refine", folder / "adapter", "--from", old, "--to", new, "-o", out, "--steps", 8, "--n-inputs", 16, "--json"
    )
    assert ran.code == 0, ran.err
    assert ran.record["outputs"]
    assert load_adapter(out).updates.keys() == adapter.updates.keys()
    again = run("refine", folder / "adapter", "--from", old, "--to", new, "-o", out)
    assert again.code == 1
    assert "exists" in again.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--budget", "soon"), "--budget 'soon' is no time"),
        (("--rate", "0"), "--rate"),
        (("--retention", "2"), "--retention"),
        (("--objective", "all"), "--objective 'all'"),
        (("--filter", "1"), "--filter"),
        (("--optimizer", "sgd"), "--optimizer"),
    ],
)
def test_options_that_are_none_are_told(
    run: Run, options: tuple[str, str], said: str, old: Path, new: Path, folder: Path, tmp_path: Path
) -> None:
    ran = run("refine", folder / "adapter", "--from", old, "--to", new, "-o", tmp_path / "out", *options)
    assert ran.code == 2
    assert said in ran.err
    assert not (tmp_path / "out").exists()


def test_a_port_that_does_worse_than_nothing_is_not_begun_from(
    adapter: Adapter, old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Outputs far from anything that either base says.
    spoilt = {ref: update.scaled(-40.0) for ref, update in adapter.updates.items()}
    ported = Start(replace(adapter, updates=spoilt, metadata=with_port(adapter, {"to": {}})), "effect", "")
    monkeypatch.setattr("regraft.refine.start_of", lambda *_: ported)
    report = refined(adapter, old, new).report
    assert report.start == "zero"
    assert "worse than the new base alone" in report.start_reason
    assert report.recovered > 0


def test_what_is_written_is_what_was_measured_biases_included(adapter: Adapter, old: Path, new: Path) -> None:
    ported = port(adapter, open_base(old), open_base(new), "copy").adapter
    biased: dict[ModuleRef, Update] = {}
    for ref, update in ported.updates.items():
        assert isinstance(update, LowRank)
        biased[ref] = replace(update, bias=InMemory(torch.linspace(-0.3, 0.3, update.shape[0])))
    first = refined(adapter, old, new, start=replace(ported, updates=biased))
    assert first.report.steps > 0
    # On the same inputs, in the base as any adapter is.
    beside = refined(adapter, old, new, start="zero", native=first.adapter).report.beside
    assert beside[-1].title == "native"
    assert beside[-1].recovered == pytest.approx(first.report.recovered, abs=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["vera", "fourierft"])
def test_numbers_on_random_directions_are_refined_as_the_lora_of_their_change(
    kind: str, old: Path, new: Path, tmp_path: Path
) -> None:
    import peft

    torch.manual_seed(0)
    drawn: dict[str, Any] = {"r": 4, "save_projection": False} if kind == "vera" else {"n_frequency": 30}
    config = (peft.VeraConfig if kind == "vera" else peft.FourierFTConfig)(target_modules=list(ROLES), **drawn)
    model = peft.get_peft_model(load_model(old).main, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * (0.5 if "lambda" in name else 0.05)
    model.save_pretrained(tmp_path / "adapter")
    result = refined(load_adapter(tmp_path / "adapter"), old, new)
    assert result.report.recovered > result.report.looks[0].recovered
    assert all(isinstance(update, LowRank) for update in result.adapter.updates.values())
    result.adapter.save(tmp_path / "refined")
    ids = torch.randint(3, 48, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        served = peft.PeftModel.from_pretrained(load_model(new).main, tmp_path / "refined").eval()(input_ids=ids).logits
        mine = load_model(new)
        with applied(mine.components, load_adapter(tmp_path / "refined")):
            found = mine.main(input_ids=ids).logits
    torch.testing.assert_close(found, served, rtol=1e-3, atol=1e-4)


def test_what_holds_nothing_to_train_is_refused_before_any_work(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft.refine import BothModels

    monkeypatch.setattr(BothModels, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    norm = Adapter({ModuleRef("model", "model.norm.weight"): Diff(InMemory(torch.ones(16)), "x.diff")}, "lycoris")
    # As many numbers as a matrix may have singular values: which it is, the base tells.
    shift = Adapter({ModuleRef("model", "model.norm"): SpectralShift(InMemory(torch.ones(16)))}, "svdiff")
    for adapter in (norm, shift):
        for start in (None, "zero", adapter):
            with pytest.raises(InputError, match=r"no linear layer or convolution that could be trained"):
                refine(adapter, open_base(old), open_base(new), start=start)  # type: ignore[arg-type]


def test_other_kinds_begin_from_one_lora_a_module(old: Path, new: Path) -> None:
    """From zero; and from a port that is a whole weight's change, which gets no LoRA beside it.

    Such an adapter can't be copied: its numbers are refused on another base than its own.
    """
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    refs = [ModuleRef("model", path) for path in paths]
    stamps = {ref: InMemory(print_of(open_base(old).weight(ref))) for ref in refs}
    shifts = {ref: SpectralShift(InMemory(torch.full((16,), 0.3)), stamp=stamp) for ref, stamp in stamps.items()}
    adapter = Adapter(shifts, "lycoris")
    ported = port(adapter, open_base(old), open_base(new), "copy").adapter
    assert {update.kind for update in ported.updates.values()} == {"diff"}
    few = RefineSettings(steps=2, look=1, n_inputs=4)
    for start in ("zero", ported, None):
        result = refine(adapter, open_base(old), open_base(new), start=start, settings=few)  # type: ignore[arg-type]
        assert sorted(ref.path.removesuffix(".weight") for ref in result.adapter.updates) == paths
        assert "copy" not in [row.title for row in result.report.beside if row.title != result.report.start]


def test_a_start_of_shifts_is_written_in_forms_that_one_file_holds(
    adapter: Adapter, old: Path, new: Path, tmp_path: Path
) -> None:
    """A LoRA for the layer; for the norm the change of its weight, or its new value."""
    layer, norm = ModuleRef("model", "model.layers.0.self_attn.q_proj"), ModuleRef("model", "model.norm")
    shifts: dict[ModuleRef, Update] = {ref: SpectralShift(InMemory(torch.full((16,), 0.3))) for ref in (layer, norm)}
    bases = open_base(old), open_base(new)
    few = RefineSettings(steps=2, look=1, n_inputs=4, rank=4)
    found: dict[str, Adapter] = {}
    for format in ("svdiff", "peft"):
        start = Adapter(shifts, format, metadata=with_port(adapter, refine_entry(*bases)))
        found[format] = refine(adapter, *bases, start=start, settings=few).adapter
    weight = ModuleRef("model", "model.norm.weight")
    assert (found["svdiff"].format, found["svdiff"].updates[weight].kind) == ("lycoris", "diff")
    found["peft"].save(tmp_path / "out")
    written = load_adapter(tmp_path / "out")
    assert {ref: update.kind for ref, update in written.updates.items()} == {layer: "lora", weight: "full"}
    base = load_model(new).main.get_submodule(norm.path).weight.detach()
    torch.testing.assert_close(written.updates[weight].merged(base), base + 0.3)


@pytest.mark.parametrize("format", ["svdiff", "lycoris"])
def test_what_begins_at_zero_is_in_a_format_that_holds_loras(format: str, old: Path, new: Path) -> None:
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    shifts: dict[ModuleRef, Update] = {
        ModuleRef("model", path): SpectralShift(InMemory(torch.ones(16))) for path in paths
    }
    begun = from_zero(Adapter(shifts, format), open_base(old), open_base(new)).adapter
    assert [update.kind for update in begun.updates.values()] == ["lora", "lora"]
    assert begun.format == "lycoris"
