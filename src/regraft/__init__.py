"""regraft: will a LoRA survive an upgrade of its base model? Carry it over, and measure what survived.

>>> adapter = regraft.load_adapter("my_lora.safetensors")
>>> old, new = regraft.open_base("v1"), regraft.open_base("v2")
>>> migration = regraft.fit_migration(old, new)
>>> ported = migration.port(adapter)
>>> ported.save("ported.safetensors")
"""

from regraft._version import __version__
from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base, open_base
from regraft.carry import Settings
from regraft.check import check
from regraft.errors import InputError, OutputError, Refused, RegraftError, UsageError
from regraft.formats import load_adapter
from regraft.inspection import inspect_adapter
from regraft.loading import load_ported, ported
from regraft.migration import Migration, fit_migration
from regraft.migration_file import load_migration
from regraft.port import PortResult, port
from regraft.verify import verify

__all__ = [
    "Adapter",
    "Base",
    "InputError",
    "Migration",
    "ModuleRef",
    "OutputError",
    "PortResult",
    "Refused",
    "RegraftError",
    "Settings",
    "UsageError",
    "__version__",
    "check",
    "fit_migration",
    "inspect_adapter",
    "load_adapter",
    "load_migration",
    "load_ported",
    "open_base",
    "port",
    "ported",
    "verify",
]
