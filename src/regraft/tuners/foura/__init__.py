"""FouRA: a low-rank adapter in the frequency domain of the channels (arXiv 2406.08798)."""

from regraft.tuners._register import register
from regraft.tuners.foura.config import FouraConfig
from regraft.tuners.foura.layer import FouraLayer
from regraft.tuners.foura.model import FouraModel

register("FOURA", FouraConfig, FouraModel)

__all__ = ["FouraConfig", "FouraLayer", "FouraModel"]
