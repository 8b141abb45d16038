from __future__ import annotations

from pathlib import Path

import pytest
import toyworld

from regraft.bench.results import assemble
from regraft.bench.run import run_grid, targets
from regraft.bench.variants import parse_variants
from regraft.report.bench_schema import BenchReport

METHODS = ("auto", "lora-x half rank", "procrustes")


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy world's whole grid, run once."""
    cache = tmp_path_factory.mktemp("bench")
    run_grid(targets(cache, worlds=toyworld.FACTORY), parse_variants(METHODS), cache, jobs=0)
    return cache


@pytest.fixture(scope="session")
def toy_record(toy_cache: Path) -> BenchReport:
    wanted = targets(toy_cache, worlds=toyworld.FACTORY)
    return assemble(wanted, parse_variants(METHODS), toy_cache, command="regraft bench", date="2026-11-25")
