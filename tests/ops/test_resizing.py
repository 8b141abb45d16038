"""Another rank: what is kept, what stays, and what the file says of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters_made import UNET, close, factors, noise, saved, unet_lora, with_magnitude
from safetensors.torch import load_file, save_file

from regraft import Adapter, ModuleRef, OutputError, UsageError, load_adapter
from regraft.ops.resize import Sizes, resize, resize_adapter
from regraft.tensors import InMemory
from regraft.updates import LoHa, LowRank


def test_a_higher_rank_leaves_delta_and_scale_as_they_are(tmp_path: Path) -> None:
    adapter = saved(unet_lora(), tmp_path / "in.safetensors")
    report = resize_adapter(tmp_path / "in.safetensors", tmp_path / "out.safetensors", Sizes(rank=9))
    back = load_adapter(tmp_path / "out.safetensors")
    assert report.energy_kept == 1.0
    for ref, update in back.updates.items():
        assert isinstance(update, LowRank)
        assert update.rank == 9
        assert update.scale == pytest.approx(adapter.updates[ref].scale)
        assert close(update.delta(), adapter.updates[ref].delta(), 1e-6)
    alphas = {float(t) for key, t in load_file(tmp_path / "out.safetensors").items() if key.endswith("alpha")}
    assert alphas == {4.5}


def test_a_lower_rank_is_the_best_of_that_rank() -> None:
    adapter = unet_lora()
    resized, rows, kept = resize(adapter, Sizes(rank=2))
    for ref, row in zip(adapter.updates, rows, strict=True):
        before, after = adapter.updates[ref].delta().flatten(1), resized.updates[ref].delta().flatten(1)
        u, s, vh = torch.linalg.svd(before.double(), full_matrices=False)
        assert close(after.double(), (u[:, :2] * s[:2]) @ vh[:2])
        assert row.energy_kept == pytest.approx(float(s[:2].square().sum() / s.square().sum()), rel=1e-5)
        assert row.rank_out == 2
    assert 0 < kept < 1


def test_energy_takes_as_low_a_rank_as_does() -> None:
    up, down = torch.eye(8)[:, :3] * torch.tensor([3.0, 2.0, 0.1]), torch.eye(3, 8)
    adapter = Adapter({ModuleRef("model", "x.q_proj"): LowRank(InMemory(up), InMemory(down), 1.0)}, "peft")
    # 9 + 4 + 0.01: two directions hold 0.9992 of it.
    assert [resize(adapter, Sizes(energy=e))[1][0].rank_out for e in (0.6, 0.99, 0.9999)] == [1, 2, 3]
    assert resize(adapter, Sizes(energy=0.9999, rank=2))[1][0].rank_out == 2


def test_a_glob_gives_one_module_its_own_size() -> None:
    _, rows, _ = resize(unet_lora(), Sizes(rank=4, per_module=(("*attn1*", 1), ("*.conv1", 6))))
    assert [row.rank_out for row in rows] == [1, 4, 4, 6]


def test_an_unchanged_rank_keeps_the_bytes(tmp_path: Path) -> None:
    saved(unet_lora(), tmp_path / "in.safetensors")
    resize_adapter(tmp_path / "in.safetensors", tmp_path / "out.safetensors", Sizes(rank=6))
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "in.safetensors").read_bytes()


def test_dora_keeps_its_magnitude_and_says_so() -> None:
    adapter = with_magnitude(unet_lora())
    resized, rows, _ = resize(adapter, Sizes(rank=3))
    for ref, update in resized.updates.items():
        assert update.magnitude is adapter.updates[ref].magnitude
        assert update.rank == 3
    assert all("magnitude stays" in row.reason for row in rows)


def test_metadata_tells_the_new_rank_and_dynamic_where_it_varies(tmp_path: Path) -> None:
    arguments = json.dumps({"conv_dim": "6", "conv_alpha": "3"})
    stated = {"ss_network_dim": "6", "ss_network_alpha": "3.0", "ss_network_args": arguments}
    saved(replace(unet_lora(), metadata=stated), tmp_path / "in.safetensors")
    resize_adapter(tmp_path / "in.safetensors", tmp_path / "two.safetensors", Sizes(rank=2))
    resize_adapter(tmp_path / "in.safetensors", tmp_path / "some.safetensors", Sizes(per_module=(("*attn1*", 1),)))
    two, some = (load_adapter(tmp_path / f"{name}.safetensors").metadata for name in ("two", "some"))
    assert (two["ss_network_dim"], two["ss_network_alpha"]) == ("2", "1")
    assert json.loads(two["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "1"}
    assert (some["ss_network_dim"], some["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert json.loads(some["ss_network_args"]) == {"conv_dim": "6", "conv_alpha": "3"}


def _loha(path: str = "x") -> Adapter:
    parts = [InMemory(noise(*shape, seed=i)) for i, shape in enumerate([(12, 2), (2, 10), (12, 2), (2, 10)])]
    return Adapter({ModuleRef("model", path): LoHa(*parts, scale=0.5)}, "peft", family="llama")


def test_a_loha_is_resized_only_as_the_lora_that_it_equals() -> None:
    adapter = _loha()
    ref, before = next(iter(adapter.updates.items()))
    left, rows, _ = resize(adapter, Sizes(rank=2))
    assert left.updates[ref] is before
    assert "--to-lora" in rows[0].reason
    turned, rows, _ = resize(adapter, Sizes(rank=4), to_lora=True)
    assert (rows[0].rank_in, rows[0].rank_out, turned.updates[ref].kind) == (2, 4, "lora")
    assert close(turned.updates[ref].delta(), before.delta())


def test_a_dynamic_resize_of_half_precision_stays_half_precision(tmp_path: Path) -> None:
    adapter = unet_lora()
    half = replace(adapter, updates={ref: update.cast(torch.float16) for ref, update in adapter.updates.items()})
    saved(half, tmp_path / "in.safetensors")
    resize_adapter(tmp_path / "in.safetensors", tmp_path / "out.safetensors", Sizes(energy=0.8))
    tensors = load_file(tmp_path / "out.safetensors")
    assert {tensor.dtype for key, tensor in tensors.items() if "lora_" in key.split(".", 1)[1]} == {torch.float16}


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(rank=0), Sizes(energy=0.0), Sizes(energy=1.5)])
def test_a_size_that_is_none_is_a_usage_error(sizes: Sizes, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        resize_adapter(tmp_path / "in", tmp_path / "out", sizes)


def test_a_glob_that_matches_nothing_is_a_usage_error(tmp_path: Path) -> None:
    saved(unet_lora(), tmp_path / "in.safetensors")
    sizes = Sizes(rank=4, per_module=(("*", 2), ("none*", 2)))
    with pytest.raises(UsageError, match="'none\\*' matches no module"):
        resize_adapter(tmp_path / "in.safetensors", tmp_path / "out.safetensors", sizes)
    assert not (tmp_path / "out.safetensors").exists()


def test_keys_that_are_not_understood_stop_it(tmp_path: Path) -> None:
    stem = "lora_unet_" + next(iter(UNET)).replace(".", "_")
    pair = factors((8, 8), 2, 0)
    tensors = {f"{stem}.lora_up.weight": pair.up.load(), f"{stem}.lora_down.weight": pair.down.load()}
    save_file({**tensors, f"{stem}.novelty": torch.ones(2)}, tmp_path / "in.safetensors")
    with pytest.raises(OutputError, match="not understood"):
        resize_adapter(tmp_path / "in.safetensors", tmp_path / "out.safetensors", Sizes(rank=1))
    assert not (tmp_path / "out.safetensors").exists()
