"""Methods that run both models, beside one forward pass of the same inputs through both.

``python -m regraft.bench.speed.running N_INPUTS`` prints a JSON object: ``floor_s`` and each method's seconds, on the
embedded demo's v1 → v2 and its LoRA.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter

import torch

from regraft import Settings, load_adapter, open_base, port
from regraft.demo import data_folder
from regraft.methods.task import Running
from regraft.pairing import names_of
from regraft.probes.batches import make_batches
from regraft.runtime.both import BothModels
from regraft.runtime.libraries import quiet_libraries

#: Method → the figure of its report that holds its seconds: `effect`'s once its inputs are made, `stream`'s in all.
METHODS = {"effect": "seconds_layers", "stream": "seconds"}


@torch.no_grad()
def floor(n_inputs: int) -> float:
    """Seconds of one forward pass of so many inputs through both bases."""
    old, new = (open_base(data_folder() / name) for name in ("v1", "v2"))
    adapter = load_adapter(data_folder() / "loras" / "style-v1.safetensors", names=names_of(old))
    with quiet_libraries():
        models = BothModels.load(old, new)
        batches = make_batches(models, adapter, n_inputs, held_out=0).fit
        # The first run of each takes longer.
        batches[0].run(models.old, "old")
        batches[0].run(models.new, "new")
        started = perf_counter()
        for batch in batches:
            batch.run(models.old, "old")
            batch.run(models.new, "new")
        return perf_counter() - started


def seconds(method: str, n_inputs: int) -> float:
    """Seconds that a method takes."""
    old, new = (open_base(data_folder() / name) for name in ("v1", "v2"))
    adapter = load_adapter(data_folder() / "loras" / "style-v1.safetensors", names=names_of(old))
    settings = Settings(force=True, running=Running(n_inputs=n_inputs))
    return port(adapter, old, new, method, settings=settings).report.figures[METHODS[method]]


if __name__ == "__main__":
    count = int(sys.argv[1])
    sys.stdout.write(json.dumps({"floor_s": floor(count), **{name: seconds(name, count) for name in METHODS}}) + "\n")
