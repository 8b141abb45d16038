"""regraft: will a LoRA survive an upgrade of its base model? Carry it over, and measure what survived."""

from regraft._version import __version__
from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base, open_base
from regraft.errors import InputError, OutputError, Refused, RegraftError, UsageError
from regraft.formats import load_adapter

__all__ = [
    "Adapter",
    "Base",
    "InputError",
    "ModuleRef",
    "OutputError",
    "Refused",
    "RegraftError",
    "UsageError",
    "__version__",
    "load_adapter",
    "open_base",
]
