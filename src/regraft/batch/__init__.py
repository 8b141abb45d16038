"""Whole libraries of adapters: each pair of bases fitted once, every adapter a row in a table.

`rows` finds the adapters, `pairs` fits what they share, `work` does one of them in a worker, `local` and `on_ray` hand
rows to workers, `journal` remembers what is done, and `run` joins these.
"""

from regraft.batch.rows import Row, expand
from regraft.batch.run import run_batch

__all__ = ["Row", "expand", "run_batch"]
