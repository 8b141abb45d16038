"""Makes PEFT know tuners that are not its own."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from regraft.errors import InputError

# The first version whose tuner classes say which tensors are an adapter's.
_OLDEST = (0, 21)


def check_version() -> None:
    """Make sure that PEFT is there and new enough.

    Raises:
        InputError: it is not.
    """
    remedy = "Install it: pip install 'peft>=0.21.2'."
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise InputError("the tuners need peft, which is not installed", remedy=remedy) from None
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise InputError(f"the tuners need peft 0.21.2 or later, and {version} is installed", remedy=remedy)


def peft_type(name: str) -> Any:
    """The member of PEFT's enumeration of tuners with this name, in capitals; it is added where there is none."""
    from peft.utils import PeftType

    if name not in PeftType.__members__:
        # PEFT looks types up in this enumeration and prints their `.value`: a plain string would not do everywhere.
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
    return PeftType[name]


def register(name: str, config: type, model: type) -> None:
    """Register a tuner under a name in capitals, once."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    if peft_type(name) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name.lower(), config_cls=config, model_cls=model)
