"""Several adapters in one: the sum of their changes, by PEFT's own judgement too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters_made import close, noise, saved, unet_lora, with_magnitude
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from regraft import Adapter, ModuleRef, Refused, UsageError, load_adapter, open_base
from regraft.ops.merge import Settings, merge, merge_adapters
from regraft.tensors import InMemory
from regraft.updates import Diff, Full, LowRank, SpectralShift
from toys import llama, save_base


def _llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **sizes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two PEFT adapters of other targets, ranks and alphas for one Llama."""
    folders = []
    for seed, targets, rank, alpha, rslora in (
        (1, ["q_proj", "v_proj"], 3, 6, False),
        (2, ["q_proj", "up_proj"], 4, 5, True),
    ):
        model = get_peft_model(
            _llama(), LoraConfig(target_modules=targets, r=rank, lora_alpha=alpha, use_rslora=rslora)
        )
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.1
        folder = tmp_path_factory.mktemp(f"adapter{seed}")
        model.save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]


def _peft_delta(first: Path, second: Path, weights: list[float], how: str, **options: int) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(_llama(), first, adapter_name="a")
    model.load_adapter(second, adapter_name="b")
    model.add_weighted_adapter(["a", "b"], weights, "both", combination_type=how, **options)
    layers = {name: module for name, module in model.named_modules() if "both" in getattr(module, "lora_A", {})}
    return {name.removeprefix("base_model.model."): m.get_delta_weight("both") for name, m in layers.items()}


def test_a_concatenation_equals_pefts(trained: tuple[Path, Path], tmp_path: Path) -> None:
    report = merge_adapters(trained, tmp_path / "out", Settings((0.8, 0.5)))
    merged = load_adapter(tmp_path / "out")
    judged = _peft_delta(*trained, [0.8, 0.5], "cat")
    assert {ref.path for ref in merged.updates} == judged.keys()
    for ref, update in merged.updates.items():
        assert close(update.delta(), judged[ref.path])
    assert {row.how for row in report.modules} == {"alone", "concatenated"}
    assert max(row.rank_out or 0 for row in report.modules) == 7


def test_an_svd_equals_pefts(trained: tuple[Path, Path], tmp_path: Path) -> None:
    merge_adapters(trained, tmp_path / "out", Settings((1.0, 1.0), "svd", 3))
    merged = load_adapter(tmp_path / "out")
    judged = _peft_delta(*trained, [1.0, 1.0], "svd", svd_rank=3)
    shared = [ref for ref in merged.updates if ref.path.endswith("q_proj")]
    assert shared
    for ref in shared:
        assert merged.updates[ref].rank == 3
        assert close(merged.updates[ref].delta(), judged[ref.path], 1e-4)


def test_the_merged_file_gives_both_effects_in_peft(trained: tuple[Path, Path], tmp_path: Path) -> None:
    merge_adapters(trained, tmp_path / "out", Settings((1.0, 1.0)))
    ids = torch.arange(8)[None]
    expected = PeftModel.from_pretrained(_llama(), trained[0]).merge_and_unload()
    expected = PeftModel.from_pretrained(expected, trained[1])
    ours = PeftModel.from_pretrained(_llama(), tmp_path / "out")
    assert float((ours(ids).logits - expected(ids).logits).abs().max()) <= 1e-5


def test_different_formats_are_merged_by_the_modules_real_names(tmp_path: Path) -> None:
    one = saved(unet_lora(seed=1), tmp_path / "kohya.safetensors")
    two = saved(unet_lora(seed=2), tmp_path / "diffusers.safetensors", "diffusers")
    sources = [tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors"]
    report = merge_adapters(sources, tmp_path / "out.safetensors", Settings((1.0, -0.5)))
    merged = load_adapter(tmp_path / "out.safetensors")
    assert merged.format == report.format == "kohya"
    assert merged.updates.keys() == one.updates.keys()
    for ref, update in merged.updates.items():
        assert update.rank == 12
        assert close(update.delta(), one.updates[ref].delta() - 0.5 * two.updates[ref].delta())


def test_equal_scales_keep_the_factors_bytes() -> None:
    one, two = unet_lora(seed=1), unet_lora(seed=2)
    merged, _ = merge([one, two], Settings((1.0, 1.0)))
    for ref, update in merged.updates.items():
        assert update.scale == one.updates[ref].scale
        assert torch.equal(update.down.load()[:6], one.updates[ref].down.load())


def test_other_families_are_refused() -> None:
    other = replace(unet_lora(), family="flux")
    with pytest.raises(Refused, match=r"for flux, .* for sd15"):
        merge([unet_lora(), other], Settings((1.0, 1.0)))


def test_other_shapes_are_refused_by_name() -> None:
    small = {ModuleRef("model", "x.q_proj"): LowRank(InMemory(noise(8, 2)), InMemory(noise(2, 8)), 1.0)}
    large = {ModuleRef("model", "x.q_proj"): LowRank(InMemory(noise(9, 2)), InMemory(noise(2, 8)), 1.0)}
    with pytest.raises(Refused, match=r"x\.q_proj.*\[9, 8\]"):
        merge([Adapter(small, "peft"), Adapter(large, "peft")], Settings((1.0, 1.0)))


def test_dora_beside_another_change_takes_the_base() -> None:
    plain, dora = unet_lora(seed=1, rank=2), with_magnitude(unet_lora(seed=2, rank=2))
    with pytest.raises(Refused, match=r"DoRA depends on the base's weight.*--base"):
        merge([plain, dora], Settings((1.0, 1.0)))


def _llama_dora(state: dict[str, Tensor], path: str) -> Adapter:
    update = LowRank(InMemory(noise(24, 2, seed=5)), InMemory(noise(2, 24, seed=6)), 1.0)
    magnitude = InMemory(state[f"{path}.weight"].norm(dim=1) * 1.2)
    return Adapter({ModuleRef("model", path): replace(update, magnitude=magnitude)}, "peft")


def test_on_the_base_dora_is_summed_as_what_it_does_there(tmp_path: Path) -> None:
    state = llama()
    base = open_base(save_base(state, tmp_path / "base.safetensors"))
    path = "model.layers.0.self_attn.q_proj"
    ref = ModuleRef("model", path)
    plain = Adapter({ref: LowRank(InMemory(noise(24, 2, seed=1)), InMemory(noise(2, 24, seed=2)), 2.0)}, "peft")
    dora = _llama_dora(state, path)
    merged, rows = merge([plain, dora], Settings((0.5, 0.7), energy=1.0), base)
    weight = state[f"{path}.weight"]
    expected = 0.5 * plain.updates[ref].delta() + 0.7 * (dora.updates[ref].merged(weight) - weight)
    assert close(merged.updates[ref].delta(), expected)
    assert rows[0].how == "base"


def test_shifts_of_singular_values_are_summed_as_changes(tmp_path: Path) -> None:
    """Not as shifts, which SVDiff's authors add before the relu: there the smallest singular value would end at 0."""
    path = "model.layers.0.self_attn.q_proj"
    ref = ModuleRef("model", path)
    state = llama()
    weight = state[f"{path}.weight"]
    u, s, vh = torch.linalg.svd(weight.double())
    base = open_base(save_base(state, tmp_path / "base.safetensors"))
    adapters = [Adapter({ref: SpectralShift(InMemory(-0.8 * s.float()))}, "svdiff", family="llama") for _ in range(2)]
    merged, rows = merge(adapters, Settings((1.0, 0.5), energy=1.0), base)
    assert close(merged.updates[ref].delta(), ((u * (-1.2 * s)) @ vh).float())
    assert rows[0].how == "base"
    with pytest.raises(Refused, match=r"svdiff depends on the base's weight.*--base"):
        merge(adapters, Settings((1.0, 0.5)))


@pytest.mark.parametrize("numbers", [(24, 24), (24, 1), (1, 1)])
def test_shifts_of_a_norm_add_up_as_changes_of_its_weight(numbers: tuple[int, int], tmp_path: Path) -> None:
    path = "model.layers.0.input_layernorm"
    ref, name = ModuleRef("model", path), ModuleRef("model", f"{path}.weight")
    state = {key: t if t.dim() > 1 else t + noise(len(t), seed=5) for key, t in llama().items()}
    base = open_base(save_base(state, tmp_path / "base.safetensors"))
    shifts = [SpectralShift(InMemory(noise(n, seed=i))) for i, n in enumerate(numbers)]
    adapters = [Adapter({ref: shift}, "svdiff", family="llama") for shift in shifts]
    merged, rows = merge(adapters, Settings((1.0, 0.5)), base)
    weight = state[name.path]
    assert close(merged.updates[name].delta(), shifts[0].delta(weight) + 0.5 * shifts[1].delta(weight))
    assert rows[0].how == "base"
    beside = Adapter({name: Diff(InMemory(noise(24, seed=9)), "k")}, "lycoris", family="llama")
    with pytest.raises(Refused, match=r"shifts this norm.*convert --base"):
        merge([*adapters, beside], Settings((1.0, 0.5, 1.0)), base)


def test_dora_alone_in_its_module_stays_dora() -> None:
    dora = with_magnitude(unet_lora(seed=2, rank=2))
    ref = next(iter(dora.updates))
    rest = replace(unet_lora(seed=1, rank=2), updates={r: u for r, u in unet_lora().updates.items() if r != ref})
    alone = replace(dora, updates={ref: dora.updates[ref]})
    merged, _ = merge([rest, alone], Settings((1.0, 1.0)))
    assert merged.updates[ref] is dora.updates[ref]
    with pytest.raises(Refused, match="scaled without it"):
        merge([rest, alone], Settings((1.0, 0.5)))


def test_whole_parameters_add_as_changes_and_conflict_as_values(tmp_path: Path) -> None:
    state = llama()
    base = open_base(save_base(state, tmp_path / "base.safetensors"))
    ref = ModuleRef("model", "model.norm.weight")
    values = [InMemory(noise(24, seed=i)) for i in (1, 2)]
    changes = [Adapter({ref: Diff(value, "k")}, "peft") for value in values]
    merged, _ = merge(changes, Settings((0.5, 2.0)))
    assert torch.allclose(merged.updates[ref].delta(), 0.5 * values[0].load() + 2 * values[1].load())
    wholes = [Adapter({ref: Full(value, "k")}, "peft") for value in values]
    with pytest.raises(Refused, match=r"model\.norm\.weight.*--base"):
        merge(wholes, Settings((1.0, 1.0)))
    merged, _ = merge(wholes, Settings((1.0, 1.0)), base)
    expected = values[0].load() + values[1].load() - state["model.norm.weight"]
    assert torch.allclose(merged.updates[ref].merged(state["model.norm.weight"]), expected, atol=1e-6)


def test_weights_that_do_not_fit_are_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not fit 2 adapters"):
        merge_adapters(["a", "b"], tmp_path / "out", Settings((1.0,)))
    with pytest.raises(UsageError, match="--how svd"):
        merge_adapters(["a", "b"], tmp_path / "out", Settings((1.0, 1.0), rank=4))


def test_only_what_all_headers_say_is_said_of_the_merged_file() -> None:
    one = replace(unet_lora(seed=1), metadata={"ss_network_dim": "6", "ss_seed": "1", "ss_base_model_version": "sd_v1"})
    two = replace(unet_lora(seed=2), metadata={"ss_network_dim": "6", "ss_seed": "2", "ss_base_model_version": "sd_v1"})
    merged, _ = merge([one, two], Settings((1.0, 1.0)))
    assert merged.metadata == {"ss_network_dim": "12", "ss_network_alpha": "6", "ss_base_model_version": "sd_v1"}
