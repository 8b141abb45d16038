"""VeRA and FourierFT in PEFT's folders: what a file leaves out, parts of it, Conv1D, and what is damaged."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regraft import Adapter, InputError, OutputError, load_adapter
from regraft.adapter import MODEL, ModuleRef
from regraft.tensors import InMemory
from regraft.updates import FourierFT, LowRank, Vera, with_shapes
from regraft.updates.exact import as_lowrank
from regraft.updates.vera import Seed

pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vera": ("VeraConfig", {"r": 3}),
    "vera drawn": ("VeraConfig", {"r": 3, "save_projection": False}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20, "n_frequency_pattern": {"1": 9}}),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 6))


def trained(case: str, base: nn.Module, **more: Any) -> PeftModel:
    name, options = CASES[case]
    torch.manual_seed(1)
    model = get_peft_model(
        copy.deepcopy(base), getattr(peft, name)(**{"target_modules": ["0", "1", "2"], **options, **more})
    )
    for key, parameter in model.named_parameters():
        if "lambda" in key or "spectrum" in key:
            parameter.data = torch.randn_like(parameter)
    return model.eval()


def shaped(adapter: Adapter, base: nn.Module) -> Adapter:
    shapes = {ref: tuple(base.get_submodule(ref.path).weight.shape) for ref in adapter.updates}
    return replace(adapter, updates=with_shapes(adapter.updates, shapes))


def merged(model: PeftModel) -> dict[str, Tensor]:
    return copy.deepcopy(model).merge_and_unload().state_dict()


@pytest.mark.parametrize("case", CASES)
def test_a_part_of_a_file_is_one_that_peft_loads(case: str, tmp_path: Path) -> None:
    """Without the largest module PEFT makes smaller projections, and draws others."""
    base = net()
    model = trained(case, base)
    model.save_pretrained(tmp_path / "theirs")
    adapter = shaped(load_adapter(tmp_path / "theirs"), base)
    kept = {ref: update for ref, update in adapter.updates.items() if ref.path in ("0", "2")}
    replace(adapter, updates={ModuleRef(MODEL, "0"): kept[ModuleRef(MODEL, "0")]}).save(tmp_path / "one")
    replace(adapter, updates=kept).save(tmp_path / "two")
    theirs = merged(model)
    for name, paths in (("one", ["0"]), ("two", ["0", "2"])):
        ours = merged(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name))
        for path in ("0", "1", "2"):
            wanted = theirs if path in paths else base.state_dict()
            assert torch.allclose(ours[f"{path}.weight"], wanted[f"{path}.weight"], atol=1e-5), (name, path)


def test_a_part_whose_projections_can_not_be_known_is_refused(tmp_path: Path) -> None:
    trained("vera drawn", net()).save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    part = dict(list(adapter.updates.items())[1:])
    with pytest.raises(OutputError, match="some of the modules of a VeRA whose projections are not stored"):
        replace(adapter, updates=part).save(tmp_path / "ours")


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_gpt2_s_conv1d_has_its_orientation(case: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
    pattern = {"n_frequency_pattern": {"c_attn": 9}} if case == "fourierft" else {}
    # c_proj of the attention is square: nothing in the file tells how it lies.
    model = trained(case, base, target_modules=["c_attn", "c_proj", "c_fc"], **pattern)
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    assert len(adapter.updates) == 8
    adapter.save(tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes()[8:] == (tmp_path / "theirs" / WEIGHTS).read_bytes()[8:]
    wanted, weights = merged(model), base.state_dict()
    for ref, update in shaped(adapter, base).updates.items():
        name = f"{ref.path}.weight"
        assert not torch.allclose(wanted[name], weights[name], atol=1e-3)
        assert torch.allclose(weights[name] + update.delta(), wanted[name], atol=1e-5)
        low = as_lowrank(update, dense=True)
        assert low is not None
        assert torch.allclose(weights[name] + low.delta(), wanted[name], atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_strength_is_exact(case: str, tmp_path: Path) -> None:
    base = net()
    trained(case, base).save_pretrained(tmp_path / "theirs")
    adapter = shaped(load_adapter(tmp_path / "theirs"), base)
    half = replace(adapter, updates={ref: update.scaled(0.5) for ref, update in adapter.updates.items()})
    half.save(tmp_path / "half")
    found = shaped(load_adapter(tmp_path / "half"), base)
    for ref, update in adapter.updates.items():
        torch.testing.assert_close(found.updates[ref].delta(), 0.5 * update.delta())


@pytest.mark.parametrize("case", CASES)
def test_names_of_an_adapter_in_a_raw_state_dict_come_back(case: str, tmp_path: Path) -> None:
    base = net()
    model = trained(case, base)
    model.save_pretrained(tmp_path / "theirs")
    named = load_file(tmp_path / "theirs" / WEIGHTS)
    save_file({f"{key}.default": value for key, value in named.items()}, tmp_path / "theirs" / WEIGHTS)
    adapter = load_adapter(tmp_path / "theirs")
    assert adapter.unrecognised == ()
    adapter.save(tmp_path / "ours")
    after = load_file(tmp_path / "ours" / WEIGHTS)
    assert set(after) == {f"{key}.default" for key in named}
    assert all(torch.equal(after[f"{key}.default"], value) for key, value in named.items())
    for ref, update in shaped(adapter, base).updates.items():
        wanted = merged(model)[f"{ref.path}.weight"]
        assert torch.allclose(base.get_submodule(ref.path).weight + update.delta(), wanted, atol=1e-5)


def test_a_bare_file_is_read_where_it_tells_enough(tmp_path: Path) -> None:
    says = {"vera drawn": "projections vera_A and vera_B are not in the file", "fourierft": "scale and places"}
    for case in CASES:
        trained(case, net()).save_pretrained(tmp_path / case)
        bare = tmp_path / f"{case}.safetensors"
        save_file(load_file(tmp_path / case / WEIGHTS), bare)
        if case in says:
            with pytest.raises(InputError, match=says[case]):
                load_adapter(bare)
            adapter = load_adapter(tmp_path / case)
            adapter = replace(adapter, layout={**adapter.layout, "bare": True})
            with pytest.raises(OutputError, match="write a folder"):
                adapter.save(tmp_path / "again.safetensors")
            continue
        load_adapter(bare).save(tmp_path / "again.safetensors")
        again, before = load_file(tmp_path / "again.safetensors"), load_file(bare)
        assert set(again) == set(before)
        assert all(torch.equal(again[key], value) for key, value in before.items())
        (tmp_path / "again.safetensors").unlink()


def values(*shape: int, seed: int = 0) -> InMemory:
    return InMemory(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def vera(seed: int = 0) -> Vera:
    return Vera(values(4), values(2), values(2, 5, seed=seed), values(4, 2))


def test_updates_that_come_from_no_folder_get_a_config_that_peft_loads(tmp_path: Path) -> None:
    base, a, b = net(), values(2, 20, seed=4), values(20, 2, seed=5)
    cases: dict[str, dict[str, Any]] = {
        "vera": {"0": Vera(values(20), values(2, seed=1), a, b), "1": Vera(values(20), values(2, seed=2), a, b)},
        "fourierft": {"0": FourierFT(values(9), 3.0, 11), "2": FourierFT(values(4), 3.0, 11)},
    }
    for name, updates in cases.items():
        Adapter({ModuleRef(MODEL, path): update for path, update in updates.items()}, "none").save(
            tmp_path / name, format="peft"
        )
        found = merged(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name))
        for path, update in updates.items():
            weight = base.get_submodule(path).weight.detach()
            assert torch.allclose(found[f"{path}.weight"], weight + update.delta(weight), atol=1e-5)


@pytest.mark.parametrize(
    ("updates", "says"),
    [
        ([vera(0), vera(1)], "several projections"),
        ([FourierFT(values(4), 1.0, 1), FourierFT(values(4), 1.0, 2)], "several scales or seeds"),
        ([FourierFT(values(4), 1.0, 1), FourierFT(values(4), 2.0, 1)], "several scales or seeds"),
        ([FourierFT(values(4), 1.0, 1), FourierFT(values(4), 1.0, 1, "conv1d")], "Conv1D beside"),
        (
            [Vera(values(4), values(2), None, None, Seed(0, 1)), LowRank(values(4, 2), values(2, 4), 1.0)],
            "LORA beside VERA",
        ),
    ],
)
def test_what_one_folder_can_not_hold_is_refused(updates: list[Any], says: str, tmp_path: Path) -> None:
    adapter = Adapter({ModuleRef(MODEL, str(i)): update for i, update in enumerate(updates)}, "none")
    with pytest.raises(OutputError, match=says):
        adapter.save(tmp_path / "out", format="peft")
    assert list(tmp_path.iterdir()) == []


P = "base_model.model."
B1, D1 = f"{P}1.vera_lambda_b", f"{P}1.vera_lambda_d"
HUGE = {f"{P}{i}.vera_lambda_d": torch.ones(1 << 15) for i in range(3)}
F0, F1 = f"{P}0.fourierft_spectrum", f"{P}1.fourierft_spectrum"


@pytest.mark.parametrize(
    ("case", "tensors", "config", "says"),
    [
        ("vera", {B1: None}, {}, r"1\.vera_lambda_d: has no matching vera_lambda_b"),
        ("vera", {D1: None}, {}, r"1\.vera_lambda_b: has no matching vera_lambda_d"),
        ("vera", {D1: torch.ones(4)}, {}, r"1\.vera_lambda_d: has shape \[4\], but the config's r is 3"),
        ("vera", {D1: torch.tensor(1.0)}, {}, r"has shape \[\], but the config's r is 3"),
        ("vera", {B1: torch.ones(21)}, {}, "its b has 20 rows where lambda_b has 21"),
        ("vera", {B1: torch.ones(20, 1)}, {}, "its lambda_b must have 1 dimensions"),
        ("vera", {B1: torch.ones(20).int()}, {}, r"1\.vera_lambda_b: has dtype int32, not a float"),
        ("vera", {"base_model.vera_A": torch.ones(3, 20).int()}, {}, "vera_A: has dtype int32, not a float"),
        ("vera", {"base_model.vera_A": torch.ones(4, 20)}, {}, "its a has 4 where lambda_d"),
        ("vera", {"base_model.vera_B": torch.ones(20)}, {}, "its b must have 2 dimensions"),
        ("vera", {"base_model.vera_B": None}, {}, "vera_A: has no matching vera_B"),
        (
            "vera",
            {"base_model.vera_A": None, "base_model.vera_B": None},
            {},
            "are not in the file.*save_projection=True",
        ),
        ("vera", {"vera_A": torch.ones(3, 20)}, {}, "is a second vera_A"),
        ("vera", {}, {"r": 10**30}, r"but the config's r is one beyond 64 bits"),
        ("vera", {}, {"r": 0}, "r: must be a whole number above 0, not 0"),
        ("vera", {}, {"r": None}, "r: is missing"),
        ("vera drawn", {}, {"projection_prng_key": 1 << 64}, "projection_prng_key: must be a whole number of 64 bits"),
        (
            "vera drawn",
            {},
            {"projection_prng_key": "0"},
            "projection_prng_key: must be a whole number of 64 bits, not '0'",
        ),
        ("vera drawn", HUGE, {"r": 1 << 15}, "are not in the file"),
        ("fourierft", {F0: torch.ones(9)}, {}, r"has shape \[9\], but the config's n_frequency is 20"),
        ("fourierft", {F1: torch.ones(20)}, {}, r"has shape \[20\], but the config's n_frequency is 9"),
        ("fourierft", {F0: torch.ones(20).long()}, {}, r"0\.fourierft_spectrum: has dtype int64"),
        ("fourierft", {}, {"n_frequency": 10**400}, "but the config's n_frequency is one beyond 64 bits"),
        ("fourierft", {}, {"n_frequency": 2.5}, "n_frequency: must be a whole number above 0, not 2.5"),
        ("fourierft", {}, {"n_frequency_pattern": ["1"]}, "n_frequency_pattern: must map module names to numbers"),
        ("fourierft", {}, {"n_frequency_pattern": {"(": 3}}, r"n_frequency_pattern: '\(' is no regular expression"),
        ("fourierft", {}, {"n_frequency_pattern": {"1": True}}, "n_frequency_pattern: must be a whole number above 0"),
        ("fourierft", {}, {"scaling": float("inf")}, "scaling: must be a number, not inf"),
        ("fourierft", {}, {"scaling": None}, "scaling: is missing"),
        ("fourierft", {}, {"random_loc_seed": None}, "random_loc_seed: is missing"),
        ("fourierft", {}, {"random_loc_seed": 1.5}, "random_loc_seed: must be a whole number of 64 bits, not 1.5"),
    ],
)
def test_what_is_damaged_is_told_in_a_line(
    case: str, tensors: dict[str, Tensor | None], config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    trained(case, net()).save_pretrained(tmp_path)
    both: dict[str, Tensor | None] = {**load_file(tmp_path / WEIGHTS), **tensors}
    save_file({key: value for key, value in both.items() if value is not None}, tmp_path / WEIGHTS)
    stated = {**json.loads((tmp_path / CONFIG).read_text()), **config}
    (tmp_path / CONFIG).write_text(json.dumps(stated))
    with pytest.raises(InputError, match=says) as error:
        load_adapter(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
