"""A kill at any moment leaves the old output whole or the new one whole."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks")]
if sys.platform == "linux":
    from tools.kill_test import scenarios
    from tools.kill_test.__main__ import main


def test_30_kills_at_random_moments_break_nothing() -> None:
    result = main(30, seed=1)
    assert result["kills"] == 30
    assert result["broken"] == 0
    assert sum(row["kills_that_left_a_hidden_folder"] for row in result["by_command"].values())


@pytest.mark.parametrize("scenario", scenarios.SCENARIOS if sys.platform == "linux" else (), ids=lambda s: s.name)
def test_a_kill_right_before_or_after_any_rename_breaks_nothing(
    scenario: scenarios.Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scenarios.prepare(tmp_path)
    contents = []
    for step in (None, *range(16)):
        scenarios.set_old(tmp_path, scenario)
        for stage in scenarios.stages(tmp_path):
            shutil.rmtree(stage)
        if step is None:
            contents.append({name: scenarios.content(tmp_path / name) for name in scenario.outputs})
        child = os.fork()
        if not child:
            if step is not None:
                _kill_at(step)
            os._exit(scenarios.run(scenario))
        _, status = os.waitpid(child, 0)
        now = {name: scenarios.content(tmp_path / name) for name in scenario.outputs}
        if step is None:
            assert status == 0
            contents.append(now)
        elif not os.WIFSIGNALED(status):
            assert step >= 2, "no rename was killed"
            return
        for name, content in now.items():
            assert content in (contents[0][name], contents[-1][name]), f"step {step}: {name} is neither old nor new"


def _kill_at(step: int) -> None:
    """Die before or after the rename that the step counts to."""
    import regraft.output as output

    seen = iter(range(100))

    def deadly(call):  # type: ignore[no-untyped-def]
        def run(*arguments, **options):  # type: ignore[no-untyped-def]
            if next(seen) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **options)
            if next(seen) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return run

    os.replace = deadly(os.replace)
    output._exchange = deadly(output._exchange)
    shutil.rmtree = deadly(shutil.rmtree)
