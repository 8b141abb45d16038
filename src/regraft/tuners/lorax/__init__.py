"""LoRA-X: an adapter that stays in the leading singular subspaces of the base's weights (arXiv 2501.16559)."""

from regraft.tuners._register import register
from regraft.tuners.lorax.config import LoraXConfig
from regraft.tuners.lorax.layer import LoraXLayer
from regraft.tuners.lorax.model import LoraXModel
from regraft.tuners.lorax.transfer import transfer_lorax

register("LORAX", LoraXConfig, LoraXModel)

__all__ = ["LoraXConfig", "LoraXLayer", "LoraXModel", "transfer_lorax"]
