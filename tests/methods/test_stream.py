"""`stream`: what it must give where the answer is known, and what a port by it leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regraft import Adapter, InputError, ModuleRef, load_adapter, open_base
from regraft.carry import Settings
from regraft.forecast.probing import activation_figures
from regraft.methods._stream_text import Readout, TextSettings, Wanted, applied_twin, logs
from regraft.methods.stream import stream
from regraft.methods.task import AdapterTask, Rank, Running
from regraft.pairing import pair_bases
from regraft.port import PortResult, port
from regraft.probes.batches import make_batches
from regraft.probes.batches_diffusion import DiffusionBatch
from regraft.runtime import applied, load_model
from regraft.runtime.both import BothModels
from regraft.tensors import InMemory
from regraft.updates import Diff
from toys import permutation, regauged, rotation
from verify import tiny


@pytest.fixture(scope="module")
def wider(folder: Path) -> Path:
    return tiny.llama(folder / "wider", seed=5, width=24)


def lora(base: Path, *roles: str, **settings: Any) -> Adapter:
    return tiny.lora(load_model(base).main, roles or ("q_proj", "v_proj", "down_proj"), **settings)


def ported(adapter: Adapter, old: Path, new: Path, rank: Rank = "full", n: int = 12, **options: Any) -> PortResult:
    settings = Settings(running=Running(n_inputs=n), rank=rank, force=True)
    options = {"sweeps": 1, "last": 0, **options}
    return port(adapter, open_base(old), open_base(new), "stream", settings=settings, **options)


def share_left(result: PortResult) -> float:
    """What is left of the KL that the new base has without the adapter."""
    return result.report.figures["held_out_kl"] / result.report.figures["none_held_out_kl"]


def values(adapter: Adapter) -> dict[str, Tensor]:
    return {str(ref): update.delta() for ref, update in adapter.updates.items()}


def error(base: Path, adapter: Adapter, wanted: Adapter) -> float:
    """Of the change of log-probabilities, on texts that nothing was fitted on."""
    model, ids = load_model(base), torch.randint(48, (8, 24), generator=torch.Generator().manual_seed(9))

    def logs(adapter: Adapter | None) -> Tensor:
        with torch.no_grad(), applied(model.components, adapter):
            logged: Tensor = model.main(input_ids=ids).logits.log_softmax(-1)
        return logged

    none = logs(None)
    return float((logs(adapter) - logs(wanted)).norm() / (logs(wanted) - none).norm())


def test_on_the_same_base_a_lora_of_its_last_write_comes_back(old: Path) -> None:
    adapter = lora(old, "layers.1.mlp.down_proj", rank=4)
    result = ported(adapter, old, old, n=96, sweeps=6, ridge=1e-3, head=False)
    assert share_left(result) < 0.05
    assert error(old, result.adapter, adapter) < 0.3


def test_a_changed_norm_is_not_carried_beside_its_effect(old: Path) -> None:
    norm = ModuleRef("model", "model.layers.1.input_layernorm.weight")
    change = Diff(InMemory(torch.full((16,), 0.3)), norm.path)
    adapter = lora(old, "q_proj")
    both = replace(adapter, updates={**adapter.updates, norm: change}, format="lycoris")
    result = ported(both, old, old)
    assert norm not in result.adapter.updates
    row = next(row for row in result.report.modules if row.name == norm.path)
    assert row.status == "skipped"
    assert result.report.figures["held_out_kl"] < result.report.figures["none_held_out_kl"]


def test_in_other_coordinates_of_the_stream_it_carries_as_much(old: Path, folder: Path) -> None:
    turned = folder / "turned"
    turned.mkdir()
    for file in ("config.json", "generation_config.json"):
        (turned / file).write_bytes((old / file).read_bytes())
    state = load_file(old / "model.safetensors")
    save_file(regauged(state, rotation(16, 1), permutation(32, 2)), turned / "model.safetensors", {"format": "pt"})
    adapter = lora(old)
    here, there = (share_left(ported(adapter, old, new)) for new in (old, turned))
    assert here < 0.8
    assert there == pytest.approx(here, abs=0.02)


def test_a_base_of_another_width_takes_on_a_part_of_the_effect(old: Path, wider: Path) -> None:
    result = ported(lora(old, size=0.3), old, wider, n=48)
    assert share_left(result) < 0.9
    assert {row.target for row in result.report.modules if row.status == "ported"} <= {
        "lm_head",
        *(f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")),
    }


def test_an_adapter_without_effect_gives_no_update(old: Path, wider: Path) -> None:
    adapter, bases = lora(old, size=0.0), (open_base(old), open_base(wider))
    pairing = pair_bases(*bases)
    task = AdapterTask(adapter, *bases, pairing, adapter.updates, lambda: adapter, Running(n_inputs=8))
    carried = stream(task)
    assert not carried.updates
    assert carried.skipped.keys() == adapter.updates.keys()


@pytest.mark.parametrize(("rank", "expected"), [(3, 3), (None, 2)])
def test_each_write_has_the_wanted_rank_or_the_adapters(old: Path, rank: Rank, expected: int) -> None:
    result = ported(lora(old), old, old, rank)
    assert {update.rank for update in result.adapter.updates.values()} == {expected}


def test_the_same_seed_gives_the_same_bytes(old: Path, wider: Path) -> None:
    first, second = (values(ported(lora(old), old, wider).adapter) for _ in range(2))
    assert first
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_was_saved_is_what_was_measured(old: Path, wider: Path, tmp_path: Path) -> None:
    result = ported(lora(old), old, wider, 4)
    result.save(tmp_path / "out")
    saved, made = values(load_adapter(tmp_path / "out")), values(result.adapter)
    assert all(torch.allclose(saved[name], made[name]) for name in made)


def test_its_time_is_told_beside_that_of_one_pass(old: Path, wider: Path) -> None:
    figures = ported(lora(old), old, wider).report.figures
    assert 0 < figures["seconds_one_pass"] < figures["seconds"]


def task_of(adapter: Adapter, old: Path, new: Path) -> AdapterTask:
    bases = open_base(old), open_base(new)
    return AdapterTask(adapter, *bases, pair_bases(*bases), adapter.updates, lambda: adapter, Running(n_inputs=8))


def test_where_tokens_have_other_ids_what_is_wanted_of_a_word_is_what_the_teacher_says_of_it(
    numbered: tuple[Path, Path],
) -> None:
    task = task_of(lora(numbered[0]), *numbered)
    batches = make_batches(task.models, task.adapter, 4)
    new = torch.tensor([0, 1, 2, *(3 + tiny.ORDER.index(i) for i in range(45))])
    with applied_twin(task) as teacher:
        wanted = Wanted(task, teacher, TextSettings(1.0, 1.0, 0.1, 1, True, 0))
        for batch in batches.fit:
            said = logs(batch.run(teacher, "old"), batch, "old")
            torch.testing.assert_close(wanted.of(batch)[:, new], said, rtol=1e-4, atol=1e-4)


def test_tokens_of_which_few_are_in_both_vocabularies_are_an_error(numbered: tuple[Path, Path], folder: Path) -> None:
    other = tiny.llama(folder / "foreign")
    tiny.write_tokenizer(other, [f"x{i}" for i in range(30)] + tiny.NUMBERED[:15])
    with pytest.raises(InputError, match="18 are in the other"):
        stream(task_of(lora(numbered[0]), numbered[0], other))


def test_a_probe_compares_no_outputs_of_other_tokens(numbered: tuple[Path, Path]) -> None:
    task = task_of(lora(numbered[0]), *numbered)
    paired = {ref: ref for ref in task.adapter.updates}
    figures = activation_figures(task.models, task.adapter, task.adapter, paired, task.running)
    assert set(figures) == {"inputs moved"}


def test_a_norms_gain_is_read_beside_its_bias() -> None:
    torch.manual_seed(0)
    norm, head = nn.LayerNorm(6), nn.Linear(6, 9, bias=False)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        h = torch.randn(50, 6) + 2
        lin = head.weight * norm.weight
        got = Readout(norm, head, centred=True).matrix(h, norm(h))
    torch.testing.assert_close(got, lin - lin.mean(-1, keepdim=True), rtol=1e-3, atol=1e-3)


def test_models_that_give_hidden_states_alone_are_an_error(folder: Path) -> None:
    base = tiny.bert(folder / "bert")
    with pytest.raises(InputError, match="hidden states alone"):
        ported(lora(base, "query"), base, base)


def test_an_encoder_and_a_language_model_are_an_error(old: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="another kind"):
        BothModels.load(open_base(old), open_base(tiny.bert(folder / "encoder")))


@pytest.fixture(scope="module")
def drawing(folder: Path) -> Path:
    return tiny.pipeline(folder / "drawing", prediction="v_prediction")


def drawn_by(folder: Path, adapter: Adapter | None) -> Tensor:
    """What a pipeline's denoiser says of pure noise."""
    model = load_model(folder)
    batch = DiffusionBatch(
        ("sample", torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))),
        torch.tensor([950, 700, 400, 100]),
        ("a", "b", "", "c"),
        "old",
    )
    with applied(model.components, adapter):
        return batch.run(model, "new")


def test_on_the_same_pipeline_most_of_the_effect_comes_back(drawing: Path, tmp_path: Path) -> None:
    adapter = tiny.lora({"unet": load_model(drawing).main}, ["to_out.0", "proj_out"], size=0.3)
    result = ported(adapter, drawing, drawing, n=32)
    none, wanted, got = (drawn_by(drawing, part) for part in (None, adapter, result.adapter))
    assert float((got - wanted).norm() / (wanted - none).norm()) < 0.6
    assert result.report.figures["held_out_error"] < 0.4


def test_a_pipeline_of_other_channels_and_another_autoencoder_takes_it_on(drawing: Path, folder: Path) -> None:
    other = tiny.pipeline(folder / "other", seed=4, prediction="v_prediction", channels=(12, 16))
    adapter = tiny.lora({"unet": load_model(drawing).main}, ["to_out.0", "proj_out"], size=0.3)
    result = ported(adapter, drawing, other, 3, n=32)
    assert result.report.figures["held_out_error"] < 1
    assert {update.rank for update in result.adapter.updates.values()} == {3}


def test_a_denoiser_alone_draws_no_pictures_to_go_through(folder: Path) -> None:
    base = tiny.unet(folder / "unet")
    with pytest.raises(InputError, match="draws none"):
        ported(lora(base, "to_v"), base, base)
