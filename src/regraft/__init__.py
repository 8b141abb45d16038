"""regraft: will a LoRA survive an upgrade of its base model? Carry it over, and measure what survived.

>>> adapter = regraft.load_adapter("my_lora.safetensors")
>>> old, new = regraft.open_base("v1"), regraft.open_base("v2")
>>> migration = regraft.fit_migration(old, new)
>>> ported = migration.port(adapter)
>>> ported.save("ported.safetensors")
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from regraft._version import __version__

if TYPE_CHECKING:
    from regraft.adapter import Adapter, ModuleRef
    from regraft.base import Base, open_base
    from regraft.carry import Settings
    from regraft.check import check
    from regraft.errors import InputError, OutputError, Refused, RegraftError, UsageError
    from regraft.fitting import fit_migration
    from regraft.formats import load_adapter
    from regraft.inspection import inspect_adapter
    from regraft.loading import load_ported, ported
    from regraft.migration import Migration
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

# Loaded when first asked for: torch takes seconds, and `regraft --help` needs none of it.
_MODULES = {
    "adapter": ("Adapter", "ModuleRef"),
    "base": ("Base", "open_base"),
    "carry": ("Settings",),
    "check": ("check",),
    "errors": ("InputError", "OutputError", "Refused", "RegraftError", "UsageError"),
    "fitting": ("fit_migration",),
    "formats": ("load_adapter",),
    "inspection": ("inspect_adapter",),
    "loading": ("load_ported", "ported"),
    "migration": ("Migration",),
    "migration_file": ("load_migration",),
    "port": ("PortResult", "port"),
    "verify": ("verify",),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


class _Package(ModuleType):
    """This package: a name that is a function's and its module's, such as `check`, is always the function."""

    def __getattr__(self, name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{self.__name__}.{_WHERE[name]}"), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # So Python's import puts a module into its package.
        if name in _WHERE and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
