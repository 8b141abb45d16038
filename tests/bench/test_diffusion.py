"""The diffusion world: what the benchmark is told of it, and what its scores say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from regraft.bench import diffusion, diffusion_score
from regraft.bench.diffusion import DEV, DiffusionWorld
from regraft.bench.diffusion_data import Latents
from regraft.bench.diffusion_judge import Judge
from regraft.bench.diffusion_recipes import ADAPTERS
from regraft.bench.diffusion_score import SAMPLED, held_out_batches
from regraft.bench.diffusion_train import Workshop
from regraft.bench.worlds import World
from regraft.demo import data_folder
from regraft.errors import InputError
from regraft.formats import load_adapter

PAIRS = DiffusionWorld.pairs


def test_there_are_the_pairs_that_the_benchmark_promises():
    kinds = [spec.relation for spec in PAIRS]
    assert kinds.count("near") == 2
    assert {"drift", "pruned", "deeper", "scratch"} <= set(kinds)
    assert [spec.name for spec in PAIRS if spec.seeds == (0, 1, 2)] == ["sd-near-2", "sd-pruned"]


@pytest.mark.parametrize("spec", PAIRS, ids=lambda spec: spec.name)
def test_every_pair_has_at_least_three_adapters_none_of_them_for_development(spec):
    assert len(set(spec.adapters)) >= 3
    assert set(spec.adapters) <= set(ADAPTERS)
    assert not set(spec.adapters) & {name for name, _ in DEV}


@pytest.mark.parametrize("name", ["sd-near-2", "sd-pruned"])
def test_a_dora_a_conv_and_a_few_step_adapter_are_carried(name):
    (spec,) = (spec for spec in PAIRS if spec.name == name)
    recipes = [ADAPTERS[adapter] for adapter in spec.adapters]
    assert any(recipe.dora for recipe in recipes)
    assert any("conv1" in recipe.targets for recipe in recipes)
    assert any(recipe.look is None for recipe in recipes)


def test_an_unknown_pair_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"sd-nowhere.*Known: sd-near-1"):
        DiffusionWorld(tmp_path).base("sd-nowhere", "old")


def test_the_demos_bases_are_not_copied(tmp_path):
    world: World = DiffusionWorld(tmp_path)
    assert world.base("sd-drift", "old") == data_folder() / "v1"
    assert world.base("sd-drift", "new") == data_folder() / "v2"
    assert world.base("sd-other", "new") == data_folder() / "v3"


def test_prompts_for_probes_are_not_those_that_pictures_are_judged_on():
    from regraft.bench.diffusion_art import PROMPTS

    given = DiffusionWorld.inputs(DiffusionWorld, "sd-drift")["prompts"]
    assert set(given) <= set(PROMPTS)
    assert not set(given) & {PROMPTS[i] for i in SAMPLED}


STYLE = data_folder() / "loras" / "style-v1.safetensors"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Four test pictures, two sampled in a step: each score runs the denoiser a few times only."""

    def latents(_self: Workshop, _base: str, name: str) -> Latents:
        drawn = torch.randn((4, 8, 16, 16), generator=torch.Generator().manual_seed(len(name)))
        return Latents(drawn.half(), torch.arange(4) * 6)

    monkeypatch.setattr(Workshop, "latents", latents)
    monkeypatch.setattr(diffusion_score, "trained_judge", lambda *_: Judge().eval())
    for name, value in {"SAMPLES": 2, "SAMPLED": [0, 6], "SAMPLE_STEPS": 1, "TEST_RUNS": 2}.items():
        monkeypatch.setattr(diffusion_score, name, value)
    return DiffusionWorld(tmp_path)


def test_an_adapter_of_zeros_scores_as_the_base_alone(world):
    adapter = load_adapter(STYLE)
    nothing = replace(adapter, updates={ref: update.scaled(0.0) for ref, update in adapter.updates.items()})
    with world.scorer("sd-drift", "new", "cyano") as score:
        alone, zero, changed, again = score(None), score(nothing), score(adapter), score(None)
    assert np.allclose(zero.task, alone.task, atol=1e-5)
    assert np.allclose(zero.retention, alone.retention, atol=1e-5)
    assert not np.allclose(changed.task, alone.task, atol=1e-2)
    assert np.array_equal(again.task, alone.task)  # the adapter was taken off again
    assert np.array_equal(again.retention, alone.retention)


def test_scores_have_a_figure_per_picture_and_the_extras_are_shares(world):
    with world.scorer("sd-drift", "old", "cyano") as score:
        found = score(None)
    assert found.task.shape == (4,)
    assert found.retention.shape == (2,)
    assert set(found.extra) == {"style", "judge", "concept"}
    assert all(0 <= share <= 1 for share in found.extra.values())


def test_the_task_is_minus_half_the_log_of_the_error(world):
    with world.scorer("sd-drift", "old", "cyano") as score:
        found = score(None)
    run = diffusion_score._Run(
        diffusion_score.load_model(world.base("sd-drift", "old")),
        diffusion_score.Schedule.of(world.base("sd-drift", "old") / "scheduler"),
    )
    data = world.shop.latents("v1", "noto-cyano-test")
    with torch.no_grad():
        words, by_hand = run.words(), []
        for batch in held_out_batches(data, run.schedule, diffusion_score.TASK_TIMES):
            v = run.loaded.main(batch.states, batch.times, words[batch.prompts]).sample
            by_hand.append(-0.5 * (v - batch.aims).square().flatten(1).mean(1).log())
    assert np.allclose(found.task, torch.stack(by_hand).mean(0).numpy(), atol=1e-4)


def test_fewer_steps_end_further_from_the_teacher(world, monkeypatch):
    with world.scorer("sd-drift", "new", "few-step") as score:
        few = score(None)
    assert few.task.shape == (2,)
    assert set(few.extra) == {"concept"}
    monkeypatch.setattr(diffusion_score, "FEW_STEPS", 1)
    with world.scorer("sd-drift", "new", "few-step") as score:
        assert score(None).task.mean() < few.task.mean()


def test_adapters_of_one_name_are_one_file_for_all_pairs(world, monkeypatch):
    asked: list[tuple[str, str, int]] = []
    monkeypatch.setattr(diffusion.Workshop, "adapter", lambda _self, *what: asked.append(what))
    world.adapter("sd-near-1", "cyano", 0)
    world.adapter("sd-pruned", "cyano", 0)
    world.native("sd-pruned", "cyano", 0)
    assert asked == [("v1", "cyano", 0), ("v1", "cyano", 0), ("pruned", "cyano", 0)]
