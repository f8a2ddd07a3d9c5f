"""The models. Importing this package also registers them with timm (see `timm_hook.py`)."""

from visformer.models.architecture import Architecture, StageConfig
from visformer.models.timm_hook import register_with_timm
from visformer.models.variants import VARIANTS, architecture, change, create_model, list_models, variant
from visformer.models.visformer import Visformer

__all__ = [
    "VARIANTS",
    "Architecture",
    "StageConfig",
    "Visformer",
    "architecture",
    "change",
    "create_model",
    "list_models",
    "variant",
]

register_with_timm()
