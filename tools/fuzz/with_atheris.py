"""``python -m tools.fuzz.with_atheris TARGET [libFuzzer's options]``: the same targets, led by coverage."""

from __future__ import annotations

import sys
from contextlib import suppress
from random import Random

import atheris

with atheris.instrument_imports(include=["regraft"]):
    from tools.fuzz.targets import TARGETS

    from regraft.errors import RegraftError


def main() -> None:
    """Fuzz one reader until it breaks, or until libFuzzer's ``-runs`` or ``-max_total_time``."""
    target = TARGETS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        with suppress(RegraftError):
            target.read(data)

    def mutated(data: bytes, size: int, seed: int) -> bytes:
        dice = Random(seed)
        # libFuzzer begins from nothing: a good input is where a broken one begins.
        start = data if len(data) > 8 and dice.random() < 0.9 else dice.choice(seeds)
        return target.mutate(start, dice)[:size]

    seeds = target.seeds()
    atheris.Setup([*sys.argv, "-timeout=5", "-rss_limit_mb=4096", "-max_len=65536"], one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
