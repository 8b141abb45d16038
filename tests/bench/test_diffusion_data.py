"""Noise and samplers agree with diffusers' own, and what is drawn depends on seed and step alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDIMScheduler

from regraft.bench import diffusion_art as art
from regraft.bench.diffusion_data import (
    EMPTY,
    FEW_STEPS,
    TEACHER_STEPS,
    Data,
    Latents,
    Schedule,
    ddim,
    decode,
    held_out_batches,
    open_autoencoder,
    training_batch,
)
from regraft.demo import data_folder

V1 = data_folder() / "v1"


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return Schedule.of(V1 / "scheduler")


@pytest.fixture(scope="module")
def judge():
    return DDIMScheduler.from_pretrained(V1 / "scheduler")


def latents(count: int = 6) -> Latents:
    return Latents(noise(count).half(), torch.arange(count))


def noise(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, 8, 16, 16), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [4, 12, 16, 20])
def test_the_times_are_those_of_diffusers(schedule, judge, steps):
    judge.set_timesteps(steps)
    assert schedule.times(steps) == [*judge.timesteps.tolist(), -1]


# Where the steps don't divide 1000, diffusers' step ends a little beside the time at which its next one starts.
@pytest.mark.parametrize("steps", [4, 20])
def test_a_step_is_diffusers_own(schedule, judge, steps):
    judge.set_timesteps(steps)
    state, v = noise(), noise(seed=1)
    for now, after in itertools.pairwise(schedule.times(steps)):
        made = schedule.step(state, v, torch.full((3,), now), torch.full((3,), after))
        assert torch.allclose(made, judge.step(v, now, state).prev_sample, atol=1e-5)


def test_noise_and_its_aim_are_those_of_diffusers(schedule, judge):
    clean, drawn, times = noise(), noise(seed=1), torch.tensor([0, 400, 999])
    states, aims = schedule.noised(clean, drawn, times)
    assert torch.allclose(states, judge.add_noise(clean, drawn, times), atol=1e-6)
    assert torch.allclose(aims, judge.get_velocity(clean, drawn, times), atol=1e-6)


def test_one_step_along_the_v_between_two_states_leads_from_one_to_the_other(schedule):
    now, after = torch.tensor([999, 749, 249]), torch.tensor([749, 499, -1])
    here, there = noise(), noise(seed=1)
    v = schedule.v_between(here, there, now, after)
    assert torch.allclose(schedule.step(here, v, now, after), there, atol=1e-4)


def test_the_few_steps_are_among_the_teachers(schedule):
    assert schedule.times(TEACHER_STEPS)[:: TEACHER_STEPS // FEW_STEPS] == schedule.times(FEW_STEPS)


@pytest.mark.parametrize("guided", [False, True])
def test_a_denoiser_that_knows_the_picture_ends_there(schedule, guided):
    picture, words, empty = noise(seed=2), torch.zeros(3, 16, 64), torch.zeros(1, 16, 64) if guided else None

    def knowing(states, times, _words):
        a, s = schedule.at(times)
        known = picture.repeat(len(states) // 3, 1, 1, 1)
        return (a * states - known) / s  # x0 = a·x − s·v, solved for v

    states = ddim(knowing, schedule, noise(), words, empty, steps=4)
    assert len(states) == 5
    assert torch.equal(states[0], noise())
    assert torch.allclose(states[-1], picture, atol=1e-4)


def test_guidance_goes_beyond_the_prompt_as_far_again(schedule):
    def says(states, times, words):
        return words[:, :1, :1, None].expand_as(states)

    words, empty = torch.full((3, 16, 64), 3.0), torch.full((1, 16, 64), 1.0)
    guided = ddim(says, schedule, noise(), words, empty, steps=1)[-1]
    plain = ddim(says, schedule, noise(), torch.full((3, 16, 64), 5.0), None, steps=1)[-1]
    assert torch.allclose(guided, plain)  # 1 + 2 · (3 − 1) = 5


def test_a_batch_depends_on_seed_and_step_alone(schedule):
    one, again = (training_batch(latents(), schedule, seed=4, step=7, size=5) for _ in range(2))
    other = training_batch(latents(), schedule, seed=4, step=8, size=5)
    assert torch.equal(one.states, again.states)
    assert torch.equal(one.times, again.times)
    assert not torch.equal(one.states, other.states)


def test_a_tenth_of_the_prompts_is_left_out(schedule):
    prompts = torch.cat([training_batch(latents(), schedule, 1, step, 100).prompts for step in range(20)])
    assert (prompts == EMPTY).float().mean().item() == pytest.approx(0.1, abs=0.03)


def test_held_out_pictures_meet_the_same_noise_every_time(schedule):
    one, again = (held_out_batches(latents(), schedule, (900, 100)) for _ in range(2))
    assert [batch.times.unique().tolist() for batch in one] == [[900], [100]]
    assert all(torch.equal(a.states, b.states) for a, b in zip(one, again, strict=True))


def drawn(name: str, cache, *, test: bool = False) -> art.Pixels:
    """Six drawings of each concept: a grey square on nothing."""
    rgba = np.zeros((16, 6, 32, 32, 4), np.uint8)
    rgba[:, :, 8:24, 8:24] = (120, 120, 120, 255)
    return rgba


def test_latents_are_made_once_and_decode_to_their_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(art, "drawings", drawn)
    data = Data(tmp_path, V1 / "vae")
    found = data.latents("noto")
    assert len(found) == 16 * 6
    assert found.prompts[:6].tolist() == [0, 1, 2, 3, 4, 5]  # each drawing on another background
    pictures = decode(open_autoencoder(V1 / "vae"), found.values[:6])
    assert np.abs(pictures[:, 16, 16] - 120 / 255).max() < 0.1
    assert np.abs(pictures[:, 2, 2] - np.array(list(art.BACKGROUNDS.values()))).max() < 0.15
    monkeypatch.setattr(art, "drawings", lambda *_, **__: pytest.fail("drawn again"))
    assert torch.equal(data.latents("noto").values, found.values)
