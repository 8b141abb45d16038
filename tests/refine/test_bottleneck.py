"""Bottleneck adapters go to another base: read and run as AdapterHub's library does, and taught the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Run
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from regraft import InputError, open_base
from regraft.refine import RefineSettings
from regraft.refine.bottleneck import BottleneckResult, load_bottlenecks, refine_bottlenecks
from regraft.refine.bottleneck.layers import placed
from regraft.refine.bottleneck.places import Spot
from regraft.refine.bottleneck.starting import first_state
from regraft.runtime import load_model
from regraft.runtime.both import BothModels
from regraft.tensors import read_tensor_file
from verify import tiny

QUICK = RefineSettings(steps=60, look=20, n_inputs=32, rate=1e-2)
SIZE = 4
HUB = Path(__file__).parents[1] / "data" / "adapterhub"
PFEIFFER = {
    "mh_adapter": False,
    "output_adapter": True,
    "reduction_factor": 4,
    "non_linearity": "relu",
    "original_ln_before": True,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "scaling": 1.0,
    "is_parallel": False,
}


class Small(nn.Module):
    """A bottleneck of Pfeiffer's behind a feed-forward, restated: f + U relu(D (f + r) + b) + c."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, SIZE), nn.Linear(SIZE, width)
        self.residual: Any = None

    def note(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.residual = args[0]

    def forward(self, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + self.up(torch.relu(self.down(output + self.residual)))


@contextmanager
def hooked(model: nn.Module, smalls: list[Small]) -> Iterator[None]:
    handles = []
    for layer, small in zip(model.model.layers, smalls, strict=True):
        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(small.note))
        handles.append(layer.mlp.register_forward_hook(small))
    yield
    for handle in handles:
        handle.remove()


def trained(base: Path) -> list[Small]:
    """Trained for a moment to go from each word to a certain other one."""
    model = load_model(base).main
    torch.manual_seed(3)
    smalls = [Small(16), Small(16)]
    optimizer = torch.optim.Adam([p for small in smalls for p in small.parameters()], lr=2e-2)
    with hooked(model, smalls):
        for _ in range(60):
            ids = torch.randint(3, 48, (16, 12))
            said = model(input_ids=ids).logits
            F.cross_entropy(said.flatten(0, 1), (3 + (7 * ids) % 45).flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return smalls


def saved(smalls: list[Small], folder: Path, **options: Any) -> Path:
    """As the library saves them."""
    tensors = {
        f"model.layers.{i}.output_adapters.adapters.words.{name}": tensor.data
        for i, small in enumerate(smalls)
        for name, tensor in {
            "adapter_down.0.weight": small.down.weight,
            "adapter_down.0.bias": small.down.bias,
            "adapter_up.weight": small.up.weight,
            "adapter_up.bias": small.up.bias,
        }.items()
    }
    folder.mkdir(parents=True)
    config = {
        "config": {**PFEIFFER, **options},
        "hidden_size": 16,
        "model_class": "LlamaForCausalLM",
        "model_name": "old",
        "model_type": "llama",
        "name": "words",
        "version": "adapters.1.3.0",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_adapter.bin")
    return folder


@pytest.fixture(scope="module")
def smalls(old: Path) -> list[Small]:
    return trained(old)


@pytest.fixture(scope="module")
def words(smalls: list[Small], folder: Path) -> Path:
    return saved(smalls, folder / "words")


# --- Read and run as the library does.


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("houlsby", "bert"),
        ("own-norms", "bert"),
        ("post-add", "distilbert"),
        ("pfeiffer", "llama"),
        ("plus", "llama"),
        ("left-out", "gpt2"),
    ],
)
def test_a_model_says_with_it_what_the_library_s_own_says(name: str, base: str, tmp_path: Path) -> None:
    model, bottlenecks = load_model(HUB / base), load_bottlenecks(HUB / name)
    wanted = load_file(HUB / name / "expected.safetensors")["outputs"]
    ids = torch.tensor([[3, 7, 5, 9, 2, 11, 4], [8, 1, 23, 6, 6, 10, 0]])

    def said() -> Tensor:
        with torch.no_grad():
            outputs = model.main(input_ids=ids)
        return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state

    before = said()
    with placed(model, bottlenecks.modules()):
        torch.testing.assert_close(said(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(said(), before)
    assert not torch.allclose(before, wanted, atol=0.1)
    # And what was read is written.
    BottleneckResult(bottlenecks, None).save(tmp_path / "again")  # type: ignore[arg-type]
    again, config = load_bottlenecks(tmp_path / "again"), "adapter_config.json"
    assert json.loads((tmp_path / "again" / config).read_text()) == json.loads((HUB / name / config).read_text())
    keys = [sorted(read_tensor_file(next(folder.glob("*adapter.*"))).tensors) for folder in (HUB / name, again.path)]
    assert keys[0] == keys[1]


def test_its_forward_is_the_formula(old: Path, smalls: list[Small], words: Path) -> None:
    model, ids = load_model(old), torch.randint(3, 48, (4, 12))
    with hooked(model.main, smalls), torch.no_grad():
        wanted = model.main(input_ids=ids).logits
    with placed(model, load_bottlenecks(words).modules()), torch.no_grad():
        assert torch.equal(model.main(input_ids=ids).logits, wanted)


# --- What it begins from.


def first(words: Path, old: Path, new: Path) -> Any:
    bases = open_base(old), open_base(new)
    return first_state(load_bottlenecks(words), *bases, BothModels.load(*bases))


def test_in_another_width_it_does_the_same_to_the_image_of_a_state(words: Path, old: Path, tmp_path: Path) -> None:
    wide = load_model(tiny.llama(tmp_path / "wide", width=24)).main
    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1)))[0][:16]
    wide.get_input_embeddings().weight.data = load_model(old).main.get_input_embeddings().weight @ turn
    wide.save_pretrained(tmp_path / "wide")
    found = first(words, old, tmp_path / "wide")
    assert found.how == "embedding map of 48 shared tokens"
    state, residual = torch.randn(2, 5, 16)
    for spot, module in load_bottlenecks(words).modules().items():
        moved = found.modules[spot](state @ turn, residual @ turn, None)
        torch.testing.assert_close(moved, module(state, residual, None) @ turn, rtol=1e-3, atol=1e-3)
    # The library makes bottlenecks of width // factor.
    assert 24 // found.config["config"]["reduction_factor"] == SIZE


def stacked(old: Path, folder: Path, order: list[int | None]) -> Path:
    """The model with some of its blocks, and random ones between them."""
    model = load_model(old).main
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": len(order)})
    torch.manual_seed(8)
    deeper = type(model)(config)
    state = {key: value for key, value in model.state_dict().items() if ".layers." not in key}
    for j, i in enumerate(order):
        source = deeper if i is None else model
        mine = f"model.layers.{j if i is None else i}."
        state |= {
            key.replace(mine, f"model.layers.{j}."): value
            for key, value in source.state_dict().items()
            if key.startswith(mine)
        }
    deeper.load_state_dict(state)
    deeper.save_pretrained(folder)
    return folder


def test_an_added_block_begins_without_effect(words: Path, old: Path, tmp_path: Path) -> None:
    found = first(words, old, stacked(old, tmp_path / "deep", [0, None, 1]))
    own = load_bottlenecks(words).modules()
    ups = [found.modules[Spot(block, "output_adapter")].adapter_up.weight for block in range(3)]
    assert torch.equal(ups[0], own[Spot(0, "output_adapter")].adapter_up.weight)
    assert torch.equal(ups[2], own[Spot(1, "output_adapter")].adapter_up.weight)
    assert not ups[1].any()


def test_of_a_removed_block_it_is_told(words: Path, old: Path, tmp_path: Path) -> None:
    found = first(words, old, stacked(old, tmp_path / "shallow", [1]))
    assert list(found.modules) == [Spot(0, "output_adapter")]
    assert found.untrained == {"block 0": "has no counterpart in the new base, and is left out"}


def test_blocks_that_were_left_out_stay_so(tmp_path: Path) -> None:
    bases = open_base(HUB / "gpt2"), open_base(HUB / "gpt2")
    found = first_state(load_bottlenecks(HUB / "left-out"), *bases, BothModels.load(*bases))
    assert list(found.modules) == [Spot(0, "output_adapter")]
    assert found.config["config"]["leave_out"] == [1]


# --- Refined.


def test_to_its_own_base_it_stays_as_it_is(words: Path, old: Path) -> None:
    result = refine_bottlenecks(load_bottlenecks(words), open_base(old), open_base(old), settings=QUICK)
    assert result.report.recovered == pytest.approx(1.0, abs=1e-4)
    for spot, table in load_bottlenecks(words).tables.items():
        assert all(torch.equal(result.bottlenecks.tables[spot][name], tensor) for name, tensor in table.items())


def test_on_a_drifted_base_it_ends_nearer_and_is_read_again(
    words: Path, old: Path, drifted: Path, tmp_path: Path
) -> None:
    result = refine_bottlenecks(load_bottlenecks(words), open_base(old), open_base(drifted), settings=QUICK)
    assert result.report.start == "copy"
    assert result.report.recovered > 0.6
    assert result.report.recovered > result.report.looks[0].recovered + 0.05
    files = result.save(tmp_path / "refined")
    assert {file.name for file in files} == {"adapter_config.json", "pytorch_adapter.bin"}
    again = load_bottlenecks(tmp_path / "refined")
    assert again.config["model_name"] == "drifted"
    assert again.config["regraft_lineage"]["ports"][0]["refined"]["objective"] == "output"
    teacher, student = load_model(old), load_model(drifted)
    ids = torch.randint(3, 48, (8, 12), generator=torch.Generator().manual_seed(5))

    def said(model: Any, folder: Path | None) -> Tensor:
        modules = load_bottlenecks(folder).modules() if folder else {}
        with placed(model, modules), torch.no_grad():
            return model.main(input_ids=ids).logits.log_softmax(-1)

    wanted = said(teacher, words)

    def away(folder: Path | None) -> float:
        return float(F.kl_div(said(student, folder), wanted, reduction="batchmean", log_target=True))

    assert away(tmp_path / "refined") < away(words) < away(None)


def test_on_a_wider_unrelated_base_it_learns(words: Path, old: Path, tmp_path: Path) -> None:
    wide = tiny.llama(tmp_path / "wide", width=24, seed=1)
    result = refine_bottlenecks(load_bottlenecks(words), open_base(old), open_base(wide), settings=QUICK)
    assert result.report.recovered > 0.15
    result.save(tmp_path / "refined")
    assert load_bottlenecks(tmp_path / "refined").config["hidden_size"] == 24


def test_an_encoder_s_goes_by_hidden_states(tmp_path: Path) -> None:
    model = load_model(HUB / "bert").main
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.8 * parameter.std().nan_to_num() * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "drifted")
    bases = open_base(HUB / "bert"), open_base(tmp_path / "drifted")
    settings = replace(QUICK, n_inputs=16)
    result = refine_bottlenecks(load_bottlenecks(HUB / "houlsby"), *bases, settings=settings)
    assert result.report.recovered > result.report.looks[0].recovered + 0.02
    assert result.report.modules == 4


def test_across_tokenizers_and_architectures_the_texts_are_learnt(
    words: Path, numbered: tuple[Path, Path], tmp_path: Path
) -> None:
    new = tiny.gpt2(tmp_path / "gpt2")
    load_model(numbered[1]).tokenizer.save_pretrained(new)
    bases = open_base(numbered[0]), open_base(new)
    result = refine_bottlenecks(load_bottlenecks(words), *bases, settings=replace(QUICK, steps=20))
    assert result.report.objective == "sample"
    assert result.report.recovered > 0
    result.save(tmp_path / "refined")
    keys = read_tensor_file(tmp_path / "refined" / "pytorch_adapter.bin").tensors
    assert "transformer.h.1.output_adapters.adapters.words.adapter_up.weight" in keys
    assert load_bottlenecks(tmp_path / "refined").config["model_type"] == "gpt2"


def test_a_start_that_does_worse_than_nothing_is_dropped(words: Path, old: Path, tmp_path: Path) -> None:
    model = load_model(old).main
    model.lm_head.weight.data.neg_()
    model.save_pretrained(tmp_path / "other")
    bases = open_base(old), open_base(tmp_path / "other")
    result = refine_bottlenecks(load_bottlenecks(words), *bases, settings=replace(QUICK, steps=1))
    assert result.report.start == "zero"
    assert "worse than the new base alone" in result.report.start_reason


# --- The command, and what is not read.


@pytest.mark.parametrize(
    ("head", "what"),
    [
        ({"config": {"head_type": "tagging"}}, "kept as it is"),
        ({"config": None, "model_class": "LlamaForCausalLM"}, "left out: the new base has one"),
    ],
)
def test_the_command_reads_and_writes_the_library_s_folder(
    words: Path, old: Path, drifted: Path, tmp_path: Path, run: Run, head: dict[str, Any], what: str
) -> None:
    shutil.copytree(words, tmp_path / "words")
    (tmp_path / "words" / "head_config.json").write_text(json.dumps(head))
    ran = run(
        "refine", tmp_path / "words", "--from", old, "--to", drifted, "-o", tmp_path / "out", "--steps", "4", "--json"
    )
    assert ran.code == 0, ran.err
    kept = {"head_config.json"} if what == "kept as it is" else set()
    assert {Path(file).name for file in ran.record["outputs"]} == {
        "adapter_config.json",
        "pytorch_adapter.bin",
        *kept,
    }
    assert what in ran.record["untrained"]["prediction head"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"is_parallel": True}, "of the parallel kind, which is not read"),
        ({"phm_layer": True}, "of the Compacter kind, which is not read"),
        ({"use_gating": True}, "of the gated kind, which is not read"),
        ({"architecture": "prompt_tuning"}, "of the kind prompt_tuning, which is not read"),
        ({"architecture": "lora"}, "of the kind lora, which is not read"),
        ({"ln_before": True}, "has no adapter_down.1.weight"),
        ({"scaling": "channel"}, "does not fit its configuration"),
        ({"non_linearity": "wobble"}, "names an activation that isn't known here"),
        ({"residual_before_ln": "maybe"}, "damaged adapter_config.json"),
    ],
)
def test_other_kinds_are_told_in_a_line(
    smalls: list[Small], old: Path, drifted: Path, tmp_path: Path, run: Run, options: dict[str, Any], said: str
) -> None:
    folder = saved(smalls, tmp_path / "odd", **options)
    ran = run("refine", folder, "--from", old, "--to", drifted, "-o", tmp_path / "out")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert said in ran.err
    assert not (tmp_path / "out").exists()


def edited(folder: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    edit(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_adapter.bin")
    return folder


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda config, tensors: config.update(model_type="t5"), "model of type t5"),
        (lambda config, tensors: tensors.popitem(), "does not fit its configuration"),
        (lambda config, tensors: tensors.clear(), "holds no"),
        (
            lambda config, tensors: tensors.update({"model.invertible_adapters.words.F.0.weight": torch.ones(2)}),
            "an invertible adapter's key",
        ),
        (lambda config, tensors: next(iter(tensors.values())).fill_(float("nan")), "NaN"),
    ],
)
def test_what_cannot_be_read_is_told(smalls: list[Small], tmp_path: Path, edit: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_bottlenecks(edited(saved(smalls, tmp_path / "odd"), edit))


def test_older_names_are_read(smalls: list[Small], words: Path, tmp_path: Path) -> None:
    def older(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del config["version"]
        config["config"]["non_linearity"] = "gelu"
        for key in list(tensors):
            tensors[key.replace(".adapters.", ".layer_text_task_adapters.")] = tensors.pop(key)

    found = load_bottlenecks(edited(saved(smalls, tmp_path / "older"), older))
    assert found.form.non_linearity == "gelu_new"
    assert found.tables.keys() == load_bottlenecks(words).tables.keys()


def test_bottlenecks_of_another_base_are_told(words: Path, old: Path, tmp_path: Path) -> None:
    wide = tiny.llama(tmp_path / "wide", width=24)
    with pytest.raises(InputError, match="16 numbers, and those of wide have 24"):
        refine_bottlenecks(load_bottlenecks(words), open_base(wide), open_base(old), settings=QUICK)
    with pytest.raises(InputError, match="for models of type llama"):
        refine_bottlenecks(load_bottlenecks(words), open_base(HUB / "gpt2"), open_base(old), settings=QUICK)
