"""Every kind into every format that can be written: it comes back as the same change of the weight, or is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters_made import close, factors, noise
from safetensors.torch import save_file

from regraft import Adapter, Base, ModuleRef, OutputError, load_adapter, open_base
from regraft.formats import formats
from regraft.ops import convert as ops
from regraft.ops._common import BaseWeights
from regraft.ops.convert import convert_adapter
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
    Oft,
    SpectralShift,
    Subspace,
    Tucker,
    Update,
    Vera,
)

LINEAR = ModuleRef("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
KERNEL = ModuleRef("unet", "conv_in")
WEIGHT, BIAS = (ModuleRef("unet", f"{KERNEL.path}.{name}") for name in ("weight", "bias"))
NORM = ModuleRef("unet", "conv_norm_out.weight")
N, INTO = 320, 4


def _ref(*shape: int, seed: int = 0) -> InMemory:
    return InMemory(noise(*shape, seed=seed))


def _four(*shapes: tuple[int, ...]) -> list[InMemory]:
    return [_ref(*shape, seed=i) for i, shape in enumerate(shapes)]


def _magnitude(*shape: int) -> InMemory:
    return InMemory(noise(*shape).abs() + 1)


CASES: dict[str, tuple[ModuleRef, Update]] = {
    "lora": (LINEAR, factors((N, N), 3, 0, scale=0.7)),
    "lora of a kernel": (KERNEL, factors((N, INTO, 3, 3), 2, 0)),
    "lora with a bias": (LINEAR, replace(factors((N, N), 3, 0, scale=0.7), bias=_ref(N, seed=9))),
    "lora of a kernel with a bias": (KERNEL, replace(factors((N, INTO, 3, 3), 2, 0, scale=0.7), bias=_ref(N, seed=9))),
    "dora": (LINEAR, replace(factors((N, N), 3, 0), magnitude=_magnitude(N))),
    "dora of a kernel": (KERNEL, replace(factors((N, INTO, 3, 3), 2, 0), magnitude=_magnitude(N))),
    "dora per input": (LINEAR, replace(factors((N, N), 3, 0), magnitude=_magnitude(1, N))),
    "dora per channel": (KERNEL, replace(factors((N, INTO, 3, 3), 2, 0), magnitude=_magnitude(1, INTO, 1, 1))),
    "tucker": (KERNEL, Tucker(_ref(N, 2, 1, 1), _ref(2, 2, 3, 3, seed=1), _ref(2, INTO, 1, 1, seed=2), 0.5)),
    "loha": (LINEAR, LoHa(*_four((N, 2), (2, N), (N, 2), (2, N)), 0.5)),
    "loha of a kernel": (
        KERNEL,
        LoHa(*_four((N, 2), (2, INTO * 9), (N, 2), (2, INTO * 9)), 0.5, weight_shape=(N, INTO, 3, 3)),
    ),
    "loha with dora": (LINEAR, LoHa(*_four((N, 2), (2, N), (N, 2), (2, N)), 0.5, magnitude=_magnitude(N, 1))),
    "lokr": (LINEAR, LoKr(0.5, w1=_ref(4, 4), w2_a=_ref(N // 4, 2, seed=1), w2_b=_ref(2, N // 4, seed=2))),
    "diff": (WEIGHT, Diff(_ref(N, INTO, 3, 3), WEIGHT.path)),
    "diff of a bias": (BIAS, Diff(_ref(N), BIAS.path)),
    "diff of a norm": (NORM, Diff(_ref(N), NORM.path)),
    "full": (WEIGHT, Full(_ref(N, INTO, 3, 3), WEIGHT.path)),
    "full norm": (NORM, Full(_ref(N), NORM.path)),
    "ia3": (LINEAR, Ia3(_ref(N), InMemory(torch.tensor(False)))),
    "ia3 per input": (KERNEL, Ia3(_ref(INTO), InMemory(torch.tensor(True)))),
    "oft": (KERNEL, Oft(_ref(10, 32, 32))),
    "boft": (KERNEL, Boft(_ref(2, 10, 32, 32))),
    "glora": (LINEAR, GLora(*_four((N, 2), (2, N), (N, 2), (2, N)), 1.0)),
    "svdiff": (KERNEL, SpectralShift(_ref(INTO * 9))),
    "lorax": (KERNEL, Subspace(_ref(4))),
    "foura": (LINEAR, Foura(_ref(3, N), _ref(N, 3, seed=1), 0.5)),
    "foura of a kernel": (KERNEL, Foura(_ref(3, INTO // 2 + 1, 3, 3, 2), _ref(N // 2 + 1, 3, 2), 0.5, size=(N, INTO))),
    "vera": (LINEAR, Vera(_ref(N), _ref(3, seed=1), _ref(3, N, seed=2), _ref(N, 3, seed=3), weight_shape=(N, N))),
    "vera without a shape": (LINEAR, Vera(_ref(N), _ref(3, seed=1), _ref(3, N, seed=2), _ref(N, 3, seed=3))),
    "fourierft": (LINEAR, FourierFT(_ref(20), 30.0, 7, weight_shape=(N, N))),
    "fourierft without a shape": (LINEAR, FourierFT(_ref(20), 30.0, 7)),
}
TARGETS = [name for name, format in formats().items() if format.write is not None]

SUFFIXES = {"peft": "", "gguf-lora": ".gguf"}
#: Those that hold a plain LoRA of a U-Net.
PLAIN = {"peft", "diffusers", "kohya", "lycoris", "comfyui", "onetrainer", "original", "cloneofsimo", "omi"} & {
    *TARGETS
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The four parameters, as a pipeline has them."""
    weights = {
        f"{LINEAR.path}.weight": noise(N, N, seed=20),
        WEIGHT.path: noise(N, INTO, 3, 3, seed=21),
        BIAS.path: noise(N, seed=22),
        NORM.path: noise(N, seed=23) + 1,
    }
    folder = tmp_path_factory.mktemp("base")
    (folder / "unet").mkdir()
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text("{}")
    return open_base(folder)


def _effects(adapter: Adapter, base: Base) -> dict[str, torch.Tensor]:
    """Parameter → its value with everything of the adapter in it; the bias of a LoRA counts to the layer's."""
    weights = {name: ref.load().clone() for name, ref in base.components["unet"].items()}
    before = BaseWeights(base, adapter)
    for ref, update in adapter.updates.items():
        home = ref.path if update.by_parameter else f"{ref.path}.weight"
        weights[home] = update.merged(before.load(ref)).reshape(weights[home].shape)
        bias = getattr(update, "bias", None)
        if bias is not None:
            name = f"{ref.path}.bias"
            weights[name] = weights.get(name, torch.zeros(N)) + update.scale * bias.load()
    return weights


FAST = ("peft", "diffusers", "kohya", "lycoris")


@pytest.mark.parametrize(
    "target", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in TARGETS]
)
def test_a_conversion_keeps_the_change_or_refuses(
    target: str, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: dict[str, str] = {}
    names = {name: tuple(base.components["unet"]) for name in ("unet", "model")}
    for name, (ref, update) in CASES.items():
        adapter = Adapter({ref: update}, "none", family="sd15")
        monkeypatch.setattr(ops, "read_whole", lambda *args, adapter=adapter, **options: adapter)
        for options in ({}, {"base": base.path, "energy": 1.0}):
            out = tmp_path / f"{name} {len(options)}{SUFFIXES.get(target, '.safetensors')}"
            try:
                report = convert_adapter("in", out, target, **options)
            except OutputError as error:
                assert not out.exists()
                refusals[name] = str(error)
                continue
            meant, got = _effects(adapter, base), _effects(load_adapter(out, names=names), base)
            assert meant.keys() == got.keys(), name
            for parameter, value in meant.items():
                assert close(got[parameter], value, 1e-4), f"{name} in {target}: {parameter}"
            assert all(row.status in ("rewritten", "merged") for row in report.changes)
    assert not [name for name, told in refusals.items() if "fault" in told or (name == "lora" and target in PLAIN)]
