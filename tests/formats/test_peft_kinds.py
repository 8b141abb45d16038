"""PEFT's tuners beside LoRA: PEFT loads what we write to the same output, and merges to our merged weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regraft import Adapter, InputError, ModuleRef, OutputError, load_adapter
from regraft.adapter import MODEL, TokenRef
from regraft.formats._peft_lokr import factorised
from regraft.inspection import inspect_adapter
from regraft.plan import check_families
from regraft.tensors import InMemory
from regraft.updates import Full, Ia3, LoHa, LoKr, LowRank, Oft, with_shapes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 16)
        self.lin = nn.Linear(16, 24)
        self.square = nn.Linear(24, 24)
        self.conv = nn.Conv2d(24, 24, 3)
        self.head = nn.Linear(24, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.square(self.lin(self.emb(ids)))
        return self.head(self.conv(x.mT.reshape(1, 24, 3, 3)).mean((2, 3)))


LAYERS = ["lin", "square", "conv"]
LINEAR = ["lin", "square", "head"]
# Name → config class, options, kind in `inspect`.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5, "target_modules": LAYERS}, "loha"),
    "loha tucker": (
        "LoHaConfig",
        {"r": 3, "alpha": 5, "use_effective_conv2d": True, "target_modules": LAYERS},
        "loha",
    ),
    "loha patterns": (
        "LoHaConfig",
        {"r": 3, "alpha": 5, "rank_pattern": {"lin": 2}, "alpha_pattern": {"conv": 7}, "target_modules": LAYERS},
        "loha",
    ),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 5, "target_modules": LAYERS}, "lokr"),
    "lokr full": ("LoKrConfig", {"r": 8, "alpha": 5, "rank_pattern": {"lin": 9}, "target_modules": LAYERS}, "lokr"),
    "lokr both": (
        "LoKrConfig",
        {"r": 1, "alpha": 5, "decompose_both": True, "decompose_factor": 4, "target_modules": LAYERS},
        "lokr",
    ),
    "lokr tucker": ("LoKrConfig", {"r": 2, "use_effective_conv2d": True, "target_modules": LAYERS}, "lokr"),
    "oft": ("OFTConfig", {"oft_block_size": 4, "r": 0, "target_modules": LAYERS}, "oft"),
    "oft exact": (
        "OFTConfig",
        {"oft_block_size": 4, "r": 0, "use_cayley_neumann": False, "bias": "oft_only", "target_modules": LAYERS},
        "oft",
    ),
    "oft shared": ("OFTConfig", {"oft_block_size": 4, "r": 0, "block_share": True, "target_modules": LAYERS}, "oft"),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "target_modules": LAYERS}, "boft"),
    "ia3": ("IA3Config", {"target_modules": LAYERS, "feedforward_modules": ["square"]}, "ia3"),
    "ia3 saved head": (
        "IA3Config",
        {"target_modules": LAYERS, "feedforward_modules": ["conv"], "modules_to_save": ["head"]},
        "ia3",
    ),
    "vera": ("VeraConfig", {"r": 3, "target_modules": LINEAR}, "vera"),
    "vera drawn": (
        "VeraConfig",
        {"r": 30, "save_projection": False, "projection_prng_key": 5, "target_modules": LINEAR},
        "vera",
    ),
    "vera saved head": (
        "VeraConfig",
        {"r": 3, "bias": "vera_only", "target_modules": ["lin", "square"], "modules_to_save": ["head"]},
        "vera",
    ),
    "fourierft": ("FourierFTConfig", {"n_frequency": 60, "random_loc_seed": 3, "target_modules": LINEAR}, "fourierft"),
    "fourierft patterns": (
        "FourierFTConfig",
        {
            "n_frequency": 60,
            "n_frequency_pattern": {"lin": 384, "head": 7},
            "scaling": 31.0,
            "bias": "fourier_only",
            "target_modules": LINEAR,
        },
        "fourierft",
    ),
}


def trained(case: str) -> tuple[nn.Module, PeftModel]:
    """A base, and an adapter on a copy of it whose every tensor has a value."""
    name, options, _ = CASES[case]
    torch.manual_seed(0)
    base = Net().eval()
    model = get_peft_model(copy.deepcopy(base), getattr(peft, name)(**options))
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            around = any(word in key for word in ("ia3_l", "boft_s", "head", "bias"))
            noise = torch.randn_like(parameter) * 0.2
            parameter.data = parameter.data + noise if around else noise
    return base, model.eval()


def shaped(adapter: Adapter, base: nn.Module) -> Adapter:
    """The adapter with what its file does not tell of the base's weights."""
    weights = base.state_dict()
    shapes = {
        ref: tuple(weights[f"{ref.path}.weight"].shape) for ref, u in adapter.updates.items() if not u.by_parameter
    }
    return replace(adapter, updates=with_shapes(adapter.updates, shapes))


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(torch.arange(9).reshape(1, 9))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_write_and_gives_the_same_outputs(case: str, tmp_path: Path) -> None:
    base, model = trained(case)
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    assert adapter.unrecognised == ()
    kinds = inspect_adapter(tmp_path / "theirs").components[MODEL].kinds
    assert kinds[CASES[case][2]] == len(CASES[case][1]["target_modules"])
    adapter.save(tmp_path / "ours")

    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert set(after) == set(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours")]
    assert configs[0] == configs[1]
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert not torch.allclose(output(base), output(model), atol=1e-3)
    assert torch.allclose(output(loaded), output(model), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_our_merged_weights_are_those_of_merge_and_unload(case: str, tmp_path: Path) -> None:
    base, model = trained(case)
    model.save_pretrained(tmp_path / "adapter")
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    ours = dict(base.state_dict())
    updates = shaped(load_adapter(tmp_path / "adapter"), base).updates
    for (_, path), update in updates.items():
        if isinstance(update, Full):
            ours[path] = update.merged(ours[path])
    for (_, path), update in updates.items():
        if not isinstance(update, Full):
            ours[f"{path}.weight"] = update.merged(ours[f"{path}.weight"])
        if isinstance(update, Ia3):
            ours[f"{path}.bias"] = update.merged_bias(ours[f"{path}.bias"])
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, atol=1e-5), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["loha patterns", "lokr", "ia3"])
def test_a_config_is_corrected_to_the_modules_that_are_left(case: str, tmp_path: Path) -> None:
    base, model = trained(case)
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    kept = {module: update for module, update in adapter.updates.items() if module.path != "lin"}
    replace(adapter, updates=kept).save(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["conv", "square"]
    merged = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").merge_and_unload().state_dict()
    theirs = copy.deepcopy(model).merge_and_unload().state_dict()
    assert torch.equal(merged["lin.weight"], base.state_dict()["lin.weight"])
    assert torch.allclose(merged["conv.weight"], theirs["conv.weight"], atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_loha_of_another_tool_becomes_one_of_peft(tmp_path: Path) -> None:
    def loha(out: int, rank: int, width: int, scale: float) -> LoHa:
        pairs = [InMemory(torch.randn(size) * 0.3) for size in ((out, rank), (rank, width)) * 2]
        return LoHa(*pairs, scale=scale)  # type: ignore[arg-type]

    updates = {ModuleRef(MODEL, "lin"): loha(24, 2, 16, 1.5), ModuleRef(MODEL, "square"): loha(24, 3, 24, 0.5)}
    Adapter(updates, "lycoris").save(tmp_path / "ours", format="peft")
    torch.manual_seed(0)
    base = Net()
    merged = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").merge_and_unload().state_dict()
    for module, update in updates.items():
        name = f"{module.path}.weight"
        assert torch.allclose(merged[name], update.merged(base.state_dict()[name]), atol=1e-5)


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 8, 16, 1000])
def test_sizes_are_cut_as_peft_cuts_them(factor: int) -> None:
    from peft.tuners.lokr.layer import factorization

    for size in (1, 2, 10, 16, 24, 127, 320, 768, 1280, 3072, 5120):
        assert factorised(size, factor) == factorization(size, factor)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("factor", "both"), [(-1, False), (4, False), (2, True)])
def test_lokr_of_another_tool_becomes_one_of_peft_where_the_cut_is_the_same(
    factor: int, both: bool, tmp_path: Path
) -> None:
    def ref(*shape: int) -> InMemory:
        return InMemory(torch.randn(shape) * 0.3)

    torch.manual_seed(1)
    updates = {}
    for path, out, width, rank in (("lin", 24, 16, 1), ("square", 24, 24, 2), ("head", 4, 24, 0)):
        (j, k), (m, n) = factorised(out, factor), factorised(width, factor)
        full_w2 = not rank or rank >= max(k, n) / 2
        halves: dict[str, Any] = {"w2": ref(k, n)} if full_w2 else {"w2_a": ref(k, rank), "w2_b": ref(rank, n)}
        low_w1 = both and rank and rank < max(j, m) / 2
        halves |= {"w1_a": ref(j, rank), "w1_b": ref(rank, m)} if low_w1 else {"w1": ref(j, m)}
        updates[ModuleRef(MODEL, path)] = LoKr(0.7 + rank, **halves)
    Adapter(updates, "lycoris").save(tmp_path / "ours", format="peft")
    base = Net()
    merged = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").merge_and_unload().state_dict()
    for module, update in updates.items():
        name = f"{module.path}.weight"
        assert torch.allclose(merged[name], update.merged(base.state_dict()[name]), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beside_lora", [False, True])
def test_trainable_tokens_are_carried_by_their_numbers(beside_lora: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Net()
    if beside_lora:
        config: Any = peft.LoraConfig(target_modules=["lin"], trainable_token_indices={"emb": [1, 3]})
    else:
        config = peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[1, 3])
    model = get_peft_model(copy.deepcopy(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    assert adapter.unrecognised == ()
    assert {token: ref.shape for token, ref in adapter.tokens.items()} == {TokenRef(MODEL, "emb[1, 3]"): (2, 16)}
    adapter.save(tmp_path / "ours")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(output(loaded), output(model.eval()))
    with pytest.raises(OutputError, match="added tokens"):
        adapter.save(tmp_path / "lost.safetensors", format="diffusers")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["VBLoRAConfig", "HRAConfig", "LNTuningConfig"])
def test_other_tuners_are_named_and_nothing_of_them_is_guessed(name: str, tmp_path: Path) -> None:
    more = {"vector_length": 4, "num_vectors": 8} if name == "VBLoRAConfig" else {}
    model = get_peft_model(Net(), getattr(peft, name)(target_modules=["lin"], **more))
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    assert adapter.updates == {}
    assert set(adapter.unrecognised) == set(load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    with pytest.raises(InputError, match=f"it is one of {str(model.peft_type).partition('.')[2] or model.peft_type}"):
        check_families(adapter, None, None)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_experts_in_one_parameter_are_listed(tmp_path: Path) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_of_all = nn.Parameter(torch.randn(3, 8, 16))
            self.lin = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) @ self.weight_of_all.sum(0).T

    net = nn.Sequential()
    net.add_module("experts", Experts())
    config = peft.LoraConfig(target_modules=["lin"], target_parameters=["experts.weight_of_all"], r=2)
    get_peft_model(net, config).save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    assert [module.path for module in adapter.updates] == ["experts.lin"]
    assert len(adapter.unrecognised) == 2
    adapter.save(tmp_path / "ours")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert set(before) - set(after) == set(adapter.unrecognised)


@pytest.mark.filterwarnings("ignore")
def test_a_pickled_weights_file_is_read(tmp_path: Path) -> None:
    base, model = trained("loha")
    model.save_pretrained(tmp_path / "theirs", safe_serialization=False)
    weights = tmp_path / "theirs" / "adapter_model.bin"
    if not weights.exists():
        # PEFT 0.21 writes safetensors whatever it is told; older ones did not.
        torch.save(load_file(tmp_path / "theirs" / "adapter_model.safetensors"), weights)
        (tmp_path / "theirs" / "adapter_model.safetensors").unlink()
    load_adapter(tmp_path / "theirs").save(tmp_path / "ours")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.allclose(output(loaded), output(model), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_in_a_subfolder_is_found_and_several_are_named(tmp_path: Path) -> None:
    model = get_peft_model(Net(), peft.LoraConfig(target_modules=["lin"]), adapter_name="first")
    model.save_pretrained(tmp_path / "run")
    assert load_adapter(tmp_path / "run").path == tmp_path / "run" / "first"
    model.add_adapter("second", peft.LoraConfig(target_modules=["square"]))
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(InputError, match="several adapters: first, second"):
        load_adapter(tmp_path / "run")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "scale"), [("loha", 1.0), ("lokr", 1.0), ("oft", None), ("boft", None), ("ia3", None)]
)
def test_a_bare_file_is_told_by_its_keys(case: str, scale: float | None, tmp_path: Path) -> None:
    _, model = trained(case)
    model.save_pretrained(tmp_path / "theirs")
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(tmp_path / "theirs" / "adapter_model.safetensors"), bare)
    adapter = load_adapter(bare)
    assert (adapter.format, adapter.unrecognised) == ("peft", ())
    assert {getattr(update, "scale", None) for update in adapter.updates.values()} == {scale}
    adapter.save(tmp_path / "again.safetensors")
    again, before = load_file(tmp_path / "again.safetensors"), load_file(bare)
    assert set(again) == set(before)
    assert all(torch.equal(again[key], value) for key, value in before.items())


def ones(*shape: int) -> InMemory:
    return InMemory(torch.ones(shape))


@pytest.mark.parametrize(
    ("updates", "says"),
    [
        ({"a": LoKr(1.0, w1=ones(4, 2), w2=ones(2, 8))}, "cut into halves otherwise"),
        ({"a": Oft(ones(2, 4, 4))}, "another tool's convention"),
        ({"a": Ia3(ones(8), InMemory(torch.tensor(0)))}, "another tool's convention"),
        ({"a": LoHa(ones(8, 2), ones(2, 8), ones(8, 2), ones(2, 8), 1.0, magnitude=ones(8))}, "magnitude"),
        (
            {"a": LoHa(ones(8, 2), ones(2, 8), ones(8, 2), ones(2, 8), 1.0), "b": LowRank(ones(8, 2), ones(2, 8), 1.0)},
            "LOHA beside LORA",
        ),
    ],
)
def test_what_peft_can_not_hold_is_refused(updates: dict[str, Any], says: str, tmp_path: Path) -> None:
    adapter = Adapter({ModuleRef(MODEL, path): update for path, update in updates.items()}, "lycoris")
    with pytest.raises(OutputError, match=says):
        adapter.save(tmp_path / "out", format="peft")
    assert list(tmp_path.iterdir()) == []


def folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    save_file({f"base_model.model.{key}": value for key, value in tensors.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


HADA: Callable[[], dict[str, Tensor]] = lambda: {  # noqa: E731
    f"lin.hada_{role}": torch.ones(shape)
    for role, shape in (("w1_a", (8, 2)), ("w1_b", (2, 8)), ("w2_a", (8, 2)), ("w2_b", (2, 8)))
}


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ({"peft_type": "LOHA", "r": 2}, HADA(), "alpha: is missing"),
        ({"peft_type": "LOHA", "r": 0, "alpha": 1}, HADA(), "above 0"),
        ({"peft_type": "LOHA", "r": 2, "alpha": 1, "rank_pattern": {"a": "x"}}, HADA(), "must have a number"),
        ({"peft_type": "LOHA", "r": 2, "alpha": 1, "rank_pattern": {"(": 1}}, HADA(), "no regular expression"),
        ({"peft_type": "IA3", "feedforward_modules": "("}, {"lin.ia3_l": torch.ones(8, 1)}, "no regular expression"),
        ({"peft_type": "LOHA", "r": 2, "alpha": 1}, dict(list(HADA().items())[1:]), "no matching w1_a"),
        ({"peft_type": "LOHA", "r": 2, "alpha": 1}, HADA() | {"lin.hada_w1_a": torch.ones(8, 3)}, "does not fit"),
        ({"peft_type": "BOFT"}, {"lin.boft_R": torch.ones(1, 2, 4, 4)}, "no matching boft_s"),
        ({"peft_type": "OFT"}, {"lin.oft_R.weight": torch.ones(4)}, "2 dimensions"),
        ({"peft_type": "IA3"}, {"lin.ia3_l": torch.ones(8, 1).int()}, "int32"),
    ],
)
def test_a_broken_folder_is_named(
    config: dict[str, Any], tensors: dict[str, Tensor], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        load_adapter(folder(tmp_path / "bad", config, tensors))
