"""How often the judge of the benchmark's pictures is right, on drawings that it was not trained on.

python -m tools.judge_accuracy --cache DIR --out results/judge.json
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

from regraft.bench.diffusion_judge import accuracy, trained_judge
from regraft.bench.diffusion_score import through_autoencoder
from regraft.bench.diffusion_train import Workshop
from regraft.runtime import quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with quiet_libraries():
        through = through_autoencoder(Workshop(asked.cache).base("v1") / "vae")
        judge = trained_judge(asked.cache / "art", asked.cache / "diffusion" / "judge.pt", through)
        record = {
            "command": "python -m tools.judge_accuracy --cache DIR --out results/judge.json",
            "date": date.today().isoformat(),
            "held_out_accuracy": accuracy(judge, asked.cache / "art", through),
        }
    asked.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
