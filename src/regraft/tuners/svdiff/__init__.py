"""SVDiff: an adapter that shifts the singular values of the base's weights (arXiv 2303.11305)."""

from regraft.tuners._register import register
from regraft.tuners.svdiff.config import SvdiffConfig
from regraft.tuners.svdiff.files import load_spectral_shifts, save_spectral_shifts
from regraft.tuners.svdiff.layer import SvdiffLayer
from regraft.tuners.svdiff.model import SvdiffModel

register("SVDIFF", SvdiffConfig, SvdiffModel)

__all__ = ["SvdiffConfig", "SvdiffLayer", "SvdiffModel", "load_spectral_shifts", "save_spectral_shifts"]
