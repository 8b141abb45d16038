"""A fixed number of broken inputs for each reader, the same every time: read, or told as an error of ours."""

from __future__ import annotations

import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="needs an alarm")]
if sys.platform != "win32":
    from tools.fuzz import running
    from tools.fuzz.targets import TARGETS

INPUTS = 2000


@pytest.mark.parametrize("name", TARGETS if sys.platform != "win32" else ())
def test_a_reader_reads_or_tells(name: str) -> None:
    if name.startswith("gguf"):
        pytest.importorskip("gguf")
    running.limit(memory=None)
    outcome = running.run(TARGETS[name], INPUTS, seed=20)
    assert not outcome.findings, list(outcome.findings)
    assert outcome.inputs == INPUTS
    # Both ways through are taken: the mutations neither break all nor nothing.
    assert outcome.read
    assert outcome.told
    assert not outcome.netted, outcome.netted
