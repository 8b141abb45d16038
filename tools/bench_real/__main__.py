"""Measure regraft on real pairs: `python -m tools.bench_real {minilm,sceptr,tables} …`; see README.md."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import commands

_RESULTS = Path(__file__).parents[2] / "results"
_PAGE = Path(__file__).parents[2] / "docs" / "measured.md"


def main() -> None:
    """Parse and run one of the three."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_real", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    minilm = verbs.add_parser("minilm", help="sentence encoder, sentiment LoRA, accuracy")
    minilm.add_argument("--tasks", nargs="+", choices=["film", "tweets"], default=["film"])
    minilm.add_argument("--methods", nargs="+", choices=list(commands.METHODS), default=list(commands.METHODS))
    sceptr = verbs.add_parser("sceptr", help="protein encoders, effect of a LoRA")
    for verb, file in ((minilm, "real-minilm.json"), (sceptr, "real-sceptr.json")):
        verb.add_argument("--cache", type=Path, required=True, help="folder for packages, adapters and features")
        verb.add_argument("--out", type=Path, default=_RESULTS / file)
        verb.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    tables = verbs.add_parser("tables", help="write docs/measured.md from results/")
    tables.add_argument("--results", type=Path, default=_RESULTS)
    tables.add_argument("--out", type=Path, default=_PAGE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.verb == "tables":
        from .tables import page

        args.out.write_text(page(args.results), encoding="utf-8")
    elif args.verb == "sceptr":
        from .sceptr import bench as bench_sceptr

        bench_sceptr(args.cache, args.out, args.seeds)
    else:
        from regraft.bench.encoders import Recipe

        from .minilm import bench as bench_minilm

        bench_minilm(args.cache, args.out, args.tasks, args.seeds, Recipe(), args.methods)


if __name__ == "__main__":
    main()
