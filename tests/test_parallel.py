"""Several modules at once give what one after the other does, in order, and leave nothing behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from regraft import Settings, open_base, port
from regraft.fitting import fit_migration
from regraft.parallel import MOST, MOST_BYTES, side_by_side
from toys import deltas, drifted, llama, lora, relative_error, save_base


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_and_two_are_at_work_at_once(two_threads: None) -> None:
    meet = threading.Barrier(2, timeout=20)
    seen: list[int] = []

    def work(item: int) -> int:
        # Nobody gets past it alone.
        meet.wait()
        seen.append(torch.get_num_threads())
        return item * item

    assert list(side_by_side(work, range(6))) == [0, 1, 4, 9, 16, 25]
    assert seen == [1] * 6
    assert torch.get_num_threads() == 2


def test_what_is_switched_off_here_is_off_there(two_threads: None) -> None:
    with torch.inference_mode():
        assert all(side_by_side(lambda item: torch.is_inference_mode_enabled(), range(3)))
    with torch.no_grad():
        assert not any(side_by_side(lambda item: torch.is_grad_enabled(), range(3)))
    assert all(side_by_side(lambda item: torch.is_grad_enabled(), range(3)))


def test_many_threads_are_no_more_at_once_than_a_few(two_threads: None) -> None:
    torch.set_num_threads(4 * MOST)
    shares = list(side_by_side(lambda item: (torch.get_num_threads(), threading.active_count()), range(40)))
    assert {share for share, _ in shares} == {4}
    assert max(alive for _, alive in shares) <= threading.active_count() + MOST


def test_what_is_large_is_alone(two_threads: None) -> None:
    alone, together = threading.Lock(), []

    def work(item: int) -> None:
        together.append(not alone.acquire(blocking=False))
        time.sleep(0.02)
        if not together[-1]:
            alone.release()

    list(side_by_side(work, range(6), size=lambda item: MOST_BYTES // 2 + 1))
    assert together == [False] * 6


def test_no_item_is_begun_long_before_its_turn(two_threads: None) -> None:
    begun: list[int] = []
    results = side_by_side(begun.append, range(100))
    next(results)
    assert len(begun) <= 4
    results.close()  # type: ignore[attr-defined]
    assert len(begun) <= 4
    assert torch.get_num_threads() == 2


def test_an_error_is_the_callers(two_threads: None) -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("no such luck")
        return item

    with pytest.raises(ValueError, match="no such luck"):
        list(side_by_side(work, range(50)))
    assert torch.get_num_threads() == 2


def test_progress_is_told_by_one_thread_at_a_time(two_threads: None, tmp_path: Path) -> None:
    state = llama(layers=1)
    bases = [open_base(save_base(s, tmp_path / f"{i}.safetensors")) for i, s in enumerate((state, drifted(state, 0.1)))]
    inside, second = threading.Lock(), threading.Event()
    told: list[int] = []

    def tick(done: int, total: int, what: str) -> None:
        if not inside.acquire(blocking=False):
            second.set()
            return
        told.append(done)
        # Time for the other thread to come in, if it can.
        second.wait(0.3 if len(told) == 1 else 0)
        inside.release()

    migration = fit_migration(*bases, "auto", tick=tick)
    assert not second.is_set()
    assert told == list(range(1, len(migration.entries) + 1))


@pytest.mark.parametrize("method", ["copy", "lora-x", "prolora", "auto"])
def test_a_port_by_two_threads_is_that_by_one(tmp_path: Path, method: str) -> None:
    # As large as what goes by Gram matrices.
    old = {f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(300, 280) for i in range(4)}
    new = drifted(old, 0.05)
    bases = [open_base(save_base(state, tmp_path / f"{i}.safetensors")) for i, state in enumerate((old, new))]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(port(lora(old), *bases, method, settings=Settings(force=True)))
        finally:
            torch.set_num_threads(before)
    one, two = (deltas(result.adapter) for result in results)
    assert one.keys() == two.keys()
    for ref, delta in one.items():
        assert relative_error(two[ref], delta) < 1e-3
    rows = [[row.name for row in result.report.modules] for result in results]
    assert rows[0] == rows[1]
