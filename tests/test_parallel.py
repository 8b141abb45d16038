"""Several modules at once give what one after the other does, in order, and leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from regraft import Settings, open_base, port
from regraft.parallel import side_by_side
from toys import deltas, drifted, llama, lora, save_base


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


@pytest.mark.parametrize("method", ["copy", "lora-x", "prolora", "auto"])
def test_a_port_by_two_threads_is_that_by_one(tmp_path: Path, method: str) -> None:
    old, new = llama(), drifted(llama(), 0.05)
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
        torch.testing.assert_close(two[ref], delta, rtol=1e-4, atol=1e-6)
    rows = [[row.name for row in result.report.modules] for result in results]
    assert rows[0] == rows[1]
