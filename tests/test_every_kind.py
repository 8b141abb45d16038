"""Every kind of update goes through every method: what is written merges to what the method's maps make of ΔW."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft import Adapter, Base, ModuleRef, load_adapter, open_base, port
from regraft.adapter import MODEL
from regraft.carry import Settings
from regraft.methods import methods
from regraft.methods.task import Rank, Running
from regraft.port import apply_migration, fit_for
from regraft.tensors import InMemory
from regraft.updates import (
    Boft,
    Diff,
    Foura,
    FourierFT,
    Full,
    GLora,
    Ia3,
    LoHa,
    LoKr,
    LowRank,
    Oft,
    SpectralShift,
    Subspace,
    Update,
    Vera,
)
from regraft.updates.vera import Seed
from verify import tiny

FEW = Running(n_inputs=12)
MODULE = ModuleRef(MODEL, "model.layers.1.self_attn.q_proj")
WEIGHT = ModuleRef(MODEL, f"{MODULE.path}.weight")
# Those that learn from adapters on both bases have none here.
METHODS = sorted(name for name, method in methods().items() if "adapters" not in method.needs)
KINDS = (
    "lora",
    "dora",
    "dora by column",
    "loha",
    "lokr",
    "ia3",
    "oft",
    "boft",
    "glora",
    "svdiff",
    "lorax",
    "foura",
    "vera",
    "fourierft",
    "diff",
    "full",
)


def values(*shape: int, seed: int = 0, size: float = 0.1) -> InMemory:
    return InMemory(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size)


def update_of(kind: str, weight: Tensor) -> Update:
    """An update of one kind for a square weight."""
    n = weight.shape[0]
    plain = LowRank(values(n, 2), values(2, n, seed=1), 1.0)
    made: dict[str, Update] = {
        "lora": plain,
        "dora": replace(plain, magnitude=InMemory(weight.norm(dim=1) * 1.1)),
        "dora by column": replace(plain, magnitude=InMemory(weight.norm(dim=0)[None] * 1.1)),
        "loha": LoHa(values(n, 2), values(2, n, seed=1), values(n, 2, seed=2), values(2, n, seed=3), 2.0),
        "lokr": LoKr(1.0, w1=values(4, 4), w2_a=values(n // 4, 2, seed=1), w2_b=values(2, n // 4, seed=2)),
        "ia3": Ia3(values(n), InMemory(torch.tensor(0))),
        "oft": Oft(values(n // 4, 4, 4)),
        "boft": Boft(values(2, n // 4, 4, 4)),
        "glora": GLora(values(n, 2), values(2, n, seed=1), values(n, 2, seed=2), values(2, n, seed=3), 1.0),
        "svdiff": SpectralShift(values(n)),
        "lorax": Subspace(values(3)),
        "foura": Foura(values(2, n), values(n, 2, seed=1), 1.0),
        "vera": Vera(
            *(values(n, size=1.0), values(3, seed=1, size=1.0)),
            *(values(3, n + 2, seed=2, size=0.5), values(n + 4, 3, seed=3, size=0.5)),
        ),
        "fourierft": FourierFT(values(40), 50.0, 7),
        "diff": Diff(values(n, n), f"{MODULE.path}.diff"),
        "full": Full(InMemory(weight + values(n, n).load()), WEIGHT.path),
    }
    return made[kind]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Base]:
    folder = tmp_path_factory.mktemp("bases")
    return open_base(tiny.llama(folder / "old")), open_base(tiny.llama(folder / "new", drift=0.1))


def adapter_of(kind: str, old: Base) -> Adapter:
    update = update_of(kind, old.weight(MODULE).float())
    other = ModuleRef(MODEL, "model.layers.0.self_attn.v_proj")
    plain = LowRank(values(old.shape(other)[0], 2), values(2, old.shape(other)[1], seed=1), 1.0)
    return Adapter({other: plain, WEIGHT if update.by_parameter else MODULE: update}, "lycoris")


def change_in(adapter: Adapter, weight: Tensor) -> Tensor:
    """What an adapter does to the module's weight."""
    (update,) = (u for ref, u in adapter.updates.items() if ref.path.removesuffix(".weight") == MODULE.path)
    return update.merged(weight.float()) - weight.float()


def settings(method: str, rank: Rank = None) -> Settings:
    return Settings(running=replace(FEW, weights_only=method == "auto"), force=True, rank=rank)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_it_is_what_the_methods_maps_make_of_the_change(method: str, kind: str, bases: tuple[Base, Base]) -> None:
    old, new = bases
    adapter = adapter_of(kind, old)
    running = settings(method)
    migration = fit_for(adapter, old, new, method, running=running.running)
    result = apply_migration(adapter, migration, running, old=old, new=new)
    if method == "stream":
        # It writes where it can reach the outputs, not where the adapter did.
        made = [update for update in result.adapter.updates.values() if isinstance(update, LowRank | Diff)]
        assert made
        assert all(bool(update.delta().isfinite().all()) and update.norm() > 0 for update in made)
        return
    row = next(row for row in result.report.modules if row.name in (str(MODULE), str(WEIGHT)))
    assert row.status == "ported"
    got = change_in(result.adapter, new.weight(MODULE))
    assert bool(got.isfinite().all())
    entry = migration.entries[MODULE]
    if methods()[method].per == "adapter" or entry.transport is None or "dora" in kind:
        # What these make is told by their own tests.
        return
    before = old.weight(MODULE).float()
    if entry.transport.is_identity and kind in ("ia3", "oft", "boft", "glora"):
        # A copy acts on the new weight as it did on the old one.
        wanted = adapter.updates[MODULE].delta(new.weight(MODULE).float())
    else:
        wanted = entry.transport.dense(change_in(adapter, before))
    assert error(got, wanted) ** 2 <= (row.cut_loss or 0.0) + 1e-6


@pytest.mark.parametrize("method", ["copy", "procrustes", "effect"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_same_base_the_function_stays(method: str, kind: str, bases: tuple[Base, Base]) -> None:
    old, _ = bases
    adapter = adapter_of(kind, old)
    # Effect matching cuts to the adapter's own rank, which a kind's change may exceed.
    result = port(adapter, old, old, method, settings=settings(method, "full" if method == "effect" else None))
    weight = old.weight(MODULE)
    assert error(change_in(result.adapter, weight), change_in(adapter, weight)) < 1e-3


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"full"}))
def test_a_file_of_it_reads_back_the_same(kind: str, bases: tuple[Base, Base], tmp_path: Path) -> None:
    old, new = bases
    adapter = adapter_of(kind, old)
    adapter = replace(adapter, updates={ModuleRef("transformer", ref.path): u for ref, u in adapter.updates.items()})
    result = port(adapter, old, new, "prolora", settings=settings("prolora"))
    names = {"transformer": tuple(new.components[MODEL])}
    result.save(tmp_path / "ported.safetensors")
    read = load_adapter(tmp_path / "ported.safetensors", names=names)
    weight = new.weight(MODULE)
    assert error(change_in(read, weight), change_in(result.adapter, weight)) < 1e-5


PEFT = {
    "loha": LoHa(values(16, 2), values(2, 16, seed=1), values(16, 2, seed=2), values(2, 16, seed=3), 2.0),
    "lokr": LoKr(2.0, w1=values(4, 4), w2_a=values(4, 2, seed=1), w2_b=values(2, 4, seed=2)),
    "ia3": Ia3(InMemory(1 + values(16, 1).load()), InMemory(torch.tensor(0)), "peft"),
    "oft": Oft(values(4, 6), convention="peft"),
    "boft": Boft(values(2, 4, 4, 4), InMemory(torch.ones(16, 1)), convention="peft"),
    "vera": Vera(values(16), values(2, seed=1), values(2, 16, seed=2), values(16, 2, seed=3)),
    "vera drawn": Vera(values(16), values(2, seed=1), None, None, Seed(5, 1)),
    "fourierft": FourierFT(values(30), 50.0, 7),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "loha": {"peft_type": "LOHA", "r": 2, "alpha": 4},
    "lokr": {"peft_type": "LOKR", "r": 2, "alpha": 4},
    "ia3": {"peft_type": "IA3", "feedforward_modules": []},
    "oft": {"peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": False},
    "boft": {"peft_type": "BOFT", "boft_block_size": 4},
    "vera": {"peft_type": "VERA", "r": 2},
    "vera drawn": {"peft_type": "VERA", "r": 2, "save_projection": False, "projection_prng_key": 5},
    "fourierft": {"peft_type": "FOURIERFT", "scaling": 50.0, "random_loc_seed": 7, "n_frequency": 30},
}


@pytest.mark.parametrize("kind", PEFT)
def test_a_peft_folder_of_one_kind_becomes_one_of_lora(kind: str, bases: tuple[Base, Base], tmp_path: Path) -> None:
    """Its config can't hold a LoRA beside another kind: all of the adapter is turned, or none of it."""
    old, new = bases
    config = {**CONFIGS[kind], "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    adapter = Adapter({MODULE: PEFT[kind]}, "peft", config=config)
    result = port(adapter, old, new, "prolora", settings=settings("prolora"))
    result.save(tmp_path / "ported")
    read = load_adapter(tmp_path / "ported")
    assert read.config is not None
    assert (read.config["peft_type"], read.config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert "alpha" not in read.config
    weight = new.weight(MODULE)
    assert error(change_in(read, weight), change_in(result.adapter, weight)) < 1e-5


def test_a_folder_keeps_to_one_kind_where_only_some_modules_were_turned(
    bases: tuple[Base, Base], tmp_path: Path
) -> None:
    old, new = bases
    other = ModuleRef(MODEL, "model.layers.0.self_attn.q_proj")
    config = {**CONFIGS["oft"], "target_modules": ["q_proj"]}
    adapter = Adapter({other: PEFT["oft"], MODULE: PEFT["oft"]}, "peft", config=config)
    half = Settings(running=FEW, force=True, block_strength=((MODULE.path, 0.5),))
    result = port(adapter, old, new, "copy", settings=half)
    result.save(tmp_path / "ported")
    read = load_adapter(tmp_path / "ported")
    assert {update.kind for update in read.updates.values()} == {"lora"}
    wanted = PEFT["oft"].delta(new.weight(other).float())
    assert error(read.updates[other].delta(), wanted) < 1e-3
