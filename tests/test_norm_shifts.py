"""SVDiff's shifts of norms are carried as the change of the old norm's weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lycoris import LycorisNetwork, create_lycoris_from_weights
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from regraft import (
    Adapter,
    Base,
    InputError,
    ModuleRef,
    OutputError,
    check,
    fit_migration,
    load_adapter,
    open_base,
    port,
)
from regraft.carry import Settings
from regraft.ops.convert import convert_adapter
from regraft.plan import Selection
from regraft.singular import print_of
from regraft.tensors import InMemory
from regraft.tuners import SvdiffConfig
from regraft.updates import Diff, SpectralShift
from toys import StateDict, drifted, llama, permutation, regauged, save_base
from tuners.cases import stir
from tuners.real import tiny_gpt2, tiny_llama, tiny_unet

# What files of spectral shifts are of, whatever the names.
HOME = "unet"
MATRIX, ELEMENTS, ONE = "model.layers.0.mlp.up_proj", "model.layers.0.input_layernorm", "model.layers.1.input_layernorm"


def vector(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.1


SHIFTS = {MATRIX: vector(24, 1), ELEMENTS: vector(24, 2), ONE: vector(1, 3)}


def with_norms(seed: int, like: StateDict | None = None) -> StateDict:
    """A Llama whose norms are no ones."""
    generator = torch.Generator().manual_seed(seed)
    state = drifted(like or llama(), 0.05, seed)
    return {n: t if t.dim() > 1 else t + torch.rand(t.shape, generator=generator) * 0.3 for n, t in state.items()}


def adapter_of(paths: tuple[str, ...] = (MATRIX, ELEMENTS, ONE)) -> Adapter:
    updates = {ModuleRef(HOME, path): SpectralShift(InMemory(SHIFTS[path])) for path in paths}
    return Adapter(dict(updates), "svdiff", {"folder": False})


def saved(folder: Path, *states: StateDict) -> list[Base]:
    return [open_base(save_base(state, folder / f"{i}.safetensors")) for i, state in enumerate(states)]


def change(weight: Tensor, shift: Tensor) -> Tensor:
    """Of a norm: per element as in the paper, or of its length, as svdiff-pytorch has it."""
    if len(shift) > 1:
        return shift
    length = weight.double().norm()
    return (weight.double() * (torch.relu(length + shift.double()) / length - 1)).float()


def carried(adapter: Adapter, path: str) -> Tensor:
    update = adapter.updates[ModuleRef(HOME, f"{path}.weight")]
    assert isinstance(update, Diff)
    return update.value.load()


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("paths", [(MATRIX, ELEMENTS, ONE), (ELEMENTS, ONE)], ids=["with a matrix", "norms alone"])
def test_the_change_of_the_old_norm_is_put_on_the_new_one(
    paths: tuple[str, ...], strength: float, tmp_path: Path
) -> None:
    state = with_norms(1)
    old, new = saved(tmp_path, state, with_norms(2, state))
    result = port(adapter_of(paths), old, new, "copy", settings=Settings(strength=strength))
    for path in (ELEMENTS, ONE):
        wanted = change(state[f"{path}.weight"], strength * SHIFTS[path])
        torch.testing.assert_close(carried(result.adapter, path), wanted)
        row = next(row for row in result.report.modules if row.name == f"{HOME}.{path}")
        assert (row.status, row.target) == ("ported", f"{HOME}.{path}.weight")
        assert "its change of the old norm's weight" in row.reason
    assert result.report.counts.ported == len(paths)
    result.save(tmp_path / "out.safetensors")
    keys = set(load_file(tmp_path / "out.safetensors"))
    assert {key for key in keys if "norm" in key} == {
        f"lora_unet_{path.replace('.', '_')}.w_norm" for path in (ELEMENTS, ONE)
    }


def test_between_equal_bases_the_same_bytes_come_back(tmp_path: Path) -> None:
    old, new = saved(tmp_path, with_norms(1), with_norms(1))
    tensors = {f"{path}.delta": shift for path, shift in SHIFTS.items()}
    save_file(tensors, tmp_path / "shifts.safetensors")
    result = port(load_adapter(tmp_path / "shifts.safetensors"), old, new)
    result.save(tmp_path / "out.safetensors")
    after = load_file(tmp_path / "out.safetensors")
    assert set(after) == set(tensors)
    assert all(torch.equal(after[key], value) for key, value in tensors.items())


def test_norms_that_have_not_moved_go_along_beside_matrices_that_have(tmp_path: Path) -> None:
    state = with_norms(1)
    old, new = saved(tmp_path, state, drifted(state, 0.1))
    result = port(adapter_of(), old, new, "copy")
    assert {row.status for row in result.report.modules} == {"ported"}
    result.save(tmp_path / "out.safetensors")
    got = load_adapter(tmp_path / "out.safetensors", names={"unet": tuple(state)})
    update = got.updates[ModuleRef("unet", f"{ONE}.weight")]
    torch.testing.assert_close(update.delta(), change(state[f"{ONE}.weight"], SHIFTS[ONE]))


def test_matrices_that_have_not_moved_go_along_beside_those_that_have(tmp_path: Path) -> None:
    """A file of spectral shifts becomes one of LyCORIS, which has no key for a shift."""
    state, other = with_norms(1), "model.layers.2.mlp.up_proj"
    old, new = saved(tmp_path, state, state | {f"{MATRIX}.weight": with_norms(2, state)[f"{MATRIX}.weight"]})
    still = {ModuleRef(HOME, other): SpectralShift(InMemory(vector(24, 4)))}
    result = port(replace(adapter_of(), updates={**adapter_of().updates, **still}), old, new, "copy")
    result.save(tmp_path / "out.safetensors")
    got = load_adapter(tmp_path / "out.safetensors", names={HOME: tuple(state)})
    assert got.unrecognised == ()
    assert {ref.path.removesuffix(".weight") for ref in got.updates} == {MATRIX, ELEMENTS, ONE, other}
    weight = state[f"{other}.weight"]
    changes = [update for ref, update in got.updates.items() if ref.path.startswith(other)]
    torch.testing.assert_close(
        changes[0].merged(weight), still[ModuleRef(HOME, other)].merged(weight), rtol=1e-4, atol=1e-5
    )


def test_a_conversion_on_a_base_holds_a_norm_s_shift_as_its_change(tmp_path: Path) -> None:
    state = with_norms(1)
    base = save_base(state, tmp_path / "base.safetensors")
    save_file({f"{path}.delta": shift for path, shift in SHIFTS.items()}, tmp_path / "shifts.safetensors")
    convert_adapter(tmp_path / "shifts.safetensors", tmp_path / "out.safetensors", "lycoris", base=base)
    got = load_adapter(tmp_path / "out.safetensors", names={HOME: tuple(state)})
    for path in (ELEMENTS, ONE):
        update = got.updates[ModuleRef(HOME, f"{path}.weight")]
        torch.testing.assert_close(update.delta(), change(state[f"{path}.weight"], SHIFTS[path]))
    with pytest.raises(OutputError, match="svdiff would be lost"):
        convert_adapter(tmp_path / "shifts.safetensors", tmp_path / "none.safetensors", "kohya", base=base)


def test_a_method_that_turns_units_moves_the_norms_with_them(tmp_path: Path) -> None:
    state, residual = with_norms(1), permutation(24, 3)
    turned = regauged(state, residual, permutation(40, 4))
    turned |= {name: residual @ t for name, t in state.items() if t.dim() == 1}
    old, new = saved(tmp_path, state, turned)
    result = port(adapter_of(), old, new, "procrustes")
    for path in (ELEMENTS, ONE):
        wanted = residual @ change(state[f"{path}.weight"], SHIFTS[path])
        torch.testing.assert_close(carried(result.adapter, path), wanted, rtol=1e-3, atol=1e-5)


def test_another_size_is_refused_as_for_a_stored_change(tmp_path: Path) -> None:
    state = with_norms(1)
    wider = {n: torch.cat([t, t[:8]]) if t.dim() == 1 else t for n, t in with_norms(2, state).items()}
    old, new = saved(tmp_path, state, wider)
    with pytest.raises(InputError, match=r"input_layernorm.*changes \[24\], a base's parameter is \[32\]"):
        port(adapter_of(), old, new, "copy")
    result = port(adapter_of(), old, new, "copy", settings=Settings(allow_partial=True))
    assert result.report.counts.refused == 2


def test_a_shift_of_another_length_is_told(tmp_path: Path) -> None:
    state = with_norms(1)
    old, new = saved(tmp_path, state, with_norms(2, state))
    wrong = {**adapter_of().updates, ModuleRef(HOME, ELEMENTS): SpectralShift(InMemory(vector(23, 0)))}
    with pytest.raises(InputError, match=r"changes \(23,\), the base's weight is \(24,\)"):
        port(replace(adapter_of(), updates=wrong), old, new, "copy")
    nan = {**adapter_of().updates, ModuleRef(HOME, ONE): SpectralShift(InMemory(torch.tensor([float("nan")])))}
    with pytest.raises(InputError, match="NaN"):
        port(replace(adapter_of(), updates=nan), old, new, "copy")


def test_without_the_old_base_a_norm_s_shift_is_refused(tmp_path: Path) -> None:
    state = with_norms(1)
    old, new = saved(tmp_path, state, with_norms(2, state))
    migration = fit_migration(old, new, "copy")
    norms = adapter_of((ELEMENTS, ONE))
    for attempt in (lambda: migration.port(norms), lambda: port(norms, None, new, "copy")):
        with pytest.raises(InputError, match="depends on the old base's weight: give --from"):
            attempt()
    assert migration.port(norms, old=old, new=new).report.counts.ported == 2


def test_a_norm_of_another_base_is_told(tmp_path: Path) -> None:
    state = with_norms(1)
    old, new = saved(tmp_path, state, with_norms(2, state))
    stamped = SpectralShift(InMemory(SHIFTS[ELEMENTS]), stamp=InMemory(print_of(state[f"{ELEMENTS}.weight"] + 0.5)))
    with pytest.raises(InputError, match="the base is not the one"):
        port(Adapter({ModuleRef(HOME, ELEMENTS): stamped}, "svdiff", {"folder": False}), old, new, "copy")


def test_a_norm_goes_where_its_block_goes_or_is_left_out(tmp_path: Path) -> None:
    state = with_norms(1, llama(layers=4))
    fewer = {n: t for n, t in state.items() if ".layers.0." not in n}
    fewer = {n.replace(f"layers.{i}.", f"layers.{i - 1}."): t for n, t in fewer.items() for i in [_number(n)]}
    old, new = saved(tmp_path, state, fewer)
    result = port(adapter_of((ELEMENTS, ONE)), old, new, "copy")
    statuses = {row.name: (row.status, row.target) for row in result.report.modules}
    assert statuses == {
        f"{HOME}.{ELEMENTS}": ("skipped", None),
        f"{HOME}.{ONE}": ("ported", f"{HOME}.{ELEMENTS}"),
    }
    chosen = Settings(selection=Selection(exclude=("*layers.1.input_layernorm",)))
    rows = port(adapter_of(), old, old, "copy", settings=chosen).report.modules
    assert {row.name for row in rows if row.status == "skipped"} == {f"{HOME}.{ONE}"}


def _number(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def test_a_check_tells_of_them(tmp_path: Path) -> None:
    state = with_norms(1)
    old, new = saved(tmp_path, state, with_norms(2, state))
    rows = {row.name: row for row in check(adapter_of(), old, new).modules}
    assert {row.status for row in rows.values()} == {"ported"}
    assert rows[f"{HOME}.{ONE}"].reason == "the shift of a norm: carried as its change"


def moved_on(model: Any, seed: int) -> Any:
    """The model trained on, norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.05 * parameter.norm() / len(parameter.flatten()) ** 0.5 * noise
    return model


def read(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (tiny_llama, ["q_proj", "input_layernorm", "norm"]),
        (tiny_llama, ["input_layernorm"]),
        # Norms with biases, which are not shifted.
        (tiny_gpt2, ["c_attn", "ln_1", "ln_f"]),
    ],
    ids=["llama", "norms alone", "gpt2"],
)
@pytest.mark.parametrize("norm_shift", ["element", "scalar"])
def test_peft_computes_with_the_new_base_what_was_meant(
    norm_shift: str, make: Callable[[], Any], targets: list[str], tmp_path: Path
) -> None:
    moved_on(make(), 1).save_pretrained(tmp_path / "old")
    moved_on(read(tmp_path / "old"), 2).save_pretrained(tmp_path / "new")
    config = SvdiffConfig(target_modules=targets, norm_shift=norm_shift, task_type="CAUSAL_LM")
    tuned = stir(get_peft_model(read(tmp_path / "old"), config))
    tuned.save_pretrained(tmp_path / "adapter")
    result = port(load_adapter(tmp_path / "adapter"), *map(open_base, (tmp_path / "old", tmp_path / "new")), "copy")
    result.save(tmp_path / "ported")
    meant, plain, ids = read(tmp_path / "new"), read(tmp_path / "new"), torch.arange(6)[None]
    with torch.no_grad():
        for name, layer in tuned.base_model.model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                meant.get_submodule(name).weight += layer.get_delta_weight("default")
        got = PeftModel.from_pretrained(read(tmp_path / "new"), tmp_path / "ported").eval()
        torch.testing.assert_close(got(ids).logits, meant(ids).logits, rtol=1e-4, atol=1e-5)
        assert (plain(ids).logits - meant(ids).logits).abs().max() > 1e-2
        # The base itself stays as it is.
        with got.disable_adapter():
            assert torch.equal(got(ids).logits, plain(ids).logits)


@torch.no_grad()
def sample(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    noise, prompt = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 16, generator=generator)
    found: Tensor = model(noise, 10, prompt).sample
    return found


def test_lycoris_computes_what_the_community_s_layout_meant(tmp_path: Path) -> None:
    for name, seeds in (("old", [1]), ("new", [1, 2])):
        model: Any = tiny_unet()
        for seed in seeds:
            moved_on(model, seed)
        model.save_pretrained(tmp_path / name / "unet")
    old, meant, plain = (
        UNet2DConditionModel.from_pretrained(tmp_path / name / "unet").eval() for name in ("old", "new", "new")
    )
    block = "down_blocks.0.attentions.0"
    norms = [f"{block}.norm", f"{block}.transformer_blocks.0.norm1", f"{block}.transformer_blocks.0.norm2"]
    shifts = {f"{name}.delta": torch.tensor([0.7 + i]) for i, name in enumerate(norms)}
    shifts[f"{block}.transformer_blocks.0.attn1.to_q.delta"] = vector(8, 5)
    (tmp_path / "shifts").mkdir()
    save_file(shifts, tmp_path / "shifts" / "spectral_shifts.safetensors")
    bases = [open_base(tmp_path / name) for name in ("old", "new")]
    result = port(load_adapter(tmp_path / "shifts"), *bases, "copy")
    assert result.report.counts.ported == 4
    result.save(tmp_path / "out.safetensors")
    for key, shift in shifts.items():
        module = old.get_submodule(key.removesuffix(".delta"))
        rows = module.weight.data[None] if module.weight.dim() == 1 else module.weight.data
        u, s, vh = torch.linalg.svd(rows, full_matrices=False)
        shifted = u @ torch.diag(torch.relu(s + shift)) @ vh
        meant.get_submodule(key.removesuffix(".delta")).weight.data += (shifted - rows).reshape(module.weight.shape)
    LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D"]})
    tensors = {k.replace("lora_unet_", "lycoris_"): t for k, t in load_file(tmp_path / "out.safetensors").items()}
    save_file(tensors, tmp_path / "named.safetensors")
    model = UNet2DConditionModel.from_pretrained(tmp_path / "new" / "unet").eval()
    network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "named.safetensors"), model)
    network.apply_to()
    network.eval()
    torch.testing.assert_close(sample(model), sample(meant), rtol=1e-4, atol=1e-5)
    assert (sample(plain) - sample(meant)).abs().max() > 1e-2
