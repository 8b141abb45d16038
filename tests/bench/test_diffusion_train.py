"""Training: every kind of adapter can be read and applied, and a run that was cut off ends as an unbroken one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import peft
from safetensors.torch import load_file

from regraft.bench import diffusion_models as models
from regraft.bench import diffusion_train as train
from regraft.bench.diffusion_data import FEW_STEPS, Latents
from regraft.bench.diffusion_recipes import ADAPTERS, BASES
from regraft.bench.diffusion_train import Workshop, trajectories
from regraft.bench.resume import Checkpoints
from regraft.demo import data_folder
from regraft.formats import load_adapter
from regraft.runtime import applied, load_model
from regraft.updates import LowRank


class Toy(Workshop):
    """A workshop whose pictures are noise."""

    def latents(self, base: str, name: str) -> Latents:
        drawn = torch.randn((8, 8, 16, 16), generator=torch.Generator().manual_seed(len(name)))
        return Latents(drawn.half(), torch.arange(8) * 6)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Two steps of two pictures."""
    for recipes in (ADAPTERS, BASES):
        for name, recipe in recipes.items():
            monkeypatch.setitem(recipes, name, replace(recipe, steps=2))
    monkeypatch.setattr(train, "BATCH", 2)
    monkeypatch.setattr(train, "LORA_BATCH", 2)
    monkeypatch.setattr(train, "TRAJECTORIES", 2)


@pytest.fixture(scope="module")
def v1():
    return load_model(data_folder() / "v1")


def tensors(file) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", ["cyano", "riso-dora", "blueprint-conv"])
def test_an_adapter_of_each_kind_finds_its_places_on_v1(name, v1, tmp_path):
    adapter = load_adapter(Toy(tmp_path).adapter("v1", name, 0))
    recipe = ADAPTERS[name]
    assert all(isinstance(update, LowRank) for update in adapter.updates.values())
    assert {update.rank for update in adapter.updates.values()} == {recipe.rank}
    ends = {ref.path.rsplit(".attentions.")[-1] for ref in adapter.updates}
    assert all(any(end.endswith(target) for target in recipe.targets) for end in ends)
    modules = [v1.components[ref.component].get_submodule(ref.path) for ref in adapter.updates]
    before = [module.weight.clone() for module in modules]
    with applied(v1.components, adapter):
        assert not any(torch.equal(module.weight, old) for module, old in zip(modules, before, strict=True))
    assert all(torch.equal(module.weight, old) for module, old in zip(modules, before, strict=True))


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name.startswith("cyano-")])
def test_a_tuner_s_adapter_does_to_v1_what_peft_does(name, v1, tmp_path):
    folder = Toy(tmp_path).adapter("v1", name, 0)
    unet = models.open_unet(data_folder() / "v1")
    states = torch.randn((2, 8, 16, 16), generator=torch.Generator().manual_seed(1))
    asked = states, torch.tensor([500, 20]), torch.randn((2, 4, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        bare = v1.main(*asked).sample
        with applied(v1.components, load_adapter(folder)):
            ours = v1.main(*asked).sample
        theirs = peft.PeftModel.from_pretrained(unet, str(folder)).eval()(*asked).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ours, bare, atol=1e-3)


def test_a_gate_s_count_is_kept_where_a_run_is_cut_off(tmp_path, monkeypatch):
    class Cut(Exception):
        pass

    def cut(step: int, **_: float) -> None:
        if step == 1:
            raise Cut

    whole = Toy(tmp_path / "a").adapter("v1", "cyano-foura", 0)
    shop = Toy(tmp_path / "b")
    with monkeypatch.context() as patched:
        patched.setattr(train, "SAVE_EVERY", 1)
        patched.setattr(Checkpoints, "note", lambda _self, step, **_: cut(step))
        with pytest.raises(Cut):
            shop.adapter("v1", "cyano-foura", 0)
    parts = shop.adapter("v1", "cyano-foura", 0)
    assert tensors(parts / "adapter_model.safetensors") == tensors(whole / "adapter_model.safetensors")


def test_the_dora_adapter_has_magnitudes_and_the_conv_one_kernels(tmp_path):
    shop = Toy(tmp_path)
    dora = load_adapter(shop.adapter("v1", "riso-dora", 0)).updates.values()
    conv = load_adapter(shop.adapter("v1", "blueprint-conv", 0)).updates.values()
    assert all(update.magnitude is not None for update in dora)
    assert any(len(update.shape) == 4 and update.shape[-1] == 3 for update in conv)


def test_training_is_the_same_every_time_and_differs_between_seeds(tmp_path):
    files = [Toy(tmp_path / place).adapter("v1", "cyano", seed) for place, seed in (("a", 0), ("b", 0), ("b", 1))]
    one, again, other = map(tensors, files)
    assert one == again
    assert one != other


def test_a_run_that_was_cut_off_goes_on_and_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    unbroken = Toy(tmp_path / "a").adapter("v1", "cyano", 0)
    shop = Toy(tmp_path / "b")
    learnt: list[int] = []

    class Cut(Exception):
        pass

    def cut(step: int) -> None:
        learnt.append(step)
        if learnt == [0, 1]:
            raise Cut

    monkeypatch.setattr(Checkpoints, "note", lambda _self, step, **_: cut(step))
    with monkeypatch.context() as patched:
        patched.setattr(train, "SAVE_EVERY", 1)
        with pytest.raises(Cut):
            shop.adapter("v1", "cyano", 0)
    assert not shop.adapter_file("v1", "cyano", 0).exists()
    assert tensors(shop.adapter("v1", "cyano", 0)) == tensors(unbroken)
    assert learnt == [0, 1, 1]


def test_a_few_step_adapter_is_taught_by_the_bases_own_guided_ways(tmp_path):
    shop = Toy(tmp_path / "a")
    assert load_adapter(shop.adapter("v1", "few-step", 0)).updates
    found = trajectories("v1", shop, 2, seed=5)
    assert found["states"].shape == (FEW_STEPS + 1, 2, 8, 16, 16)
    assert found["states"][0].float().std() == pytest.approx(1, abs=0.1)  # noise at the start
    again = trajectories("v1", Toy(tmp_path / "b"), 2, seed=5)
    assert all(torch.equal(again[name], found[name]) for name in ("states", "prompts"))
    assert not torch.equal(trajectories("v1", shop, 2, seed=6)["states"], found["states"])


def test_a_pupil_that_is_its_teacher_has_nothing_to_learn_and_another_has(v1):
    states, times, words = torch.randn(2, 8, 16, 16), torch.tensor([100, 800]), torch.randn(2, 16, 64)
    teacher, pupil = (models.open_unet(data_folder() / "v1") for _ in range(2))
    teaching = train._Teaching(teacher, pupil)

    def taught() -> float:
        return teaching.loss(pupil(states, times, words).sample, states, times, words).item()

    assert taught() == 0
    pupil.mid_block.resnets[0].conv1.weight.data *= 1.5
    assert taught() > 0
    teaching.close()
    assert not any(module._forward_hooks for unet in (teacher, pupil) for module in unet.modules())


@pytest.mark.parametrize("name", BASES)
def test_every_base_is_trained_and_loads(name, tmp_path):
    folder = Toy(tmp_path).base(name)
    loaded = load_model(folder)
    start = models.open_unet(data_folder() / "v1")
    assert 0 < models.drift(start, loaded.main) < 0.2
    assert (folder / "tokenizer" / "vocab.json").is_file()
    encoders = [models.open_text(place)[0].state_dict() for place in (data_folder() / "v1", folder)]
    same = all(torch.equal(value, encoders[1][name]) for name, value in encoders[0].items())
    assert same is not BASES[name].text


def test_a_finished_model_is_not_trained_again(tmp_path, monkeypatch):
    shop = Toy(tmp_path)
    file, folder = shop.adapter("v1", "cyano", 0), shop.base("near-1")
    monkeypatch.setattr(train, "train_adapter", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(train, "train_base", lambda *_: pytest.fail("trained again"))
    assert shop.adapter("v1", "cyano", 0) == file
    assert shop.base("near-1") == folder
