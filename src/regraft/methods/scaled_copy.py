"""The copy at the one strength that serves best on held-out inputs."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

from regraft.methods import Carried, method
from regraft.methods._choosing import HeldOut, lowest, scaled
from regraft.methods.task import AdapterTask
from regraft.probes.batches import make_batches
from regraft.runtime.libraries import quiet_libraries

_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


@method(
    "scaled-copy",
    reference="the usual slider, set by measuring",
    summary="The copy at one strength: the one that brings the new base's outputs nearest to the old one's with it.",
    needs=("old", "new", "models"),
    scope="adapter",
    per="adapter",
)
def scaled_copy(task: AdapterTask) -> Carried:
    """ΔW_t = s ΔW_s, with s in [0, 1.25] where a parabola through the held-out errors is lowest.

    Args:
        task: the adapter and both bases.
    """
    started = perf_counter()
    with quiet_libraries():
        n = task.running.n_inputs or 96
        inputs = make_batches(task.models, task.adapter, 2, task.seed, task.prompts, held_out=n)
        held = HeldOut(task, inputs.held("adapter", "given"))
        copy = task.as_wanted(task.copied().updates)
        errors = []
        for done, strength in enumerate(_STRENGTHS):
            task.tick(done, len(_STRENGTHS), f"strength {strength:g}")
            errors.append(held.score(scaled(copy, strength)).task)
        best = lowest(_STRENGTHS, errors)
    found = Carried(scaled(copy, best), "scaled-copy", f"strength {best:.2f} comes nearest on {n} held-out inputs")
    return replace(found, figures={"strength": best, "copy_error": errors[4], "seconds_all": perf_counter() - started})
