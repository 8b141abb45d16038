"""A few-step adapter is told by what it does on the old base, and judged by the same on the new one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.adapter import Adapter, ModuleRef
from regraft.base import open_base
from regraft.methods import _few_steps as few_steps
from regraft.methods._few_steps import FewSteps
from regraft.methods.task import AdapterTask, Running
from regraft.pairing import pair_bases
from regraft.tensors import InMemory
from regraft.updates import LowRank
from verify import tiny

GATE = ModuleRef("unet", "down_blocks.0.attentions.0.proj_in")


def with_gate(size: float) -> Adapter:
    """An adapter that adds ``size`` to one weight's first entry."""
    up, down = torch.zeros(8, 1), torch.zeros(1, 8)
    up[0, 0], down[0, 0] = size, 1.0
    update = LowRank(InMemory(up), InMemory(down), 1.0)
    return Adapter({GATE: update}, "peft")


@pytest.fixture
def task(tmp_path: Path) -> AdapterTask:
    folders = tiny.pipeline(tmp_path / "old"), tiny.pipeline(tmp_path / "new")
    old, new = map(open_base, folders)
    adapter = with_gate(1.0)
    return AdapterTask(
        adapter, old, new, pair_bases(old, new), adapter.updates, lambda: adapter, Running(prompts=("a", "b"))
    )


def pictures(short: Callable[[float], float]) -> Any:
    """A sampler whose guided pictures are 1, and whose unguided ones ``short`` of what the adapter added."""

    def drawn(
        model: Any, texts: list[str], seed: int, *, num_inference_steps: int, guidance_scale: float | None
    ) -> Any:
        weight: Tensor = model.components["unet"].get_submodule(GATE.path).weight
        added = float(weight.flatten()[0] - drawn.start)  # type: ignore[attr-defined]
        value = 1.0 if guidance_scale != 1.0 else short(added) if num_inference_steps == 4 else 0.0
        return torch.full((len(texts), 4, 8, 8), value)

    return drawn


def sampled_by(task: AdapterTask, monkeypatch: pytest.MonkeyPatch, short: Callable[[float], float]) -> None:
    sampler = pictures(short)
    weight = task.models.old.components["unet"].get_submodule(GATE.path).weight
    sampler.start = float(weight.detach().flatten()[0])
    monkeypatch.setattr(few_steps, "sample_latents", sampler)


def test_what_brings_few_steps_to_many_guided_ones_is_told_and_judged_by_it(
    task: AdapterTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled_by(task, monkeypatch, lambda added: 0.9 * added)
    found = FewSteps.of(task)
    assert found is not None
    assert found.steps == 4
    assert found.error({}) == pytest.approx(1.0)
    assert found.error(task.adapter.updates) == pytest.approx(0.01, rel=1e-3)
    assert found.error(with_gate(0.5).updates) == pytest.approx(0.55**2, rel=1e-3)


def test_what_leads_away_from_them_is_no_few_step_adapter(task: AdapterTask, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled_by(task, monkeypatch, lambda added: -added)
    assert FewSteps.of(task) is None


def test_a_unet_alone_can_not_tell(task: AdapterTask) -> None:
    bare = replace(task.models, old=replace(task.models.old, pipeline=None))
    assert FewSteps.of(replace(task, given=bare)) is None
