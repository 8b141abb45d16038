"""Methods that fit maps from activations: what they give where the answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from regraft import Adapter, ModuleRef, open_base
from regraft.adapter import MODEL
from regraft.carry import Settings
from regraft.fitting import fit_migration
from regraft.methods._choosing import lowest
from regraft.methods.task import Running
from regraft.migration_file import load_migration
from regraft.port import PortResult, port
from regraft.runtime import applied, load_model
from regraft.updates import LowRank
from verify import tiny

FEW = Running(n_inputs=24)
ROLES = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("bases") / "old")


@pytest.fixture(scope="module")
def drifted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("bases") / "drifted", drift=0.2)


@pytest.fixture(scope="module")
def rotated(old: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """The same function with the hidden units of the residual stream rotated: RMS norms have weights of 1."""
    model = load_model(old).main
    width = model.config.hidden_size
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1)))[0]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            role = name.split(".")[-2]
            if role in ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                weight.copy_(weight @ turn.T)
            elif role in ("o_proj", "down_proj"):
                weight.copy_(turn @ weight)
    folder = tmp_path_factory.mktemp("bases") / "rotated"
    model.save_pretrained(folder)
    return folder, turn


def adapter_for(base: Path) -> Adapter:
    return tiny.lora(load_model(base).main, ROLES)


def carried(adapter: Adapter, old: Path, new: Path, method: str, **options: float) -> PortResult:
    settings = Settings(running=FEW, force=True)
    return port(adapter, open_base(old), open_base(new), method, settings=settings, **options)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def logits(base: Path, adapter: Adapter) -> Tensor:
    model = load_model(base)
    with torch.no_grad(), applied(model.components, adapter):
        return model.main(input_ids=torch.arange(3, 19)[None]).logits


def test_the_rotated_base_is_the_same_function(old: Path, rotated: tuple[Path, Tensor]) -> None:
    nothing = Adapter({}, "peft")
    assert error(logits(rotated[0], nothing), logits(old, nothing)) < 1e-4


def test_theseus_recovers_a_rotated_model(old: Path, rotated: tuple[Path, Tensor]) -> None:
    adapter = adapter_for(old)
    result = carried(adapter, old, rotated[0], "theseus")
    assert error(logits(rotated[0], result.adapter), logits(old, adapter)) < 1e-2


@pytest.mark.parametrize("method", ["ridge", "theseus"])
def test_on_the_same_base_it_is_the_copy(old: Path, method: str) -> None:
    adapter = adapter_for(old)
    for ref, update in carried(adapter, old, old, method).adapter.updates.items():
        assert error(update.delta(), adapter.updates[ref].delta()) < 1e-2


def test_ridge_with_an_endless_prior_is_the_copy_and_with_none_it_is_not(old: Path, drifted: Path) -> None:
    adapter = adapter_for(old)

    def away(ridge: float) -> float:
        result = carried(adapter, old, drifted, "ridge", ridge=ridge)
        return max(error(u.delta(), adapter.updates[ref].delta()) for ref, u in result.adapter.updates.items())

    assert away(1e7) < 1e-5
    assert away(0.1) > 0.05


def test_ridge_gives_the_old_change_of_output_on_what_the_new_base_reads(old: Path, drifted: Path) -> None:
    """Without much of a prior, ΔW_t x_t comes nearer to ΔW_s x_s than the copy's ΔW_s x_t does."""
    adapter = adapter_for(old)
    by_ridge = carried(adapter, old, drifted, "ridge", ridge=0.01).adapter
    path = "model.layers.1.self_attn.q_proj"
    ids = torch.randint(3, 48, (20, 30), generator=torch.Generator().manual_seed(9))
    seen = []
    for base in (old, drifted):
        model = load_model(base).main
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            model(input_ids=ids)
    wanted = seen[0] @ adapter.updates[ModuleRef(MODEL, path)].delta().T
    got, copied = (seen[1] @ a.updates[ModuleRef(MODEL, path)].delta().T for a in (by_ridge, adapter))
    assert error(got, wanted) < error(copied, wanted)


@pytest.mark.parametrize("method", ["ridge", "theseus"])
def test_its_maps_serve_every_adapter_and_can_be_kept(old: Path, drifted: Path, method: str, tmp_path: Path) -> None:
    adapter = adapter_for(old)
    migration = fit_migration(open_base(old), open_base(drifted), method, running=FEW)
    kept = load_migration(migration.save(tmp_path / "m.safetensors"))
    there = kept.port(adapter, Settings(force=True)).adapter.updates
    for ref, update in carried(adapter, old, drifted, method).adapter.updates.items():
        assert error(there[ref].delta(), update.delta()) < 1e-2


def test_scaled_copy_is_the_copy_at_one_strength(old: Path, drifted: Path) -> None:
    adapter = adapter_for(old)
    result = carried(adapter, old, drifted, "scaled-copy")
    strength = result.report.figures["strength"]
    assert 0 <= strength <= 1.25
    for ref, update in result.adapter.updates.items():
        assert isinstance(update, LowRank)
        assert torch.allclose(update.delta(), strength * adapter.updates[ref].delta(), atol=1e-6)


def test_scaled_copy_keeps_the_wanted_rank(old: Path, drifted: Path) -> None:
    settings = Settings(running=FEW, rank=1)
    result = port(adapter_for(old), open_base(old), open_base(drifted), "scaled-copy", settings=settings)
    assert {update.rank for update in result.adapter.updates.values()} == {1}


def test_scaled_copy_on_the_same_base_has_strength_one(old: Path) -> None:
    assert carried(adapter_for(old), old, old, "scaled-copy").report.figures["strength"] == pytest.approx(1, abs=0.02)


def test_the_lowest_point_of_a_parabola_is_found_between_its_samples() -> None:
    strengths = (0.0, 0.5, 1.0, 1.5)
    assert lowest(strengths, [(s - 0.7) ** 2 for s in strengths]) == pytest.approx(0.7)
    assert lowest(strengths, list(strengths)) == 0.0
