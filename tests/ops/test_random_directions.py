"""VeRA and FourierFT through the verbs: PEFT's own adapters on a U-Net and on a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from running import Run
from safetensors.torch import load_file
from torch import Tensor, nn

from regraft import OutputError, load_adapter, open_base, port
from regraft.adapter import MODEL, ModuleRef
from regraft.carry import Settings as Carrying
from regraft.demo import data_folder
from regraft.inspection import inspect_adapter
from regraft.lineage import lineage_of
from regraft.ops.convert import convert_adapter
from regraft.ops.diff import diff_adapters
from regraft.ops.merge import Settings, merge_adapters
from regraft.ops.resize import Sizes, resize_adapter
from regraft.port import apply_migration, fit_for
from regraft.runtime import load_model
from regraft.updates import LowRank
from verify import tiny

pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = "adapter_model.safetensors"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vera": ("VeraConfig", {"r": 3}),
    "vera drawn": ("VeraConfig", {"r": 3, "save_projection": False}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20}),
}
TARGETS = ["q_proj", "down_proj"]


def trained(case: str, base: nn.Module, targets: list[str], seed: int = 1, **more: Any) -> PeftModel:
    name, options = CASES[case]
    torch.manual_seed(seed)
    model = get_peft_model(base, getattr(peft, name)(target_modules=targets, **options, **more))
    for key, parameter in model.named_parameters():
        if "lambda" in key or "spectrum" in key:
            parameter.data = torch.randn_like(parameter)
    return model.eval()


def changes(model: PeftModel) -> dict[str, Tensor]:
    """Module → ΔW, by PEFT."""
    layers = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in layers.items()
        if hasattr(layer, "get_delta_weight")
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return tiny.llama(folder / "old"), tiny.llama(folder / "new", drift=0.1)


def saved(case: str, base: Path, folder: Path, **more: Any) -> dict[str, Tensor]:
    model = trained(case, load_model(base).main.float(), TARGETS, **more)
    model.save_pretrained(folder)
    return changes(model)


@pytest.mark.parametrize("case", CASES)
def test_a_copy_keeps_the_bytes_and_peft_loads_it_on_the_new_base(
    case: str, bases: tuple[Path, Path], tmp_path: Path
) -> None:
    wanted = saved(case, bases[0], tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    for number, new in enumerate(bases):
        result = port(adapter, open_base(bases[0]), open_base(new), "copy")
        result.save(tmp_path / f"{number}")
        assert result.report.counts.ported == len(wanted)
        before, after = (load_file(place / WEIGHTS) for place in (tmp_path / "theirs", tmp_path / f"{number}"))
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        lineage = lineage_of(load_adapter(tmp_path / f"{number}"))
        assert lineage is not None
        assert {group["kind"] for group in lineage["updates"]} == {case.split()[0]}
        found = changes(PeftModel.from_pretrained(load_model(new).main.float(), tmp_path / f"{number}"))
        assert all(torch.equal(found[name], delta) for name, delta in wanted.items())


@pytest.mark.parametrize("case", CASES)
def test_another_method_writes_the_lora_of_the_carried_change(
    case: str, bases: tuple[Path, Path], tmp_path: Path
) -> None:
    changed = saved(case, bases[0], tmp_path / "theirs")
    old, new = (open_base(base) for base in bases)
    adapter = load_adapter(tmp_path / "theirs")
    migration = fit_for(adapter, old, new, "lora-x")
    apply_migration(adapter, migration, Carrying(rank="full"), old=old, new=new).save(tmp_path / "ported")
    assert {update.kind for update in load_adapter(tmp_path / "ported").updates.values()} == {"lora"}
    found = changes(PeftModel.from_pretrained(load_model(bases[1]).main.float(), tmp_path / "ported"))
    assert found.keys() == changed.keys()
    for name, delta in changed.items():
        transport = migration.entries[ModuleRef(MODEL, name)].transport
        assert transport is not None
        wanted = transport.dense(delta)
        assert not torch.allclose(wanted, delta, atol=1e-4)
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_check_and_inspect_tell_what_it_is(case: str, bases: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    saved(case, bases[0], tmp_path / "theirs")
    kind = case.split()[0]
    assert inspect_adapter(tmp_path / "theirs").components["model"].kinds == {kind: 4}
    result = run("check", tmp_path / "theirs", "--from", bases[0], "--to", bases[1])
    assert result.code == 0, result.err


@pytest.mark.parametrize("case", CASES)
def test_on_its_base_it_becomes_a_lora_of_another_format(case: str, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    pipeline, target = data_folder() / "v1", tmp_path / "x.safetensors"
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    model = trained(case, unet, ["attn1.to_q", "attn2.to_v"])
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(OutputError, match=r"would be lost.*--base"):
        convert_adapter(tmp_path / "theirs", target, "kohya")
    report = convert_adapter(tmp_path / "theirs", target, "kohya", base=pipeline, energy=1.0)
    exact = case.startswith("vera")
    assert {row.status for row in report.changes} == {"rewritten" if exact else "merged"}
    updates = {ref.path: update for ref, update in load_adapter(target).updates.items()}
    for name, delta in changes(model).items():
        update = updates[name]
        assert torch.allclose(update.delta(), delta, rtol=1e-4, atol=1e-6)
        assert not exact or update.rank == 3


@pytest.mark.parametrize("case", CASES)
def test_two_of_them_add_up_and_are_resized_on_their_base(case: str, bases: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = (saved(case, bases[0], tmp_path / name, seed=i) for i, name in enumerate("ab"))
    sources = [tmp_path / "a", tmp_path / "b"]
    merge_adapters(sources, tmp_path / "sum", Settings(weights=(1.0, 0.5)), base=bases[0])
    for ref, update in load_adapter(tmp_path / "sum").updates.items():
        assert isinstance(update, LowRank)
        torch.testing.assert_close(update.delta(), one[ref.path] + 0.5 * two[ref.path], rtol=1e-3, atol=1e-5)
    if case == "fourierft":
        return
    resize_adapter(tmp_path / "a", tmp_path / "small", Sizes(rank=2), to_lora=True, base=bases[0])
    for ref, update in load_adapter(tmp_path / "small").updates.items():
        assert update.rank == 2
        best = torch.linalg.svd(one[ref.path])[1][2:].norm()
        assert float((update.delta() - one[ref.path]).norm()) == pytest.approx(float(best), rel=1e-3)


def test_a_seed_that_differs_is_a_difference(bases: tuple[Path, Path], tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 4), ("c", 3)):
        saved("fourierft", bases[0], tmp_path / name, random_loc_seed=seed)
    for based in (None, bases[0]):
        assert diff_adapters(tmp_path / "a", tmp_path / "b", base=based).equal == 0
        assert diff_adapters(tmp_path / "a", tmp_path / "c", base=based).equal == 4
